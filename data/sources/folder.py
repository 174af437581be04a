"""A user's folder: any tree of videos and images, with captions beside them.

  videos     mp4 mkv webm mov gif avi;  images  png jpg jpeg webp
  captions   NAME.txt beside NAME.mp4, or captions.jsonl ({"file": "a/b.mp4", "caption": "..."}, seen from the folder
             that it lies in); where both speak of a file, NAME.txt is taken

A file without a caption is kept, with an empty one, and noted. What is taken of a file, see data/curation.py.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from data import curation
from data.clips import LONGEST_CAPTION, Dropped, Item, RawClip, map_in_threads, read_caption, version
from sora_jax import video
from sora_jax.errors import BadInput

CAPTIONS = "captions.jsonl"
SUFFIXES = video.VIDEO_SUFFIXES + video.IMAGE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class Source(curation.FileSource):
  """Clips of a folder; the files that are none are in `ignored`."""

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """Pieces in order; BadClip where the file cannot be read any further."""
    return curation.read(item.location, item, self.rules)


def open_source(config) -> Source:
  """config: path, and the fields of data.curation.Rules, each of which may be missing.

  BadInput if there is no such folder, or no clip in it.
  """
  root = pathlib.Path(config.path)
  if not root.is_dir():
    raise BadInput(f"{root}: " + ("is a file; give the folder that holds it, a manifest or tar shards" if root.exists() else
                   "there is no such folder; give one that holds videos or images"))
  paths = list(_walk(root))
  files = {_name(root, path): path for path in paths if path.suffix.lower() in SUFFIXES}
  if not files:
    raise BadInput(f"{root}: no clips in it (of {len(paths)} files); it takes {' '.join(s[1:] for s in SUFFIXES)}, "
                   "in any tree of folders")
  captions, notes = _captions(root, paths, files)
  noted = {file for file, _ in notes}
  notes += [(file, read_caption("")[1]) for file in files if not captions.get(file) and file not in noted]
  ignored = [(_name(root, path), "neither a clip nor a caption, by its name") for path in paths
             if path.suffix.lower() not in (*SUFFIXES, ".txt") and path.name != CAPTIONS]
  items, names = [], sorted(files)
  for file, (found, wrong) in zip(names, map_in_threads(file_version, [files[file] for file in names]), strict=True):
    if wrong:
      ignored.append((file, wrong))
    else:
      items.append(Item(file, captions.get(file, ""), found, files[file]))
  return Source(root.resolve().name, tuple(items), tuple(sorted(notes)), tuple(ignored), curation.Rules.of(config))


def file_version(path):
  """-> (Item.version of a whole file, why there is none or "": a link may lead nowhere, a file belong to others)."""
  try:
    with open(path, "rb") as f:
      return version(f, 0, os.fstat(f.fileno()).st_size), ""
  except OSError as error:
    return "", f"cannot be opened: {error.strerror}"


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
  texts = [path for path in paths if path.suffix.lower() == ".txt"]
  notes += [(_name(root, path), "a caption without a clip") for path in texts if path.with_suffix("") not in stems]
  texts = [path for path in texts if path.with_suffix("") in stems]
  for path, (raw, wrong) in zip(texts, map_in_threads(_read_caption, texts), strict=True):
    text, fault = read_caption(raw)
    wrong = wrong or fault
    for file in stems[path.with_suffix("")]:
      if wrong:
        notes.append((file, f"{_name(root, path)}: {wrong}"))
      elif captions.get(file, text) != text:
        notes.append((file, f"has two captions: that of {_name(root, path)} is taken"))
      captions[file] = text
  return captions, notes


def _read_jsonl(root, path, files, notes):
  """{file: caption} of one captions.jsonl; a line that is wrong is noted, and the others are taken."""
  found, (raw, wrong) = {}, _read_bytes(path)
  if wrong:
    notes.append((_name(root, path), wrong))
  for number, line in enumerate(raw.split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
      file, caption = entry["file"], entry["caption"]
      if not isinstance(file, str) or not isinstance(caption, str):
        raise TypeError
    except (ValueError, KeyError, TypeError):
      notes.append((_name(root, path), f'line {number} is not {{"file": "...", "caption": "..."}} in UTF-8'))
      continue
    file = os.path.normpath(os.path.join(_name(root, path.parent), file)).replace(os.sep, "/")
    if file not in files:
      notes.append((_name(root, path), f"line {number} speaks of {file}, which is not there"))
    found[file], wrong = read_caption(caption)
    if wrong and caption.strip():
      notes.append((file, wrong))
  return found


def _read_caption(path):
  return _read_bytes(path, LONGEST_CAPTION + 1)


def _read_bytes(path, most=-1):
  """(the bytes of a file, or so many of them; why there are none, or "")."""
  try:
    with open(path, "rb") as f:
      return f.read(most), ""
  except OSError as error:
    return b"", f"cannot be opened: {error.strerror}"
