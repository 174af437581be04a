"""What launch.packing measures: our plan beside the ways of others, on the reference mixture; and how fast records load.

Clips are those of launch/packing/reference.py, in the order of our plan's shuffle for all methods; the others are launch/packing/peers.py. Ours plans a
whole epoch in windows of 256 clips a row of a step; all its steps count, with the empty rows of the last, short one. The others, which have no
windows, take the first 32,768 clips; of theirs, whole steps count. Columns:

  padding      share of the tokens of all rows of all steps that are not a clip's.
  lost         share of the clips that are dropped, or have another number of tokens along t, y or x than at their own size.
  attention, linear   the dearest row of a step over the mean row, as sum of maxima / sum of means over the steps: of sum n^2, and of tokens.
  useful       FLOPs of the clips / FLOPs that ranks are busy or wait for: of each step the dearest row, times the rows. For a DiT of width
               D = 5120 and MLP F = 13,824 (Wan 2.1 14B), a layer, forward (backward is the same multiple of both): 2 (6 D^2 + 2 D F) for each
               token of a row, padding too, and 4 D for each pair of tokens in the tiles that run. Tiles are 1024 x 1024 on the row as it is
               laid out; one runs where a clip has tokens in both its queries and its keys (sora_jax/models/attention.py). Scores of the
               text are left out. Batches of buckets have no padding.
  us a clip    CPU time of planning, microseconds: of ours the whole plan; of Grain's its iterator, which also writes segment ids and positions.

`loading` writes records of 256 x 256 pixels (1, 9 and 17 frames at strides (4, 8, 8), 16 channels, bfloat16, texts as ids) to a temporary
directory, and times data.loader from ArrayRecord to PackedBatch, one thread on one core, the files in the page cache.
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
from launch.reports import packing as packing_report, page
from sora_jax.batch import RowShape

SHAPES = (RowShape(81_920, clips=64, text=8192), RowShape(40_960, clips=32, text=4096))
ROWS = (64, 256)                           # of a step
WINDOW = 256                               # clips a row of a step
OTHERS = 1 << 15                           # clips that the others are given
TILE = 1024
WIDTH, MLP = 5120, 13_824
LINEAR, ATTENTION = 2 * (6 * WIDTH**2 + 2 * WIDTH * MLP), 4 * WIDTH          # FLOPs a token, and a pair of tokens
GOALS = {"padding": {81_920: 0.005, 40_960: 0.010}, "attention": 1.02, "linear": 1.02, "useful": 0.93, "planning": 50}
LOADED, LOADING_GOAL = 4096, 1000          # records; clips a second


def packing(count, picture=""):
  """Prints a table for each shape of rows and rows a step -> their lines, as dicts. picture: where that of some rows goes, as SVG."""
  index, found = reference.index(count), []
  tokens = tokens_of(index)
  say(f"{count} clips, {np.mean(index['t'] == 1):.0%} of them images; tokens: mean {tokens.mean():.0f}, median {np.median(tokens):.0f}, "
          f"most {tokens.max()}")
  for shape in SHAPES:
    for rows in ROWS:
      say(f"\nrows of {shape.length} tokens, at most {shape.clips} clips and {shape.text} text tokens; {rows} rows a step")
      say(f"{'':<22}{'padding':>10}{'lost':>9}{'attention':>12}{'linear':>9}{'useful':>9}{'us a clip':>12}")
      ours = plan.Plan(index, rows_per_step=rows, shape=shape, patch=reference.PATCH, seed=0, window_clips=WINDOW * rows)
      if picture and not found:
        page.save(pathlib.Path(picture), packing_report.picture(ours, packing_report.look(ours), reference.STRIDE))
      for name, result in results(ours, tokens):
        figures = (f"{result['padding']:.2%}", f"{result['lost']:.1%}", f"{result['attention']:.3f}", f"{result['linear']:.3f}",
                   f"{result['useful']:.3f}", f"{result['planning']:.1f}")
        line = "".join(f"{figure:>{wide}}" for figure, wide in zip(figures, (10, 9, 12, 9, 9, 12), strict=True))
        say(f"{name:<22}{line}  {verdict(result, shape) if name == 'ours' else result.get('note', '')}".rstrip())
        found.append({"method": name, "length": shape.length, "clips": shape.clips, "text": shape.text, "rows": rows, **result})
  return found


def verdict(result, shape):
  """`ok`, or which goals were missed."""
  missed = [name for name, goal in GOALS.items()
            if (result[name] < goal if name == "useful" else result[name] > (goal[shape.length] if name == "padding" else goal))]
  return "MISSED: " + ", ".join(missed) if missed else "ok"


def tokens_of(index):
  """Tokens of each clip, int64 [N]."""
  return np.prod([index[name].astype(np.int64) // p for name, p in zip("thw", reference.PATCH, strict=True)], axis=0)


def results(ours, tokens):
  """A plan of the mixture, tokens of its clips -> yields (method, figures); ours comes last."""
  index, shape, rows_per_step = ours.index, ours.shape, ours.rows_per_step
  arrived, _ = ours.clips(np.arange(min(len(index), OTHERS)))
  sizes, text = tokens[arrived], index["text_tokens"][arrived].astype(np.int64)
  figures = functools.partial(measure, shape=shape, rows_per_step=rows_per_step)
  whole = lambda rows: rows[:len(rows) // rows_per_step * rows_per_step]  # noqa: E731
  for name, pack in {
      "next-fit (NaViT)": lambda: peers.next_fit(sizes, text, shape),
      "first-fit (Grain)": lambda: peers.grain_fit(grain.experimental.FirstFitPackIterDataset, sizes, text, shape, rows_per_step),
      "best-fit (Grain)": lambda: peers.grain_fit(grain.experimental.BestFitPackIterDataset, sizes, text, shape, rows_per_step)}.items():
    rows, seconds = timed(pack)
    yield name, figures(whole(rows), sizes) | {"lost": 0.0, "planning": seconds / len(sizes) * 1e6}

  size_N3 = np.stack([index[name][arrived].astype(np.int64) // p for name, p in zip("thw", reference.PATCH, strict=True)], -1)
  (rows, bucket_N3), seconds = timed(lambda: peers.buckets(size_N3, shape, 0))
  kept = np.zeros(len(sizes), bool)
  kept[np.concatenate(whole(rows)).astype(int)] = True
  changed = bucket_N3 != size_N3
  lost = {"dropped": 1 - kept.mean(), "shortened": (changed[:, 0] & kept).mean(), "resized": (changed[:, 1:].any(1) & kept).mean()}
  yield "buckets (Open-Sora)", figures(whole(rows), bucket_N3.prod(1), padded=False) | lost | {
      "lost": 1 - (kept & ~changed.any(1)).mean(), "planning": seconds / len(sizes) * 1e6,
      "note": ", ".join(f"{share:.0%} {what}" for what, share in lost.items())}

  steps, seconds = timed(lambda: list(ours.steps(epochs=1)))
  rows = [[position for position, _ in row] for _, step in steps for row in step.rows]
  placed = np.bincount(np.concatenate(rows).astype(int), minlength=len(index))
  yield "ours", figures(rows, tokens) | {"lost": np.mean(placed != 1), "planning": seconds / len(index) * 1e6, "steps": len(steps)}


def timed(run):
  """-> (what it returns, CPU seconds)."""
  start = time.process_time()
  return run(), time.process_time() - start


def measure(rows, tokens, *, shape, rows_per_step, padded=True):
  """Rows of clips in order, tokens of each clip -> padding, attention, linear, useful. padded: rows cost `shape.length` tokens, however full."""
  clips = [tokens[np.array(row, int)] for row in rows] + [np.zeros(0, int)] * (-len(rows) % rows_per_step)
  of_steps = lambda value: np.array([value(row) for row in clips], float).reshape(-1, rows_per_step)  # noqa: E731
  load_AR, square_AR = of_steps(np.sum), of_steps(lambda row: (row**2).sum())
  issued_AR = ATTENTION * TILE**2 * of_steps(tiles) + LINEAR * (np.full_like(load_AR, shape.length) if padded else load_AR)
  dearest = lambda cost_AR: float(cost_AR.max(1).sum() / cost_AR.mean(1).sum())  # noqa: E731
  return {"padding": float(1 - load_AR.mean() / shape.length) if padded else 0.0, "attention": dearest(square_AR), "linear": dearest(load_AR),
          "useful": float((ATTENTION * square_AR + LINEAR * load_AR).sum() / (rows_per_step * issued_AR.max(1).sum()))}


def tiles(clips):
  """Tokens of the clips of a row, in order -> how many tiles of TILE x TILE run."""
  if not len(clips):
    return 0
  ends = np.cumsum(clips)
  first, last = (ends - clips) // TILE, (ends - 1) // TILE                # tiles of each clip
  start = np.arange(0, ends[-1], TILE)
  low, high = (np.searchsorted(ends, at, side="right") for at in (start, np.minimum(start + TILE, ends[-1]) - 1))      # clips of each tile
  return int((last[high] - first[low] + 1).sum())


def loading():
  """Prints how fast records become batches -> figures."""
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as directory:
    with records.RecordWriter(directory) as writer:
      for i in range(LOADED):
        latents_THWC = rng.standard_normal((1 + i % 3 * 2, 32, 32, 16), np.float32)
        writer.add(records.Record(latents_THWC, np.arange(40 + i % 50, dtype=np.int32), f"clip {i}", f"{i:05d}.mp4", 0.0, 16.0, "made"))
      index = writer.finish({"latent_channels": 16}, null_text=[1])
    size = sum(path.stat().st_size for path in pathlib.Path(directory).glob("*.array_record"))
    rows = plan.Plan(index.rows, rows_per_step=4, shape=RowShape(40_960, clips=128, text=8192), patch=(1, 2, 2), seed=0)
    for _ in loader.batches(index, rows, seed=0, epochs=1, threads=1):      # the files come into the page cache
      pass
    count, start, start_cpu = 0, time.perf_counter(), time.process_time()
    for batch, _ in loader.batches(index, rows, seed=0, epochs=2, threads=1):
      count += int((batch.size_BG3[..., 0] > 0).sum())
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
  found = {"clips": count, "megabytes": size / 1e6, "seconds": seconds, "cpu_seconds": cpu, "clips_per_cpu_second": count / cpu}
  say(f"{LOADED} records, {size / 1e6:.0f} MB: {count} clips in {cpu:.2f} s of one core ({seconds:.2f} s by the clock): "
          f"{count / cpu:.0f} clips and {count / LOADED * size / 1e6 / cpu:.0f} MB a second; goal {LOADING_GOAL} clips: "
          f"{'ok' if count / cpu >= LOADING_GOAL else 'MISSED'}")
  return found
