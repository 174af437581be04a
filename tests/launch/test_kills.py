"""A training run that is killed at random moments ends with the weights of one that is left in peace.

bash tests/run.sh faults -k kills            # 50 kills over 200 steps, of one process or of two
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data import records
from sora_jax import parts, workdir as workdirs
from tests import conftest

STRIDE = (4, 8, 8)  # of the VAE that ships
PAGE = """
from configs import t2v

def get_config():
  config = t2v.tiny()
  config.log_every, config.checkpoint_every = 1, 4
  config.optim.name, config.model.remat = "adamw", "none"
  config.data.row_tokens = 128
  with config.unlocked():
    config.model.dit = dict(
      depth=1, heads=1, head_size=48, mlp=48, channels=48, patch=(1, 2, 2), text_width=128
    )
  return config
"""


@dataclasses.dataclass(frozen=True)
class Kill:
  """When and how one life of the run ends.

  moment: "start" (`wait` of the time that a start takes), "step" or "save": once `step` steps are made, or a
  save after it has begun, `wait` of a tenth of a second later. processes: how many run. victim: the number of
  the one that is signalled; None: all.
  """

  moment: str
  step: int
  wait: float
  signal: int = signal.SIGKILL
  processes: int = 1
  victim: int | None = None


def draw_kills(seed, count, steps):
  """Kills at random moments over a run of so many steps."""
  rng = random.Random(seed)
  kills = []
  for step in sorted(rng.randrange(1, steps - 8) for _ in range(count)):
    processes = rng.choice((1, 1, 1, 2))
    kills.append(
      Kill(
        moment=rng.choice(("start", "step", "save", "save")),
        step=step,
        wait=rng.random(),
        signal=rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)),
        processes=processes,
        victim=rng.choice((None, *range(processes))),
      )
    )
  return kills


class TrainingRun:
  """One run of launch.train, on a mesh of two devices: of one process, or one each of two processes."""

  def __init__(self, root, name, steps, *flags, devices=2):
    self.workdir, self.steps, self.devices, self.startup = root / name, steps, devices, 8.0
    page = root / "page.py"
    page.write_text(PAGE)
    self.cache = root / "cache"  # a kill may cut an entry short: not that of other tests
    self.flags = (
      f"--config={page}",
      f"--config.steps={steps}",
      f"--config.data.path={root / 'records'}",
      f"--workdir={self.workdir}",
      *flags,
    )

  def start(self, processes):
    """Starts the program, in a process group of its own."""
    environment = os.environ | {
      "XLA_FLAGS": conftest.DEVICES.format(self.devices // processes),
      "PYTHONPATH": str(conftest.ROOT),
      "PYTHONSAFEPATH": "1",
      "JAX_COMPILATION_CACHE_DIR": str(self.cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = ["launch.train"] if processes == 1 else ["launch.hosts", f"--count={processes}", "launch.train"]
    return subprocess.Popen(
      [sys.executable, "-m", *program, *self.flags],
      cwd=conftest.ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def finish(self, processes=1):
    """Runs to the end."""
    child = self.start(processes)
    _, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors[-3000:]

  def end_by(self, kill):
    """Starts the run, and ends it -> what it was doing when it was signalled."""
    began, before = time.monotonic(), self.log_time()
    child = self.start(kill.processes)
    moment = "start" if self.last_save() > kill.step + 4 else kill.moment  # ahead: others shall have a turn

    def resumed():
      return self.log_time() != before

    if moment == "start":
      self.wait_for(child, lambda: resumed() or time.monotonic() > began + kill.wait * self.startup)
    else:
      self.wait_for(child, resumed)
      self.startup = time.monotonic() - began
      self.wait_for(child, lambda: self.last_step() >= max(self.last_save() + 1, kill.step))
      if moment == "save":
        self.wait_for(child, lambda: self.phase() == "in a save")
      time.sleep(kill.wait / 10)
    phase = self.phase() if moment != "start" else "before the first step"
    for pid in self.victims(child, kill):
      os.kill(pid, kill.signal)
    _, errors = child.communicate(timeout=300)
    codes = {signal.SIGKILL: (-signal.SIGKILL, 1), signal.SIGTERM: (75, -signal.SIGTERM, 1)}[kill.signal]
    assert child.returncode in codes, (kill, child.returncode, errors[-3000:])
    if child.returncode == 1:  # launch.hosts, of whose processes one was ended
      assert kill.processes > 1 and "was ended by signal" in errors, errors[-3000:]
    return phase

  def victims(self, child, kill):
    """The processes to signal."""
    if kill.processes == 1:
      return [child.pid]
    paths = pathlib.Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    workers = sorted(map(int, paths))
    if kill.victim is not None:
      return workers[kill.victim : kill.victim + 1]
    return [child.pid] if kill.signal == signal.SIGTERM else [child.pid, *workers]

  def wait_for(self, child, condition):
    deadline = time.monotonic() + 300
    while not condition():
      if child.poll() is not None or time.monotonic() > deadline:
        raise AssertionError(f"it ended by itself, {child.returncode}: {child.stderr.read()[-3000:]}")
      time.sleep(0.005)

  def log_time(self):
    """When metrics.jsonl was last written: a resumed run does so just before its first step."""
    path = self.workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0

  def last_step(self):
    return max(self.metrics(), default=0)

  def last_save(self):
    return max((int(path.stem) for path in self.workdir.glob("manifests/*.json")), default=0)

  def phase(self):
    """What a look at the work directory says of the moment."""
    names = {path.name for path in self.workdir.glob("checkpoints/*")}
    if any("orbax-checkpoint-tmp" in name for name in names):
      return "in a save"
    if any(not (self.workdir / "manifests" / f"{name}.json").exists() for name in names):
      return "before the manifest"
    return "between saves"

  def metrics(self):
    """{step: its line}."""
    path = self.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line for line in values}


def write_records(out):
  """Clips of noise, for the VAE and the tokenizer that ship."""
  for part in ("vae", "text"):
    parts.copy_part(workdirs.shipped() / part, out / part)
  rng = np.random.default_rng(0)
  with records.RecordWriter(out) as writer:
    for i in range(12):
      latents = rng.standard_normal((1 + i % 3, 6, 8, 48), np.float32)
      ids = np.arange(3 + i % 5, dtype=np.int32)
      writer.add(records.Record(latents, ids, "", f"{i:02d}.mp4", 0.0, 8.0, "noise"))
    writer.finish({"latent_channels": 48, "vae_stride": STRIDE}, null_text=[1])


def check(tmp_path, kills, steps):
  """Ends a run by these kills, and compares it with one that is left in peace."""
  write_records(tmp_path / "records")
  peace, killed = (TrainingRun(tmp_path, name, steps) for name in ("peace", "killed"))
  peace.finish()
  phases = collections.Counter()
  for number, kill in enumerate(kills, 1):
    began = time.monotonic()
    phase = killed.end_by(kill)
    phases[phase] += 1
    name = signal.Signals(kill.signal).name
    who = "all" if kill.victim is None else f"number {kill.victim}"
    print(
      f"{number}: {name} to {who} of {kill.processes}, {phase}; step {killed.last_step()}, "
      f"{time.monotonic() - began:.1f} s",
      flush=True,
    )
  killed.finish()
  print("kills:", ", ".join(f"{count} {phase}" for phase, count in phases.most_common()))
  for which in ("params", "ema"):
    ours, theirs = (workdirs.load_weights(run.workdir, which) for run in (killed, peace))
    assert ours[1] == theirs[1] == steps
    for a, b in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(theirs[0]), strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  curves = [
    {step: (line["loss"], line["grad_norm"], line["data_checksum"]) for step, line in run.metrics().items()}
    for run in (killed, peace)
  ]
  assert list(curves[0]) == list(range(1, steps + 1)) and curves[0] == curves[1]
  assert not list(killed.workdir.glob("checkpoints/*tmp*")) and not list(killed.workdir.glob("*/*.part*"))
  return phases


def test_three_kills(tmp_path):
  """In a start, in a save, and on request."""
  kills = [
    Kill("save", 4, 0.5),
    Kill("step", 6, 0.1, signal.SIGTERM),
    Kill("start", 8, 0.9),
  ]
  assert check(tmp_path, kills, steps=12)["in a save"]


@pytest.mark.faults
def test_fifty_kills(tmp_path):
  phases = check(tmp_path, draw_kills(seed=0, count=50, steps=200), steps=200)
  assert phases["in a save"] >= 5 and phases["before the first step"] >= 5 and sum(phases.values()) == 50
