"""A folder of a user: any tree of videos and images, with captions beside them.

  videos     mp4 mkv webm mov gif avi;  images  png jpg jpeg webp
  captions   NAME.txt beside NAME.mp4, or captions.jsonl ({"file": "a/b.mp4", "caption": "..."}, with paths
             relative to the folder of captions.jsonl); if a file has both, NAME.txt is used. Several
             captions, one after another in time: "shots": [{"seconds": 2, "prompt": "..."}, ...] instead

A file without a caption is kept with an empty one, and this is noted. data/curation.py turns files into
clips.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

from data import curation
from data.clips import (
  LONGEST_CAPTION,
  Dropped,
  Item,
  RawClip,
  map_in_threads,
  read_caption,
  read_shots,
  version,
)
from sora_jax import video
from sora_jax.errors import BadInput

CAPTIONS = "captions.jsonl"
LINE = '{"file": "...", "caption": "..."}, or with "shots": [{"seconds": 2, "prompt": "..."}, ...]'
SUFFIXES = video.VIDEO_SUFFIXES + video.IMAGE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class Source(curation.FileSource):
  """Clips of a folder; item.location: the path. Files that are not clips are in `ignored`."""

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """The pieces in order. Raises BadClip where the file cannot be read any further."""
    return curation.read(item.location, item, self.rules)


def open_source(config) -> Source:
  """config: path, and the fields of data.curation.Rules, each optional.

  Raises BadInput if there is no such folder, or no clip in it.
  """
  root = pathlib.Path(config.path)
  if not root.exists():
    raise BadInput(f"{root}: there is no such folder; give one that holds videos or images")
  if not root.is_dir():
    raise BadInput(f"{root}: is a file; give the folder that holds it, a manifest or tar shards")
  paths = list(_walk(root))
  files = {_name(root, path): path for path in paths if path.suffix.lower() in SUFFIXES}
  if not files:
    raise BadInput(
      f"{root}: no clips in it (of {len(paths)} files); it takes {' '.join(s[1:] for s in SUFFIXES)}, "
      "in any tree of folders"
    )
  captions, notes = _captions(root, paths, files)
  noted = {file for file, _ in notes}
  notes += [(file, read_caption("")[1]) for file in files if not captions.get(file) and file not in noted]
  ignored = [
    (_name(root, path), "neither a clip nor a caption, by its name")
    for path in paths
    if path.suffix.lower() not in (*SUFFIXES, ".txt") and path.name != CAPTIONS
  ]
  items, names = [], sorted(files)
  versions = map_in_threads(file_version, [files[file] for file in names])
  for file, (version_of_file, fault) in zip(names, versions, strict=True):
    if fault:
      ignored.append((file, fault))
    else:
      caption, shots = captions.get(file, ("", ()))
      items.append(Item(file, caption, version_of_file, files[file], shots))
  return Source(
    root.resolve().name, tuple(items), tuple(sorted(notes)), tuple(ignored), curation.Rules.of(config)
  )


def file_version(path):
  """-> (Item.version of a whole file, "") or ("", why it cannot be opened: a broken link, no permission)."""
  try:
    with open(path, "rb") as f:
      return version(f, 0, os.fstat(f.fileno()).st_size), ""
  except OSError as error:
    return "", f"cannot be opened: {error.strerror}"


def _walk(root):
  """Files under root, except hidden ones. Follows links, but enters no folder twice."""
  entered = set()
  for folder, folders, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in entered:
      folders[:] = []
      continue
    entered.add(real)
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    yield from (pathlib.Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _name(root, path):
  """The path relative to the root, with slashes; bytes that are not UTF-8 are written as \\xNN."""
  return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _captions(root, paths, files):
  """-> ({file: (caption, shots)}, notes)."""
  captions, notes, stems = {}, [], {}
  for file, path in files.items():
    stems.setdefault(path.with_suffix(""), []).append(file)
  for path in paths:
    if path.name == CAPTIONS:
      captions.update(_read_jsonl(root, path, files, notes))
  texts = [path for path in paths if path.suffix.lower() == ".txt"]
  notes += [
    (_name(root, path), "a caption without a clip") for path in texts if path.with_suffix("") not in stems
  ]
  texts = [path for path in texts if path.with_suffix("") in stems]
  for path, (raw, read_fault) in zip(texts, map_in_threads(_read_caption_file, texts), strict=True):
    text, fault = read_caption(raw)
    fault = read_fault or fault
    for file in stems[path.with_suffix("")]:
      if fault:
        notes.append((file, f"{_name(root, path)}: {fault}"))
      elif captions.get(file, (text,))[0] != text:
        notes.append((file, f"has two captions: that of {_name(root, path)} is used"))
      captions[file] = text, ()
  return captions, notes


def _read_jsonl(root, path, files, notes):
  """{file: (caption, shots)} of one captions.jsonl. Lines that are none of these go into `notes`."""
  captions, (raw, fault) = {}, _read_bytes(path)
  if fault:
    notes.append((_name(root, path), fault))
  for number, line in enumerate(raw.split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      entry = json.loads(line)
      file, raw_caption, shots = entry["file"], entry.get("caption"), ()
      if "shots" in entry:
        raw_caption, shots = read_shots(entry["shots"])
      if not isinstance(file, str) or not isinstance(raw_caption, str):
        raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
      notes.append((_name(root, path), f"line {number} is not {LINE} in UTF-8"))
      continue
    file = os.path.normpath(os.path.join(_name(root, path.parent), file)).replace(os.sep, "/")
    if file not in files:
      notes.append((_name(root, path), f"line {number} names {file}, which does not exist"))
    caption, fault = read_caption(raw_caption)
    captions[file] = caption, shots
    if fault and raw_caption.strip():
      notes.append((file, fault))
  return captions


def _read_caption_file(path):
  return _read_bytes(path, LONGEST_CAPTION + 1)


def _read_bytes(path, limit=-1):
  """-> (the bytes of a file, at most `limit` if it is given, and "") or (b"", why it cannot be opened)."""
  try:
    with open(path, "rb") as f:
      return f.read(limit), ""
  except OSError as error:
    return b"", f"cannot be opened: {error.strerror}"
