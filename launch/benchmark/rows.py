"""The rows of launch.benchmark: what each runs, how two processes run it in turns, the table of results."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys

import numpy as np

from launch.reports import tables
from sora_jax.errors import BadInput, Failure


@dataclasses.dataclass(frozen=True)
class Row:
  """One comparison. Goals are ratios, ours / theirs.

  run: the name of the function in ours.py and theirs.py.  full, tiny: its sizes.  time, memory: goals or
  None. counts: which memory is compared, "work" or "all".  differs: the largest difference that is allowed
  between the outputs, relative to the largest value.
  """

  name: str
  run: str
  full: dict
  tiny: dict
  time: float | None = None
  memory: float | None = None
  counts: str = "work"
  differs: float = 1e-4


DIT = {"heads": 12, "head_size": 128, "mlp": 8960, "text_width": 4096}
TINY_DIT = {"heads": 2, "head_size": 16, "mlp": 64, "text_width": 24}
# Grids of patches (t, h, w): of one clip; of 8 clips, of which the first is the largest in every dimension.
ONE = [[5, 16, 16]]
MIXED = [[5, 8, 16], [3, 8, 12], [5, 4, 10], [2, 8, 8], [1, 8, 16], [3, 4, 6], [1, 8, 8], [1, 6, 8]]
TINY_ONE = TINY_DIT | {"depth": 2, "grids": [[2, 4, 3]]}
TINY_MIXED = TINY_DIT | {"depth": 2, "grids": [[3, 4, 4], [1, 2, 2]]}
VAE = {"base_dim": 96, "frames": 17, "size": [96, 128]}
TINY_VAE = {"base_dim": 8, "frames": 9, "size": [32, 48]}
TEXT = {"width": 2048, "heads": 32, "head_size": 64, "mlp": 5120, "depth": 4, "vocab": 32768,
        "lengths": [40, 66, 93, 120]}  # fmt: skip
TINY_TEXT = {"width": 24, "heads": 4, "head_size": 6, "mlp": 40, "depth": 2, "vocab": 90, "lengths": [7, 12]}
JOB = DIT | {"depth": 4, "base_dim": 96, "frames": 9, "size": [96, 128], "steps": 10}
TINY_JOB = TINY_DIT | {"depth": 2, "base_dim": 8, "frames": 5, "size": [32, 48], "steps": 3}

# fmt: off
ROWS = (
  Row("machine matmul", "matmul", {"size": [1280, 1536, 8960]}, {"size": [64, 32, 96]}),
  Row("machine convolution", "convolution", {"size": [4, 96, 128, 160]}, {"size": [1, 8, 16, 16]}),
  Row("dit", "dit", DIT | {"depth": 4, "grids": ONE}, TINY_ONE, 1.0),
  Row("mixed padded", "dit_padded", DIT | {"depth": 2, "grids": MIXED * 2}, TINY_MIXED, 0.35),
  Row("mixed alone", "dit", DIT | {"depth": 2, "grids": MIXED * 2}, TINY_MIXED, 0.8),
  Row("train", "train", DIT | {"depth": 2, "grids": ONE}, TINY_ONE, 0.85, 0.7, "all", 1e-3),
  Row("train padded", "train_padded", DIT | {"depth": 2, "grids": MIXED}, TINY_MIXED, 0.85, 0.7, "all", 1e-3),
  Row("train alone", "train", DIT | {"depth": 2, "grids": MIXED}, TINY_MIXED, 0.85, 0.7, "all", 1e-3),
  Row("vae encode", "vae_encode", VAE, TINY_VAE, 1.0, 0.5),
  Row("vae decode", "vae_decode", VAE, TINY_VAE, 1.0, 0.5),
  Row("text", "text", TEXT, TINY_TEXT, 0.35),
  Row("whole job", "job", JOB, TINY_JOB, 0.9, None, "all", 1e-2),
)
# fmt: on


class Side:
  """The process that runs one row of one side, controlled through its stdin and stdout."""

  def __init__(self, which, row, shape, folder):
    command = [sys.executable, "-m", "launch.benchmark.worker", which, row.run, json.dumps(shape), folder]
    self.which = which
    # With large pages both sides are 5 to 10 % faster.
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    )

  def ask(self, command):
    """Sends a command (a word) and waits for the answer, a dict."""
    self._process.stdin.write(command + "\n")
    return self.answer()

  def answer(self):
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      raise Failure(f"the process of {self.which} ended with exit code {code}; its messages are above")
    return json.loads(line)

  def end(self):
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()


def measure(row, shape, pairs, folder):
  """Runs a row -> dict of all measurements. Raises Failure if the outputs of the sides are not the same."""
  theirs = Side("theirs", row, shape, folder)
  ours = None
  try:
    theirs.answer()  # its weights are in the folder from here on
    ours = Side("ours", row, shape, folder)
    compile_s = ours.answer()["compile_s"]
    for side in (ours, theirs):
      side.ask("first")
    difference = compare(folder)
    if not difference <= row.differs:
      raise Failure(
        f"{row.name}: the outputs differ by {difference:.2e} of the largest value; "
        f"{row.differs:.0e} is allowed"
      )
    seconds = [(ours.ask("run")["s"], theirs.ask("run")["s"]) for _ in range(pairs)]
    memory = {side.which: side.ask("memory") for side in (ours, theirs)}
  finally:
    for side in filter(None, (ours, theirs)):
      side.end()
  return {
    "name": row.name,
    "shape": shape,
    "difference": difference,
    "compile_s": compile_s,
    "seconds": seconds,
    "ours_s": statistics.median(ours_s for ours_s, _ in seconds),
    "theirs_s": statistics.median(theirs_s for _, theirs_s in seconds),
    "time": statistics.median(ours_s / theirs_s for ours_s, theirs_s in seconds),
    "time_goal": row.time,
    "memory_mb": memory,
    "memory": memory["ours"][row.counts] / max(memory["theirs"][row.counts], 1e-9),
    "memory_goal": row.memory,
    "counts": row.counts,
  }


def compare(folder):
  """Largest difference between the outputs of both sides, relative to the largest value of theirs."""
  ours, theirs = (np.load(os.path.join(folder, f"{side}.npz")) for side in ("ours", "theirs"))
  if set(ours) != set(theirs) or any(ours[name].shape != theirs[name].shape for name in ours):
    our_shapes, their_shapes = ([(name, side[name].shape) for name in side] for side in (ours, theirs))
    raise Failure(f"the outputs do not have the same names and shapes: {our_shapes}, {their_shapes}")
  return float(max(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in ours))


def chosen(only):
  """Prefixes of names, as --only gives them -> the rows that they select; all rows for an empty list."""
  for word in only:
    if not any(row.name.startswith(word) for row in ROWS):
      raise BadInput(f"--only={word} names no row; known: {', '.join(row.name for row in ROWS)}")
  return [row for row in ROWS if not only or any(row.name.startswith(word) for word in only)]


def table(results):
  """Results -> lines to print."""
  header = ("", "ours", "theirs", "time", "MB: ours", "theirs", "of these", "memory", "compile", "differ")
  rows = []
  for result in results:
    counts = result["counts"]
    rows.append(
      (
        result["name"],
        f"{result['ours_s']:.3f} s",
        f"{result['theirs_s']:.3f} s",
        ratio(result["time"], result["time_goal"]),
        *(f"{result['memory_mb'][side][counts]:.0f}" for side in ("ours", "theirs")),
        counts,
        ratio(result["memory"], result["memory_goal"]),
        f"{result['compile_s']:.1f} s",
        f"{result['difference']:.0e}",
      )
    )
  texts = [header.index(name) for name in ("", "time", "of these", "memory")]
  return tables.lines(header, rows, left=texts)


def ratio(value, goal):
  """A ratio as text, with its goal and whether it is reached where there is one: "1.11 <= 1 MISSED"."""
  if goal is None:
    return f"{value:.2f}"
  verdict = "ok" if value <= goal else "MISSED"
  return f"{value:.2f} <= {goal:g} {verdict}"
