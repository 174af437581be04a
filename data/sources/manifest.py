"""A manifest: a table of clips that lie anywhere, a row a clip. NAME.jsonl, NAME.csv (with a header) or NAME.parquet.

  file         path, seen from the manifest's folder, or absolute
  caption      text; empty: the clip is kept without
  start, end   seconds, optional: a range of a longer file, frames shown from `start` to before `end`

Several rows may take ranges of one file: each is a clip of its own, named as in W3C Media Fragments (film.mp4#t=12.5,17),
whose `start` in records is seconds of the whole file. Other columns are not read. A row that cannot be used is named in
`ignored`. What is taken of a file, see data/curation.py.
"""

import csv
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from data import curation
from data.clips import Dropped, Item, RawClip, map_in_threads, read_caption
from data.sources.folder import SUFFIXES, file_version
from sora_jax.errors import BadInput

COLUMNS = ("file", "caption", "start", "end")


@dataclasses.dataclass(frozen=True)
class Source(curation.FileSource):
  """Clips of a manifest; item.location: (path, start, end)."""

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """Pieces in order; BadClip where the file cannot be read any further, or its range is empty."""
    path, start, end = item.location
    return curation.read(path, item, self.rules, start, end)


def open_source(config) -> Source:
  """config: path, and the fields of data.curation.Rules, each of which may be missing.

  BadInput if there is no such file, if it is no table of this kind, or if no row of it can be used.
  """
  path = pathlib.Path(config.path)
  rows = FORMATS.get(path.suffix.lower())
  if rows is None or not path.is_file():
    raise BadInput(f"{path}: " + (f"a manifest is a file NAME{'|'.join(FORMATS)}" if rows is None or path.exists() else
                                  "there is no such file; give a manifest that is there"))
  rules, found, items, notes, ignored, count = curation.Rules.of(config), {}, [], [], [], 0
  for number, row in rows(path):
    count += 1
    try:
      file, local, start, end = _place(row, path.parent)
      if file in found:
        raise ValueError("it is in an earlier row, too")
      found[file] = number, *read_caption(row.get("caption") if isinstance(row.get("caption"), str) else None), (local, start, end)
    except ValueError as error:
      ignored.append((f"{path.name}, row {number}", str(error)))
  paths = sorted({local for *_, (local, _, _) in found.values()})
  versions = dict(zip(paths, map_in_threads(file_version, paths), strict=True))
  for file, (number, caption, note, where) in sorted(found.items()):
    version, wrong = versions[where[0]]
    if wrong:
      ignored.append((f"{path.name}, row {number}", f"{file!r} {wrong}"))
      continue
    items.append(Item(file, caption, version, where))
    notes += [(file, note)] if note else []
  if not items:
    raise BadInput(f"{path}: none of its {count} rows can be used" + (f", such as {ignored[0][0]}: {ignored[0][1]}" if ignored
                   else "; a row needs `file` and `caption`"))
  return Source(path.stem, tuple(items), tuple(notes), tuple(ignored), rules)


def _place(row, folder):
  """A row -> (name of the clip, path, start, end); ValueError says what is wrong with it."""
  if not isinstance(row, dict):
    raise ValueError(row if isinstance(row, str) else "is not an object with `file` and `caption`")
  file = row.get("file")
  if not isinstance(file, str) or not file:
    raise ValueError("has no text `file`")
  if "\0" in file or not file.lower().endswith(SUFFIXES):
    raise ValueError(f"{file!r} is no clip by its name; known are {' '.join(s[1:] for s in SUFFIXES)}")
  start, end = _seconds(row, "start", 0.0), _seconds(row, "end", math.inf)
  if not 0 <= start < end:
    raise ValueError(f"from start={start:g} to end={end:g} there is nothing; start is at least 0, end after it")
  local = os.path.normpath(os.path.join(folder, file))
  name = os.path.relpath(local, folder) if not os.path.isabs(file) else local
  name = os.fsencode(name.replace(os.sep, "/")).decode("utf-8", "backslashreplace")
  if start or end < math.inf:
    name += f"#t={_short(start)}" + (f",{_short(end)}" if end < math.inf else "")
  return name, local, start, end


def _seconds(row, key, default):
  value = row.get(key)
  if value is None or value == "":
    return default
  try:
    value = float(value)
  except (TypeError, ValueError, OverflowError):
    value = math.nan
  if not math.isfinite(value):
    raise ValueError(f"{key}={row[key]!r} is not a number of seconds")
  return value


def _short(seconds):
  return f"{seconds:.6f}".rstrip("0").rstrip(".")


# --- rows of a file: (its number, from 1; a dict, or a str that says what is wrong with it), one at a time

def _jsonl(path):
  with open(path, "rb") as f:
    for number, line in enumerate(f, 1):
      try:
        if line.strip():
          yield number, json.loads(line)
      except (ValueError, RecursionError):
        yield number, "is not JSON in UTF-8"


def _csv(path):
  csv.field_size_limit(1 << 30)                # the module's own limit is 128 kB
  with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
    table = csv.DictReader(f, strict=True)     # an open quote would otherwise swallow what follows it
    try:
      _check_columns(path, table.fieldnames or ())
      for number, row in enumerate(table, 1):
        yield number, "has more fields than the header" if None in row else row
    except csv.Error as error:
      raise BadInput(f"{path}: is no csv from line {table.line_num} on: {error}") from None


def _parquet(path):
  try:
    table = pyarrow.parquet.ParquetFile(path)
    _check_columns(path, table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(1024, columns=[name for name in COLUMNS if name in table.schema_arrow.names]):
      values = [column.cast(pyarrow.large_binary()) if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
                else column for column in batch.columns]           # a text may hold anything, and costs its row alone
      for row in zip(*(column.to_pylist() for column in values), strict=True):
        number += 1
        yield number, {name: value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
                       for name, value in zip(batch.schema.names, row, strict=True)}
  except BadInput:
    raise
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise BadInput(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None


def _check_columns(path, names):
  missing = [name for name in ("file", "caption") if name not in names]
  if missing:
    raise BadInput(f"{path}: has no column {' and no '.join(missing)}, but {', '.join(map(repr, names[:9])) or 'none'}; "
                   "its first line, or its schema, names the columns: file, caption and, optional, start and end")


FORMATS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
