"""Clips in a TFDS dataset are those of the files it was made from; examples that cannot be read are named."""

import functools
import json
import pickle

import numpy as np
import pytest
import tensorflow_datasets
from ml_collections import ConfigDict
from tensorflow_datasets.core import DatasetInfo, ShardBasedBuilder, Version
from tensorflow_datasets.core.features import FeaturesDict, Sequence, Tensor, Text

from data import sources
from data.clips import BadClip
from data.sources import folder, tfds
from sora_jax import video
from sora_jax.errors import BadInput

tensorflow_datasets.disable_progress_bar()
BYTES = Tensor(shape=(), dtype=np.object_)
ORDER = ("c.mp4", "a.mp4", "b.png", "d.mp4")


class RawClips(ShardBasedBuilder):
  """A user's dataset: `shards` is a list of lists of examples; "test" is the first of them."""

  VERSION = Version("1.0.0")
  url_infos = None  # see data/tfds_builder.py

  def __init__(self, shards, schema, **kwargs):
    self._shards, self._schema = shards, FeaturesDict(schema)
    super().__init__(file_format="array_record", **kwargs)

  def _info(self):
    return DatasetInfo(builder=self, features=self._schema)

  def _shard_iterators_per_split(self, dl_manager):
    shards = [functools.partial(enumerate, shard) for shard in self._shards]
    return {"train": shards, "test": shards[:1]}


def build(path, shards, **schema):
  """-> the directory of the version, without its features.json, which may need TensorFlow and is not read."""
  RawClips(shards, schema, data_dir=path).download_and_prepare()
  directory = path / "raw_clips" / "1.0.0"
  (directory / "features.json").unlink()
  return directory


def config(path, **more):
  return ConfigDict({"path": str(path), **more})


def frames(seed, count=9, height=32):
  """Squares of noise."""
  return (
    np.random.default_rng(seed)
    .integers(0, 256, (count, height // 8, 6, 3), np.uint8)
    .repeat(8, 1)
    .repeat(8, 2)
  )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A folder of three videos and an image, with captions."""
  root = tmp_path_factory.mktemp("files")
  for i, name in enumerate(ORDER):
    if name.endswith("mp4"):
      video.write_mp4(root / name, frames(i, 9 + 4 * i, 32 + 16 * (i % 2)), 8)
    else:
      video.write_png(root / name, frames(i)[0])
    (root / name).with_suffix(".txt").write_text(f"clip {i}, naïve 猫")
  return root


def examples(files):
  return [
    {
      "video": (files / name).read_bytes(),
      "caption": (files / name).with_suffix(".txt").read_text(),
      "file": name,
    }
    for name in ORDER
  ]


def dataset(path, examples):
  return build(path, [examples[:3], examples[3:]], video=BYTES, caption=Text(), file=Text())


def equal(one, other):
  for mine, theirs in zip(one, other, strict=True):
    np.testing.assert_array_equal(mine.video_THWC, theirs.video_THWC)
    for name in ("fps", "start", "file", "caption", "left_out", "notes"):
      assert getattr(mine, name) == getattr(theirs, name), name
  return True


def test_clips_are_those_of_the_files(files, tmp_path):
  directory = dataset(tmp_path, examples(files))
  source, wanted = (
    tfds.open_source(config(directory, max_seconds=1.2)),
    folder.open_source(config(files, max_seconds=1.2)),
  )
  assert (source.name, source.ignored, source.notes) == ("raw_clips", (), ())
  assert [(item.file, item.caption) for item in source.items()] == [
    (item.file, item.caption) for item in wanted.items()
  ]
  assert all(
    equal(source.read(one), wanted.read(other)) for one, other in zip(source.items(), wanted.items())
  )
  assert tfds.open_source(config(directory.parent, max_seconds=1.2)).items() == source.items()


def test_splits_slices_and_pickling(files, tmp_path):
  directory = dataset(tmp_path, examples(files))
  listed = {
    split: [item.file for item in tfds.open_source(config(directory, split=split)).items()]
    for split in ("test", "train[1:3]", "train[75%:]")
  }
  assert listed == {
    "test": ["a.mp4", "b.png", "c.mp4"],
    "train[1:3]": ["a.mp4", "b.png"],
    "train[75%:]": ["d.mp4"],
  }
  source = tfds.open_source(config(directory, split="train[1:]"))
  again = pickle.loads(pickle.dumps(source))
  assert again.items() == source.items()
  assert equal(source.read(source.items()[0]), again.read(source.items()[0]))


def test_the_version_changes_with_the_clip(files, tmp_path):
  rows = examples(files)
  before = {
    item.file: item.version for item in tfds.open_source(config(dataset(tmp_path / "1", rows))).items()
  }
  rows[1]["video"] = rows[0]["video"]
  after = {
    item.file: item.version for item in tfds.open_source(config(dataset(tmp_path / "2", rows))).items()
  }
  assert [name for name in ORDER if before[name] != after[name]] == ["a.mp4"]


def test_damaged_examples_are_named(files, tmp_path):
  """One is not a video, one is detected on opening, one is deleted after that; the others are read."""
  rows = examples(files)
  rows[0]["video"] = b"what a video is called"
  rows[1]["video"] = noise = np.random.default_rng(0).bytes(4096)  # not compressible: stored as it is
  directory = build(tmp_path, [[row] for row in rows], video=BYTES, caption=Text(), file=Text())
  paths = sorted(directory.glob("raw_clips-train*"))
  content = bytearray(paths[1].read_bytes())
  content[content.index(noise[:64])] ^= 1
  paths[1].write_bytes(content)
  source = tfds.open_source(config(directory))
  ((name, why),) = source.ignored
  assert name == "train/00000001" and why.startswith("corrupt: ") and "\n" not in why
  b, c, d = source.items()
  assert len(list(source.read(b))) == 1
  with pytest.raises(BadClip, match="not a video"):
    list(source.read(c))
  paths[3].unlink()
  with pytest.raises(BadClip, match="corrupt"):
    list(tfds.Source(**{**vars(source), "blobs": pickle.loads(pickle.dumps(source.blobs))}).read(d))


def test_names_and_captions(files, tmp_path):
  clip = (files / "b.png").read_bytes()
  rows = [("a", b"one"), ("a", b"two\n lines"), ("", b""), ("b", "gris carré".encode("latin-1"))]
  source = tfds.open_source(
    config(
      build(
        tmp_path,
        [[{"png": clip, "text": text, "filename": name} for name, text in rows]],
        png=BYTES,
        text=Text(),
        filename=Text(),
      )
    )
  )
  assert [(item.file, item.caption) for item in source.items()] == [
    ("a", "one"),
    ("b", ""),
    ("train/00000001", "two lines"),
    ("train/00000002", ""),
  ]
  assert [f"{file}: {note}" for file, note in source.notes] == [
    "b: its caption is not UTF-8: an empty one is used",
    "train/00000001: another example is also named a: this one is named by its position",
    "train/00000002: no caption: an empty one is used",
  ]


def test_numbers_as_names(files, tmp_path):
  clip = (files / "b.png").read_bytes()
  source = tfds.open_source(
    config(build(tmp_path, [[{"image": clip, "id": 40 + i} for i in range(2)]], image=BYTES, id=np.int64))
  )
  assert [item.file for item in source.items()] == ["40", "41"]


def test_sequences_of_images(tmp_path):
  """What a tfds.features.Video stores: its frames, at the rate of the example or at the given one."""
  images = frames(0, 13)
  for i, image in enumerate(images):
    video.write_png(tmp_path / f"{i:02d}.png", image)
  row = [(tmp_path / f"{i:02d}.png").read_bytes() for i in range(13)]
  bare = build(tmp_path / "bare", [[{"video": row}]], video=Sequence(BYTES))
  with pytest.raises(BadInput, match="have no rate; give it as --fps"):
    tfds.open_source(config(bare))
  rated = build(tmp_path / "rated", [[{"video": row, "fps": 16.0}]], video=Sequence(BYTES), fps=np.float32)
  for path, fps, every, rate in ((bare, 5, 1, 5), (rated, 0, 1, 16), (rated, 8, 2, 8)):
    source = tfds.open_source(config(path, fps=fps))
    (piece,) = source.read(source.items()[0])
    np.testing.assert_array_equal(piece.video_THWC, images[::every][: len(piece.video_THWC)])
    assert piece.fps == rate and len(piece.video_THWC) + piece.left_out == len(images[::every])


@pytest.mark.parametrize(
  ("row", "kind"),
  [([b"", b""], "not a video"), (["png", b"noise"], "truncated"), (["png", "large"], "its size changes")],
)
def test_bad_sequences_of_images(tmp_path, row, kind):
  pictures = {"png": frames(0)[0], "large": frames(0, height=64)[0]}
  for name, image in pictures.items():
    video.write_png(tmp_path / f"{name}.png", image)
  row = [(tmp_path / f"{one}.png").read_bytes() if one in pictures else one for one in row]
  source = tfds.open_source(config(build(tmp_path, [[{"video": row}]], video=Sequence(BYTES)), fps=8))
  with pytest.raises(BadClip, match=kind):
    list(source.read(source.items()[0]))


def message(path, **more):
  with pytest.raises(BadInput) as error:
    tfds.open_source(config(path, **more))
  assert "\n" not in str(error.value)
  return str(error.value)


def test_what_is_no_dataset(files, tmp_path):
  directory = dataset(tmp_path, examples(files))
  assert all(f"no {tfds.INFO} in it" in message(path) for path in (tmp_path / "missing", files))
  assert "no split valid; it has test, train" in message(directory, split="valid")
  assert "no split train[" in message(directory, split="train[")
  other, info = directory.parent / "1.1.0", json.loads((directory / tfds.INFO).read_text())
  other.mkdir()
  (other / tfds.INFO).write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
  assert "holds 2 datasets, 1.0.0, 1.1.0; give one of them" in message(directory.parent)
  assert "is in the format tfrecord" in message(
    other
  ) and f"convert_format --dataset_version_dir={other}" in message(other)
  (directory / tfds.INFO).write_text("{broken")
  assert "cannot be read" in message(directory)
  (directory / tfds.INFO).unlink()
  assert "ArrayRecord files without" in message(directory) and sources.kind_of(directory) == "tfds"
  (directory / "index.json").touch()
  assert "encoded already; train on them with" in message(directory)


def test_a_dataset_without_clips(files, tmp_path):
  text = message(build(tmp_path / "a", [[{"latents": b"1", "caption": "a"}]], latents=BYTES, caption=Text()))
  assert "its examples hold caption, latents; a clip is" in text
  directory = dataset(tmp_path / "b", examples(files))
  for path in directory.glob("raw_clips-train*"):
    path.write_bytes(b"")
  assert "none of its 4 examples can be read, such as train/00000000: corrupt" in message(directory)
