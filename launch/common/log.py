"""W/metrics.jsonl (one JSON object a logged step) and TensorBoard events in W/metrics/."""

import json
import math
import os
import tempfile
import time

import tensorboardX
from etils import epath

from sora_jax import files

METRICS = "metrics.jsonl"
EVERY = 10.0  # seconds between uploads to a bucket


class MetricsLog:
  """Writes each logged step to both places. On resume, lines of steps after `step` are dropped: they will be
  made again.

  silent: writes nothing; of several processes one writes.
  """

  def __init__(self, workdir, step=0, silent=False):
    self.path, self.silent = epath.Path(workdir) / METRICS, silent
    if silent:
      return
    self.waiting, self.uploaded = [], time.monotonic()  # lines that are not in the file yet
    if self.path.exists():
      kept = [line for line in files.read_jsonl(self.path) if line["step"] <= step]
      files.write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    self.directory = epath.Path(workdir) / "metrics"
    local = files.is_local(self.directory)
    self.staged = None if local else tempfile.TemporaryDirectory()  # of events, which grow
    events = os.fspath(self.directory) if local else self.staged.name
    self.events = tensorboardX.SummaryWriter(events, purge_step=step + 1)

  def write(self, step, values):
    """values: name -> number; a number that is not finite is written as null."""
    if self.silent:
      return
    clean = {name: _finite(value) for name, value in values.items()}
    self.waiting.append({"step": int(step), **clean})
    for name, value in clean.items():
      if value is not None:
        self.events.add_scalar(name, value, int(step))
    if self.staged is None or time.monotonic() > self.uploaded + EVERY:
      self.flush()

  def flush(self):
    """Has all lines in the file. A bucket gets them every EVERY seconds, and before each checkpoint."""
    if self.silent or not self.waiting:
      return
    files.append_jsonl(self.path, *self.waiting)
    self.waiting, self.uploaded = [], time.monotonic()
    if self.staged:
      self.events.flush()
      files.copy_tree(self.staged.name, self.directory)

  def close(self):
    if not self.silent:
      self.flush()
      self.events.close()


def _finite(value):
  if isinstance(value, int):
    return value
  return float(value) if math.isfinite(float(value)) else None


def read_metrics(workdir):
  """W/metrics.jsonl as a list of dicts; empty where there is none."""
  return list(files.read_jsonl(epath.Path(workdir) / METRICS))
