"""Our records as a TFDS dataset. Needs no TensorFlow.

  from data.tfds_builder import SoraRecords, to_record
  builder = SoraRecords(data_dir="out/tfds", records="out/records")     # records: the output of launch.encode
  builder.download_and_prepare()
  source = builder.as_data_source("train[:90%]")                       # random access; can be pickled; works
  with Grain record = to_record(source[0])                                        # a data.records.Record,
  equal bit for bit

A prepared dataset opens without this class: tfds.data_source("sora_records", data_dir="out/tfds"). The header
of the index (stride and fingerprint of the VAE, null text, ...) is in `builder.info.metadata`. So are, under
`damaged`, the records that could not be read and were skipped. Examples are in the order of the records'
shards; nothing is shuffled.

The schema is one that TFDS 4.9 stores exactly without TensorFlow. Arrays are raw bytes, little-endian, with
their shape beside them (TFDS has no bfloat16, and takes at most one unknown dimension). float64 is stored as
bytes (otherwise it becomes float32). A uid is 16 hexadecimal digits (unsigned 64-bit integers overflow when
they are read).

Examples are written to disk one by one, shard by shard. tfds.core.GeneratorBasedBuilder would first collect
all of them, in memory and, from 1 GB on, in files that it needs TensorFlow to write. A run that was killed
begins again; TFDS leaves what it had written in a folder incomplete.*, which may be deleted.
"""

import functools

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import utils

from data.records import DamagedRecord, Record, RecordIndex, read
from sora_jax.errors import BadInput

RANKS = {"latents": 4, "text_embedding": 2, "condition": 4}  # of the arrays of bfloat16


def features():
  """The schema of an example."""
  arrays = {}
  for name, rank in RANKS.items():
    arrays[name] = tfds.features.Tensor(
      shape=(), dtype=np.object_, doc="bfloat16, raw bytes; empty where there is none"
    )
    arrays[f"{name}_shape"] = tfds.features.Tensor(shape=(rank,), dtype=np.int32)
  number = functools.partial(tfds.features.Tensor, shape=(), dtype=np.float64, encoding="bytes")
  return tfds.features.FeaturesDict(
    {
      **arrays,
      "text_ids": tfds.features.Tensor(shape=(None,), dtype=np.int32),
      "caption": tfds.features.Text(),
      "file": tfds.features.Text(),
      "source": tfds.features.Text(),
      "uid": tfds.features.Text(doc="16 hexadecimal digits"),
      "start": number(doc="seconds from the start of the file"),
      "fps": number(doc="frames a second of the pixels"),
    }
  )


def from_record(record: Record) -> dict:
  """Record -> example of the schema `features()`."""
  arrays = {"latents": record.latents_THWC, "text_embedding": record.text_SE, "condition": record.cond_THWC}
  example = {
    "text_ids": np.asarray(record.text_ids_S, np.int32),
    "caption": _utf8(record.caption),
    "file": _utf8(record.file),
    "source": _utf8(record.source),
    "uid": f"{record.uid:016x}",
    "start": float(record.start),
    "fps": float(record.fps),
  }
  for name, rank in RANKS.items():
    array = np.zeros((0,) * rank) if arrays[name] is None else np.asarray(arrays[name])
    example[name] = array.astype(ml_dtypes.bfloat16).tobytes()
    example[f"{name}_shape"] = np.array(array.shape, np.int32)
  return example


def to_record(example: dict) -> Record:
  """Example, as a data source returns it -> the Record it was made from.

  ValueError if bytes and shapes disagree.
  """
  arrays = {}
  for name in RANKS:
    shape = example[f"{name}_shape"]
    array = np.frombuffer(example[name], ml_dtypes.bfloat16).reshape(shape)
    arrays[name] = array if shape.any() else None
  caption, file, source = (example[name].decode() for name in ("caption", "file", "source"))
  return Record(
    arrays["latents"],
    example["text_ids"],
    caption,
    file,
    float(example["start"]),
    float(example["fps"]),
    source,
    arrays["text_embedding"],
    arrays["condition"],
  )


class SoraRecords(tfds.core.ShardBasedBuilder):
  """Records of video latents and captions, written by launch.encode.

  records: the directory that launch.encode wrote; not needed if the dataset is already prepared. Raises
  BadInput if its records are incomplete, or if the dataset in `data_dir` was made from other records.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First schema; record format 1."}
  # Nothing is downloaded. To look for checksums, TFDS 4.9 imports a package that is not a dependency of it.
  url_infos = None

  def __init__(self, *, records=None, **kwargs):
    self._index = None if records is None else RecordIndex.open(records)
    super().__init__(file_format="array_record", **kwargs)
    self._original_state["records"] = records  # for pickling
    if (
      self._index
      and self.data_path.exists()
      and not _header(self._index).items() <= self.info.metadata.items()
    ):
      raise BadInput(
        f"{self.data_dir}: was made from other records than {records}; give another data_dir, or remove it"
      )

  def _info(self):
    metadata = tfds.core.MetadataDict(_header(self._index) if self._index else {})
    return tfds.core.DatasetInfo(
      builder=self,
      features=features(),
      license="unknown",
      metadata=metadata,
      description="Latents and captions of video clips at their native sizes, ready to train a video "
      "diffusion transformer on.",
    )

  def _shard_iterators_per_split(self, dl_manager):
    del dl_manager
    if self._index is None:
      raise BadInput(
        f"{self.data_dir}: not prepared yet; give records=DIR, the directory that launch.encode wrote"
      )
    self.info.metadata["damaged"] = []
    rows = self._index.rows
    order = np.lexsort((rows["position"], rows["shard"]))
    parts = np.split(order, np.flatnonzero(np.diff(rows["shard"][order])) + 1)
    return {"train": [functools.partial(self._examples, part) for part in parts]}

  def _examples(self, rows):
    """Yields (uid, example) for these rows of the index."""
    example = {}  # one dict for all: TFDS keeps every example of a shard until it has counted them
    for i in utils.tqdm(rows.tolist(), unit=" records", leave=False):
      try:
        record = read(self._index, i)
      except DamagedRecord as error:
        logging.warning("skipped: %s", error)
        self.info.metadata["damaged"].append(str(error))
        continue
      example.clear()
      example.update(from_record(record))
      yield record.uid, example

  def _download_and_prepare(self, dl_manager, download_config=None):
    super()._download_and_prepare(dl_manager, download_config)
    damaged = self.info.metadata["damaged"]
    if not self.info.splits.total_num_examples:
      raise BadInput(
        f"{self._index.directory}: none of its {len(self._index)} records can be read, such as {damaged[0]}; "
        "encode again"
      )
    if damaged:
      logging.warning(
        "%d of %d records are damaged and were skipped; info.metadata['damaged'] names them",
        len(damaged),
        len(self._index),
      )


def _header(index):
  """What training needs besides the records: the index's header and the null text's embedding, as JSON."""
  _, null_SE = index.null_text
  header = {name: value for name, value in index.header.items() if name != "shards"}
  header["null_text_embedding"] = None if null_SE is None else null_SE.astype(float).tolist()
  return header


def _utf8(text):
  return text.encode("utf-8", "backslashreplace")
