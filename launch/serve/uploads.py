"""Files that a page sent: checked by what is in them, kept under a name made from their content.

A request names them by that name, never by a path.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import secrets
import stat

from sora_jax import files, video
from sora_jax.errors import BadInput

# Where and with what a file begins -> its suffix. Only these are opened: FFmpeg also knows playlists, which
# name other files.
BEGINNINGS = (
  (0, b"\x89PNG\r\n\x1a\n", ".png"),
  (0, b"\xff\xd8\xff", ".jpg"),
  (0, b"GIF8", ".gif"),
  (0, b"\x1a\x45\xdf\xa3", ".webm"),
  (4, b"ftyp", ".mp4"),
  (8, b"WEBP", ".webp"),
  (8, b"AVI ", ".avi"),
)
TYPES = {
  ".png": "image/png",
  ".jpg": "image/jpeg",
  ".gif": "image/gif",
  ".webp": "image/webp",
  ".mp4": "video/mp4",
  ".webm": "video/webm",
  ".avi": "video/x-msvideo",
}
ID = re.compile(r"[0-9a-f]{32}")
FRAME = 1 << 26  # pixels of one frame of a file or a result: 200 MB of bytes
PIXELS = 1 << 30  # of all its frames: 3 GB


@dataclasses.dataclass(frozen=True)
class Upload:
  """A file that was checked. name: its name where it came from, only to be shown."""

  id: str
  path: pathlib.Path
  name: str
  frames: int
  fps: float | None
  size: tuple

  def view(self):
    """What a page is told."""
    return dataclasses.asdict(self) | {"path": None, "type": TYPES[self.path.suffix]}


class Uploads:
  """The files in a folder. Methods may be called from any thread."""

  def __init__(self, folder):
    self.folder, self._known = pathlib.Path(folder), {}
    self.folder.mkdir(parents=True, exist_ok=True)
    for path in self.folder.glob(".*.part*"):  # of a program that was killed
      path.unlink()

  def begin(self):
    """A path to write to, for `take`."""
    return self.folder / f".{secrets.token_hex(16)}.part"

  def take(self, partial, name):
    """A file that was written whole -> Upload. BadInput where it is no image or video that can be read."""
    name = re.sub(r"[^\w. -]+", "_", name)[:80] or "the file"
    path = partial.with_suffix(f".part{_suffix(partial, name)}")
    os.rename(partial, path)
    try:
      frames, fps, size = _measure(path, name)
      digest = hashlib.sha256()
      for piece in files.pieces_of(path):
        digest.update(piece)
      key = digest.hexdigest()[:32]
      upload = Upload(key, self.folder / f"{key}{path.suffix}", name, frames, fps, size)
      os.replace(path, upload.path)
    finally:
      path.unlink(missing_ok=True)
    self._known[key] = upload
    return upload

  def get(self, key):
    """The Upload of an id; None where there is none."""
    upload = self._known.get(key) if isinstance(key, str) and ID.fullmatch(key) else None
    return upload if upload and is_inside(self.folder, upload.path.name) else None

  def shown(self, text):
    """A message without the paths of uploads."""
    for upload in list(self._known.values()):
      text = text.replace(str(upload.path), upload.name)
    return text.replace(f"{self.folder}{os.sep}", "")


def is_inside(folder, name):
  """Is `name` a plain file, and no link, right in the folder?"""
  if name != os.path.basename(name) or name.startswith("."):
    return False
  try:
    return stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode)
  except (OSError, ValueError):
    return False


def check_pixels(what, frames, size):
  """BadInput where so many frames would fill the memory."""
  pixels = size[0] * size[1]
  if pixels > FRAME or frames * pixels > PIXELS:
    raise BadInput(
      f"{what} has {frames} frames of {size[0]} x {size[1]} pixels; at most {FRAME / 1e6:,.0f} million "
      f"pixels a frame, and {PIXELS / 1e6:,.0f} million in all, are taken here: make it smaller or shorter"
    )


def _suffix(path, name):
  """By the first bytes of a file."""
  with open(path, "rb") as f:
    head = f.read(16)
  for at, begins, suffix in BEGINNINGS:
    if head[at:].startswith(begins):
      return suffix
  path.unlink()
  raise BadInput(f"{name} is no image or video that is taken here; send {', '.join(TYPES)}")


def _measure(path, name):
  """A file -> (frames, frames a second or None of a still, (height, width)). Its first frame is decoded."""
  try:
    reader = video.Reader(path)
    check_pixels(name, reader.count, reader.stored_size)  # before a frame takes memory
    size = next(iter(reader)).image_HWC.shape[:2]
  except (video.BadClip, StopIteration) as error:
    raise BadInput(f"{name} cannot be read: {error}") from None
  return reader.count, reader.fps, size
