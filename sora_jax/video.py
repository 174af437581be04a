"""Reads and writes video and image files, through PyAV (FFmpeg's libraries).

Reading gives every frame with its presentation time, as upright RGB. A damaged file raises BadClip; it never
gives fewer or different frames silently. Writing gives H.264 that browsers play, with colours that survive a
round trip.

Frame rates in files are not trusted: frames have presentation times, and `resample` converts them to a
constant rate. Colour is converted by the stream's own tags (ITU-T H.273): matrix bt601, bt709, bt2020 or
smpte240m, limited or full range, any bit depth. An untagged stream is read as bt709 from 720 lines on and as
bt601 below, in limited range unless its pixel format has full range, and `Reader.notes` says so.
"""

import contextlib
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import (
  ColorPrimaries,
  ColorRange,
  Colorspace,
  ColorTrc,
  Interpolation,
  VideoReformatter,
)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".gif", ".avi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# ITU-T H.273 table 4, matrix coefficients -> the names of libswscale.
_MATRICES = {
  1: Colorspace.ITU709,
  4: Colorspace.FCC,
  5: Colorspace.ITU601,
  6: Colorspace.ITU601,
  7: Colorspace.SMPTE240M,
  9: Colorspace.BT2020,
  10: Colorspace.BT2020,
}
_UNTAGGED = (0, 2, 3)  # H.273: RGB (which a YUV stream is not), unspecified, reserved
_HDR = {16: "PQ", 18: "HLG"}  # H.273 table 3, transfer characteristics
_EXACT = (
  Interpolation.BILINEAR
  | Interpolation.ACCURATE_RND
  | Interpolation.FULL_CHR_H_INT
  | Interpolation.BITEXACT
)  # fmt: skip
_STILL_FORMATS = ("image2", "png_pipe", "jpeg_pipe", "webp_pipe")
_MAX_DENOMINATOR = 1001  # of frame rates: 30000/1001 and similar rates are exact
NEAR = 0.001  # seconds: the precision of times in files


class BadClip(Exception):
  """A file that cannot be used, or not from some frame on. `kind` is one of KINDS; `detail` explains it."""

  KINDS = (
    "unreadable",
    "not a video",
    "not supported",
    "no frames",
    "truncated",
    "corrupt",
    "bad times",
    "too small",
  )

  def __init__(self, kind, detail=""):
    if kind not in self.KINDS:
      raise ValueError(f"BadClip: kind {kind!r}; known: {', '.join(self.KINDS)}")
    super().__init__(f"{kind}: {detail}" if detail else kind)
    self.kind, self.detail = kind, detail


class Frame(NamedTuple):
  """time: seconds since the first frame. seconds: the frame's duration. image_HWC: RGB uint8, upright."""

  time: float
  seconds: float
  image_HWC: np.ndarray


class Reader:
  """An opened file. Iterating decodes it from the start and yields Frames, in constant memory.

  count: number of frames that the file should have. fps: their average rate, (count - 1) / span of
  presentation times; None for a still. still: whether the file is a picture. stored_size: the (height, width)
  that the file names, before frames are turned upright. notes: assumptions, and tags that were ignored;
  complete once the first frame is decoded.

  Opening raises BadClip of kind unreadable, not a video, not supported, no frames, truncated, bad times.
  Iterating raises BadClip of kind corrupt, truncated, bad times, not supported; frames before it were good.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.notes = []
    with _libav_errors("opening"):
      _check_bytes(self.path)
    with _libav_errors("opening"), _open(self.path) as container:
      stream = _video_stream(container)
      self.still = container.format.name in _STILL_FORMATS
      self.stored_size = stream.height, stream.width
      declared_seconds = _declared_seconds(container, stream)
      times, declared, last = [], stream.frames, 0
      for packet in container.demux(stream):
        if packet.size and packet.is_discard:  # an edit list removes it
          declared -= 1
        elif packet.size:
          times.append(packet.pts if packet.pts is not None else packet.dts)
          last = packet.duration or 0
      self._declared, time_base = max(0, declared), stream.time_base
    self.count, self.fps, self._first = len(times), None, 0.0
    if not times:
      raise BadClip("no frames")
    if self._declared > len(times):
      raise BadClip("truncated", f"{len(times)} of {self._declared} frames are in the file")
    if self.still:
      return
    if None in times:
      raise BadClip("bad times", "frames without a presentation time")
    self._first = float(min(times) * time_base)
    span = (max(times) - min(times)) * time_base
    if len(set(times)) < 0.9 * len(times):
      raise BadClip("bad times", f"{len(times)} frames within {float(span):g} s")
    interval = span / (len(times) - 1) if span else last * time_base
    end = float(span + last * time_base)
    slack = float(3 * interval) if span else 0.5  # a single frame may have no duration
    if not self._declared and declared_seconds and declared_seconds - end > slack + 0.01:
      raise BadClip("truncated", f"ends at {end:.3f} s of {declared_seconds:.3f} s")
    self.fps = float(1 / interval) if span else None

  def __iter__(self) -> Iterator[Frame]:
    return self.frames()

  def frames(self, start=0.0) -> Iterator[Frame]:
    """Yields Frames in order of presentation; time 0 is the first frame of the file.

    start: seconds; only frames from this time on. Decoding starts at the last key frame at or before it.
    """
    previous, longest, decoded = None, 0.0, 0
    first = self._first if start else None
    for frame, image in self._decode(start):
      decoded += 1
      if frame.pts is None:
        raise BadClip("bad times", f"frame {decoded} has no presentation time")
      time = float(frame.pts * frame.time_base)
      first = time if first is None else first
      time -= first
      if previous is not None:
        seconds = time - previous.time
        if seconds < 0:
          raise BadClip("bad times", f"time runs backwards at {previous.time:.3f} s")
        longest = max(longest, seconds)
        yield previous._replace(seconds=seconds)
      previous = Frame(time, float((frame.duration or 0) * frame.time_base), image)
    if previous is None:
      raise BadClip("no frames", f"none from {start:g} s on" if start else "")
    if decoded < self._declared and not start:
      raise BadClip("truncated", f"{decoded} of {self._declared} frames could be decoded")
    average = 1 / self.fps if self.fps else 0.0
    seconds = min(previous.seconds or average, longest) or average
    yield previous._replace(seconds=seconds)

  def _decode(self, start, seek=True):
    """Yields (av frame, image) in order of presentation, from `start` seconds after the first frame on."""
    begin = self._first + start
    complete = not (start and seek)  # whether an earlier frame was decoded, so that none is missed
    with _libav_errors("decoding"), _open(self.path) as container:
      stream = _video_stream(container)
      stream.thread_type = "AUTO"
      if self.still:  # otherwise a truncated JPEG is a picture with a grey end
        stream.codec_context.options = {"err_detect": "explode"}
      if not complete:
        container.seek(int(begin / stream.time_base), stream=stream)  # to the last key frame before it
      to_rgb, shape = _ToRGB(self.path, self.notes), None
      for frame in container.decode(stream):
        if start and frame.time is not None and frame.time < begin - NEAR:
          complete = True
          continue
        if not complete and frame.time is not None and frame.time > begin + NEAR:
          # A file without an index is decoded from its start.
          yield from self._decode(start, seek=False)
          return
        complete = True
        if frame.is_corrupt:
          raise BadClip("corrupt", f"at {frame.time or 0:.3f} s")
        if shape not in (None, (frame.width, frame.height)):
          raise BadClip(
            "not supported",
            f"its size changes at {frame.time or 0:.3f} s from {shape[0]} x {shape[1]} to "
            f"{frame.width} x {frame.height}",
          )
        if shape is None:
          _note_oddities(frame, stream, self.notes)
        shape = frame.width, frame.height
        yield frame, to_rgb(frame)


def read(path) -> Iterator[Frame]:
  """Yields the Frames of a video or image, in order. Raises as Reader does."""
  return iter(Reader(path))


def load(path, fps=None):
  """A whole file at a constant rate -> (video_THWC uint8, fps). fps: None for the file's average rate.

  A still is one frame, at fps (or 1).
  """
  reader = Reader(path)
  fps = float(fps or reader.fps or 1)
  return np.stack(list(resample(reader, fps, reader.fps))), fps


def resample(frames: Iterable[Frame], fps, native_fps=None) -> Iterator[np.ndarray]:
  """Yields images [H, W, 3] at a constant rate, at least one. Image k is the frame shown at k / fps + offset.

  native_fps: the average rate of the frames (Reader.fps). The offset is half an interval of the faster rate,
  so times may be rounded or jitter by that much: a file of constant rate gives every frame at its own rate,
  and every second frame at half of it. Where the rate varies, each image is shown as long as its frame was.
  """
  k, image, offset = 0, None, 0.5 / max(fps, native_fps or fps)
  for frame in frames:
    image = frame.image_HWC
    while k / fps + offset < frame.time + frame.seconds:
      yield image
      k += 1
  if k == 0 and image is not None:
    yield image


def write_mp4(path, video_THWC, fps, crf=18):
  """Writes RGB uint8 frames as H.264 High, 4:2:0, bt709 in limited range.

  video_THWC: an array, or any iterable of [H, W, 3].
  The file is written atomically. Its index comes first, so that it plays while it loads. 4:2:0 has even sizes
  only: where height or width is odd, the last row or column is repeated, and nothing is cropped. fps: frames
  a second, exact for rates like 30000/1001. Returns the (height, width) of the file. Raises ValueError where
  there is no frame, or frames differ in shape.
  """
  frames = iter(video_THWC)
  first = next(frames, None)
  if first is None:
    raise ValueError(f"{path}: a video needs a frame")
  height, width = (n + n % 2 for n in first.shape[:2])
  rate = Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
  reformatter = VideoReformatter()
  with _replacing(path) as temporary:
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
      # cpu-independent: x264's AVX-512 code sometimes gives a different file for the same frames.
      options = {"crf": str(crf), "profile": "high", "x264-params": "cpu-independent=1"}
      stream = container.add_stream("libx264", rate=rate, options=options)
      stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
      context = stream.codec_context
      context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
      context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
      context.time_base = 1 / rate
      for index, image in enumerate(_chain(first, frames)):
        if image.shape != first.shape or image.dtype != np.uint8:
          raise ValueError(
            f"{path}: frame {index} is {image.dtype} {image.shape}; all must be uint8 {first.shape}"
          )
        padding = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
        even = np.ascontiguousarray(np.pad(image, padding, "edge"))
        frame = reformatter.reformat(
          av.VideoFrame.from_ndarray(even, format="rgb24"),
          format="yuv420p",
          src_colorspace=Colorspace.ITU709,
          dst_colorspace=Colorspace.ITU709,
          src_color_range=ColorRange.JPEG,
          dst_color_range=ColorRange.MPEG,
          interpolation=_EXACT | Interpolation.FULL_CHR_H_INP,
        )
        frame.pts, frame.time_base = index, 1 / rate
        container.mux(stream.encode(frame))
      container.mux(stream.encode(None))
  return height, width


def write_png(path, image_HWC):
  """Writes an RGB uint8 image as PNG. The file is written atomically."""
  height, width, _ = image_HWC.shape
  options = {"update": "1"}  # one file, not a numbered series
  with _replacing(path) as temporary:
    with av.open(str(temporary), "w", format="image2", options=options) as container:
      stream = container.add_stream("png", rate=1)
      stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
      container.mux(stream.encode(frame))
      container.mux(stream.encode(None))


class _ToRGB:
  """Converts an av frame to RGB uint8 [H, W, 3], upright, with transparent pixels over black.

  It adds each assumption that it makes to `notes` once.
  """

  def __init__(self, path, notes):
    self._path, self._notes, self._reformatter = path, notes, VideoReformatter()

  def __call__(self, frame):
    alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    target = "rgba" if alpha else "rgb24"
    if frame.format.is_rgb or frame.format.has_palette:
      image = self._reformatter.reformat(frame, format=target, interpolation=_EXACT).to_ndarray()
    else:
      matrix, full = self._tags(frame)
      image = self._reformatter.reformat(
        frame,
        format=target,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        interpolation=_EXACT,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
      ).to_ndarray()
    if alpha:
      image = (image[..., :3].astype(np.uint16) * image[..., 3:] + 127) // 255
    return np.ascontiguousarray(_upright(image.astype(np.uint8, copy=False), frame, self._path))

  def _tags(self, frame):
    """(matrix, whether it has full range) of a YUV frame."""
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    if all(c.is_luma or c.is_alpha for c in frame.format.components):  # grey: no colours to convert
      return Colorspace.ITU709, full
    if frame.colorspace in _MATRICES:
      return _MATRICES[frame.colorspace], full
    if frame.colorspace not in _UNTAGGED:
      raise BadClip("not supported", f"colour matrix {frame.colorspace} of ITU-T H.273")
    name, matrix = ("bt709", Colorspace.ITU709) if frame.height >= 720 else ("bt601", Colorspace.ITU601)
    note = f"colours are not tagged: taken as {name}, {'full' if full else 'limited'} range"
    if note not in self._notes:
      self._notes.append(note)
    return matrix, full


def _upright(image, frame, path):
  """The image, rotated and mirrored by a display matrix (ISO/IEC 14496-12, 8.5.3) or EXIF's orientation."""
  try:
    matrix = frame.side_data.get("DISPLAYMATRIX")
  except ValueError:  # PyAV 18.1 raises it for side data that it does not know, such as EXIF
    matrix = _EXIF_MATRICES.get(_exif_orientation(path))
    if matrix is None:
      return np.rot90(image, round(frame.rotation / 90))  # degrees counterclockwise
  if matrix is None:
    return image
  if not isinstance(matrix, tuple):
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]
    matrix = (a, b, c, d)
  a, b, c, d = matrix  # the pixel (x, y) is shown at (a x + c y, b x + d y), up to a translation
  if abs(b) > abs(a):
    image, a, d = image.swapaxes(0, 1), c, b
  return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# EXIF 2.32, tag 274: the matrix (a, b, c, d) of each orientation.
_EXIF_MATRICES = {
  1: (1, 0, 0, 1),
  2: (-1, 0, 0, 1),
  3: (-1, 0, 0, -1),
  4: (1, 0, 0, -1),
  5: (0, 1, 1, 0),
  6: (0, 1, -1, 0),
  7: (0, -1, -1, 0),
  8: (0, -1, 1, 0),
}


def _exif_orientation(path):
  """The orientation in a picture's EXIF block (TIFF 6.0, section 2); None without one."""
  with open(path, "rb") as f:
    head = f.read(1 << 18)
  for mark in (b"Exif\0\0", b"eXIf", b"EXIF"):  # JPEG, PNG, WebP (where the length of the chunk comes first)
    at = head.find(mark)
    tiff = head[at + len(mark) :] if at >= 0 else b""
    tiff = tiff[4:] if mark == b"EXIF" else tiff
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
      continue
    directory = int.from_bytes(tiff[4:8], order)
    for entry in range(int.from_bytes(tiff[directory : directory + 2], order)):
      field = tiff[directory + 2 + 12 * entry :][:12]
      if int.from_bytes(field[:2], order) == 274:
        return int.from_bytes(field[8:10], order)
  return None


def _note_oddities(frame, stream, notes):
  """Adds to `notes` the properties of a stream that are ignored."""
  if frame.color_trc in _HDR:
    notes.append(f"HDR ({_HDR[frame.color_trc]}) taken without tone mapping: it looks flat")
  if frame.interlaced_frame:
    notes.append("interlaced: taken as it is")
  ratio = stream.sample_aspect_ratio
  if ratio and ratio != 1:
    notes.append(f"pixels are not square ({ratio.numerator}:{ratio.denominator}): taken as stored")


def _open(path):
  """An opened container. Titles and other tags of a file need not be UTF-8."""
  return av.open(str(path), metadata_errors="replace")


def _video_stream(container):
  """The video stream of a file. Raises BadClip where there is none, or its codec is unknown."""
  stream = container.streams.best("video")
  if stream is None or stream.codec_context is None:
    raise BadClip("not a video", "no picture in it" if stream is None else "its codec is not known")
  return stream


def _declared_seconds(container, stream):
  """Duration of the video in the file's metadata; None without one, or where it may be that of the sound."""
  if stream.duration:
    return float(stream.duration * stream.time_base)
  tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""), re.ASCII)
  if tag:  # Matroska: 00:00:01.600000000
    hours, minutes, seconds = map(float, tag.groups())
    end = hours * 3600 + minutes * 60 + seconds
    return end - float((stream.start_time or 0) * stream.time_base)
  if container.duration and len(container.streams) == 1:
    return container.duration / av.time_base
  return None


def _check_bytes(path):
  """Raises BadClip for truncated files that libavformat does not report, and for animated WebP.

  libavformat cannot decode animated WebP.
  """
  size = os.path.getsize(path)
  with open(path, "rb") as f:
    head = f.read(64)
    f.seek(-min(64, size), os.SEEK_END)
    tail = f.read()
    if head[4:8] == b"ftyp":
      _check_boxes(f, size)
  if head[:3] == b"GIF" and b"\x3b" not in tail:  # the trailer: GIF89a, section 27
    raise BadClip("truncated", "a GIF without its trailer")
  if head[8:12] == b"WEBP" and b"ANIM" in head:
    raise BadClip("not supported", "an animated webp; convert it to mp4 or gif")


def _check_boxes(f, size):
  """Raises BadClip for a truncated mp4 or mov.

  Such a file is a sequence of boxes, one of which is the index, `moov` (ISO/IEC 14496-12, 4.2).
  """
  at, kinds = 0, set()
  while at + 8 <= size:
    f.seek(at)
    length, kind = struct.unpack(">I4s", f.read(8))
    if length == 1 and at + 16 <= size:
      (length,) = struct.unpack(">Q", f.read(8))
    if 0 < length < 8:
      break  # not a box: other data was appended
    at += length or size - at  # 0: up to the end of the file
    if at > size and kind in (b"mdat", b"moov"):
      raise BadClip("truncated", f"{size} of {at} bytes")
    kinds.add(kind)
  if b"moov" not in kinds:
    raise BadClip("truncated", "its index is missing")


@contextlib.contextmanager
def _libav_errors(doing):
  """Turns the errors of PyAV into BadClip. doing: "opening" or "decoding"."""
  try:
    yield
  except av.error.InvalidDataError as e:
    raise BadClip("not a video" if doing == "opening" else "corrupt", "cannot be decoded") from e
  except av.error.EOFError as e:
    raise BadClip("truncated", "the file ends too early") from e
  except (av.error.DecoderNotFoundError, av.error.PatchWelcomeError) as e:
    raise BadClip("not supported", e.strerror or str(e)) from e
  except (av.error.FFmpegError, OSError) as e:
    raise BadClip("unreadable" if doing == "opening" else "corrupt", e.strerror or str(e)) from e


@contextlib.contextmanager
def _replacing(path):
  """A temporary file in the folder of `path`: renamed to it on success, removed on failure."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _chain(first, rest):
  yield first
  yield from rest
