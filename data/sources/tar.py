"""Tar shards as WebDataset writes them: a clip is what its members of one key say.

  PATH       one NAME.tar, a folder of them, or a pattern: shards-{00000..00099}.tar, shards-*.tar
  key        a member's name up to the first dot of its base name; of one key, in one shard,
             one video or image   (suffixes of sora_jax.video)
             its caption          KEY.txt, or KEY.json with "caption" or "text"; where both are there, KEY.txt

Shards are not unpacked and must not be compressed: listing walks the headers and reads captions; a clip's bytes are copied
to a temporary file while it is read. Members of other kinds are counted, shard by shard; what is cut or damaged is named,
and costs what lies behind it in its shard, no more. What is taken of a clip, see data/curation.py.
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
SAYS = (".json", ".txt")          # suffixes of captions; the latter is taken before the former


@dataclasses.dataclass(frozen=True)
class Source(curation.FileSource):
  """Clips in shards; item.location: (path of the shard, first byte, bytes)."""

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """Pieces in order; BadClip where the file cannot be read any further."""
    with _unpacked(*item.location, pathlib.Path(item.file).suffix) as path:
      yield from curation.read(path, item, self.rules)


def open_source(config) -> Source:
  """config: path (a pattern, too), and the fields of data.curation.Rules, each of which may be missing.

  BadInput if there is no shard, or no clip in any.
  """
  spec, rules = str(config.path), curation.Rules.of(config)
  shards = find(spec)
  if not shards:
    raise BadInput(f"{spec}: no tar file there; give one, a folder of them, or a pattern such as shards-{{00000..00099}}.tar")
  root = os.path.commonpath([os.path.dirname(shard) for shard in shards])
  notes, ignored = [], []
  others = [name for name in sorted(os.listdir(spec)) if not name.endswith(SUFFIX)] if os.path.isdir(spec) else []
  if others:
    notes.append((".", f"{len(others)} other files beside the shards are not read, such as {others[0]!r}"))

  def listed(shard):
    name = _name(os.path.relpath(shard, root).replace(os.sep, "/"))
    try:
      with open(shard, "rb") as f:
        return list(_clips(f, name, shard, notes, ignored))
    except OSError as error:
      ignored.append((name, f"cannot be opened: {error.strerror}"))
      return []

  items = [item for found in map_in_threads(listed, shards) for item in found]
  ignored.sort()
  if not items:
    file, why = (ignored + notes + [(os.path.basename(shards[0]), "is empty")])[0]
    raise BadInput(f"{spec}: no clips in it ({len(shards)} tar files), such as {file}: {why}")
  name = pathlib.Path(shards[0]).stem if len(shards) == 1 else os.path.basename(root)
  return Source(name, tuple(sorted(items, key=lambda item: item.file)), tuple(sorted(notes)), tuple(ignored), rules)


def find(spec) -> list[str]:
  """Absolute paths of the shards that a --source=... speaks of, sorted; of a numbered range also those that are not there."""
  if os.path.isdir(spec):
    spec = os.path.join(glob.escape(spec), "*" + SUFFIX)
  found = set()
  for path in [glob.escape(spec)] if os.path.exists(spec) else _ranges(spec):
    found.update(glob.glob(path, recursive=True) if glob.has_magic(path) else [path])
  return sorted(os.path.abspath(path) for path in found)


def _ranges(spec):
  """shards-{008..010}.tar -> shards-008.tar, shards-009.tar, shards-010.tar, as a shell has it."""
  match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
  if not match:
    return [spec]
  first, last = match.groups()
  width = len(first) if first.startswith("0") else 0
  return [path for number in range(int(first), int(last) + 1)
          for path in _ranges(f"{spec[:match.start()]}{number:0{width}}{spec[match.end():]}")]


def _clips(f, name, shard, notes, ignored):
  """The Items of an open shard; adds to notes and ignored what is wrong with it."""
  samples, others, other = {}, 0, ""
  for member in _members(f, name, ignored):
    folder, base = os.path.split(member.name)
    suffix = os.path.splitext(base)[1].lower()
    if suffix in (*SUFFIXES, *SAYS) and member.isreg() and not member.issparse() and not base.startswith("."):
      samples.setdefault(os.path.join(folder, base.partition(".")[0]), []).append((suffix, member))
    elif not member.isdir():
      others, other = others + 1, other or member.name
  if others:
    notes.append((name, f"{others} members are neither clips nor captions, such as {other!r}"))
  for key, members in samples.items():
    clips = [member for suffix, member in members if suffix in SUFFIXES]
    texts = [member for suffix, member in sorted(members, key=lambda pair: pair[0] != ".txt") if suffix in SAYS]
    file = _name(f"{name}/{clips[0].name if clips else key}")
    if len(clips) > 1:
      ignored.append((file, f"{len(clips)} clips share the key {key!r}, such as {clips[1].name!r}: none is taken"))
    elif not clips:
      notes.append((file, "a caption without a clip"))
    else:
      caption, wrong = _caption(f, texts[0]) if texts else read_caption(None)
      if wrong:
        notes.append((file, wrong))
      at, size = clips[0].offset_data, clips[0].size
      yield Item(file, caption, version(f, at, size), (shard, at, size))


def _members(f, name, ignored):
  """The members of a tar, whole ones only; what ends them too early is added to `ignored`."""
  size, wrong = os.fstat(f.fileno()).st_size, ""
  try:
    with tarfile.open(fileobj=f, mode="r:") as tar:
      while (member := tar.next()) is not None:
        tar.members = []                                       # it would keep them all
        if not 0 <= member.size <= size - member.offset_data:
          wrong = f"is cut: of {member.name!r}, {member.size} bytes, {size - member.offset_data} are there"
          break
        yield member
      else:
        f.seek(tar.offset)
        end = f.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0"):                                   # tarfile takes a damaged header for the end
          wrong = f"is damaged at byte {tar.offset} of {size}: what follows is lost"
        elif not end:
          wrong = "has no end mark: it may have been cut behind its last member"
  except (tarfile.TarError, ValueError, OverflowError) as error:
    wrong = f"is no tar file, or a compressed one, or damaged: {error}"
  if wrong:
    ignored.append((name, wrong))


def _caption(f, member):
  """-> (caption, what is wrong with it or "")."""
  f.seek(member.offset_data)
  raw = f.read(min(member.size, LONGEST_CAPTION + 1))
  if member.name.lower().endswith(".txt") or len(raw) > LONGEST_CAPTION:
    return read_caption(raw)
  try:
    entry = json.loads(raw)
  except (ValueError, RecursionError):
    return "", f"its {pathlib.PurePosixPath(member.name).name} is not JSON in UTF-8: kept with an empty caption"
  texts = [entry[key] for key in ("caption", "text") if isinstance(entry, dict) and isinstance(entry.get(key), str)]
  return read_caption(texts[0] if texts else None)


def _name(path):
  """With bytes that are not UTF-8 written as \\xNN."""
  return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def _unpacked(shard, at, size, suffix):
  """The path of a temporary file with these bytes of a shard."""
  with tempfile.NamedTemporaryFile(suffix=suffix) as out:
    try:
      with open(shard, "rb") as f:
        f.seek(at)
        while size and (some := f.read(min(size, 1 << 20))):
          out.write(some)
          size -= len(some)
    except OSError as error:
      raise BadClip("unreadable", error.strerror) from error
    out.flush()
    yield pathlib.Path(out.name)
