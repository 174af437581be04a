"""Classes of clips: each clip is in one class, and in the one that a person would name."""

import numpy as np
import pytest

from data.records import INDEX_DTYPE
from launch.reports import sizes

STRIDE = (4, 8, 8)


def make_rows(*clips):
  """(frames, height, width, fps, text tokens) of each -> rows of an index."""
  rows = np.zeros(len(clips), INDEX_DTYPE)
  for row, (frames, height, width, fps, text) in zip(rows, clips):
    row["t"], row["h"], row["w"], row["fps"], row["text_tokens"] = (
      (frames + 3) // 4,
      height // 8,
      width // 8,
      fps,
      text,
    )
  return rows


@pytest.mark.parametrize(
  ("clip", "classes"),
  [
    ((1, 1072, 1920, 24, 5), ("1080", "image", "16:9", None, "to 8")),
    ((17, 64, 64, 8, 9), ("64", "2 to 3", "1:1", "8", "9 to 16")),
    ((121, 832, 480, 23.976, 512), ("480", "5 to 10", "9:16", "24", "257 to 512")),
    ((5, 256, 200, 29.97, 600), ("240", "under 1", "3:4", "30", "over 512")),
    ((1441, 2160, 4096, 24, 0), ("2160", "60 and over", "2:1", "24", "to 8")),
  ],
)
def test_the_class_that_a_person_would_name(clip, classes):
  rows = make_rows(clip)
  assert tuple(sizes.pixels(rows, STRIDE)[0]) == (clip[0], *(n // 8 * 8 for n in clip[1:3]))
  charts = sizes.histograms(rows, STRIDE)
  for name, label in zip(("short_side", "seconds", "aspect", "fps", "caption"), classes):
    assert charts[name]["clips"] == ([0] if label is None else [1]), name
    assert label is None or charts[name]["labels"] == [label]


def test_each_clip_is_counted_once(monkeypatch):
  """In each histogram, however the index is read; images have no rate."""
  rng = np.random.default_rng(0)
  rows = make_rows(
    *zip(
      rng.choice([1, 5, 81], 500),
      rng.integers(8, 3000, 500),
      rng.integers(8, 3000, 500),
      rng.uniform(1, 240, 500),
      rng.integers(0, 2000, 500),
    )
  )
  whole = sizes.histograms(rows, STRIDE)
  for name, chart in whole.items():
    assert sum(chart["clips"]) == (int((rows["t"] > 1).sum()) if name == "fps" else 500)
    assert len(chart["labels"]) == len(chart["clips"]) and chart["clips"][0] and chart["clips"][-1]
  monkeypatch.setattr(sizes, "PART", 77)
  assert sizes.histograms(rows, STRIDE) == whole


def test_powers():
  """Every value lies within what its label says."""
  values = np.random.default_rng(1).integers(1, 300, 400)
  for sample in (values, values[:1], np.array([1, 1]), np.array([2]), np.array([5, 1])):
    chart = sizes.powers("t", sample)
    ranges = [[int(word) for word in label.split(" to ")] for label in chart["labels"]]
    assert chart["clips"] == [int(((sample >= r[0]) & (sample <= r[-1])).sum()) for r in ranges]
    assert sum(chart["clips"]) == len(sample)
