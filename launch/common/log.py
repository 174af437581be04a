"""W/metrics.jsonl (one JSON object a logged step) and TensorBoard events in W/metrics/."""

import json
import math
import os

import tensorboardX

from sora_jax import files

METRICS = "metrics.jsonl"


class MetricsLog:
  """Writes each logged step to both places. On resume, lines of steps after `step` are dropped: they will be
  made again.

  silent: writes nothing; of several processes one writes.
  """

  def __init__(self, workdir, step=0, silent=False):
    self.path, self.silent = os.path.join(workdir, METRICS), silent
    if silent:
      return
    if os.path.exists(self.path):
      kept = [line for line in files.read_jsonl(self.path) if line["step"] <= step]
      files.write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    self.events = tensorboardX.SummaryWriter(os.path.join(workdir, "metrics"), purge_step=step + 1)

  def write(self, step, values):
    """values: name -> number; a number that is not finite is written as null."""
    if self.silent:
      return
    clean = {name: _finite(value) for name, value in values.items()}
    files.append_jsonl(self.path, {"step": int(step), **clean})
    for name, value in clean.items():
      if value is not None:
        self.events.add_scalar(name, value, int(step))

  def close(self):
    if not self.silent:
      self.events.close()


def _finite(value):
  if isinstance(value, int):
    return value
  return float(value) if math.isfinite(float(value)) else None


def read_metrics(workdir):
  """W/metrics.jsonl as a list of dicts; empty where there is none."""
  return list(files.read_jsonl(os.path.join(workdir, METRICS)))
