"""From a file to the clips that are worth training on: rate, size, scenes, pieces.

Shared by the sources of real files.

In the order of processing, with one piece in memory at a time:

  scenes   a cut is a frame that FFmpeg's filter `scdet` scores at `scene_threshold` or more, in per cent of
           the full range. The score is min(d, |d - d before|), where d is the mean absolute difference of
           luma from the frame before; the authors of the filter advise 8 to 14. The filter gets a grid of at
           most GRID pixels of each frame, as stored, not averaged: their mean is an estimate of the mean of
           the whole frame, while a scaled copy would lose the motion of fine detail. No piece spans a cut.
           Fades and dissolves score low and are not detected; neither are cuts between frames of similar
           brightness (a score of 7 was seen).
  rate     the average rate of the file, by presentation times, or `fps`; a rate above `max_fps` becomes
           `max_fps`.
  size     the size of the file. Frames of more than `max_pixels` are averaged down, with their aspect ratio
           kept to a pixel, and this is noted.
  pieces   consecutive pieces of 1 + s n frames, as in data/clips.py, from `min_seconds` to `max_seconds`; an
           image is never too short.
  dull     `drop_dull` drops a piece that is, throughout,
             black    as in FFmpeg's `blackdetect`: 98 % of the pixels of each frame have a luma of
                      at most 10 %
             frozen   as in FFmpeg's `freezedetect`: no frame differs from the first by more than -60 dB,
                      which is a thousandth of the full range, on average
           Both run in numpy on the piece itself and stop at the first frame that is neither. A piece of which
           only a part is dull is kept.

A piece that is not kept is yielded as a `Dropped` in its place, so that a report can name it.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from data.clips import BadClip, Dropped, Item, RawClip, pieces
from sora_jax import video
from sora_jax.errors import BadInput

STILL_FPS = 1.0  # the rate of an image, which has no motion, unless `fps` sets another
GRID = 1 << 16  # pixels of a frame that decide whether it begins a scene
# The grid has this many pixels in a line, or a multiple. For other widths scdet (FFmpeg 8) also sums the
# memory behind the end of each line.
LINE = 64
BLACK_LUMA, BLACK_SHARE = 0.10, 0.98  # FFmpeg's defaults for blackdetect: pix_th and pic_th
FROZEN = 0.001  # FFmpeg's default for freezedetect: noise
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709


@dataclasses.dataclass(frozen=True)
class Rules:
  """How a file is processed; see the head of this module.

  A limit of 0 is no limit. The defaults change nothing.

  temporal_stride: s of the VAE that will encode the pieces; they have 1 + s n frames.
  """

  max_seconds: float = 0.0
  min_seconds: float = 0.0
  fps: float = 0.0
  max_fps: float = 0.0
  max_pixels: int = 0
  scene_threshold: float = 0.0
  drop_dull: bool = False
  temporal_stride: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 0:
        raise BadInput(f"{field.name}={getattr(self, field.name):g}: it must be 0 or more; 0 sets no limit")
    if 0 < self.max_seconds < self.min_seconds:
      raise BadInput(
        f"min_seconds={self.min_seconds:g} is more than max_seconds={self.max_seconds:g}: "
        "no clip would be left"
      )
    if not 0 <= self.scene_threshold <= 100:
      raise BadInput(
        f"scene_threshold={self.scene_threshold:g}: a score is from 0 to 100; 10 detects most cuts, "
        "0 detects none"
      )
    if self.fps and 0 < self.max_fps < self.fps:
      raise BadInput(f"fps={self.fps:g} is more than max_fps={self.max_fps:g}; give one of them")

  @classmethod
  def of(cls, config):
    """The rules of a config (a ConfigDict or dict). A field that is missing or None has its default."""
    return cls(
      **{field.name: field.type(config.get(field.name) or field.default) for field in dataclasses.fields(cls)}
    )


@dataclasses.dataclass(frozen=True)
class FileSource:
  """The common part of the sources of real files.

  listed: sorted by file. notes, ignored: see data/clips.py.
  """

  name: str
  listed: tuple[Item, ...]
  notes: tuple[tuple[str, str], ...]
  ignored: tuple[tuple[str, str], ...]
  rules: Rules

  def items(self) -> list[Item]:
    return list(self.listed)


def read(path, item: Item, rules: Rules, start=0.0, end=math.inf) -> Iterator[RawClip | Dropped]:
  """The pieces of a file, or of its frames shown from `start` to before `end`, in seconds.

  BadClip if it is damaged.
  """
  reader = video.Reader(path)
  fps = _output_fps(reader.fps, rules)
  in_range = _frames_in_range(reader, start, end)
  first = next(in_range)
  frames = (frame._replace(time=frame.time - first.time) for frame in itertools.chain([first], in_range))
  size, smaller = first.image_HWC.shape[:2], None
  if 0 < rules.max_pixels < math.prod(size):
    smaller = scaled_size(*size, rules.max_pixels)
  rate_notes = []
  if not rules.fps and reader.fps and fps < reader.fps:
    rate_notes = [f"{reader.fps:.6g} frames a second became {fps:.6g}"]
  cuts = Cuts(rules.scene_threshold) if rules.scene_threshold and not reader.still else None
  resampled = enumerate(video.resample(_number_scenes(frames, cuts), fps, reader.fps))
  for _, scene in itertools.groupby(resampled, key=lambda numbered: numbered[1].scene):
    k, shot = next(scene)
    images = (shot.image_HWC for _, shot in itertools.chain([(k, shot)], scene))
    if smaller:
      images = _scaled(images, smaller)
    for video_THWC, offset, left_out in pieces(
      images, fps, rules.max_seconds, rules.temporal_stride, first=k
    ):
      why = _drop_reason(video_THWC, fps, reader.still, rules)
      if why:
        yield Dropped(first.time + offset, (len(video_THWC) + left_out) / fps, why)
        continue
      notes = (*reader.notes, *rate_notes)
      yield RawClip(
        video_THWC,
        fps,
        item.caption,
        item.file,
        first.time + offset,
        left_out,
        notes,
        size if smaller else None,
      )


def _output_fps(file_fps, rules):
  """The rate of the pieces of a file whose own rate is file_fps (None: unknown)."""
  if rules.fps:
    return rules.fps
  return min(file_fps or STILL_FPS, rules.max_fps or math.inf)


def _frames_in_range(reader, start, end):
  """The frames whose time lies in the range. BadClip if there are none."""
  empty = True
  for frame in reader.frames(start):
    if frame.time >= end - video.NEAR:
      break
    empty = False
    yield frame
  if empty:
    raise BadClip("no frames", f"none from {start:g} to {end:g} s")


class _Shot(NamedTuple):
  """An image and the number of its scene."""

  image_HWC: np.ndarray
  scene: int


def _number_scenes(frames: Iterable[video.Frame], cuts):
  """Frames with a _Shot as their image. Before resampling drops or repeats frames, so that no cut is lost."""
  scene = 0
  for frame in frames:
    if cuts and cuts(frame.image_HWC):
      scene += 1
    yield frame._replace(image_HWC=_Shot(frame.image_HWC, scene))


class Cuts:
  """image -> bool: True if it begins a new scene, by FFmpeg's `scdet`. Takes images of one size, in order."""

  def __init__(self, threshold):
    self._threshold, self._graph, self._count, self._reformatter = threshold, None, 0, VideoReformatter()
    self.score = 0.0

  def __call__(self, image_HWC):
    step = max(1.0, math.sqrt(image_HWC[..., 0].size / GRID))
    rows, columns = (_grid_points(n, step, multiple) for n, multiple in zip(image_HWC.shape, (2, LINE)))
    grid = np.ascontiguousarray(image_HWC[rows[:, None], columns])
    frame = self._reformatter.reformat(
      av.VideoFrame.from_ndarray(grid, format="rgb24"),
      format="yuv420p",
      src_colorspace=Colorspace.ITU709,
      dst_colorspace=Colorspace.ITU709,
      src_color_range=ColorRange.JPEG,
      dst_color_range=ColorRange.MPEG,
    )
    frame.pts, self._count = self._count, self._count + 1
    if self._graph is None:
      self._graph = _graph(frame, "scdet", threshold=str(self._threshold))
    self._graph.vpush(frame)
    metadata = self._graph.vpull().metadata
    self.score = float(metadata.get("lavfi.scd.score", 0))
    return "lavfi.scd.time" in metadata


def _grid_points(n, step, multiple):
  """Indices into an axis of n pixels, about `step` apart; their number is a multiple of `multiple`."""
  count = max(round(n / step) // multiple, 1) * multiple
  return ((np.arange(count) + 0.5) * n / count).astype(int)


def _graph(frame, name, **options):
  """A filter graph: a buffer for frames of this size and format, the filter, a sink."""
  graph = av.filter.Graph()
  graph.threads = 1
  source = graph.add_buffer(
    width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
  )
  graph.link_nodes(source, graph.add(name, **options), graph.add("buffersink")).configure()
  return graph


def _scaled(frames: Iterable[np.ndarray], size) -> Iterator[np.ndarray]:
  """Images averaged down to a size (height, width)."""
  reformatter = VideoReformatter()
  method = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
  for image_HWC in frames:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
    yield reformatter.reformat(frame, height=size[0], width=size[1], interpolation=method).to_ndarray()


def scaled_size(height, width, max_pixels):
  """The largest size (height, width) of the same aspect ratio, to a pixel, of at most `max_pixels` pixels."""
  scale = math.sqrt(max_pixels / (height * width))
  return max(1, int(height * scale)), max(1, int(width * scale))


def _drop_reason(video_THWC, fps, still, rules):
  """Why a piece is dropped; None if it is kept."""
  if not still and len(video_THWC) < rules.min_seconds * fps - 1e-3:
    return "too short"
  if rules.drop_dull and is_black(video_THWC):
    return "black"
  if rules.drop_dull and is_frozen(video_THWC):
    return "frozen"
  return None


def is_black(video_THWC):
  """True if in each frame at least BLACK_SHARE of the pixels have a luma of at most BLACK_LUMA."""
  return all(np.mean(image_HWC @ _LUMA <= 255 * BLACK_LUMA) >= BLACK_SHARE for image_HWC in video_THWC)


def is_frozen(video_THWC):
  """True if there are several frames and none differs from the first by more than FROZEN on average."""
  first = video_THWC[0].astype(np.int16)
  return len(video_THWC) > 1 and all(
    np.abs(image_HWC - first).mean() <= 255 * FROZEN for image_HWC in video_THWC[1:]
  )
