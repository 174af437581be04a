"""A user's folder: any tree of videos and images, with captions beside them.

  videos     mp4 mkv webm mov gif avi;  images  png jpg jpeg webp
  captions   NAME.txt beside NAME.mp4, or captions.jsonl ({"file": "a/b.mp4", "caption": "..."}, seen from the folder
             that it lies in); where both speak of a file, NAME.txt is taken

Files are kept at their native size and, unless `fps` is given, at their own average rate, by presentation times; videos
longer than `max_seconds` become consecutive pieces. A file without a caption is kept, with an empty one, and noted.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from data.clips import Item, RawClip, pieces
from sora_jax import video
from sora_jax.errors import BadInput

CAPTIONS = "captions.jsonl"
STILL_FPS = 1.0       # rate of a picture that was not asked for at another: it has no motion


@dataclasses.dataclass(frozen=True)
class Source:
  """Clips of a folder. notes: (file, text) of what the listing found wrong; ignored: (file, why) of other files."""
  root: pathlib.Path
  listed: tuple[Item, ...]
  notes: tuple[tuple[str, str], ...]
  ignored: tuple[tuple[str, str], ...]
  max_seconds: float
  fps: float
  name: str

  def items(self) -> list[Item]:
    return list(self.listed)

  def read(self, item: Item) -> Iterator[RawClip]:
    """Pieces in order; BadClip where the file cannot be read any further."""
    reader = video.Reader(item.where)
    fps = self.fps or reader.fps or STILL_FPS
    for images, start, left_out in pieces(video.resample(reader, fps, reader.fps), fps, self.max_seconds):
      yield RawClip(images, fps, item.caption, item.file, start, left_out, tuple(reader.notes))


def open_source(config) -> Source:
  """config: path; max_seconds (0: videos are not cut); fps (None or 0: each file's own).

  BadInput if there is no such folder, or no clip in it.
  """
  root = pathlib.Path(config.path)
  if not root.is_dir():
    raise BadInput(f"{root}: " + ("is a file; give the folder that holds it" if root.exists() else
                   "there is no such folder; give one that holds videos or images"))
  paths = list(_walk(root))
  suffixes = video.VIDEO_SUFFIXES + video.IMAGE_SUFFIXES
  files = {_name(root, path): path for path in paths if path.suffix.lower() in suffixes}
  if not files:
    raise BadInput(f"{root}: no clips in it (of {len(paths)} files); it takes {' '.join(s[1:] for s in suffixes)}, "
                   "in any tree of folders")
  captions, notes = _captions(root, paths, files)
  notes += [(file, "no caption: kept with an empty one") for file in files
            if not captions.get(file) and not any(file == noted for noted, _ in notes)]
  ignored = tuple((_name(root, path), "neither a clip nor a caption, by its name") for path in paths
                  if path.suffix.lower() not in (*suffixes, ".txt") and path.name != CAPTIONS)
  unreadable = {file: reason for file, path in files.items() if (reason := _unreadable(path))}
  ignored += tuple(unreadable.items())
  items = tuple(Item(file, captions.get(file, ""), str(path.stat().st_size), path)
                for file, path in sorted(files.items()) if file not in unreadable)
  return Source(root, items, tuple(sorted(notes)), ignored, float(config.max_seconds or 0), float(config.fps or 0),
                root.resolve().name)


def _unreadable(path):
  """Why a file cannot be read, or None: links that lead nowhere, and what belongs to others."""
  try:
    with open(path, "rb"):
      return None
  except OSError as error:
    return f"cannot be opened: {error.strerror}"


def _walk(root):
  """Files under root, links followed but no folder entered twice; hidden ones are no one's clips."""
  entered = set()
  for folder, folders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    folders[:] = [] if real in entered else sorted(f for f in folders if not f.startswith("."))
    if real not in entered:
      yield from (pathlib.Path(folder, name) for name in sorted(names) if not name.startswith("."))
    entered.add(real)


def _name(root, path):
  """The path from the root, with slashes; bytes that are not UTF-8 are written as \\xNN."""
  return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _captions(root, paths, files):
  """({file: caption}, notes)."""
  captions, notes, stems = {}, [], {}
  for file, path in files.items():
    stems.setdefault(path.with_suffix(""), []).append(file)
  for path in paths:
    if path.name == CAPTIONS:
      captions.update(_read_jsonl(root, path, files, notes))
  for path in paths:
    if path.suffix.lower() != ".txt":
      continue
    text = _read_text(path)
    for file in stems.get(path.with_suffix(""), ()):
      if text is None:
        notes.append((file, f"its caption {_name(root, path)} is not UTF-8: kept with an empty one"))
        text = ""
      elif captions.get(file, text) != text:
        notes.append((file, f"has two captions: that of {_name(root, path)} is taken"))
      captions[file] = text
    if path.with_suffix("") not in stems:
      notes.append((_name(root, path), "a caption without a clip"))
  return captions, notes


def _read_jsonl(root, path, files, notes):
  """{file: caption} of one captions.jsonl; a line that is wrong is noted, and the others are taken."""
  text, found = _read_text(path, lines=True), {}
  if text is None:
    notes.append((_name(root, path), "is not UTF-8: none of its captions is taken"))
    return found
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
      file, caption = entry["file"], entry["caption"]
      if not isinstance(file, str) or not isinstance(caption, str):
        raise TypeError
    except (ValueError, KeyError, TypeError):
      notes.append((_name(root, path), f'line {number} is not {{"file": "...", "caption": "..."}}'))
      continue
    file = os.path.normpath(os.path.join(_name(root, path.parent), file)).replace(os.sep, "/")
    if file not in files:
      notes.append((_name(root, path), f"line {number} speaks of {file}, which is not there"))
    found[file] = " ".join(caption.split())
  return found


def _read_text(path, lines=False):
  """UTF-8 text, byte order mark or not; white space becomes single spaces unless `lines`; None: it is not UTF-8."""
  try:
    text = path.read_text("utf-8-sig")
  except (OSError, UnicodeDecodeError):
    return None
  return text if lines else " ".join(text.split())
