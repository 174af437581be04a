"""Cutting and cropping: little is left out, only at the end or the edge, and it is counted."""

import io

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import clips
from data.clips import BadClip, crop, pieces, read_caption, version, whole_frames


def images(count):
  return (np.full((2, 3, 3), i % 256, np.uint8) for i in range(count))


@settings(max_examples=200, deadline=None)
@given(
  count=st.integers(0, 200),
  fps=st.sampled_from([1, 8, 23.976, 25, 30000 / 1001]),
  seconds=st.sampled_from([0, 0.1, 0.5, 0.68, 1, 2, 1000]),
)
def test_pieces_are_consecutive_and_lose_nothing_but_the_end(count, fps, seconds):
  """Joined, the pieces are the video without at most 4 frames at its end, which are counted."""
  cut = list(pieces(images(count), fps, seconds, 4))
  assert (count == 0) == (not cut)
  at = 0
  for clip, start, left_out in cut:
    assert len(clip) == whole_frames(len(clip), 4)
    assert not seconds or len(clip) <= max(1, seconds * fps + 1e-3)
    assert start == pytest.approx(at / fps)
    np.testing.assert_array_equal(clip[:, 0, 0, 0], np.arange(at, at + len(clip)) % 256)
    at += len(clip) + left_out
  assert at == count
  assert all(left_out == 0 for _, _, left_out in cut[:-1])
  assert not cut or cut[-1][2] <= 4
  assert len({len(clip) for clip, _, _ in cut[:-1]}) <= 1
  if len(cut) > 1 and len(cut[0][0]) > 1:
    assert len(cut[-1][0]) >= 5, "the last piece has motion"


def test_17_frames():
  """0.68 s at 25 frames a second, and 0.68 s at 29.97 cut to 1 + 4 n, are 17 frames, in spite of rounding."""
  for fps in (25, 30000 / 1001):
    assert [len(clip) for clip, _, _ in pieces(images(40), fps, 0.68, 4)] == [17, 17, 5]


def test_one_piece_is_held_at_a_time():
  drawn = 0

  def counted():
    nonlocal drawn
    for image in images(1000):
      drawn += 1
      yield image

  cut = pieces(counted(), 8, 2, 4)
  for n in range(1, 6):
    assert len(next(cut)[0]) == 13
    assert drawn == 13 * n + 5, "a piece and five frames"


def test_pieces_before_the_damage_are_yielded():
  def damaged(count):
    yield from images(count)
    raise BadClip("corrupt")

  for count, whole in ((0, 0), (12, 0), (13, 1), (25, 1), (26, 2), (30, 2)):
    taken = []
    with pytest.raises(BadClip):
      for clip, _, _ in pieces(damaged(count), 8, 2, 4):
        taken.append(len(clip))
    assert taken == [13] * whole, count


def test_crop_takes_the_middle():
  video = np.arange(7 * 37 * 50 * 3).reshape(7, 37, 50, 3)
  np.testing.assert_array_equal(crop(video, (4, 16, 16)), video[:5, 2:34, 1:49])
  assert crop(video[:5, :32, :48], (4, 16, 16)).shape == (5, 32, 48, 3)
  with pytest.raises(BadClip, match="50 x 37 pixels; at least 64 x 64"):
    crop(video, (4, 64, 64))


def test_pieces_of_a_later_scene_begin_later():
  cut = pieces(images(40), 25, 0.68, 4, first=100)
  assert [(len(clip), round(start * 25)) for clip, start, _ in cut] == [(17, 100), (17, 117), (5, 134)]


@pytest.mark.parametrize(("raw", "caption", "part"), [
  (b"\xef\xbb\xbf two \n words\t", "two words", ""), ("naïve 猫", "naïve 猫", ""),
  (b"caf\xe9", "", "not UTF-8"), ("caf\udce9", "", "not UTF-8"), ("\ud800", "", "not UTF-8"),
  (b"", "", "no caption"), (" \n", "", "no caption"), (None, "", "no caption"),
  (b"x" * (1 << 20), "x" * (1 << 20), ""), ("猫" * (1 << 19), "", "more than 1048576 bytes"),
])  # fmt: skip
def test_captions(raw, caption, part):
  read, fault = read_caption(raw)
  assert read == caption and part in fault and bool(part) == bool(fault)


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 300_000])
def test_a_version_depends_on_the_bytes_alone(size):
  """It does not change with the offset. It changes with the length, and with a byte near either end."""
  content = np.random.default_rng(0).bytes(size)
  name = version(io.BytesIO(content), 0, size)
  assert version(io.BytesIO(b"before" + content + b"after"), 6, size) == name
  assert version(io.BytesIO(content + b"!"), 0, size + 1) != name
  for k in {0, size // 20, size - 1} if size else ():
    changed = bytearray(content)
    changed[k] ^= 1
    assert version(io.BytesIO(bytes(changed)), 0, size) != name


def test_a_bad_clip_says_why():
  assert str(BadClip("truncated", "3 of 40 frames")) == "truncated: 3 of 40 frames"
  with pytest.raises(ValueError, match="known: unreadable"):
    BadClip("ugly")


def test_shots():
  """Captions one after another: of a file in seconds, of a piece in its latent frames."""
  entries = [
    {"seconds": 2, "prompt": "a"},
    {"seconds": 0.5, "prompt": " b\n c"},
    {"seconds": 9, "prompt": "d"},
  ]
  caption, shots = clips.read_shots(entries)
  assert caption == "a b c d" and shots == ((0.0, "a"), (2.0, "b c"), (2.5, "d"))
  assert clips.shots_of_piece(shots, 0.0, 25, 8.0, 4) == [(0, "a"), (5, "b c"), (6, "d")]
  assert clips.shots_of_piece(shots, 0.0, 9, 8.0, 4) == [(0, "a")]  # the others come later
  assert clips.shots_of_piece(shots, 2.0, 9, 8.0, 4) == [(0, "b c"), (2, "d")]
  assert clips.shots_of_piece(shots, 30.0, 1, 8.0, 4) == [(0, "d")]
  assert clips.shots_of_piece((), 0.0, 9, 8.0, 4) == []
  for wrong in (
    [],
    [{"seconds": 0, "prompt": "a"}],
    [{"seconds": 1, "prompt": " "}],
    [{"seconds": "x", "prompt": "a"}],
  ):
    with pytest.raises(ValueError):
      clips.read_shots(wrong)
