"""The whole story by the programs alone, killed in the middle of each, against the same story left in peace.

bash tests/run.sh faults -k story
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data import records
from sora_jax import parts
from tests import conftest

pytestmark = pytest.mark.faults

VAE = (
  "--config=configs/vae.py:tiny",
  "--config.steps=6",
  "--config.checkpoint_every=2",
  "--config.log_every=1",
  "--config.eval_every=0",
  "--config.data.clips=2",
  "--config.data.images=2",
  "--config.data.count=40",
)
DIT = (
  "--config=configs/t2v.py:tiny",
  "--config.steps=6",
  "--config.checkpoint_every=2",
  "--config.log_every=1",
  "--config.data.rows=2",
  "--config.data.row_tokens=256",
  "--config.sample.steps=2",
  "--config.sample.rows=1",
  "--config.sample.row_tokens=128",
  "--config.sample.frames=5",
  "--config.sample.every=6",
)


def stopped(name, *arguments, when, by=signal.SIGKILL):
  """Starts a program and signals it as soon as `when()` is true -> its exit code; None if it was too late."""
  environment = {
    **os.environ,
    "XLA_FLAGS": conftest.DEVICES.format(1),
    "PYTHONPATH": str(conftest.ROOT),
    "PYTHONSAFEPATH": "1",
  }
  child = subprocess.Popen(
    [sys.executable, "-m", f"launch.{name}", *map(str, arguments)],
    cwd=conftest.ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 900
  while child.poll() is None and time.monotonic() < deadline:
    if when():
      child.send_signal(by)
      return child.wait(300)
    time.sleep(0.02)
  child.kill()
  return None


def metrics_of(workdir):
  """{step: loss} of a run, the last line of a step counting."""
  return {
    line["step"]: line["loss"] for line in map(json.loads, open(workdir / "metrics.jsonl")) if "loss" in line
  }


def test_stopped_on_request(run_program, tmp_path):
  """SIGTERM: the step is finished and saved, exit code 75; the next run goes on from there."""
  long = (*VAE[:1], "--config.steps=100000", *VAE[2:], f"--workdir={tmp_path}")
  assert (
    stopped("train_vae", *long, when=lambda: (tmp_path / "manifests" / "4.json").exists(), by=signal.SIGTERM)
    == 75
  )
  step = max(int(path.stem) for path in (tmp_path / "manifests").iterdir())
  assert step >= 5 and max(metrics_of(tmp_path)) >= step - 1
  assert (
    f"going on from the checkpoint of step {step}"
    in run_program("train_vae", *long[:1], f"--config.steps={step}", *long[2:]).stdout
  )


def test_story(run_program, tmp_path):
  def run(name, *arguments, code=0):
    done = run_program(name, *arguments, timeout=1800)
    assert done.returncode == code, f"{name}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout

  finished = {}
  for kind in ("peace", "kills"):
    root = tmp_path / kind
    vae, clips, dit, out = root / "vae", root / "records", root / "dit", root / "out"
    steps = {
      "train_vae": (*VAE, f"--workdir={vae}"),
      "encode": ("--source=shapes:64", f"--workdir={vae}", f"--out={clips}"),
      "train": (*DIT, f"--config.data.path={clips}", f"--workdir={dit}"),
      "sample": (f"--workdir={dit}", f"--requests={root / 'requests.jsonl'}", f"--out={out}"),
    }
    root.mkdir()
    requests = [
      {"id": str(i), "prompt": "a red ball moves left", "size": [48, 64], "frames": 5, "seed": i}
      for i in range(4)
    ]
    (root / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    when = {
      "train_vae": lambda: (vae / "manifests" / "2.json").exists(),
      "encode": lambda: list(clips.glob("*")),
      "train": lambda: (dit / "manifests" / "2.json").exists(),
      "sample": lambda: (out / "1.mp4").exists(),
    }
    for name, arguments in steps.items():
      if kind == "kills":
        assert stopped(name, *arguments, when=when[name]) == -signal.SIGKILL, name
        said = run(name, *arguments)
        assert "train" not in name or "going on from the checkpoint of step" in said
      else:
        run(name, *arguments)
      again = time.monotonic()
      said = run(name, *arguments)  # nothing is done twice
      assert any(word in said for word in ("nothing to do", "were there already")), name
      assert time.monotonic() - again < 60
    index = records.RecordIndex.open(clips)
    finished[kind] = {
      "vae": metrics_of(vae),
      "dit": metrics_of(dit),
      "files": {path.name: path.read_bytes() for path in out.glob("*.mp4")},
      "records": {
        records.read(index, i).caption: records.read(index, i).latents_THWC for i in range(len(index))
      },
      "samples": sorted(path.name for path in (dit / "samples" / "6").iterdir()),
    }

  peace, kills = finished["peace"], finished["kills"]
  assert (
    peace["vae"][6] == kills["vae"][6]
    and peace["dit"][6] == kills["dit"][6]
    and set(peace["dit"]) == set(kills["dit"]) == set(range(1, 7))
  )
  assert (
    len(peace["files"]) == 4 and peace["files"] == kills["files"] and peace["samples"] == kills["samples"]
  )
  assert len(peace["samples"]) == 3 and peace["records"].keys() == kills["records"].keys()
  for caption, latents in peace["records"].items():
    np.testing.assert_array_equal(latents, kills["records"][caption])

  shutil.rmtree(tmp_path / "kills" / "vae" / "vae")  # as if killed between the last step and the end
  run("train_vae", *VAE, f"--workdir={tmp_path / 'kills' / 'vae'}")
  assert parts.checksum(tmp_path / "kills" / "vae" / "vae") == parts.checksum(
    tmp_path / "peace" / "vae" / "vae"
  )

  finer = (
    *VAE,
    "--config.decoder_only=True",
    "--config.ssim_weight=0.5",
    f"--config.init={tmp_path / 'peace' / 'vae'}",
  )
  run("train_vae", *finer, f"--workdir={tmp_path / 'finer'}")
  before, after = (parts.load_part(tmp_path / name / "vae") for name in ("peace/vae", "finer"))
  assert before[0] == after[0] and not np.array_equal(
    before[1]["decoder"]["conv_out"]["kernel"], after[1]["decoder"]["conv_out"]["kernel"]
  )
  # The records of the first VAE are still good for the finer one.
  shutil.copytree(tmp_path / "finer" / "vae", tmp_path / "kills" / "dit" / "vae", dirs_exist_ok=True)

  report = tmp_path / "report.json"
  run("evaluate", f"--workdir={tmp_path / 'peace' / 'dit'}", "--clips=4", "--prompts=2", f"--out={report}")
  measured = json.loads(report.read_text())
  assert (
    measured["vae"]["clips"] == 4 and len(measured["loss_by_sigma"]) == 9 and "colour" in measured["scores"]
  )
  run("export", f"--workdir={tmp_path / 'peace' / 'dit'}", "--dtype=float32", f"--out={tmp_path / 'plain'}")
  run(
    "sample",
    f"--workdir={tmp_path / 'plain'}",
    f"--requests={tmp_path / 'peace' / 'requests.jsonl'}",
    f"--out={tmp_path / 'again'}",
  )
  # An export gives the same samples.
  assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.mp4")} == peace["files"]

  last = max(
    (tmp_path / "kills" / "dit" / "checkpoints" / "6").rglob("*"),
    key=lambda path: path.stat().st_size if path.is_file() else 0,
  )
  os.truncate(last, last.stat().st_size // 2)
  said = run(
    "train",
    *DIT,
    f"--config.data.path={tmp_path / 'kills' / 'records'}",
    f"--workdir={tmp_path / 'kills' / 'dit'}",
  )
  assert "going on from the checkpoint of step 4" in said
  assert "6" in said.split("going on")[0]  # it names the damaged one
  assert metrics_of(tmp_path / "kills" / "dit")[6] == peace["dit"][6]
