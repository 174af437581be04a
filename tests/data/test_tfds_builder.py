"""Our records as a TFDS dataset: equal bit for bit, one at a time, and without TensorFlow."""

import importlib.abc
import importlib.machinery
import pickle
import sys
import tracemalloc

import grain
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from data import tfds_builder
from data.records import DamagedRecord, Record, RecordWriter
from data.tfds_builder import SoraRecords, from_record, to_record
from sora_jax.errors import BadInput

HEADER = {"latent_channels": 4, "vae_stride": [4, 8, 8], "vae_fingerprint": "abc", "text_fingerprint": "def"}
tfds.disable_progress_bar()


class Watch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Pretends that TensorFlow is installed, and records imports of it. (A search for it is not an import.)"""

  def __init__(self):
    self.imported = False

  def find_spec(self, name, path=None, target=None):
    return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None

  def create_module(self, spec):
    self.imported = True
    raise ImportError(f"{spec.name} is not for us")

  def exec_module(self, module):
    """Never called: there is no module."""


@pytest.fixture
def watch(monkeypatch):
  finder = Watch()
  monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
  yield finder
  assert not finder.imported and "tensorflow" not in sys.modules


def record(i, **more):
  """Records of many sizes. Start and fps are no float32 numbers; latents are any bfloat16 bits, even NaN."""
  rng = np.random.default_rng(i)
  bits = rng.integers(0, 1 << 16, (1 + i % 3, 2 + i % 2, 3, 4), np.uint16)
  return Record(
    bits.view(ml_dtypes.bfloat16),
    np.arange(i % 4, dtype=np.int32),
    f"eine Katze, naïve 猫 {i}",
    f"b/{i * 7 % 13:02d}.mp4",
    i / 3,
    24000 / 1001,
    "folder",
    **more,
  )


def write(directory, wanted, null_SE=None, **header):
  with RecordWriter(directory) as writer:
    for i, one in enumerate(wanted):
      writer.add(one)
      writer.close_file(one.file, {"pieces": 1})
      if i % 4 == 3:
        writer.commit()
    return writer.finish(HEADER | header, [1], null_SE)


def bits(record):
  """All fields of a record, comparable."""
  arrays = (record.latents_THWC, record.text_ids_S, record.text_SE, record.cond_THWC)
  return [None if a is None else (str(a.dtype), a.shape, a.tobytes()) for a in arrays] + [
    record.caption,
    record.file,
    record.start,
    record.fps,
    record.source,
    record.uid,
  ]


def prepared(tmp_path, wanted, **null):
  write(tmp_path / "records", wanted, **null)
  builder = SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / "records")
  builder.download_and_prepare()
  return builder


def test_records_come_back_bit_by_bit(tmp_path, watch):
  text = np.random.default_rng(0).normal(size=(5, 6)).astype(ml_dtypes.bfloat16)
  wanted = [
    record(i, text_SE=text[: i % 5] if i > 3 else None, cond_THWC=record(i).latents_THWC if i > 6 else None)
    for i in range(10)
  ]
  builder = prepared(tmp_path, wanted, null_SE=text[:1])
  assert len({record.uid >> 63 for record in wanted}) == 2  # also uids that int64 cannot hold
  for source in (
    builder.as_data_source("train"),
    tfds.data_source("sora_records", data_dir=tmp_path / "tfds", split="train"),
    tfds.builder_from_directory(builder.data_dir).as_data_source("train"),
  ):
    assert [bits(to_record(example)) for example in source] == [bits(one) for one in wanted]
    assert [int(example["uid"], 16) for example in source] == [one.uid for one in wanted]
  example = source[9]
  example["latents"] = example["latents"][2:]
  with pytest.raises(ValueError, match="reshape"):
    to_record(example)


def test_what_training_needs_beside_the_records(tmp_path):
  null_SE = np.array([[0.1, -3]], ml_dtypes.bfloat16)
  builder = prepared(tmp_path, [record(i) for i in range(5)], null_SE=null_SE)
  info = tfds.builder_from_directory(builder.data_dir).info
  assert (
    HEADER.items() <= info.metadata.items()
    and info.metadata["null_text"] == [1]
    and info.metadata["damaged"] == []
  )
  np.testing.assert_array_equal(np.array(info.metadata["null_text_embedding"], ml_dtypes.bfloat16), null_SE)
  assert (
    info.splits["train"].shard_lengths == [4, 1] and info.as_proto.redistribution_info.license == "unknown"
  )


def test_slices_grain_and_pickling(tmp_path, watch):
  wanted = [bits(record(i)) for i in range(10)]
  builder = prepared(tmp_path, [record(i) for i in range(10)])
  parts = [builder.as_data_source(split) for split in ("train[:30%]", "train[3:8]", "train[80%:]")]
  assert [len(part) for part in parts] == [3, 5, 2]
  assert [bits(to_record(example)) for part in parts for example in part] == wanted
  again = pickle.loads(pickle.dumps(parts[1]))
  assert bits(to_record(again[4])) == wanted[7]
  assert len(pickle.loads(pickle.dumps(builder)).as_data_source("train")) == 10
  read = (
    grain.MapDataset.source(builder.as_data_source("train"))
    .shuffle(seed=1)
    .map(lambda example: bits(to_record(example)))
    .to_iter_dataset()
  )
  shuffled = list(read)
  assert shuffled != wanted and sorted(shuffled, key=lambda fields: fields[6]) == wanted


def test_one_record_at_a_time(tmp_path, watch, monkeypatch):
  """Few of a shard's 24 MB are in memory at once; more than TFDS's buffer holds needs no TensorFlow."""
  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1 << 20)
  large = [
    Record(
      np.full((4, 64, 128, 16), i, ml_dtypes.bfloat16),
      np.arange(3, dtype=np.int32),
      "a",
      f"{i:02d}",
      0.0,
      8.0,
      "x",
    )
    for i in range(24)
  ]
  with RecordWriter(tmp_path / "records") as writer:
    for one in large:
      writer.add(one)
    writer.finish(HEADER)
  size = large[0].latents_THWC.nbytes
  del large, one
  builder = SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / "records")
  tracemalloc.start()
  builder.download_and_prepare()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(builder.as_data_source("train")) == 24 and size < peak < 10 * size


def flip(path, needle):
  """Flips a bit at the position of `needle`."""
  content = bytearray(path.read_bytes())
  content[content.index(needle)] ^= 1
  path.write_bytes(content)


def test_a_damaged_record_is_named(tmp_path, caplog):
  wanted = [record(i) for i in range(10)]
  write(tmp_path / "records", wanted)
  flip(sorted((tmp_path / "records").glob("*.array_record"))[1], wanted[5].latents_THWC.tobytes())
  builder = SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / "records")
  builder.download_and_prepare()
  del wanted[5]
  assert [bits(to_record(example)) for example in builder.as_data_source("train")] == [
    bits(one) for one in wanted
  ]
  (damaged,) = SoraRecords(data_dir=tmp_path / "tfds").info.metadata["damaged"]
  assert "b/09.mp4 at 1.66667 s" in damaged
  assert damaged in caplog.text and "1 of 10 records are damaged" in caplog.text


def test_nothing_is_made_of_damaged_records_alone(tmp_path, monkeypatch):
  write(tmp_path / "records", [record(i) for i in range(5)])

  def damaged(index, i):
    raise DamagedRecord(f"record {i}")

  monkeypatch.setattr(tfds_builder, "read", damaged)
  builder = SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / "records")
  with pytest.raises(BadInput, match="none of its 5 records can be read, such as record 0; encode again"):
    builder.download_and_prepare()
  assert not list((tmp_path / "tfds").rglob("*array_record*"))


def test_a_run_that_was_stopped_is_run_again(tmp_path, monkeypatch):
  """It leaves nothing that looks like a dataset. The second run begins again; the third has nothing to do."""
  wanted = [record(i) for i in range(10)]
  write(tmp_path / "records", wanted)
  builder = SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / "records")
  reads = []

  def stopped(index, i):
    reads.append(i)
    if len(reads) == 6:
      raise KeyboardInterrupt
    return read(index, i)

  read = tfds_builder.read
  monkeypatch.setattr(tfds_builder, "read", stopped)
  with pytest.raises(KeyboardInterrupt):
    builder.download_and_prepare()
  assert not builder.is_prepared() and not list((tmp_path / "tfds").rglob("*array_record*"))
  for _ in range(2):
    builder = SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / "records")
    builder.download_and_prepare()
    assert [bits(to_record(example)) for example in builder.as_data_source("train")] == [
      bits(one) for one in wanted
    ]
  assert len(reads) == 6 + 10


def test_bad_input(tmp_path):
  with pytest.raises(BadInput, match="not prepared yet; give records=DIR"):
    SoraRecords(data_dir=tmp_path / "tfds").download_and_prepare()
  with pytest.raises(BadInput, match="holds no records"):
    SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path)
  prepared(tmp_path, [record(i) for i in range(3)])
  write(tmp_path / "more", [record(i) for i in range(4)])
  write(
    tmp_path / "others", [record(i) for i in range(3)], vae_fingerprint="another VAE, and so other latents"
  )
  for name in ("more", "others"):
    with pytest.raises(BadInput, match="was made from other records"):
      SoraRecords(data_dir=tmp_path / "tfds", records=tmp_path / name)


def test_an_example_follows_the_schema(watch):
  """Without a disk: TFDS serialises what from_record returns, and reads it back."""
  schema = tfds_builder.features()
  one = record(7, text_SE=np.zeros((0, 6), ml_dtypes.bfloat16))
  assert bits(to_record(schema.deserialize_example_np(schema.serialize_example(from_record(one))))) == bits(
    one
  )


def test_the_watch_sees_tensorflow(monkeypatch):
  finder = Watch()
  monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
  with pytest.raises(ImportError):
    tfds.features.Video(shape=(None, 8, 8, 3))
  assert finder.imported
