"""Raw clips: pixels and a caption, before the VAE.

The interface of a source; cutting and cropping for all of them.

A source module (data/sources/NAME.py) has `open_source(config) -> source`. A source has

  source.name                 str, stored in every record
  source.items()              list of Item, sorted by file; cheap: it decodes nothing
  source.read(item)           iterator of RawClip, the pieces in order, one in memory at a time; raises
                              BadClip. If the rules drop pieces (data/curation.py), it yields a Dropped for
                              each of them
  source.notes                optional list of (file, text): problems found while listing, e.g. a caption not
                              in UTF-8
  source.ignored              optional list of (file, reason): files that are not clips
"""

import concurrent.futures
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from sora_jax import masks
from sora_jax.video import BadClip

__all__ = [
  "BadClip", "Dropped", "Item", "RawClip", "crop", "join_shots", "map_in_threads", "pieces", "read_caption",
  "read_shots", "shots_of_piece", "version", "whole_frames",
]  # fmt: skip

LONGEST_CAPTION = 1 << 20  # bytes; a longer text is not taken for a caption
END_BYTES = 64 << 10  # `version` reads this many bytes at either end of a file
THREADS = 32  # threads that open files while a source is listed
CHUNK = 64  # the most files that a thread takes at a time


@dataclasses.dataclass(frozen=True)
class Item:
  """A file of a source, not opened yet.

  version: changes with the content of the file.  location: what the source needs to read it; only the source
  uses it.  shots: of several captions, one after another in time, ((seconds from the start of the file,
  caption), ...), the first at 0; then `caption` is all of them.
  """

  file: str
  caption: str
  version: str = ""
  location: Any = None
  shots: tuple[tuple[float, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class RawClip:
  """Pixels [T, H, W, 3] uint8 with their caption. start: seconds from the start of the file.

  left_out: frames of the file after this piece that belong to no piece.  notes: remarks for the report.
  scaled_from: (height, width) before the frames were scaled down; None if they were not.
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
  """A piece that is not used.

  start, seconds: its range in the file. why: `black`, `frozen` or `too short`.
  """

  start: float
  seconds: float
  why: str


def version(f: BinaryIO, offset: int, size: int) -> str:
  """Identifies `size` bytes at `offset` in a file: their number, and a CRC of the first and last 64 KiB."""
  f.seek(offset)
  crc = zlib.crc32(f.read(min(END_BYTES, size)))
  f.seek(offset + max(0, size - END_BYTES))
  return f"{size}-{zlib.crc32(f.read(min(END_BYTES, size)), crc):08x}"


def map_in_threads(function: Callable, items: Sequence) -> list:
  """[function(item) for item in items], in threads: a network disk is slow to open files one by one."""
  size = min(CHUNK, max(1, len(items) // THREADS))

  def apply(start):
    return [function(item) for item in items[start : start + size]]

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    chunks = pool.map(apply, range(0, len(items), size))
    return [result for chunk in chunks for result in chunk]


def read_caption(text: bytes | str | None) -> tuple[str, str]:
  """-> (caption, what is wrong with it or "").

  UTF-8, with or without a byte order mark; runs of white space become one space.

  A text that cannot be read gives an empty caption. In a str, "surrogateescape" marks bytes that were not
  decoded.
  """
  try:
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text or b""
    if len(raw) > LONGEST_CAPTION:
      return "", f"its caption has more than {LONGEST_CAPTION} bytes: an empty one is used"
    caption = " ".join(raw.decode("utf-8-sig").split())
  except UnicodeError:
    return "", "its caption is not UTF-8: an empty one is used"
  if not caption:
    return "", "no caption: an empty one is used"
  return caption, ""


def read_shots(entries) -> tuple[str, tuple[tuple[float, str], ...]]:
  """[{"seconds": 2.0, "prompt": "..."}, ...], one after another -> (caption, shots) of an Item.

  ValueError where they are something else. The last goes on to the end of the file.
  """
  shots, start = [], 0.0
  for entry in entries:
    seconds, prompt = float(entry["seconds"]), read_caption(entry["prompt"])[0]
    if not 0 < seconds < math.inf or not prompt:
      raise ValueError(f"{entry} is no shot")
    shots.append((start, prompt))
    start += seconds
  if not shots:
    raise ValueError("there are no shots")
  return join_shots(shots), tuple(shots)


def join_shots(shots):
  """The caption of an Item with shots."""
  return " ".join(caption for _, caption in shots)


def shots_of_piece(shots, start, frames, fps, stride):
  """Shots of a file -> [(first latent frame, caption)] of a piece of it that begins at `start` seconds.

  A shot of less than a latent frame is left out. stride: of latents in time.
  """
  latents, found = 1 + (frames - 1) // stride, {}
  for begin, caption in shots:
    at = masks.latent_of_frame(round((begin - start) * fps), stride)
    if at < latents:
      found[at] = caption
  return sorted(found.items())


def whole_frames(frames, stride):
  """The largest 1 + stride * n <= frames: the frames that a causal VAE of this temporal stride encodes."""
  return 1 + stride * ((frames - 1) // stride)


def pieces(
  frames: Iterable[np.ndarray], fps: float, max_seconds: float, stride: int, first: int = 0
) -> Iterator[tuple[np.ndarray, float, int]]:
  """Cuts images [H, W, 3] at a constant rate into pieces -> (video_THWC, start, frames left out after it).

  A piece has 1 + stride * n frames and lasts at most `max_seconds`, but has at least one frame; 0 sets no
  limit and gives one piece. `start` is in seconds; `first` is the number of frames before these. Frames are
  left out only at the end:
  fewer than `stride`, or exactly `stride` if they would make a piece without motion. One piece and stride + 1
  frames are in memory at a time. If `frames` raises BadClip, the pieces that are complete by then
  are yielded first.
  """
  length = whole_frames(max(1, math.floor(max_seconds * fps + 1e-3)), stride) if max_seconds else None
  # The frames of the shortest last piece with motion.
  lookahead = 1 if length is None or length < stride + 1 else stride + 1
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
    if length and len(held) == length + lookahead:
      piece, held = np.stack(held[:length]), held[length:]
      yield piece, start / fps, 0
      start += length
  if held:
    keep = min(whole_frames(len(held), stride), length or len(held))
    yield np.stack(held[:keep]), start / fps, len(held) - keep


def crop(video_THWC, stride):
  """The middle of the frames, cut to multiples of the stride (t, y, x), and the first 1 + t n frames; a view.

  Raises BadClip if a frame is smaller than one stride.
  """
  frames, height, width, _ = video_THWC.shape
  _, sy, sx = stride
  if height < sy or width < sx:
    raise BadClip("too small", f"{width} x {height} pixels; at least {sx} x {sy}")
  t, h, w = whole_frames(frames, stride[0]), height // sy * sy, width // sx * sx
  top, left = (height - h) // 2, (width - w) // 2
  return video_THWC[:t, top : top + h, left : left + w]
