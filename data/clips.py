"""Raw clips: pixels and a caption, before the VAE. What every source yields, and the cutting and cropping they share.

A source module (data/sources/NAME.py) has `open_source(config) -> source`; a source has

  source.name                 str, kept in every record
  source.items()              list of Item, sorted by file; cheap: decodes nothing
  source.read(item)           iterator of RawClip, pieces in order, one in memory at a time; raises BadClip. Where the
                              caller asked for it (data/curation.py), Dropped stand between them
  source.notes                list of (file, text), optional: what the listing found wrong, as a caption not in UTF-8
  source.ignored              list of (file, why), optional: files that are no clips
"""

import concurrent.futures
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from sora_jax.video import BadClip

__all__ = ["BadClip", "Dropped", "Item", "RawClip", "all_at_once", "crop", "pieces", "read_caption", "version", "whole_frames"]

LONGEST_CAPTION = 1 << 20      # bytes; whatever is longer is no caption
ENDS = 64 << 10        # bytes at either end of a file that its version looks at
THREADS, MANY = 32, 64         # that open files while a source is listed; files that one takes at a time


@dataclasses.dataclass(frozen=True)
class Item:
  """A file of a source, not opened yet. `version` changes with its content; `where` is the source's own business."""
  file: str
  caption: str
  version: str = ""
  where: Any = None


@dataclasses.dataclass(frozen=True)
class RawClip:
  """Pixels [T, H, W, 3] uint8 and what is said of them. start: seconds from the start of the file.

  left_out: frames of the file after this piece that are in no piece.  notes: what a reader of the report should know.
  scaled_from: (height, width) before it was made smaller; None: it was not.
  """
  video_THWC: np.ndarray
  fps: float
  caption: str
  file: str
  start: float
  left_out: int = 0
  notes: tuple[str, ...] = ()
  scaled_from: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Dropped:
  """A piece that is not taken. start, seconds: its place in the file. why: `black`, `frozen` or `too short`."""
  start: float
  seconds: float
  why: str


def version(f: BinaryIO, at: int, size: int) -> str:
  """Of the `size` bytes at `at` in an open file: a name that changes with them, as far as length, head and tail tell."""
  f.seek(at)
  crc = zlib.crc32(f.read(min(ENDS, size)))
  f.seek(at + max(0, size - ENDS))
  return f"{size}-{zlib.crc32(f.read(min(ENDS, size)), crc):08x}"


def all_at_once(function: Callable, things: Sequence) -> list:
  """[function(thing), ...], by threads: files on a network disk are slow to open, one after the other."""
  some = min(MANY, max(1, len(things) // THREADS))
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    parts = pool.map(lambda i: [function(thing) for thing in things[i:i + some]], range(0, len(things), some))
    return [one for part in parts for one in part]


def read_caption(text: bytes | str | None) -> tuple[str, str]:
  """-> (caption, what is wrong with it or ""). UTF-8, byte order mark or not; white space becomes single spaces.

  What cannot be read is an empty caption; undecoded bytes in a str are those of "surrogateescape".
  """
  try:
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text or b""
    if len(raw) > LONGEST_CAPTION:
      return "", f"its caption has more than {LONGEST_CAPTION} bytes: kept with an empty one"
    caption = " ".join(raw.decode("utf-8-sig").split())
  except UnicodeError:
    return "", "its caption is not UTF-8: kept with an empty one"
  return caption, "" if caption else "no caption: kept with an empty one"


def whole_frames(frames, stride):
  """The largest 1 + stride * n <= frames: what a causal VAE of this temporal stride takes whole."""
  return 1 + stride * ((frames - 1) // stride)


def pieces(frames: Iterable[np.ndarray], fps: float, max_seconds: float, stride: int,
           first: int = 0) -> Iterator[tuple[np.ndarray, float, int]]:
  """Cuts images [H, W, 3] at a constant rate into consecutive pieces -> (video_THWC, start, frames left out after it).

  A piece has 1 + stride * n frames and lasts at most `max_seconds` (but has a frame; 0: no limit, all in one piece); `start`
  is in seconds, where `first` frames came before. Only the end loses frames: fewer than `stride`, or as many where they
  would make a piece without motion. One piece and stride + 1 frames are held at a time. Where `frames` raises BadClip, what was whole by
  then comes first.
  """
  length = whole_frames(max(1, math.floor(max_seconds * fps + 1e-3)), stride) if max_seconds else None
  ahead = 1 if length is None or length < stride + 1 else stride + 1      # frames of the shortest tail that moves
  held, start, frames = [], first, iter(frames)
  while True:
    try:
      image = next(frames, None)
    except BadClip:
      if length and len(held) >= length:
        yield np.stack(held[:length]), start / fps, 0
      raise
    if image is None:
      break
    held.append(image)
    if length and len(held) == length + ahead:
      piece, held = np.stack(held[:length]), held[length:]
      yield piece, start / fps, 0
      start += length
  if held:
    keep = min(whole_frames(len(held), stride), length or len(held))
    yield np.stack(held[:keep]), start / fps, len(held) - keep


def crop(video_THWC, stride):
  """The middle of the frames, to multiples of the stride (t, y, x), and the first 1 + t n of them; a view.

  BadClip if a frame is smaller than one stride.
  """
  frames, height, width, _ = video_THWC.shape
  _, sy, sx = stride
  if height < sy or width < sx:
    raise BadClip("too small", f"{width} x {height} pixels; at least {sx} x {sy}")
  t, h, w = whole_frames(frames, stride[0]), height // sy * sy, width // sx * sx
  top, left = (height - h) // 2, (width - w) // 2
  return video_THWC[:t, top:top + h, left:left + w]
