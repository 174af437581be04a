"""W/metrics.jsonl (one JSON object a logged step) and TensorBoard events in W/metrics/."""

import json
import math
import os

import tensorboardX


class MetricsLog:
  """Writes each logged step to both places. On resume, lines of steps after `step` are dropped: they will be made again.

  silent: writes nothing; of several processes one writes.
  """

  def __init__(self, workdir, step=0, silent=False):
    self.path, self.silent = os.path.join(workdir, "metrics.jsonl"), silent
    if silent:
      return
    if os.path.exists(self.path):
      kept = [line for line in _lines(self.path) if line["step"] <= step]
      partial = self.path + ".partial"
      with open(partial, "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in kept)
      os.replace(partial, self.path)
    self.events = tensorboardX.SummaryWriter(os.path.join(workdir, "metrics"), purge_step=step + 1)

  def write(self, step, values):
    """values: name -> number; a number that is not finite is written as null."""
    if self.silent:
      return
    clean = {k: v if isinstance(v, int) else float(v) if math.isfinite(float(v)) else None for k, v in values.items()}
    with open(self.path, "a") as f:
      f.write(json.dumps({"step": int(step), **clean}) + "\n")
    for name, value in clean.items():
      if value is not None:
        self.events.add_scalar(name, value, int(step))

  def image(self, step, name, image_HWC):
    """A contact sheet, uint8."""
    self.events.add_image(name, image_HWC, int(step), dataformats="HWC")

  def close(self):
    if not self.silent:
      self.events.close()


def _lines(path):
  """The whole lines of a metrics file; one cut short by a kill is passed over."""
  for line in open(path):
    try:
      yield json.loads(line)
    except ValueError:
      continue


def read_metrics(workdir):
  """W/metrics.jsonl as a list of dicts; empty where there is none."""
  path = os.path.join(workdir, "metrics.jsonl")
  return list(_lines(path)) if os.path.exists(path) else []
