"""Laws of the crops: a function of the step number; every file is used; few readings; bounded memory."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from data.clips import BadClip, Item, RawClip
from data.crops import Crops, CropStream, crop_at_random
from sora_jax.errors import BadInput


@dataclasses.dataclass
class Source:
  """Files of pieces of given lengths.

  A pixel holds (file, frame within the file, position) as red, green, blue.

  files: for each file, the lengths of its pieces; a string instead of a length raises BadClip with that
  reason.
  """

  files: list
  size: tuple = (12, 16)
  name: str = "test"

  def __post_init__(self):
    self.readings = collections.Counter()

  def items(self):
    return [Item(f"{i:03d}", "") for i in range(len(self.files))]

  def read(self, item):
    self.readings[item.file] += 1
    start, (h, w) = 0, self.size
    for length in self.files[int(item.file)]:
      if isinstance(length, str):
        raise BadClip(length)
      video = np.empty((length, h, w, 3), np.uint8)
      video[..., 0] = int(item.file)
      video[..., 1] = np.arange(start, start + length).reshape(-1, 1, 1)
      video[..., 2] = np.arange(h * w).reshape(h, w)
      yield RawClip(video, 8.0, "", item.file, start / 8)
      start += length


def make_stream(source, size=(5, 8, 8), seed=0, reads=4, pool_bytes=1 << 20, on_bad=print):
  return CropStream(
    source, source.items(), size, seed=seed, reads=reads, pool_bytes=pool_bytes, on_bad=on_bad
  )


def steps(source, count, **options):
  options = dict(seed=0, clips=3, images=2, frames=5, size=(8, 8)) | options
  return list(itertools.islice(Crops(source, **options), count))


def test_batches_are_a_function_of_seed_and_step():
  """The same batches from any step on and with any number of threads; another seed gives other batches."""
  source = Source([[9], [1], [17, 9], [5]] * 5)
  whole = steps(source, 12)
  assert whole[0]["clips"].shape == (3, 5, 8, 8, 3) and whole[0]["images"].shape == (2, 1, 8, 8, 3)
  assert whole[0]["clips"].dtype == np.float32 and min(b["clips"].min() for b in whole) == -1
  assert max(np.abs(b["clips"]).max() for b in whole) <= 1
  for first, threads in ((0, 1), (3, 4), (11, 2)):
    for a, b in zip(whole[first:], steps(source, 12 - first, step=first, threads=threads), strict=True):
      np.testing.assert_array_equal(a["clips"], b["clips"])
      np.testing.assert_array_equal(a["images"], b["images"])
  assert (steps(source, 1, seed=1)[0]["clips"] != whole[0]["clips"]).any()
  assert steps(source, 1, images=0)[0]["images"].shape == (0, 1, 8, 8, 3)


def test_a_crop_is_a_piece_of_one_clip():
  """Consecutive frames of one piece, one window of its pixels, unchanged."""
  stream = make_stream(Source([[9, 17], [30], [5]]))
  for j in range(60):
    crop = stream[j].astype(int)
    file, frames, corner = crop[0, 0, 0, 0], crop[:, 0, 0, 1], crop[0, 0, 0, 2]
    assert (crop[..., 0] == file).all() and (np.diff(frames) == 1).all()
    assert file != 0 or not (frames[0] < 9 <= frames[-1])  # never across a cut
    np.testing.assert_array_equal(crop[0, ..., 2], corner + np.arange(8)[:, None] * 16 + np.arange(8))


def test_times_and_positions_are_uniform():
  stream = make_stream(Source([[9, 13]], size=(8, 10)), size=(5, 8, 8))  # 5 + 9 times, 1 x 3 positions
  crops = np.array([stream[j][0, 0, 0] for j in range(2800)])
  times, positions = np.unique(crops[:, 1], return_counts=True), np.unique(crops[:, 2], return_counts=True)
  np.testing.assert_array_equal(times[0], [*range(5), *range(9, 18)])
  np.testing.assert_allclose(times[1], 200, atol=60)
  np.testing.assert_array_equal(positions[0], range(3))
  np.testing.assert_allclose(positions[1], 933, atol=120)


def test_every_file_is_used_equally():
  """In an epoch of readings each file gives the same number of crops; a step mixes many files."""
  source = Source([[7]] * 200)
  stream = make_stream(source)
  files = np.array([stream[j][0, 0, 0, 0] for j in range(64 * 40)])
  assert len(np.unique(files)) == 200
  counts = np.bincount(files, minlength=200)
  assert counts.max() - counts.min() <= 2 * 4 and counts.mean() == 12.8
  assert len(np.unique(files[:16])) >= 14
  assert sum(source.readings.values()) <= 64 * 40 / 4 + 64  # 4 crops a reading


def test_few_files_are_read_seldom_and_memory_is_bounded():
  source = Source([[250], [120], [120], [132]])
  pool = 300 * 5 * 8 * 8 * 3
  stream = make_stream(source, pool_bytes=pool)
  held = 0
  for j in range(4000):
    stream[j]
    held = max(held, sum(future.result().nbytes for future in stream._readings.values()))
  assert held <= pool * 1.2
  assert sum(source.readings.values()) < 4000 / 40
  small = make_stream(Source([[250]] * 50), pool_bytes=10 * 5 * 8 * 8 * 3)
  assert small.lanes == 1 and small[0].shape == (5, 8, 8, 3)


def test_bad_and_short_files_are_skipped():
  """Bad files are named once, and what was read before the damage is used. Short files give images."""
  lines = []
  source = Source([[9], ["not a video"], [9, "truncated"], [1]])
  stream = Crops(source, seed=0, clips=6, images=6, frames=5, size=(8, 8), on_bad=lines.append)
  batches = list(itertools.islice(stream, 40))

  def red(name):
    return set(np.concatenate([np.rint((batch[name][:, 0, 0, 0, 0] + 1) * 127.5) for batch in batches]))

  assert red("clips") == {0, 2} and red("images") == {0, 2, 3}
  assert sorted(lines) == ["001: not a video", "002: truncated"] and sorted(stream.bad) == ["001", "002"]
  assert stream.short == {"003": 1}


@pytest.mark.parametrize(
  "files, match",
  [
    ([], "source test: it holds no clips"),
    ([[1], [3]], "of 2 files none has 5 frames; the longest has 3 frames; train on shorter"),
    ([["corrupt"], [1]], "of 2 files none has 5 frames; 1 cannot be read, such as 000: corrupt"),
  ],
)
def test_bad_sources(files, match):
  with pytest.raises(BadInput, match=match):
    steps(Source(files), 1, on_bad=lambda line: None)


def test_clips_smaller_than_the_crop_are_reflected():
  video = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
  crop = crop_at_random(video, (4, 3), 0, 0)
  np.testing.assert_array_equal(crop[0, ..., 0], [[3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]])
  assert crop_at_random(video[:, :1], (4, 2), 0, 1).shape == (1, 4, 2, 1)
