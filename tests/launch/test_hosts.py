"""Several processes do one job, on loopback. The result depends neither on their number nor on kills.

bash tests/run.sh faults -k hosts            # with 1, 2, 4 and 8 processes
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data import records
from launch.common import children
from tests import conftest
from tests.launch import test_kills

TRAIN = (
  "--config=configs/t2v.py:tiny",
  "--config.log_every=1",
  "--config.checkpoint_every=2",
  "--config.data.rows=8",
  "--config.data.row_tokens=128",
)


def command(count, program, *arguments):
  start = (
    ["-m", "launch.hosts", f"--count={count}", f"launch.{program}"]
    if count > 1
    else ["-m", f"launch.{program}"]
  )
  environment = {
    **os.environ,
    "XLA_FLAGS": conftest.DEVICES.format(1),
    "PYTHONPATH": os.pathsep.join([str(conftest.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "PYTHONSAFEPATH": "1",
  }
  return [sys.executable, *start, *map(str, arguments)], environment


def run(count, program, *arguments, code=0, timeout=900):
  line, environment = command(count, program, *arguments)
  done = subprocess.run(
    line, cwd=conftest.ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
  )
  assert done.returncode == code, done.stdout[-1500:] + done.stderr[-1500:]
  return done


def killed(count, program, *arguments, when, by=signal.SIGKILL):
  """Starts a job and signals all its processes when `when()` is true -> exit code of their parent."""
  line, environment = command(count, program, *arguments)
  child = subprocess.Popen(
    line,
    cwd=conftest.ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  deadline = time.monotonic() + 300
  while not when():
    assert child.poll() is None and time.monotonic() < deadline, child.poll()
    time.sleep(0.02)
  if by == signal.SIGKILL:
    os.killpg(child.pid, by)
  else:
    child.send_signal(by)
  return child.wait(120)


def contents(directory):
  """All that the records of a directory hold, in the order of the index."""
  index = records.RecordIndex.open(directory)
  return [
    (r.file, r.start, r.caption, r.latents_THWC.tobytes(), r.text_ids_S.tobytes())
    for r in (records.read(index, i) for i in range(len(index)))
  ]


def lines(workdir):
  return {line["step"]: line for line in map(json.loads, open(workdir / "metrics.jsonl"))}


def test_two_encode_what_one_does(tmp_path):
  for count in (1, 2):
    run(count, "encode", "--source=shapes:6", f"--out={tmp_path / str(count)}")
  shards = {path.name[:9] for path in (tmp_path / "2").glob("*.array_record")}
  assert shards == {"shard-000", "shard-001"}  # both had their share
  assert contents(tmp_path / "1") == contents(tmp_path / "2") and len(contents(tmp_path / "1")) == 6


@pytest.mark.faults
def test_two_train_what_one_does(tmp_path):
  """Two processes get the batches of one, also from raw clips that the training run encodes by itself.

  Another number of processes continues in the middle.
  """
  run(2, "encode", "--source=shapes:40", f"--out={tmp_path / 'records'}")
  run(
    1, "train", *TRAIN, "--config.steps=4", "--config.data.clips=shapes:40", f"--workdir={tmp_path / 'alone'}"
  )
  assert (
    contents(tmp_path / "records") == contents(tmp_path / "alone" / "records")
    and len(contents(tmp_path / "records")) == 40
  )
  data = f"--config.data.path={tmp_path / 'records'}"
  run(2, "train", *TRAIN, "--config.steps=2", data, f"--workdir={tmp_path / 'both'}")
  run(1, "train", *TRAIN, "--config.steps=4", data, f"--workdir={tmp_path / 'both'}")
  alone, both = lines(tmp_path / "alone"), lines(tmp_path / "both")
  assert [alone[s]["data_checksum"] for s in (1, 2, 3, 4)] == [both[s]["data_checksum"] for s in (1, 2, 3, 4)]
  assert len({line["data_checksum"] for line in alone.values()}) == 4
  losses = np.array([[run[s]["loss"] for s in (1, 2, 3, 4)] for run in (alone, both)])
  np.testing.assert_allclose(losses[0, :2], losses[1, :2], rtol=1e-5)  # in two processes
  # The order of sums differs; the first large steps amplify it.
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


@pytest.mark.faults
@pytest.mark.parametrize("count", [2, 4])
def test_samples_and_held_out_loss_of_several(tmp_path, count):
  """On the same mesh, of one process and of several: the same loss on held-out clips, the same videos."""
  flags = (
    "--config.data.rows=4",
    "--config.eval.every=2",
    f"--config.data.held_out={tmp_path / 'records'}",
    "--config.sample.every=2",
    "--config.sample.steps=2",
    "--config.sample.frames=5",
    f"--config.mesh.fsdp={count}",
  )
  test_kills.write_records(tmp_path / "records")
  runs = [test_kills.TrainingRun(tmp_path, name, 2, *flags, devices=count) for name in ("one", "several")]
  runs[0].finish()
  runs[1].finish(processes=count)
  made = [
    {path.name: path.read_bytes() for path in (run.workdir / "samples" / "2").glob("*.mp4")} for run in runs
  ]
  losses = [[value for name, value in run.metrics()[2].items() if "held_out" in name] for run in runs]
  assert len(losses[0]) == 6
  np.testing.assert_allclose(*losses, rtol=1e-6)  # sums of several devices, in any order
  assert len(made[0]) == 2 and made[0] == made[1]


@pytest.mark.faults
def test_two_train_the_vae_that_one_does(tmp_path):
  flags = (
    "--config=configs/vae.py:tiny",
    "--config.steps=2",
    "--config.log_every=1",
    "--config.eval_every=2",
  )
  for count in (1, 2):
    run(count, "train_vae", *flags, "--config.data.count=40", f"--workdir={tmp_path / str(count)}")
  one, two = (
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("1", "2")
  )
  for name in ("loss", "kl", "psnr", "held_out_psnr", "held_out_ssim"):
    values = [[line[name] for line in lines if name in line] for lines in (one, two)]
    assert values[0]
    np.testing.assert_allclose(*values, rtol=1e-4)
  assert (tmp_path / "2" / "vae" / "weights.safetensors").exists()


def test_one_line_for_all(tmp_path):
  """What is wrong is said once, with exit code 2, however many processes found it."""
  done = run(2, "encode", f"--source={tmp_path / 'nothing'}", f"--out={tmp_path / 'out'}", code=2)
  assert len(done.stderr.strip().splitlines()) == 1 and "nothing" in done.stderr


class Child:
  """A process that has ended, or ends when it is asked to."""

  def __init__(self, code):
    self.returncode, self.asked = code, False

  def poll(self):
    return self.returncode

  def terminate(self):
    self.returncode, self.asked = -15, True


@pytest.mark.parametrize(
  "codes, worst", [((0, 0), 0), ((0, 75), 75), ((75, 2), 2), ((0, None, 1), 1), ((None, -9), 1)]
)
def test_the_worst_exit_code_counts(codes, worst):
  processes = [Child(code) for code in codes]
  assert children.watch(processes, children.Lines()) == worst
  assert all(child.asked for child, code in zip(processes, codes, strict=True) if code is None)


def test_the_process_that_was_killed_is_blamed(capsys):
  """Not the one that missed it, and ended as quickly."""
  assert children.watch([Child(1), Child(-9)], children.Lines()) == 1
  assert "process 1 was ended by signal 9" in capsys.readouterr().err


def test_lines_are_told_once_and_those_of_the_survivors_not_at_all(capsys):
  lines = children.Lines()
  for number, text in enumerate((["all\n", "first\n"], ["all\n", "lost the first\n"])):
    lines.follow(number, text)
  lines.show(failed=0, wait=0.0)
  assert capsys.readouterr().err == "all\nfirst\n"


@pytest.mark.faults
def test_killed_with_four_goes_on_with_any_number(tmp_path):
  """After kill -9 of four processes, then eight, then one, records and batches are those of one alone."""
  one, many = tmp_path / "one", tmp_path / "many"
  encode = ("encode", "--source=shapes:600")
  run(1, *encode, f"--out={one}")
  assert killed(4, *encode, f"--out={many}", when=lambda: list(many.glob("*.tmp"))) == -signal.SIGKILL
  for path in many.glob(".lock-*"):
    path.unlink()
  assert (
    killed(2, *encode, f"--out={many}", when=lambda: (many / ".lock-1").exists(), by=signal.SIGTERM) == 75
  )
  run(3, *encode, f"--out={many}")
  assert contents(one) == contents(many)
  assert "nothing to do" in run(2, *encode, f"--out={many}").stdout
  alone, workdir = tmp_path / "alone", tmp_path / "killed"
  train, flag = (*TRAIN, f"--config.data.path={one}"), f"--workdir={workdir}"

  def saved(step):
    return lambda: (workdir / "manifests" / f"{step}.json").exists()

  assert killed(4, "train", *train, "--config.steps=8", flag, when=saved(2)) == -signal.SIGKILL
  assert killed(8, "train", *train, "--config.steps=800", flag, when=saved(4), by=signal.SIGTERM) == 75
  last = max(lines(workdir)) + 3
  run(2, "train", *train, f"--config.steps={last}", flag)
  run(1, "train", *train, f"--config.steps={last}", f"--workdir={alone}")
  assert list(lines(alone)) == list(lines(workdir)) == list(range(1, last + 1))
  assert [line["data_checksum"] for line in lines(alone).values()] == [
    line["data_checksum"] for line in lines(workdir).values()
  ]
