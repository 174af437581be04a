"""Tar shards: samples of one key, read in place. Truncated and damaged ones are named, others are used."""

import io
import json
import tarfile
import tempfile

import numpy as np
import pytest
from ml_collections import ConfigDict

from data.clips import LONGEST_CAPTION
from data.sources import tar
from sora_jax import video
from sora_jax.errors import BadInput


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
  """Bytes of a video of nine greys, and of a picture."""
  folder = tmp_path_factory.mktemp("clips")
  images = np.broadcast_to((20 + 4 * np.arange(9))[:, None, None, None], (9, 32, 48, 3)).astype(np.uint8)
  video.write_mp4(folder / "a.mp4", images, 8, crf=4)
  video.write_png(folder / "a.png", images[5])
  return (folder / "a.mp4").read_bytes(), (folder / "a.png").read_bytes()


def shard(path, members, format=tarfile.PAX_FORMAT):
  """members: [(name, bytes)]."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=format) as out:
    for name, content in members:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      out.addfile(member, io.BytesIO(content))
  return path


def open_source(path, **rules):
  return tar.open_source(ConfigDict({"path": str(path), **rules}))


def test_samples_of_several_shards(tmp_path, mp4, monkeypatch):
  movie, picture = mp4
  members = [
    ("a/one.mp4", movie),
    ("a/one.txt", b"  a grey\nsquare "),
    ("two.seg.PNG", picture),
    ("two.json", json.dumps({"caption": "two 猫", "id": 3}).encode()),
    ("three.mp4", movie),
    ("three.json", b'{"text": "by another name"}'),
    ("four.mp4", movie),
    ("four.txt", b"text"),
    ("four.json", b'{"caption": "json"}'),
  ]
  for i, part in enumerate((members[:5], members[5:])):
    shard(tmp_path / "set" / f"shard-{i:05d}.tar", part, (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[i])
  shard(
    tmp_path / "set" / "shard-00002.tar",
    [
      ("three.mp4", movie),
      ("three.txt", b"a key counts in its shard"),
      ("n" * 150 + "/long.mp4", movie),
      ("caf\udce9.mp4", movie),
    ],
  )
  source = open_source(tmp_path / "set")
  assert {item.file: item.caption for item in source.items()} == {
    "shard-00000.tar/a/one.mp4": "a grey square",
    "shard-00000.tar/two.seg.PNG": "two 猫",
    "shard-00000.tar/three.mp4": "",
    "shard-00001.tar/four.mp4": "text",
    "shard-00002.tar/three.mp4": "a key counts in its shard",
    f"shard-00002.tar/{'n' * 150}/long.mp4": "",
    "shard-00002.tar/caf\\xe9.mp4": "",
  }
  assert [item.file for item in source.items()] == sorted(item.file for item in source.items())
  assert source.name == "set" and source.ignored == ()
  assert sum("no caption" in note for _, note in source.notes) == 3
  assert ("shard-00001.tar/three", "a caption without a clip") in source.notes
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
  (tmp_path / "temporary").mkdir()
  for item in source.items():
    (clip,) = source.read(item)
    np.testing.assert_allclose(
      clip.video_THWC.mean((1, 2, 3)),
      20 + 4 * (np.arange(9) if item.file.endswith("mp4") else np.array([5])),
      atol=2.5,
    )
    assert (clip.file, clip.caption) == (item.file, item.caption)
  pieces = source.read(source.items()[0])
  next(pieces)
  assert len(list((tmp_path / "temporary").iterdir())) == 1, "one clip at a time is on disk"
  pieces.close()
  assert not list((tmp_path / "temporary").iterdir())
  for spec in ("shard-*.tar", "shard-{00000..00002}.tar"):
    assert open_source(tmp_path / "set" / spec).items() == source.items()
  assert open_source(tmp_path / "set" / "shard-00001.tar").name == "shard-00001"
  assert [item.file for item in open_source(tmp_path / "set" / "shard-0000{1..1}.tar").items()] == [
    "shard-00001.tar/four.mp4"
  ]


def test_samples_that_cannot_be_used(tmp_path, mp4):
  movie, picture = mp4
  path = shard(
    tmp_path / "x.tar",
    [
      ("good.mp4", movie),
      ("good.txt", b"good"),
      ("two.mp4", movie),
      ("two.left.png", picture),
      ("two.txt", b"two clips"),
      ("latin.mp4", movie),
      ("latin.txt", "carré".encode("latin-1")),
      ("huge.mp4", movie),
      ("huge.txt", b"x" * (LONGEST_CAPTION + 1)),
      ("broken.mp4", movie),
      ("broken.json", b"{"),
      ("other.mp4", movie),
      ("other.json", b'["caption"]'),
      ("deep.mp4", movie),
      ("deep.json", b"[" * 100000),
      ("features.npy", b"123"),
      ("label.cls", b"7"),
      ("._good.mp4", b"of macOS"),
      ("noise.mp4", b"noise" * 99),
    ],
  )
  source = open_source(path)
  items = {item.file.removeprefix("x.tar/"): item for item in source.items()}
  assert {name: item.caption for name, item in items.items()} == {
    "good.mp4": "good",
    "latin.mp4": "",
    "huge.mp4": "",
    "broken.mp4": "",
    "other.mp4": "",
    "deep.mp4": "",
    "noise.mp4": "",
  }
  assert source.ignored == (
    ("x.tar/two.mp4", "2 clips share the key 'two', such as 'two.left.png': none is used"),
  )
  notes = {file.removeprefix("x.tar/"): note for file, note in source.notes}
  assert (
    "not UTF-8" in notes["latin.mp4"]
    and "more than" in notes["huge.mp4"]
    and "broken.json is not JSON" in notes["broken.mp4"]
  )
  assert "no caption" in notes["other.mp4"] and "deep.json is not JSON" in notes["deep.mp4"]
  assert notes["x.tar"] == "3 members are neither clips nor captions, such as 'features.npy'"
  with pytest.raises(video.BadClip, match="not a video"):
    list(source.read(items["noise.mp4"]))


def test_shards_that_are_cut_or_damaged(tmp_path, mp4):
  """Members before the damage are used, and the shard is named; the other shards are used as a whole."""
  movie, _ = mp4
  members = [
    (f"{k}.{suffix}", content)
    for k in range(3)
    for suffix, content in (("txt", b"a caption"), ("mp4", movie))
  ]
  whole = shard(tmp_path / "good.tar", members).read_bytes()
  block = 512 + 512 + 512 + -(-len(movie) // 512) * 512  # of a sample
  cases = {
    "body.tar": (whole[: block * 2 + 1024 + 700], 2, "is truncated: of '2.mp4'"),
    "header.tar": (whole[: block * 2 + 100], 2, "damaged"),
    "between.tar": (whole[: block * 2], 2, "no end mark"),
    "flipped.tar": (whole[:block] + b"!" + whole[block + 1 :], 1, "is damaged at byte"),
    "none.tar": (b"no tar at all" * 100, 0, "is not a tar file"),
    "empty.tar": (b"", 0, "is not a tar file"),
    "gz.tar": (b"\x1f\x8b" + whole[2:], 0, "is not a tar file, or a compressed one"),
  }
  for name, (content, _, _) in cases.items():
    (tmp_path / name).write_bytes(content)
  source = open_source(tmp_path / "*.tar")
  files = [item.file for item in source.items()]
  ignored = dict(source.ignored)
  assert ignored.keys() == cases.keys()
  for name, (_, samples, part) in cases.items():
    assert sum(file.startswith(name) for file in files) == samples, name
    assert part in ignored[name], ignored[name]
  assert sum(file.startswith("good.tar") for file in files) == 3
  for item in source.items():
    assert len(list(source.read(item))) == 1


def test_shards_that_are_not_there(tmp_path, mp4):
  shard(tmp_path / "s-8.tar", [("a.mp4", mp4[0])])
  source = open_source(tmp_path / "s-{8..10}.tar")
  assert [item.file for item in source.items()] == ["s-8.tar/a.mp4"]
  assert dict(source.ignored) == {
    f"s-{k}.tar": "cannot be opened: No such file or directory" for k in (9, 10)
  }
  shard(tmp_path / "captions.tar", [("a.txt", b"alone")])
  shard(tmp_path / "nothing.tar", [])
  (tmp_path / "empty").mkdir()
  for path, part in (
    ("gone.tar", "such as gone.tar: cannot be opened"),
    ("no-*.tar", "no tar file there"),
    ("empty", "no tar file there"),
    ("captions.tar", "such as captions.tar/a: a caption without a clip"),
    ("nothing.tar", "no clips in it (1 tar files)"),
  ):
    with pytest.raises(BadInput) as e:
      open_source(tmp_path / path)
    assert part in str(e.value) and "\n" not in str(e.value)


def test_a_folder_of_shards_and_more(tmp_path, mp4):
  """Files beside shards are noted, not read. A changed member is another version; a copied shard is not."""
  path = shard(tmp_path / "s.tar", [("a.mp4", mp4[0]), ("a.txt", b"x")])
  (tmp_path / "b.mp4").write_bytes(mp4[0])
  source = open_source(tmp_path)
  assert source.notes == ((".", "1 other files beside the shards are not read, such as 'b.mp4'"),)
  content = path.read_bytes()
  path.unlink()
  path.write_bytes(content)
  assert open_source(tmp_path).items() == source.items()
  shard(path, [("a.mp4", mp4[0][:-1] + b"!"), ("a.txt", b"x")])
  assert open_source(tmp_path).items()[0].version != source.items()[0].version
