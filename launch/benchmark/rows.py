"""The rows of launch.benchmark: what each runs, how two processes run it in turns, and the table of what was measured."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys

import numpy as np

from sora_jax.errors import BadInput, Failure


@dataclasses.dataclass(frozen=True)
class Row:
  """What is run: a function of ours.py and theirs.py, its sizes (full, tiny), and what is to be reached: ratios of
  time and of memory, and which memory counts."""
  name: str
  run: str
  full: dict
  tiny: dict
  time: float | None = None
  memory: float | None = None
  counts: str = "work"
  differs: float = 1e-4         # of the largest value; outputs that differ by more are not the same


DIT = {"heads": 12, "head_size": 128, "mlp": 8960, "text_width": 4096}
TINY_DIT = {"heads": 2, "head_size": 16, "mlp": 64, "text_width": 24}
PROMPT = 100        # tokens of a prompt, padded with zeros to 512
MIXED = [[5, 8, 16], [3, 8, 12], [5, 4, 10], [2, 8, 8], [1, 8, 16], [3, 4, 6], [1, 8, 8], [1, 6, 8]]      # patches; all fit into the first
VAE = {"base_dim": 96, "frames": 17, "size": [96, 128]}
TINY_VAE = {"base_dim": 8, "frames": 9, "size": [32, 48]}

ROWS = (
    Row("machine matmul", "matmul", {"size": [1280, 1536, 8960]}, {"size": [64, 32, 96]}),
    Row("machine convolution", "convolution", {"size": [4, 96, 128, 160]}, {"size": [1, 8, 16, 16]}),
    Row("dit", "dit", DIT | {"depth": 4, "grids": [[5, 16, 16]]}, TINY_DIT | {"depth": 2, "grids": [[2, 4, 3]]}, 1.0),
    Row("mixed padded", "dit_padded", DIT | {"depth": 2, "grids": MIXED * 2}, TINY_DIT | {"depth": 2, "grids": [[3, 4, 4], [1, 2, 2]]}, 0.35),
    Row("mixed alone", "dit", DIT | {"depth": 2, "grids": MIXED * 2}, TINY_DIT | {"depth": 2, "grids": [[3, 4, 4], [1, 2, 2]]}, 0.8),
    Row("train", "train", DIT | {"depth": 2, "grids": [[5, 16, 16]]}, TINY_DIT | {"depth": 2, "grids": [[2, 4, 3]]}, 0.85, 0.7, "all", 1e-3),
    Row("train padded", "train_padded", DIT | {"depth": 2, "grids": MIXED}, TINY_DIT | {"depth": 2, "grids": [[3, 4, 4], [1, 2, 2]]},
        0.85, 0.7, "all", 1e-3),
    Row("train alone", "train", DIT | {"depth": 2, "grids": MIXED}, TINY_DIT | {"depth": 2, "grids": [[3, 4, 4], [1, 2, 2]]},
        0.85, 0.7, "all", 1e-3),
    Row("vae encode", "vae_encode", VAE, TINY_VAE, 1.0, 0.5),
    Row("vae decode", "vae_decode", VAE, TINY_VAE, 1.0, 0.5),
    Row("text", "text", {"width": 2048, "heads": 32, "head_size": 64, "mlp": 5120, "depth": 4, "vocab": 32768, "lengths": [40, 66, 93, 120]},
        {"width": 24, "heads": 4, "head_size": 6, "mlp": 40, "depth": 2, "vocab": 90, "lengths": [7, 12]}, 0.35),
    Row("whole job", "job", DIT | {"depth": 4, "base_dim": 96, "frames": 9, "size": [96, 128], "steps": 10},
        TINY_DIT | {"depth": 2, "base_dim": 8, "frames": 5, "size": [32, 48], "steps": 3}, 0.9, None, "all", 1e-2),
)


class Side:
  """One process that runs one row of one side, driven through its pipes."""

  def __init__(self, which, row, shape, folder):
    command = [sys.executable, "-m", "launch.benchmark.worker", which, row.run, json.dumps(shape), folder]
    self.which = which
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ         # large pages: both sides are 5 to 10 % faster
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment)

  def ask(self, what):
    """Sends a word, waits for the answer, a dict."""
    self._process.stdin.write(what + "\n")
    return self.answer()

  def answer(self):
    line = self._process.stdout.readline()
    if not line:
      raise Failure(f"the process of {self.which} ended with exit code {self._process.wait()}; what it said stands above")
    return json.loads(line)

  def end(self):
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()


def measure(row, shape, pairs, folder):
  """Runs a row -> dict of all that was measured. Failure where the outputs are not the same."""
  theirs = Side("theirs", row, shape, folder)
  ours = None
  try:
    theirs.answer()                          # its weights are in the folder now
    ours = Side("ours", row, shape, folder)
    compile_s = ours.answer()["compile_s"]
    for side in (ours, theirs):
      side.ask("first")
    difference = compare(folder)
    if not difference <= row.differs:
      raise Failure(f"{row.name}: the outputs differ by {difference:.2e} of the largest value; {row.differs:.0e} is allowed")
    seconds = [(ours.ask("run")["s"], theirs.ask("run")["s"]) for _ in range(pairs)]
    memory = {side.which: side.ask("memory") for side in (ours, theirs)}
  finally:
    for side in filter(None, (ours, theirs)):
      side.end()
  return {
      "name": row.name, "shape": shape, "difference": difference, "compile_s": compile_s, "seconds": seconds,
      "ours_s": statistics.median(s[0] for s in seconds), "theirs_s": statistics.median(s[1] for s in seconds),
      "time": statistics.median(a / b for a, b in seconds), "time_goal": row.time,
      "memory_mb": memory, "memory": memory["ours"][row.counts] / max(memory["theirs"][row.counts], 1e-9), "memory_goal": row.memory,
      "counts": row.counts,
  }


def compare(folder):
  """Largest difference between the outputs of both sides, in units of theirs' largest value."""
  ours, theirs = (np.load(os.path.join(folder, f"{side}.npz")) for side in ("ours", "theirs"))
  if set(ours) != set(theirs) or any(ours[name].shape != theirs[name].shape for name in ours):
    raise Failure(f"the outputs are not alike: {[(n, ours[n].shape) for n in ours]}, {[(n, theirs[n].shape) for n in theirs]}")
  return float(max(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max() for name in ours))


def chosen(only):
  """Words of --only -> rows."""
  for word in only:
    if not any(row.name.startswith(word) for row in ROWS):
      raise BadInput(f"--only={word} is no row; known: {', '.join(row.name for row in ROWS)}")
  return [row for row in ROWS if not only or any(row.name.startswith(word) for word in only)]


def table(results):
  """Results -> lines to print."""
  ratio = lambda value, goal: f"{value:.2f}" + ("" if goal is None else f" <= {goal:g} {'ok' if value <= goal else 'MISSED'}")  # noqa: E731
  rows = [("", "ours", "theirs", "time", "MB: ours", "theirs", "of these", "memory", "compile", "differ")]
  for r in results:
    mb = [f"{r['memory_mb'][side][r['counts']]:.0f}" for side in ("ours", "theirs")]
    rows.append((r["name"], f"{r['ours_s']:.3f} s", f"{r['theirs_s']:.3f} s", ratio(r["time"], r["time_goal"]), *mb, r["counts"],
                 ratio(r["memory"], r["memory_goal"]), f"{r['compile_s']:.1f} s", f"{r['difference']:.0e}"))
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
