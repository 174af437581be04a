"""A manifest: a table of clips anywhere on disk, one a row.

NAME.jsonl, NAME.csv (with a header) or NAME.parquet.

  file         path, absolute or relative to the folder of the manifest
  caption      text; if it is empty, the clip is kept with an empty caption
  start, end   seconds, optional: a range of a longer file, the frames shown from `start` to before `end`

Several rows may use ranges of one file. Each is a clip of its own, named as in W3C Media Fragments
(film.mp4#t=12.5,17); its `start` in records counts seconds from the start of the whole file. Other columns
are not read. A row that cannot be used is named in `ignored`. data/curation.py turns files into clips.
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
    """The pieces in order.

    Raises BadClip where the file cannot be read any further, or if its range is empty.
    """
    path, start, end = item.location
    return curation.read(path, item, self.rules, start, end)


def open_source(config) -> Source:
  """config: path, and the fields of data.curation.Rules, each optional.

  Raises BadInput if there is no such file, if it is not such a table, or if none of its rows can be used.
  """
  path = pathlib.Path(config.path)
  rows = FORMATS.get(path.suffix.lower())
  if rows is None or (path.exists() and not path.is_file()):
    raise BadInput(f"{path}: a manifest is a file NAME{'|'.join(FORMATS)}")
  if not path.exists():
    raise BadInput(f"{path}: there is no such file; give a manifest that exists")
  rules, clips, items, notes, ignored, count = curation.Rules.of(config), {}, [], [], [], 0
  for number, row in rows(path):
    count += 1
    try:
      file, location = _parse_row(row, path.parent)
      if file in clips:
        raise ValueError("is also in an earlier row")
      text = row.get("caption")
      caption, note = read_caption(text if isinstance(text, str) else None)
      clips[file] = number, caption, note, location
    except ValueError as error:
      ignored.append((f"{path.name}, row {number}", str(error)))
  paths = sorted({clip_path for *_, (clip_path, _, _) in clips.values()})
  versions = dict(zip(paths, map_in_threads(file_version, paths), strict=True))
  for file, (number, caption, note, location) in sorted(clips.items()):
    version, fault = versions[location[0]]
    if fault:
      ignored.append((f"{path.name}, row {number}", f"{file!r} {fault}"))
      continue
    items.append(Item(file, caption, version, location))
    if note:
      notes.append((file, note))
  if not items:
    detail = f", such as {': '.join(ignored[0])}" if ignored else "; a row needs `file` and `caption`"
    raise BadInput(f"{path}: none of its {count} rows can be used{detail}")
  return Source(path.stem, tuple(items), tuple(notes), tuple(ignored), rules)


def _parse_row(row, folder):
  """A row -> (name of the clip, (path, start, end)). Raises ValueError, which names the fault."""
  if not isinstance(row, dict):
    raise ValueError(row if isinstance(row, str) else "is not an object with `file` and `caption`")
  file = row.get("file")
  if not isinstance(file, str) or not file:
    raise ValueError("has no text `file`")
  if "\0" in file or not file.lower().endswith(SUFFIXES):
    raise ValueError(f"{file!r} is not a clip by its name; known are {' '.join(s[1:] for s in SUFFIXES)}")
  start, end = _seconds(row, "start", 0.0), _seconds(row, "end", math.inf)
  if not 0 <= start < end:
    raise ValueError(
      f"from start={start:g} to end={end:g} there is nothing; start must be at least 0, and end after it"
    )
  path = os.path.normpath(os.path.join(folder, file))
  name = path if os.path.isabs(file) else os.path.relpath(path, folder)
  name = os.fsencode(name.replace(os.sep, "/")).decode("utf-8", "backslashreplace")
  if start or end < math.inf:
    name += f"#t={_short(start)}"
  if end < math.inf:
    name += f",{_short(end)}"
  return name, (path, start, end)


def _seconds(row, key, default):
  """row[key] as a float; `default` if it is missing or empty."""
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
  """At most six decimals, without trailing zeros."""
  return f"{seconds:.6f}".rstrip("0").rstrip(".")


# --- readers: they yield (number of the row, from 1; a dict, or a str that names the fault of the row)


def _jsonl(path):
  with open(path, "rb") as f:
    for number, line in enumerate(f, 1):
      try:
        if line.strip():
          yield number, json.loads(line)
      except (ValueError, RecursionError):
        yield number, "is not JSON in UTF-8"


def _csv(path):
  csv.field_size_limit(1 << 30)  # the default limit is 128 kB
  with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
    table = csv.DictReader(f, strict=True)  # otherwise a quote that is not closed takes in the rows after it
    try:
      _check_columns(path, table.fieldnames or ())
      for number, row in enumerate(table, 1):
        yield number, "has more fields than the header" if None in row else row
    except csv.Error as error:
      raise BadInput(f"{path}: is not valid csv from line {table.line_num} on: {error}") from None


def _parquet(path):
  try:
    table = pyarrow.parquet.ParquetFile(path)
    _check_columns(path, table.schema_arrow.names)
    columns = [name for name in COLUMNS if name in table.schema_arrow.names]
    number = 0
    for batch in table.iter_batches(1024, columns=columns):
      values = [_python_values(column) for column in batch.columns]
      for row in zip(*values, strict=True):
        number += 1
        yield number, dict(zip(batch.schema.names, row, strict=True))
  except BadInput:
    raise
  except (pyarrow.ArrowException, OSError, ValueError) as error:
    raise BadInput(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None


def _python_values(column):
  """The values of a column. Texts are decoded one by one, so that invalid UTF-8 affects only its own row."""
  if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
    column = column.cast(pyarrow.large_binary())
  return [
    value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    for value in column.to_pylist()
  ]


def _check_columns(path, names):
  missing = [name for name in ("file", "caption") if name not in names]
  if missing:
    raise BadInput(
      f"{path}: has no column {' and no '.join(missing)}, but {', '.join(map(repr, names[:9])) or 'none'}; "
      "its first line, or its schema, must name the columns file and caption, and may name start and end"
    )


FORMATS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
