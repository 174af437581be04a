"""Manifests: a clip a row, in three formats. Invalid tables give a one-line error; invalid rows are named."""

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from data import sources
from data.clips import LONGEST_CAPTION
from data.sources import manifest
from sora_jax import video
from sora_jax.errors import BadInput


def clip(path, frames=25, fps=25):
  path.parent.mkdir(parents=True, exist_ok=True)
  images = np.broadcast_to((20 + 4 * np.arange(frames))[:, None, None, None], (frames, 32, 48, 3)).astype(
    np.uint8
  )
  video.write_mp4(path, images, fps, crf=4)
  return path


def open_source(path, **rules):
  return manifest.open_source(ConfigDict({"path": str(path), **rules}))


def write(path, rows):
  """Writes rows (dicts) as a manifest, in the format of the path's suffix."""
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
  elif path.suffix == ".csv":
    with open(path, "w", newline="", encoding="utf-8") as f:
      table = csv.DictWriter(f, list({key: None for row in rows for key in row}))
      table.writeheader()
      table.writerows(rows)
  else:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  return path


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.parquet"])
def test_rows_and_ranges(tmp_path, name):
  clip(tmp_path / "sub" / "long film.mp4", frames=50)
  other = clip(tmp_path / "elsewhere" / "b.mp4", frames=9)
  rows = [
    {"file": "sub/long film.mp4", "caption": 'the first,\n"half"', "start": 0, "end": 1.0, "more": "x"},
    {
      "file": "sub/long film.mp4",
      "caption": "the second half, naïve 猫",
      "start": 1.0,
      "end": None,
      "more": None,
    },
    {"file": str(other), "caption": "", "start": None, "end": None, "more": "y"},
  ]
  source = open_source(write(tmp_path / name, rows))
  assert source.name == "m" and source.ignored == ()
  items = {item.file: item for item in source.items()}
  assert {file: item.caption for file, item in items.items()} == {
    "sub/long film.mp4#t=0,1": 'the first, "half"',
    "sub/long film.mp4#t=1": "the second half, naïve 猫",
    str(other): "",
  }
  assert [item.file for item in source.items()] == sorted(items)
  assert source.notes == ((str(other), "no caption: an empty one is used"),)
  (first,), (second,), (third,) = (
    source.read(items[file]) for file in sorted(items, key=lambda file: (file == str(other), file))
  )
  np.testing.assert_allclose(first.video_THWC.mean((1, 2, 3)), 20 + 4 * np.arange(25), atol=2.5)
  np.testing.assert_allclose(second.video_THWC.mean((1, 2, 3)), 20 + 4 * np.arange(25, 50), atol=2.5)
  assert (first.start, second.start, len(third.video_THWC)) == (0, 1, 9)
  assert second.file == "sub/long film.mp4#t=1" and second.caption == "the second half, naïve 猫"
  assert open_source(tmp_path / name).items() == source.items()


def test_rows_that_cannot_be_used(tmp_path):
  """Each is named; the other rows are used."""
  clip(tmp_path / "a.mp4", frames=9)
  (tmp_path / "folder.mp4").mkdir()
  lines = [
    b"{broken",
    b"[]",
    b'{"caption": "no file"}',
    b'{"file": 3, "caption": "x"}',
    b'{"file": "gone.mp4", "caption": "x"}',
    b'{"file": "a.txt", "caption": "x"}',
    b'{"file": "a.mp4", "caption": "x", "start": -1}',
    b'{"file": "a.mp4", "caption": "x", "start": 2, "end": 1}',
    b'{"file": "a.mp4", "caption": "x", "start": "soon"}',
    b'{"file": "a.mp4", "caption": "caf\xe9"}',
    b'{"file": "folder.mp4", "caption": "x"}',
    b"",
    b'{"file": "a.mp4", "caption": "x", "end": 1e999}',
    b'{"file": "a.mp4", "caption": "good"}',
    b'{"file": "./a.mp4", "caption": "twice"}',
    b"[" * 100000,
  ]
  (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
  source = open_source(tmp_path / "m.jsonl")
  (item,) = source.items()
  assert (item.file, item.caption) == ("a.mp4", "good")
  ignored = dict(source.ignored)
  for number, part in {
    1: "not JSON",
    2: "not an object",
    3: "no text `file`",
    4: "no text `file`",
    5: "'gone.mp4' cannot be opened: No such file",
    6: "is not a clip by its name",
    7: "start=-1",
    8: "from start=2 to end=1",
    9: "start='soon' is not a number",
    10: "not JSON in UTF-8",
    11: "cannot be opened: Is a directory",
    13: "end=inf is not",
    15: "earlier row",
    16: "not JSON",
  }.items():
    assert part in ignored.pop(f"m.jsonl, row {number}")
  assert not ignored


def test_captions_that_are_none(tmp_path):
  for name in "abcd":
    clip(tmp_path / f"{name}.mp4", frames=1)
  (tmp_path / "m.csv").write_bytes(
    b"\xef\xbb\xbffile,caption\na.mp4,caf\xe9\nb.mp4\nc.mp4,"
    + b"x" * (LONGEST_CAPTION + 1)
    + b"\nd.mp4,"
    + b"y" * LONGEST_CAPTION
    + b"\nd.mp4,too,many\n"
  )
  source = open_source(tmp_path / "m.csv")
  assert [len(item.caption) for item in source.items()] == [0, 0, 0, LONGEST_CAPTION]
  notes = dict(source.notes)
  assert notes.keys() == {"a.mp4", "b.mp4", "c.mp4"}
  assert (
    "not UTF-8" in notes["a.mp4"]
    and "no caption" in notes["b.mp4"]
    and "more than 1048576 bytes" in notes["c.mp4"]
  )
  assert source.ignored == (("m.csv, row 5", "has more fields than the header"),)


@pytest.mark.parametrize(
  ("name", "content", "part"),
  [
    ("m.txt", b"", "a manifest is a file NAME.jsonl"),
    ("m.jsonl", None, "no such file"),
    ("m.jsonl", b"", "none of its 0 rows"),
    ("m.jsonl", b"{}\n{}", "none of its 2 rows can be used, such as m.jsonl, row 1: has no text `file`"),
    (
      "m.csv",
      b"a.mp4,a caption\nb.mp4,another\n",
      "has no column file and no caption, but 'a.mp4', 'a caption'",
    ),
    ("m.csv", b"", "has no column file and no caption, but none"),
    ("m.csv", b"file,text\na.mp4,b\n", "has no column caption"),
    ("m.csv", b'file,caption\na.mp4,"never closed\nb.mp4,x\n', "is not valid csv from line"),
    ("m.csv", bytes(range(256)) * 9, "m.csv: "),
    ("m.parquet", b"PAR1 not at all", "cannot be read as parquet"),
    ("m.parquet", b"", "cannot be read as parquet"),
  ],
)
def test_invalid_tables(tmp_path, name, content, part):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(BadInput) as e:
    open_source(tmp_path / name)
  assert part in str(e.value) and "\n" not in str(e.value)


def test_a_damaged_parquet(tmp_path):
  clip(tmp_path / "a.mp4", frames=1)
  path = write(
    tmp_path / "m.parquet",
    [{"file": "a.mp4", "caption": str(k), "start": float(k), "end": k + 1.0} for k in range(5000)],
  )
  assert len(open_source(path).items()) == 5000
  whole = path.read_bytes()
  for damaged in (whole[: len(whole) // 2], whole[:1000] + bytes(5000) + whole[6000:]):
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match="cannot be read as parquet"):
      open_source(path)
  texts = pyarrow.array([b"one", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
  pyarrow.parquet.write_table(
    pyarrow.table({"file": ["a.mp4"] * 2, "caption": texts, "start": [0.0, 1.0]}), path
  )
  assert [item.caption for item in open_source(path).items()] == ["one", ""] and "not UTF-8" in open_source(
    path
  ).notes[0][1]
  pyarrow.parquet.write_table(pyarrow.table({"file": ["a.mp4"], "words": ["x"]}), path)
  with pytest.raises(BadInput, match="no column caption, but 'file', 'words'"):
    open_source(path)


def test_a_changed_file_is_another_version(tmp_path):
  """A file of the same name and size with another end is another version; a copy is not."""
  path = clip(tmp_path / "a.mp4")
  write(tmp_path / "m.jsonl", [{"file": "a.mp4", "caption": "x", "start": 0.2}])
  (before,) = open_source(tmp_path / "m.jsonl").items()
  content = path.read_bytes()
  path.unlink()
  path.write_bytes(content)
  assert open_source(tmp_path / "m.jsonl").items() == [before]
  path.write_bytes(content[:-1] + b"!")
  assert open_source(tmp_path / "m.jsonl").items()[0].version != before.version


def test_which_source_reads_a_path(tmp_path):
  """By its name and by its contents. A name that is not a path has no reader."""
  for path in (
    "clips/a.mp4",
    "shards/s-0.tar",
    "set/1.0.0/dataset_info.json",
    "old/features.json",
    "x.csv/a.mp4",
    "list.CSV",
  ):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
  kinds = {
    path: sources.kind_of(tmp_path / path)
    for path in (
      "clips",
      "shards",
      "set",
      "set/1.0.0",
      "old",
      "x.csv",
      "list.CSV",
      "gone.jsonl",
      "gone.parquet",
      "shards/s-0.tar",
      "s-{000..123}.tar",
      "gone*.tar",
      "gone",
      "clips/a.mp4",
    )
  }
  assert kinds == {
    "clips": "folder",
    "shards": "tar",
    "set": "tfds",
    "set/1.0.0": "tfds",
    "old": "tfds",
    "x.csv": "folder",
    "list.CSV": "manifest",
    "gone.jsonl": "manifest",
    "gone.parquet": "manifest",
    "shards/s-0.tar": "tar",
    "s-{000..123}.tar": "tar",
    "gone*.tar": "tar",
    "gone": "folder",
    "clips/a.mp4": "folder",
  }
  assert sources.kind_of("shapes:40") is None and sources.kind_of("nothere") is None
  assert tuple(manifest.FORMATS) == sources.MANIFESTS
  with pytest.raises(BadInput, match="gone.csv: there is no such file"):
    sources.open_files(ConfigDict({"path": str(tmp_path / "gone.csv")}))
