"""Our models beside the public PyTorch ones, on this machine's CPU: the same weights and inputs, outputs compared first, then timed in turns.

  python -m launch.benchmark [--only=dit,vae] [--pairs=5] [--out=FILE.json]

Needs the extra `oracle` (torch, diffusers, transformers). Each row of the table runs in two processes, one for each side, with two
threads and float32. A pair is one run of ours and one of theirs, right after each other: on a machine that others use too, only the ratio of
the two says anything, and the table has the median of the ratios. Compilation is timed apart. Memory is the peak of resident
memory in one run, begun when all that is free went back to the system: `work` over the level before the first run, with weights loaded;
`all` over the level with nothing but the libraries loaded.

Rows (theirs; ours is what launch.sample and launch.train compute):
  machine           a plain matrix product and a 3 x 3 convolution: what each side could reach here
  dit               `WanTransformer3DModel`, forward of one clip with a prompt padded to 512 tokens
  mixed padded      16 clips of 8 sizes, one batch, each padded to the longest; ours: packed in one row
  mixed alone       the same clips, a call for each
  train             loss, gradient and AdamW, of one clip
  train padded      of 8 clips of 8 sizes, one batch, each padded to the longest; ours: packed in one row
  train alone       of the same clips, a call for each, their gradients summed
  vae encode/decode `AutoencoderKLWan` at the shape of Wan 2.1; ours: streamed
  text              `UMT5EncoderModel`, prompts padded to 512 tokens as `WanPipeline` does; ours: of their true length
  whole job         `WanPipeline`, prompt to frames, with guidance; ours: the same folder imported, sampled as launch.sample does (from the same
                    noise; frames in [0, 1] may differ by 0.01, which is 40 dB)
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from absl import flags

from launch import cli
from sora_jax.errors import BadInput

ONLY = flags.DEFINE_list("only", [], "rows, by the first word or words of their names; all by default")
PAIRS = flags.DEFINE_integer("pairs", 5, "runs of each side, in turns", lower_bound=1)
SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "widths of the public models, or tiny ones that tell nothing but that all works")
OUT = flags.DEFINE_string("out", "", "where the numbers go, as JSON")
LIBRARIES = ("torch", "diffusers", "transformers")


@dataclasses.dataclass(frozen=True)
class Row:
  """What is run: a function of benchmark_ours and benchmark_theirs, its sizes (full, tiny), and what is to be reached: ratios of
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
    command = [sys.executable, "-m", "launch.benchmark_worker", which, row.run, json.dumps(shape), folder]
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
      raise cli.Failure(f"the process of {self.which} ended with exit code {self._process.wait()}; what it said stands above")
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
      raise cli.Failure(f"{row.name}: the outputs differ by {difference:.2e} of the largest value; {row.differs:.0e} is allowed")
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
    raise cli.Failure(f"the outputs are not alike: {[(n, ours[n].shape) for n in ours]}, {[(n, theirs[n].shape) for n in theirs]}")
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


def main():
  rows = chosen(ONLY.value)
  missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
  if missing:
    raise BadInput(f"{', '.join(missing)} must be installed to compare with; pip install '.[oracle]'")
  results = []
  for row in rows:
    with tempfile.TemporaryDirectory() as folder:
      results.append(measure(row, getattr(row, SIZE.value), PAIRS.value, folder))
    r = results[-1]
    cli.say(f"{row.name}: {r['ours_s']:.3f} s, theirs {r['theirs_s']:.3f} s, {r['time']:.2f} x")
  for line in table(results):
    cli.say(line)
  if OUT.value:
    with open(OUT.value, "w") as f:
      json.dump({"size": SIZE.value, "pairs": PAIRS.value, "rows": results}, f, indent=1)
  return cli.OK


if __name__ == "__main__":
  cli.run(main)
