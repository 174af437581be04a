"""From a file to the clips that are worth learning: rate, size, scenes, pieces. What sources of real files share.

In the order in which it happens, one piece in memory at a time:

  scenes   a cut is where FFmpeg's filter `scdet` scores a frame at `scene_threshold` or more, in per cent of the full
           range: min(d, |d - d before|), d the mean absolute difference of luma from the frame before; its authors
           advise 8 to 14. It sees a grid of at most GRID pixels of each frame, as stored, not averaged: their mean
           estimates that of the whole frame, where a scaled copy would lose what moves finely. No piece spans a cut.
           Fades and dissolves score low and are not found, nor are cuts between frames of like brightness (7 was seen).
  rate     the file's own average, by presentation times, or `fps`; above `max_fps` it becomes `max_fps`.
  size     the file's own; above `max_pixels` a frame it is averaged down, its shape kept to a pixel, and noted.
  pieces   consecutive ones of 1 + s n frames, as in data/clips.py, from `min_seconds` to `max_seconds`; a picture is
           never too short.
  dull     `drop_dull` drops what is, throughout,
             black    as FFmpeg's `blackdetect` has it: 98 % of the pixels of each frame have a luma of at most 10 %
             frozen   as its `freezedetect` has it: no frame differs from the first by more than -60 dB, which is a
                      thousandth of the full range, on average
           both in numpy on the piece itself, which ends at the first frame that is neither. A piece of which a part
           is dull stays.

What is dropped comes out as `Dropped`, in its place, so that a report can name it.
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

STILL_FPS = 1.0            # rate of a picture that was not asked for at another: it has no motion
GRID = 1 << 16             # pixels of a frame that decide whether it begins a scene
LINE = 64                  # of them in a line, or a multiple: of other lines scdet (FFmpeg 8) also sums up what lies behind their ends in memory
BLACK_LUMA, BLACK_SHARE = 0.10, 0.98       # FFmpeg's defaults of blackdetect: pix_th and pic_th
FROZEN = 0.001                             # and of freezedetect: noise
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)       # ITU-R BT.709


@dataclasses.dataclass(frozen=True)
class Rules:
  """What becomes of a file; see the head of this module. Of each limit, 0 is none. The defaults take all as it is.

  temporal_stride: of the VAE that will encode the pieces, s: they have 1 + s n frames.
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
        raise BadInput(f"{field.name}={getattr(self, field.name):g}: 0 or more; 0 sets no limit")
    if 0 < self.max_seconds < self.min_seconds:
      raise BadInput(f"min_seconds={self.min_seconds:g} is more than max_seconds={self.max_seconds:g}: nothing would be left")
    if not 0 <= self.scene_threshold <= 100:
      raise BadInput(f"scene_threshold={self.scene_threshold:g}: a score is from 0 to 100; 10 finds most cuts, 0 cuts nowhere")
    if self.fps and 0 < self.max_fps < self.fps:
      raise BadInput(f"fps={self.fps:g} is more than max_fps={self.max_fps:g}; give one of them")

  @classmethod
  def of(cls, config):
    """Those that a config (a ConfigDict or dict) has; None is the default."""
    return cls(**{field.name: field.type(config.get(field.name) or field.default) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Files:
  """What sources of real files have in common. listed: sorted by file. notes, ignored: see data/clips.py."""
  name: str
  listed: tuple[Item, ...]
  notes: tuple[tuple[str, str], ...]
  ignored: tuple[tuple[str, str], ...]
  rules: Rules

  def items(self) -> list[Item]:
    return list(self.listed)


def read(path, item: Item, rules: Rules, start=0.0, end=math.inf) -> Iterator[RawClip | Dropped]:
  """The pieces of a file, or of its frames shown from `start` to before `end`, in seconds. BadClip where it is damaged."""
  reader = video.Reader(path)
  fps = rules.fps or min(reader.fps or STILL_FPS, rules.max_fps or math.inf)
  between = _between(reader, start, end)
  first = next(between)
  frames = (frame._replace(time=frame.time - first.time) for frame in itertools.chain([first], between))
  size = first.image_HWC.shape[:2]
  smaller = fitting(*size, rules.max_pixels) if 0 < rules.max_pixels < math.prod(size) else None
  slower = [f"{reader.fps:.6g} frames a second became {fps:.6g}"] if not rules.fps and fps < (reader.fps or fps) else []
  cuts = Cuts(rules.scene_threshold) if rules.scene_threshold and not reader.still else None
  shown = enumerate(video.resample(_numbered(frames, cuts), fps, reader.fps))
  for _, scene in itertools.groupby(shown, key=lambda numbered: numbered[1].scene):
    k, shot = next(scene)
    images = (shot.image_HWC for _, shot in itertools.chain([(k, shot)], scene))
    if smaller:
      images = _scaled(images, smaller)
    for video_THWC, at, left_out in pieces(images, fps, rules.max_seconds, rules.temporal_stride, first=k):
      why = _fault(video_THWC, fps, reader.still, rules)
      if why:
        yield Dropped(first.time + at, (len(video_THWC) + left_out) / fps, why)
        continue
      yield RawClip(video_THWC, fps, item.caption, item.file, first.time + at, left_out, (*reader.notes, *slower), size if smaller else None)


def _between(reader, start, end):
  """Frames whose time lies in the range, at least one; BadClip if there is none."""
  taken = False
  for frame in reader.frames(start):
    if frame.time >= end - video.NEAR:
      break
    taken = True
    yield frame
  if not taken:
    raise BadClip("no frames", f"none from {start:g} to {end:g} s")


class _Shot(NamedTuple):
  """An image and the number of its scene."""
  image_HWC: np.ndarray
  scene: int


def _numbered(frames: Iterable[video.Frame], cuts):
  """Frames whose images know their scene: numbered before frames are left out or repeated, so that no cut is lost."""
  scene = 0
  for frame in frames:
    scene += bool(cuts and cuts(frame.image_HWC))
    yield frame._replace(image_HWC=_Shot(frame.image_HWC, scene))


class Cuts:
  """image -> does it begin another scene than the one before it? By FFmpeg's `scdet`; images of one size, in order."""

  def __init__(self, threshold):
    self._threshold, self._graph, self._count, self._reformatter = threshold, None, 0, VideoReformatter()
    self.score = 0.0

  def __call__(self, image_HWC):
    step = max(1.0, math.sqrt(image_HWC[..., 0].size / GRID))
    rows, columns = (_places(n, step, multiple) for n, multiple in zip(image_HWC.shape, (2, LINE)))
    grid = np.ascontiguousarray(image_HWC[rows[:, None], columns])
    frame = self._reformatter.reformat(
        av.VideoFrame.from_ndarray(grid, format="rgb24"), format="yuv420p", src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709, src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG)
    frame.pts, self._count = self._count, self._count + 1
    if self._graph is None:
      self._graph = _graph(frame, "scdet", threshold=str(self._threshold))
    self._graph.vpush(frame)
    found = self._graph.vpull().metadata
    self.score = float(found.get("lavfi.scd.score", 0))
    return "lavfi.scd.time" in found


def _places(n, step, multiple):
  """Places of an axis of n pixels, about `step` apart, a multiple of them."""
  count = max(round(n / step) // multiple, 1) * multiple
  return ((np.arange(count) + 0.5) * n / count).astype(int)


def _graph(frame, name, **options):
  """A filter between a source of frames like this one and a sink."""
  graph = av.filter.Graph()
  graph.threads = 1
  source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
  graph.link_nodes(source, graph.add(name, **options), graph.add("buffersink")).configure()
  return graph


def _scaled(frames: Iterable[np.ndarray], size) -> Iterator[np.ndarray]:
  """Images averaged down to a size (height, width)."""
  reformatter, way = VideoReformatter(), Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
  for image_HWC in frames:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
    yield reformatter.reformat(frame, height=size[0], width=size[1], interpolation=way).to_ndarray()


def fitting(height, width, max_pixels):
  """The largest size (height, width) of the same shape, to a pixel, that has at most so many pixels."""
  scale = math.sqrt(max_pixels / (height * width))
  return max(1, int(height * scale)), max(1, int(width * scale))


def _fault(video_THWC, fps, still, rules):
  """Why a piece is dropped; None where it is not."""
  if not still and len(video_THWC) < rules.min_seconds * fps - 1e-3:
    return "too short"
  if rules.drop_dull and is_black(video_THWC):
    return "black"
  if rules.drop_dull and is_frozen(video_THWC):
    return "frozen"
  return None


def is_black(video_THWC):
  """Are, of each frame, BLACK_SHARE of the pixels at most of BLACK_LUMA?"""
  return all(np.mean(image_HWC @ _LUMA <= 255 * BLACK_LUMA) >= BLACK_SHARE for image_HWC in video_THWC)


def is_frozen(video_THWC):
  """Are there several frames, none further than FROZEN, on average, from the first?"""
  first = video_THWC[0].astype(np.int16)
  return len(video_THWC) > 1 and all(np.abs(image_HWC - first).mean() <= 255 * FROZEN for image_HWC in video_THWC[1:])
