"""The reference mixture: frozen, within its bounds, of every kind it promises."""

import zlib

import numpy as np
import pytest

from launch.packing import reference


@pytest.fixture(scope="module")
def index():
  return reference.index(100_000)


def test_it_is_frozen(index):
  """Every packing figure ever quoted is of these sizes. (Number from this code, 2026-11.)"""
  assert zlib.crc32(index.tobytes()) == 1473230846
  np.testing.assert_array_equal(reference.index(70_001), index[:70_001])  # independent of count
  assert zlib.crc32(reference.index(100_001)[1:].tobytes()) != zlib.crc32(index.tobytes())


def test_sizes_are_within_bounds(index):
  tokens = index["t"].astype(int) * (index["h"] // 2) * (index["w"] // 2)
  images, clips = index[index["source"] == reference.IMAGES], index[index["source"] == reference.CLIPS]
  assert tokens.max() <= 40_960 and tokens.max() > 40_000 and tokens.min() >= 200
  assert not (index["h"] % 2).any() and not (index["w"] % 2).any()
  assert len(np.unique(index["uid"])) == len(index)
  assert index["text_tokens"].min() == 4 and index["text_tokens"].max() == 512
  assert 0.34 < len(images) / len(index) < 0.36 and (images["t"] == 1).all() and (clips["t"] > 1).all()
  seconds, side = (clips["t"] - 1) * 4 / clips["fps"], np.sqrt(images["h"].astype(float) * images["w"]) * 8
  assert 0.8 < seconds.min() and seconds.max() < 20 and abs(seconds.mean() - 6.2) < 0.1
  assert 240 < side.min() < 260 and 2000 < side.max() <= 2048 and 480 < np.median(side) < 520
  assert set(clips["fps"]) == {16, 24, 25, 30}
  short = np.minimum(clips["h"], clips["w"])
  assert short.min() == (178 // 16) * 2 and short.max() == (1080 // 16) * 2


def test_every_kind_is_there(index):
  """There are wide, tall and square images and clips. Longer clips have fewer pixels; some are large."""
  for source in (reference.IMAGES, reference.CLIPS):
    mine = index[index["source"] == source]
    wide = mine["w"] / mine["h"]
    assert min((wide > 1.2).mean(), (wide < 0.84).mean(), (np.abs(wide - 1) < 0.1).mean()) > 0.05
  clips = index[index["source"] == reference.CLIPS]
  seconds, pixels = (clips["t"] - 1) * 4 / clips["fps"], clips["h"].astype(int) * clips["w"] * 64
  means = [
    pixels[(seconds >= low) & (seconds < high)].mean() for low, high in ((0, 2), (2, 5), (5, 10), (10, 20))
  ]
  assert means == sorted(means, reverse=True) and means[0] > 2 * means[-1]
  assert ((pixels > 800_000) & (seconds < 3)).mean() > 0.005 and (seconds > 15).mean() > 0.05
