"""Clips that cannot be trained on: launch.train skips them, goes back, and ends, in one process or in two.

bash tests/run.sh faults -k rollback
"""

import shutil

import numpy as np
import pytest

from data import records
from sora_jax import workdir as workdirs
from tests.launch.test_hosts import TRAIN, lines, run

pytestmark = pytest.mark.faults


def write_records(out, broken):
  """Sixty clips of noise; those in `broken` hold what is not finite."""
  for part in ("vae", "text"):
    shutil.copytree(workdirs.shipped() / part, out / part)
  rng = np.random.default_rng(0)
  with records.RecordWriter(out) as writer:
    for number in range(60):
      latents = rng.normal(size=(2, 6, 6, 48)).astype(np.float32)
      if number in broken:
        latents[0, 0, 0, 0] = np.nan
      ids = rng.integers(2, 40, 5).astype(np.int32)
      writer.add(records.Record(latents, ids, "", f"{number:04d}.mp4", 0.0, 8.0, "noise"))
    fields = {"latent_channels": 48, "vae_stride": (4, 8, 8), "vae_fingerprint": None}
    writer.finish(fields, null_text=[1])


@pytest.mark.parametrize("count", [1, 2])
def test_back_and_on(tmp_path, count):
  """One clip in sixty: each update with it takes the weights back, and the run comes to its end."""
  write_records(tmp_path / "records", broken={30})
  flags = (
    *TRAIN,
    f"--config.data.path={tmp_path / 'records'}",
    "--config.max_bad_steps=1",
    "--config.steps=8",
  )
  done = run(count, "train", *flags, "--config.data.rows=2", f"--workdir={tmp_path / 'w'}")
  assert done.stdout.count("is not finite") == done.stdout.count("the weights go back") > 0
  last = lines(tmp_path / "w")[8]
  assert last["rollbacks"] == done.stdout.count("the weights go back") and np.isfinite(last["loss"])
  assert list(lines(tmp_path / "w")) == list(range(1, 9)) and last["time_lost"] > 0


def test_nothing_helps(tmp_path):
  """All clips are broken: it says what to do, with exit code 1."""
  write_records(tmp_path / "records", broken=range(60))
  flags = (
    *TRAIN,
    f"--config.data.path={tmp_path / 'records'}",
    "--config.max_bad_steps=2",
    "--config.steps=40",
  )
  done = run(2, "train", *flags, "--config.data.rows=2", f"--workdir={tmp_path / 'w'}", code=1)
  assert done.stdout.count("the weights go back") == 2
  assert done.stderr.count("stopped at step 2: too many updates were skipped") == 1
