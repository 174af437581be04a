"""Every page of configs/pod.py trains in its tiny form: a small model and short rows, the rest as it says.

bash tests/run.sh -m slow -k pod_pages       # five minutes
"""

import json
import os
import subprocess
import sys

import pytest

from configs import pod
from sora_jax import workdir as workdirs
from tests import conftest
from tests.launch import test_kills


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  path = tmp_path_factory.mktemp("pod") / "records"
  test_kills.write_records(path)
  return path


@pytest.mark.slow
@pytest.mark.parametrize("page", pod.VARIANTS)
def test_its_tiny_form_trains(page, records, tmp_path):
  config = pod.get_config(page)
  imported = page.startswith("wan")  # its mesh is one of 4 devices, as it stands
  rows = config.data.rows if imported else 8 * config.micro_steps
  flags = [f"--config.data.rows={rows}", "--config.data.row_tokens=256", "--config.data.row_clips=8"]
  flags += ["--config.data.row_text=128", "--config.steps=2", "--config.log_every=1"]
  flags += ["--config.model.text=tiny"]
  if imported:
    flags += [f"--config.init={workdirs.shipped()}"]
  else:
    flags += ["--config.model.size=quick-small"]
    flags += [f"--config.mesh.{axis}={min(config.mesh[axis], 2)}" for axis in ("fsdp", "context")]
  command = [sys.executable, "-m", "launch.train", f"--config={conftest.ROOT}/configs/pod.py:{page}", *flags]
  done = subprocess.run(
    [*command, f"--config.data.path={records}", f"--workdir={tmp_path}"],
    env=os.environ | {"XLA_FLAGS": conftest.DEVICES.format(4 if imported else 8)},
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
  assert [line["step"] for line in lines] == [1, 2]
  assert all(0 < line["loss"] < 1000 and line["not_finite"] == 0 for line in lines)
  assert (tmp_path / "checkpoints" / "2").is_dir()
