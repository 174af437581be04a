"""Classes of clips, for reports: by short side, length, shape, frame rate and caption. numpy only.

All of it follows from an index of records; no record is opened, and an index of any length is read one part
at a time. Pixels and frames follow from the sizes of latents and the VAE's stride (t, y, x): a causal VAE
makes 1 + (frames - 1) / t latents in time.
"""

import numpy as np

PART = 1 << 20  # clips in a part

SHORT_SIDES = (64, 128, 240, 360, 480, 720, 1080, 1440, 2160)  # pixels; the class is the nearest by ratio
RATES = (5, 8, 10, 12, 15, 16, 20, 24, 25, 30, 50, 60, 120)  # frames a second, likewise: 23.976 is 24
# fmt: off
SHAPES = {
  "1:2": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1, "4:3": 4 / 3,
  "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2,
}
# fmt: on
SECONDS = (1, 2, 3, 5, 10, 20, 60)  # edges between classes of length
TEXT = (8, 16, 32, 64, 128, 256, 512)  # the most tokens of each class

_BETWEEN_SECONDS = [f"{a} to {b}" for a, b in zip(SECONDS, SECONDS[1:])]
LENGTHS = ("image", f"under {SECONDS[0]}", *_BETWEEN_SECONDS, f"{SECONDS[-1]} and over")
CAPTIONS = (f"to {TEXT[0]}", *(f"{a + 1} to {b}" for a, b in zip(TEXT, TEXT[1:])), f"over {TEXT[-1]}")


def pixels(rows, stride):
  """Rows of an index -> frames, height and width in pixels, int64 [N, 3]."""
  t, h, w = (rows[name].astype(np.int64) * step for name, step in zip("thw", stride, strict=True))
  return np.stack([t - (stride[0] - 1), h, w], axis=-1)


def nearest(values, candidates):
  """The index of the nearest candidate, by ratio, for each value [N]. candidates: positive, ascending."""
  candidates = np.asarray(list(candidates), np.float64)
  return np.searchsorted(np.sqrt(candidates[1:] * candidates[:-1]), values)


def short_side_class(pixels_N3):
  """-> indices into SHORT_SIDES [N]."""
  return nearest(pixels_N3[:, 1:].min(axis=-1), SHORT_SIDES)


def length_class(pixels_N3, fps):
  """-> indices into LENGTHS [N]; 0 for an image, whatever its rate."""
  seconds = pixels_N3[:, 0] / np.maximum(fps, 1e-6)
  return np.where(pixels_N3[:, 0] == 1, 0, 1 + np.searchsorted(SECONDS, seconds, side="right"))


def parts(rows):
  """An index, which may be memory-mapped -> its parts one after another, in memory."""
  return (np.asarray(rows[i : i + PART]) for i in range(0, len(rows), PART))


def histograms(rows, stride):
  """Counts the clips of a whole index by class -> {name: {"title": str, "labels": [str], "clips": [int]}}.

  Empty classes at both ends are left out. Images do not count for the frame rate.
  """
  counts = {name: np.zeros(len(labels), np.int64) for name, (_, labels) in _HISTOGRAMS.items()}
  for part in parts(rows):
    size_N3 = pixels(part, stride)
    moving = size_N3[:, 0] > 1
    classes = {
      "short_side": short_side_class(size_N3),
      "seconds": length_class(size_N3, part["fps"]),
      "aspect": nearest(size_N3[:, 2] / size_N3[:, 1], SHAPES.values()),
      "fps": nearest(part["fps"][moving], RATES),
      "caption": np.searchsorted(TEXT, part["text_tokens"]),
    }
    for name, indices in classes.items():
      counts[name] += np.bincount(indices, minlength=len(counts[name]))
  charts = {}
  for name, (title, labels) in _HISTOGRAMS.items():
    charts[name] = {"title": title, **_trim(labels, counts[name].tolist())}
  return charts


_HISTOGRAMS = {
  "short_side": ("Short side, about so many pixels", [str(side) for side in SHORT_SIDES]),
  "seconds": ("Length in seconds", list(LENGTHS)),
  "aspect": ("Width : height, about", list(SHAPES)),
  "fps": ("Frames a second, about", [str(rate) for rate in RATES]),
  "caption": ("Tokens of the caption", list(CAPTIONS)),
}


def powers(title, values):
  """Counts positive integers by powers of two -> a chart, as `histograms` has them."""
  classes = np.ceil(np.log2(np.maximum(np.asarray(values, np.float64), 1))).astype(np.int64)
  labels = ["1", "2", *(f"{2**k + 1} to {2 ** (k + 1)}" for k in range(1, max(classes.max(initial=0), 1)))]
  return {"title": title, **_trim(labels, np.bincount(classes, minlength=len(labels)).tolist())}


def _trim(labels, counts):
  occupied = [i for i, count in enumerate(counts) if count] or [0]
  kept = slice(occupied[0], occupied[-1] + 1)
  return {"labels": labels[kept], "clips": counts[kept]}
