"""Tar shards as WebDataset writes them: the members of one key make a clip.

  PATH       one NAME.tar, a folder of them, or a pattern: shards-{00000..00099}.tar, shards-*.tar
  key        the name of a member up to the first dot of its base name. The members of one key, in one shard,
             are one video or image   (suffixes of sora_jax.video)
             its caption          KEY.txt, or KEY.json with "caption" or "text"; if both exist, KEY.txt is
                                  used

Shards are not unpacked and must not be compressed. Listing walks the headers and reads the captions. The
bytes of a clip are copied to a temporary file while it is read. Members of other kinds are counted, shard by
shard. Truncated or damaged members are named; only what follows them in their shard is lost. data/curation.py
turns files into clips.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Iterator

from data import curation
from data.clips import LONGEST_CAPTION, BadClip, Dropped, Item, RawClip, map_in_threads, read_caption, version
from data.sources.folder import SUFFIXES
from sora_jax.errors import BadInput

SUFFIX = ".tar"
CAPTION_SUFFIXES = (".json", ".txt")  # if both exist, .txt is used


@dataclasses.dataclass(frozen=True)
class Source(curation.FileSource):
  """Clips in shards; item.location: (path of the shard, first byte, bytes)."""

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """The pieces in order. Raises BadClip where the file cannot be read any further."""
    with _temporary_file(*item.location, pathlib.Path(item.file).suffix) as path:
      yield from curation.read(path, item, self.rules)


def open_source(config) -> Source:
  """config: path (or pattern), and the fields of data.curation.Rules, each optional.

  Raises BadInput if there is no shard, or if no shard holds a clip.
  """
  spec, rules = str(config.path), curation.Rules.of(config)
  shards = find_shards(spec)
  if not shards:
    raise BadInput(
      f"{spec}: no tar file there; give one, a folder of them, or a pattern such as "
      "shards-{00000..00099}.tar"
    )
  root = os.path.commonpath([os.path.dirname(shard) for shard in shards])
  notes, ignored = [], []
  if os.path.isdir(spec):
    unread = [name for name in sorted(os.listdir(spec)) if not name.endswith(SUFFIX)]
    if unread:
      notes.append((".", f"{len(unread)} other files beside the shards are not read, such as {unread[0]!r}"))

  def items_of(shard):
    name = _name(os.path.relpath(shard, root).replace(os.sep, "/"))
    try:
      with open(shard, "rb") as f:
        return list(_clips(f, name, shard, notes, ignored))
    except OSError as error:
      ignored.append((name, f"cannot be opened: {error.strerror}"))
      return []

  items = [item for shard_items in map_in_threads(items_of, shards) for item in shard_items]
  ignored.sort()
  if not items:
    file, why = (ignored + notes + [(os.path.basename(shards[0]), "is empty")])[0]
    raise BadInput(f"{spec}: no clips in it ({len(shards)} tar files), such as {file}: {why}")
  name = pathlib.Path(shards[0]).stem if len(shards) == 1 else os.path.basename(root)
  return Source(
    name, tuple(sorted(items, key=lambda item: item.file)), tuple(sorted(notes)), tuple(ignored), rules
  )


def find_shards(spec) -> list[str]:
  """Absolute paths of the shards that a path or pattern names, sorted.

  A numbered range includes the missing ones.
  """
  if os.path.isdir(spec):
    spec = os.path.join(glob.escape(spec), "*" + SUFFIX)
  patterns = [glob.escape(spec)] if os.path.exists(spec) else _expand_ranges(spec)
  paths = set()
  for pattern in patterns:
    paths.update(glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else [pattern])
  return sorted(os.path.abspath(path) for path in paths)


def _expand_ranges(spec):
  """shards-{008..010}.tar -> [shards-008.tar, shards-009.tar, shards-010.tar], as in a shell."""
  match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
  if not match:
    return [spec]
  first, last = match.groups()
  width = len(first) if first.startswith("0") else 0
  paths = []
  for number in range(int(first), int(last) + 1):
    paths += _expand_ranges(f"{spec[: match.start()]}{number:0{width}}{spec[match.end() :]}")
  return paths


def _clips(f, name, shard, notes, ignored):
  """Yields the Items of an open shard. Adds its faults to `notes` and `ignored`."""
  samples, other_count, first_other = {}, 0, ""
  for member in _members(f, name, ignored):
    folder, base = os.path.split(member.name)
    suffix = os.path.splitext(base)[1].lower()
    is_file = member.isreg() and not member.issparse()
    if suffix in (*SUFFIXES, *CAPTION_SUFFIXES) and is_file and not base.startswith("."):
      samples.setdefault(os.path.join(folder, base.partition(".")[0]), []).append((suffix, member))
    elif not member.isdir():
      other_count, first_other = other_count + 1, first_other or member.name
  if other_count:
    notes.append((name, f"{other_count} members are neither clips nor captions, such as {first_other!r}"))
  for key, members in samples.items():
    clips = [member for suffix, member in members if suffix in SUFFIXES]
    texts = [member for suffix, member in members if suffix == ".txt"]
    texts += [member for suffix, member in members if suffix == ".json"]
    file = _name(f"{name}/{clips[0].name if clips else key}")
    if len(clips) > 1:
      ignored.append(
        (file, f"{len(clips)} clips share the key {key!r}, such as {clips[1].name!r}: none is used")
      )
    elif not clips:
      notes.append((file, "a caption without a clip"))
    else:
      caption, fault = _caption(f, texts[0]) if texts else read_caption(None)
      if fault:
        notes.append((file, fault))
      offset, size = clips[0].offset_data, clips[0].size
      yield Item(file, caption, version(f, offset, size), (shard, offset, size))


def _members(f, name, ignored):
  """Yields the complete members of a tar. If they end too early, adds the reason to `ignored`."""
  size, fault = os.fstat(f.fileno()).st_size, ""
  try:
    with tarfile.open(fileobj=f, mode="r:") as tar:
      while (member := tar.next()) is not None:
        tar.members = []  # TarFile would keep all members
        if not 0 <= member.size <= size - member.offset_data:
          fault = (
            f"is truncated: of {member.name!r}, {member.size} bytes, {size - member.offset_data} are there"
          )
          break
        yield member
      else:
        f.seek(tar.offset)
        end = f.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0"):  # tarfile takes a damaged header for the end
          fault = f"is damaged at byte {tar.offset} of {size}: what follows is lost"
        elif not end:
          fault = "has no end mark: it may be truncated after its last member"
  except (tarfile.TarError, ValueError, OverflowError) as error:
    fault = f"is not a tar file, or a compressed one, or damaged: {error}"
  if fault:
    ignored.append((name, fault))


def _caption(f, member):
  """-> (caption, what is wrong with it or "")."""
  f.seek(member.offset_data)
  raw = f.read(min(member.size, LONGEST_CAPTION + 1))
  if member.name.lower().endswith(".txt") or len(raw) > LONGEST_CAPTION:
    return read_caption(raw)
  try:
    entry = json.loads(raw)
  except (ValueError, RecursionError):
    return "", f"its {pathlib.PurePosixPath(member.name).name} is not JSON in UTF-8: an empty caption is used"
  if isinstance(entry, dict):
    for key in ("caption", "text"):
      if isinstance(entry.get(key), str):
        return read_caption(entry[key])
  return read_caption(None)


def _name(path):
  """The path, with bytes that are not UTF-8 written as \\xNN."""
  return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _temporary_file(shard, offset, size, suffix):
  """The path of a temporary file with a copy of these bytes of a shard."""
  with tempfile.NamedTemporaryFile(suffix=suffix) as out:
    try:
      with open(shard, "rb") as f:
        f.seek(offset)
        while size and (chunk := f.read(min(size, 1 << 20))):
          out.write(chunk)
          size -= len(chunk)
    except OSError as error:
      raise BadClip("unreadable", error.strerror) from error
    out.flush()
    yield pathlib.Path(out.name)
