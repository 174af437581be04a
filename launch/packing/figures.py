"""What launch.packing measures: our plan beside other methods, and how fast records load.

All methods pack the clips of launch/packing/reference.py, in the order of our plan's shuffle. The other
methods are in launch/packing/peers.py. Our plan packs a whole epoch, in windows of 256 clips for each row of
a step; all its steps count, including the empty rows of the last, short one. The other methods have no
windows; they pack the first 32,768 clips, and their whole steps count. Columns:

  padding      share of the tokens of all rows of all steps that belong to no clip.
  lost         share of the clips that are dropped, or whose number of tokens along t, y or x is not that of
               their own size.
  attention    cost of the most expensive row of a step / mean cost of its rows: sum of the maxima over the
               steps / sum of the means. The cost is the sum of n^2 over the clips of a row.
  linear       the same, where the cost is the number of tokens.
  useful       FLOPs of the clips / FLOPs that all ranks compute or wait for, which are those of the most
               expensive row of each step, times the number of rows. They are counted for one layer of a DiT
               of width D = 5120 and MLP F = 13,824 (Wan 2.1 14B), forward only (backward is the same multiple
               of both terms): 2 (6 D^2 + 2 D F) for each token of a row, including padding, and 4 D for each
               pair of tokens in the tiles that run. Tiles are 1024 x 1024 on the row as it is laid out; a
               tile runs if a clip has tokens in both its queries and its keys (sora_jax/models/attention.py).
               Attention to the text is left out. Batches of buckets have no padding.
  us a clip    CPU time of planning in microseconds. For ours, of the whole plan; for Grain, of its iterator,
               which also writes segment ids and positions.

`loading` writes records of 256 x 256 pixels (1, 9 and 17 frames at strides (4, 8, 8), 16 channels, bfloat16,
texts as ids) to a temporary directory. It then times data.loader from ArrayRecord to PackedBatch, with one
thread on one core and the files in the page cache.
"""

import functools
import pathlib
import tempfile
import time

import grain
import numpy as np

from data import loader, plan, records
from launch.common.progress import say
from launch.packing import peers, reference
from launch.reports import packing as packing_report, page, tables
from sora_jax.batch import RowShape

SHAPES = (RowShape(81_920, clips=64, text=8192), RowShape(40_960, clips=32, text=4096))
ROWS = (64, 256)  # of a step
WINDOW = 256  # clips of a window for each row of a step
OTHERS = 1 << 15  # clips that the other methods pack
TILE = 1024
WIDTH, MLP = 5120, 13_824
LINEAR = 2 * (6 * WIDTH**2 + 2 * WIDTH * MLP)  # FLOPs a token
ATTENTION = 4 * WIDTH  # FLOPs a pair of tokens
LEAST_PADDING = {81_920: 0.005, 40_960: 0.010}  # goal for rows of so many tokens
GOALS = {"padding": LEAST_PADDING, "attention": 1.02, "linear": 1.02, "useful": 0.93, "planning": 50}
LOADED = 4096  # records
LOADING_GOAL = 1000  # clips a second
HEADER = ("", "padding", "lost", "attention", "linear", "useful", "us a clip", "")


def packing(count, picture=""):
  """Prints a table for each shape of rows and number of rows a step -> their lines, as dicts.

  picture: file for a picture of some rows, as SVG; "": none.
  """
  index, lines = reference.index(count), []
  tokens = tokens_of(index)
  say(
    f"{count} clips, {np.mean(index['t'] == 1):.0%} of them images; tokens: mean {tokens.mean():.0f}, "
    f"median {np.median(tokens):.0f}, most {tokens.max()}"
  )
  for shape in SHAPES:
    for rows in ROWS:
      limits = f"at most {shape.clips} clips and {shape.text} text tokens"
      say(f"\nrows of {shape.length} tokens, {limits}; {rows} rows a step")
      window = WINDOW * rows
      ours = plan.Plan(
        index, rows_per_step=rows, shape=shape, patch=reference.PATCH, seed=0, window_clips=window
      )
      if picture and not lines:
        svg = packing_report.picture(ours, packing_report.look(ours), reference.STRIDE)
        page.save(pathlib.Path(picture), svg)
      by_method = dict(results(ours, tokens))
      for line in tables.lines(HEADER, [cells(*item, shape) for item in by_method.items()], left=(0, 7)):
        say(line)
      setting = {"length": shape.length, "clips": shape.clips, "text": shape.text, "rows": rows}
      lines += [{"method": name, **setting, **result} for name, result in by_method.items()]
  return lines


def cells(name, result, shape):
  """A line of the table. After the numbers: for ours, whether the goals are reached; for others, a note."""
  return (
    name,
    f"{result['padding']:.2%}",
    f"{result['lost']:.1%}",
    f"{result['attention']:.3f}",
    f"{result['linear']:.3f}",
    f"{result['useful']:.3f}",
    f"{result['planning']:.1f}",
    verdict(result, shape) if name == "ours" else result.get("note", ""),
  )


def verdict(result, shape):
  """`ok`, or the names of the goals that were missed."""
  goals = GOALS | {"padding": LEAST_PADDING[shape.length]}
  missed = []
  for name, goal in goals.items():
    reached = result[name] >= goal if name == "useful" else result[name] <= goal
    if not reached:
      missed.append(name)
  return "MISSED: " + ", ".join(missed) if missed else "ok"


def sizes_of(index):
  """Tokens of each clip along t, y and x, int64 [N, 3]."""
  return np.stack(
    [index[name].astype(np.int64) // p for name, p in zip("thw", reference.PATCH, strict=True)], -1
  )


def tokens_of(index):
  """Tokens of each clip, int64 [N]."""
  return sizes_of(index).prod(-1)


def results(ours, tokens):
  """A plan of the mixture, tokens of its clips -> yields (method, figures); ours comes last."""
  index, shape, rows_per_step = ours.index, ours.shape, ours.rows_per_step
  arrived, _ = ours.clips(np.arange(min(len(index), OTHERS)))
  sizes, text = tokens[arrived], index["text_tokens"][arrived].astype(np.int64)
  figures = functools.partial(measure, shape=shape, rows_per_step=rows_per_step)

  def in_whole_steps(rows):
    return rows[: len(rows) // rows_per_step * rows_per_step]

  def next_fit():
    return peers.next_fit(sizes, text, shape)

  def first_fit():
    return peers.grain_fit(grain.experimental.FirstFitPackIterDataset, sizes, text, shape, rows_per_step)

  def best_fit():
    return peers.grain_fit(grain.experimental.BestFitPackIterDataset, sizes, text, shape, rows_per_step)

  methods = {"next-fit (NaViT)": next_fit, "first-fit (Grain)": first_fit, "best-fit (Grain)": best_fit}
  for name, pack in methods.items():
    rows, seconds = timed(pack)
    yield name, figures(in_whole_steps(rows), sizes) | {"lost": 0.0, "planning": seconds / len(sizes) * 1e6}

  size_N3 = sizes_of(index[arrived])
  (rows, bucket_N3), seconds = timed(lambda: peers.buckets(size_N3, shape, 0))
  rows = in_whole_steps(rows)
  kept = np.zeros(len(sizes), bool)
  kept[np.concatenate(rows).astype(int)] = True
  changed = bucket_N3 != size_N3
  lost = {
    "dropped": 1 - kept.mean(),
    "shortened": (changed[:, 0] & kept).mean(),
    "resized": (changed[:, 1:].any(1) & kept).mean(),
  }
  more = {
    "lost": 1 - (kept & ~changed.any(1)).mean(),
    "planning": seconds / len(sizes) * 1e6,
    "note": ", ".join(f"{share:.0%} {reason}" for reason, share in lost.items()),
  }
  yield "buckets (Open-Sora)", figures(rows, bucket_N3.prod(1), padded=False) | lost | more

  steps, seconds = timed(lambda: list(ours.steps(epochs=1)))
  rows = [[position for position, _ in row] for _, step in steps for row in step.rows]
  placed = np.bincount(np.concatenate(rows).astype(int), minlength=len(index))
  more = {"lost": np.mean(placed != 1), "planning": seconds / len(index) * 1e6, "steps": len(steps)}
  yield "ours", figures(rows, tokens) | more


def timed(run):
  """-> (what it returns, CPU seconds)."""
  start = time.process_time()
  return run(), time.process_time() - start


def measure(rows, tokens, *, shape, rows_per_step, padded=True):
  """Rows of clips in order, tokens of each clip -> padding, attention, linear, useful.

  padded: a row costs `shape.length` tokens, however full it is; else only the tokens of its clips.
  """
  clips = [tokens[np.array(row, int)] for row in rows] + [np.zeros(0, int)] * (-len(rows) % rows_per_step)

  def by_step(value):
    """value(clips of a row) of all rows -> [A, R]."""
    return np.array([value(row) for row in clips], float).reshape(-1, rows_per_step)

  load_AR, square_AR = by_step(np.sum), by_step(lambda row: (row**2).sum())
  computed_AR = np.full_like(load_AR, shape.length) if padded else load_AR
  issued_AR = ATTENTION * TILE**2 * by_step(tiles) + LINEAR * computed_AR
  useful_AR = ATTENTION * square_AR + LINEAR * load_AR
  return {
    "padding": float(1 - load_AR.mean() / shape.length) if padded else 0.0,
    "attention": max_over_mean(square_AR),
    "linear": max_over_mean(load_AR),
    "useful": float(useful_AR.sum() / (rows_per_step * issued_AR.max(1).sum())),
  }


def max_over_mean(cost_AR):
  """Costs of the rows of each step -> sum over the steps of the largest / sum of the means."""
  return float(cost_AR.max(1).sum() / cost_AR.mean(1).sum())


def tiles(clips):
  """Tokens of the clips of a row, in order -> how many tiles of TILE x TILE run."""
  if not len(clips):
    return 0
  ends = np.cumsum(clips)
  first_tile, last_tile = (ends - clips) // TILE, (ends - 1) // TILE  # of each clip
  start = np.arange(0, ends[-1], TILE)
  last = np.minimum(start + TILE, ends[-1]) - 1
  # Of each tile:
  first_clip, last_clip = (np.searchsorted(ends, token, side="right") for token in (start, last))
  return int((last_tile[last_clip] - first_tile[first_clip] + 1).sum())


def loading():
  """Prints how fast records become batches -> figures."""
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as directory:
    with records.RecordWriter(directory) as writer:
      for i in range(LOADED):
        latents_THWC = rng.standard_normal((1 + i % 3 * 2, 32, 32, 16), np.float32)
        ids_S = np.arange(40 + i % 50, dtype=np.int32)
        writer.add(records.Record(latents_THWC, ids_S, f"clip {i}", f"{i:05d}.mp4", 0.0, 16.0, "made"))
      index = writer.finish({"latent_channels": 16}, null_text=[1])
    size = sum(path.stat().st_size for path in pathlib.Path(directory).glob("*.array_record"))
    shape = RowShape(40_960, clips=128, text=8192)
    rows = plan.Plan(index.rows, rows_per_step=4, shape=shape, patch=(1, 2, 2), seed=0)
    for _ in loader.batches(index, rows, seed=0, epochs=1, threads=1):  # brings the files into the page cache
      pass
    count, start, start_cpu = 0, time.perf_counter(), time.process_time()
    for batch, _ in loader.batches(index, rows, seed=0, epochs=2, threads=1):
      count += int((batch.size_BG3[..., 0] > 0).sum())
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
  say(
    f"{LOADED} records, {size / 1e6:.0f} MB: {count} clips in {cpu:.2f} s of one core ({seconds:.2f} s by "
    f"the clock): {count / cpu:.0f} clips and {count / LOADED * size / 1e6 / cpu:.0f} MB a second; goal "
    f"{LOADING_GOAL} clips: {'ok' if count / cpu >= LOADING_GOAL else 'MISSED'}"
  )
  return {
    "clips": count,
    "megabytes": size / 1e6,
    "seconds": seconds,
    "cpu_seconds": cpu,
    "clips_per_cpu_second": count / cpu,
  }
