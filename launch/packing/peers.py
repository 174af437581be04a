"""How other methods put clips into batches: what launch.packing measures beside our plan, on the same sizes.

Each function takes the sizes of clips [N] in order of arrival. It returns rows, in order; a row is a list of
indices in [0, N). Consecutive rows form a step, as many as a step has.

  next_fit   the greedy packing of NaViT (arXiv:2307.06304) in order of arrival, with one open row: a clip
             that does not fit closes it.
  grain_fit  Grain's own FirstFitPackIterDataset and BestFitPackIterDataset (grain.experimental), unchanged,
             on features that have lengths and no values; `num_packing_bins` is the number of rows of a step,
             `max_sequences_per_bin` the number of clips of a row.
  buckets    the rules of Open-Sora 2.0 (github.com/hpcaitech/Open-Sora at 7ad6a96,
             opensora/datasets/bucket.py, sampler.py, aspect.py), reimplemented. A clip goes to the largest
             resolution of at most 1 / 0.8 of its area, then to the longest length that it can fill, then to
             the nearest of 17 aspect ratios; it is resized and cropped to that bucket. A batch holds clips of
             one bucket. Clips that do not fill a batch are dropped, and so are batches that do not fill a
             step (`drop_last`, as its training sets it). Batches of all buckets are shuffled, and each rank
             takes its own. Assumptions: the resolutions are those of its v1.2 (stage3.py) without the lowest;
             lengths are the 1 + 4 n to 129 frames of its stage1.py, then some longer ones; a batch has as
             many clips as fit the tokens and clips of a row (theirs are set by hand); all frame rates are
             kept (theirs are reduced to 24 at most).
"""

import math

import grain
import numpy as np

# Pixels of a frame.
RESOLUTIONS = {
  "256px": 256**2,
  "240p": 240**2 * 16 // 9,
  "360p": 360**2 * 16 // 9,
  "512px": 512**2,
  "480p": 480**2 * 16 // 9,
  "720p": 720**2 * 16 // 9,
  "1024px": 1024**2,
  "1080p": 1080**2 * 16 // 9,
  "2048px": 2048**2,
}
LENGTHS = (*range(2, 34), 41, 49, 57, 65, 81, 97, 113, 129)  # latent frames
ASPECTS = (2.39, 2, 16 / 9, 1.85, 1.6, 1.5, 4 / 3, 1)  # width / height; their inverses are used as well
CELL = 16  # pixels of a side of a token


def next_fit(tokens, text, shape):
  """tokens, text: tokens and text tokens of each clip [N] -> rows."""
  rows, row, room, text_room = [], [], shape.length, shape.text
  for clip, (size, text_size) in enumerate(zip(tokens.tolist(), text.tolist(), strict=True)):
    if size > room or text_size > text_room or len(row) == shape.clips:
      rows.append(row)
      row, room, text_room = [], shape.length, shape.text
    row.append(clip)
    room, text_room = room - size, text_room - text_size
  return [*rows, row]


class _Lengths:
  """A Grain source of clips whose arrays have lengths but no values."""

  def __init__(self, tokens, text):
    self.tokens, self.text = tokens.tolist(), text.tolist()

  def __len__(self):
    return len(self.tokens)

  def __getitem__(self, i):
    return {
      "tokens": np.empty((self.tokens[i], 0), bool),
      "text": np.empty((self.text[i], 0), bool),
      "clip": i,
    }


def grain_fit(dataset, tokens, text, shape, rows_per_step):
  """dataset: FirstFitPackIterDataset or BestFitPackIterDataset of grain.experimental -> rows."""
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  clips = grain.MapDataset.source(_Lengths(tokens, text)).to_iter_dataset(options)
  packed = dataset(
    clips,
    length_struct={"tokens": shape.length, "text": shape.text},
    num_packing_bins=rows_per_step,
    shuffle_bins=False,
    meta_features=("clip",),
    max_sequences_per_bin=shape.clips,
  )
  return [list(row["clip"]) for row in packed]


def bucket_shapes():
  """-> {area: [((height, width) in tokens, width / height)]}, largest area first."""
  shapes = {}
  for area in sorted(RESOLUTIONS.values(), reverse=True):
    sizes = {}
    for aspect in ASPECTS:
      width = int(math.sqrt(area * aspect) // CELL) * CELL
      height = int(area / width // CELL) * CELL
      by_height = [(height, width), (height - CELL, width), (height + CELL, width)]
      by_width = [(height, width - CELL), (height, width + CELL)]
      height, width = min(by_height + by_width, key=lambda size: abs(size[0] * size[1] - area))
      sizes |= {(height, width): aspect, (width, height): 1 / aspect}
    shapes[area] = [((height // CELL, width // CELL), aspect) for (height, width), aspect in sizes.items()]
  return shapes


def buckets(size_N3, shape, seed):
  """Assigns clips to buckets, and buckets to batches. size_N3: t, y, x of each clip in tokens.

  -> (rows, bucket_N3: t, y, x of the bucket of each clip, zeros if it has none).
  """
  rng, (t, h, w) = np.random.default_rng(seed), size_N3.T
  bucket_N3 = np.zeros_like(size_N3)
  for area, shapes in bucket_shapes().items():  # largest first; a clip that has a bucket keeps it
    grid_K2, aspect_K = np.array([grid for grid, _ in shapes]), np.array([aspect for _, aspect in shapes])
    nearest = np.abs((h / w)[:, None] - 1 / aspect_K).argmin(1)
    most = shape.length // grid_K2.prod(1).max()  # latent frames of a batch of one clip
    lengths = np.array([1, *(length for length in LENGTHS if length <= most)])
    length = lengths[np.searchsorted(lengths, t, side="right") - 1]
    free = bucket_N3[:, 0] == 0
    large_enough = h * w * CELL**2 >= 0.8 * area
    long_enough = (t == 1) | (length > 1)
    fits = free & large_enough & long_enough & (most > 0)
    bucket_N3[fits] = np.column_stack([length, grid_K2[nearest]])[fits]
  kinds, of_kind = np.unique(bucket_N3, axis=0, return_inverse=True)
  batches = []
  for number, kind in enumerate(kinds):
    if kind[0]:
      clips = rng.permutation(np.flatnonzero(of_kind.ravel() == number))
      each = min(shape.length // int(kind.prod()), shape.clips)
      batches += clips[: len(clips) // each * each].reshape(-1, each).tolist()
  return [batches[i] for i in rng.permutation(len(batches))], bucket_N3
