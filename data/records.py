"""Records on disk: latents and text of clips, in ArrayRecord shards, with an index of their sizes.

A directory of records holds

  shard-000-00000.array_record   one blob a clip (group_size 1: a flipped byte costs one record, and is
                                 detected)
  shard-000-00000.json       what the shard holds; written after it, by rename: a shard without it was never
                             finished
  index.npy                  INDEX_DTYPE, a row a clip, sorted by (file, start): all that planning needs,
                             memory-mapped
  index.json                 header: format_version, shards, sources, latent channels, stride, fingerprints,
                             null text
  null_text.safetensors      the encoder's output for the empty string, if texts are embedded

A blob is safetensors: `latents` bfloat16 [T, H, W, C], `text_ids` int32 [S], `text_embedding` bfloat16 [S, E]
if texts are embedded, `condition` bfloat16 [T, H, W, C] if the model takes one, `text_spans` int32 [N, 2] if
there are several captions, one after another in time, and the metadata strings caption, file, start, fps,
source, format_version. Latents are posterior means, normalised.

The writer works in shards. A finished shard is safe; a killed run loses only the open one. Several processes
may write at once, each its own shards (the first number is that of the process), and any number of them may
resume. The directory may be in a bucket: data/bucket.py.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from data import bucket
from sora_jax import files
from sora_jax.errors import BadInput

FORMAT_VERSION = 1
SHARD_BYTES = 128 << 20

INDEX_DTYPE = np.dtype([
  ("uid", "<u8"), ("t", "<u2"), ("h", "<u2"), ("w", "<u2"), ("source", "<u2"),
  ("fps", "<f4"), ("text_tokens", "<i4"), ("shard", "<u4"), ("position", "<u4"),
])  # fmt: skip


class DamagedRecord(Exception):
  """A record that cannot be read back as it was written; the message names it."""


def uid(file, start):
  """uint64 of a clip, the same on every machine: a hash of its file name and start (to the microsecond)."""
  name = f"{file}\0{round(start * 1e6)}".encode("utf-8", "surrogateescape")
  return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Record:
  """One clip, ready for training.

  fps: frames a second of the pixels. start: seconds from the start of the file.
  cond_THWC: latents of the first frame followed by grey frames, for models that are given these (Wan I2V).
  text_spans_N2: of several captions (N > 1), whose ids and embeddings follow one another: how many text
    tokens each has, and the latent frame that it begins with, the first 0. None: there is one.
  """

  latents_THWC: np.ndarray
  text_ids_S: np.ndarray
  caption: str
  file: str
  start: float
  fps: float
  source: str
  text_SE: np.ndarray | None = None
  cond_THWC: np.ndarray | None = None
  text_spans_N2: np.ndarray | None = None

  @property
  def uid(self):
    return uid(self.file, self.start)

  @property
  def spans_N2(self):
    """text_spans_N2, or the one span of a single caption."""
    if self.text_spans_N2 is None:
      return np.array([[len(self.text_ids_S), 0]], np.int32)
    return self.text_spans_N2

  @property
  def text_tokens(self):
    """What its text takes of a row. Each of several captions may be followed by a zero (plan's text_pad)."""
    return len(self.text_ids_S) + (0 if self.text_spans_N2 is None else len(self.text_spans_N2))


def to_blob(record):
  """Record -> bytes.

  Equal records give equal bytes (the writer of safetensors itself shuffles the metadata).
  """
  arrays = {"latents": np.asarray(record.latents_THWC, ml_dtypes.bfloat16)}
  if record.text_SE is not None:
    arrays["text_embedding"] = np.asarray(record.text_SE, ml_dtypes.bfloat16)
  if record.cond_THWC is not None:
    arrays["condition"] = np.asarray(record.cond_THWC, ml_dtypes.bfloat16)
  if record.text_spans_N2 is not None:
    arrays["text_spans"] = np.asarray(record.text_spans_N2, np.int32)
  arrays["text_ids"] = np.asarray(record.text_ids_S, np.int32)
  metadata = {
    "format_version": str(FORMAT_VERSION),
    "caption": record.caption,
    "file": record.file,
    "start": repr(float(record.start)),
    "fps": repr(float(record.fps)),
    "source": record.source,
  }
  return files.to_safetensors(arrays, metadata)


def from_blob(blob):
  """bytes -> Record. Raises ValueError if they are not a record."""
  arrays, metadata = files.parse_safetensors(blob)
  try:
    if int(metadata["format_version"]) > FORMAT_VERSION:
      raise ValueError(f"format_version {metadata['format_version']}; this code reads up to {FORMAT_VERSION}")
    return Record(
      arrays["latents"],
      arrays["text_ids"],
      metadata["caption"],
      metadata["file"],
      float(metadata["start"]),
      float(metadata["fps"]),
      metadata["source"],
      arrays.get("text_embedding"),
      arrays.get("condition"),
      arrays.get("text_spans"),
    )
  except KeyError as e:
    raise ValueError(f"not a record: it lacks {e}") from e


class RecordWriter:
  """Writes a directory of records.

  Opened on a directory that a killed run left, it resumes after the last finished shard.

    with RecordWriter(directory, settings) as writer:
      writer.add(record)                      # unless record.uid in writer.uids
      writer.close_file("a/b.mp4", {...})     # all its records are added; the dict goes into the report
      writer.commit()                         # finishes the shard: safe from here on
      index = writer.finish(header)           # writes the index, of the shards of all processes

  process: the number of this process, of several that write here. Process 0 opens its writer first, the
  others open theirs afterwards, and process 0 calls `finish` last.
  settings: what decides the contents of records (JSON values). Raises BadInput if the directory was begun
  with other settings, or if another writer has it open.

  uids: of the records in finished shards.  files: {file: dict of close_file} in finished shards. Both are of
  all processes, as of the last call of `load`.
  """

  def __init__(self, directory, settings: Mapping | None = None, shard_bytes=SHARD_BYTES, process=0):
    self.directory, self._process = bucket.path_of(directory), process
    self.directory.mkdir(parents=True, exist_ok=True)
    self._remote = not files.is_local(self.directory)
    self._stage = bucket.cache_of(directory, "writing") if self._remote else self.directory
    self._lock = open(self._stage / (f".lock-{process}" if process else ".lock"), "w")
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      self._lock.close()
      raise BadInput(
        f"{directory}: another program is writing records here; wait for it, or give another --out"
      ) from e
    self._shard_bytes = shard_bytes
    try:
      _check_settings(self.directory / "job.json", dict(settings or {}))
      self.load()
      if not process:  # the other processes have not begun yet
        self._remove_unfinished()
    except BaseException:
      self._lock.close()
      raise
    self._open_shard()

  def load(self):
    """Reads the lists of contents of all shards that any process has finished."""
    self.uids, self.files, self._shards = set(), {}, {}
    for path in sorted(self.directory.glob("shard-*.json")):
      shard = _read_json(path)
      if shard.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{path}: not a shard of this format; give an empty --out")
      self._register(path.stem, shard)

  def _register(self, name, shard):
    self._shards[name] = shard
    self.uids.update(uid(file, start) for file, start, *_ in shard["records"])
    self.files.update(shard["files"])

  def _remove_unfinished(self):
    """Deletes the shards that a killed run left open."""
    for path in self.directory.glob("shard-*.array_record*"):
      if path.name.split(".")[0] not in self._shards:
        path.unlink()

  def _open_shard(self):
    prefix = f"shard-{self._process:03d}-"
    numbers = [int(name.removeprefix(prefix)) for name in self._shards if name.startswith(prefix)]
    self._name = f"{prefix}{max(numbers, default=-1) + 1:05d}"
    self._writer, self._records, self._open_files, self._bytes = None, [], {}, 0

  def add(self, record):
    """Appends to the open shard, and finishes the shard if it has reached `shard_bytes`."""
    if record.uid in self.uids:
      raise ValueError(f"{record.file} at {record.start} s is already written")
    blob = to_blob(record)
    with _full_disk(self.directory):
      if self._writer is None:
        self._writer = ArrayRecordWriter(str(self._shard_path(".tmp")), "group_size:1,uncompressed")
      self._writer.write(blob)
    self._bytes += len(blob)
    t, h, w, _ = record.latents_THWC.shape
    self._records.append(
      [record.file, float(record.start), t, h, w, float(record.fps), record.text_tokens, record.source]
    )
    if self._bytes >= self._shard_bytes:
      self.commit()

  def close_file(self, file, entry):
    """Declares that all records of `file` are added (none if it was skipped).

    It is done once this shard is finished.
    """
    self._open_files[file] = entry

  @property
  def pending(self):
    """The number of records in the open shard, which a kill would lose."""
    return len(self._records)

  def commit(self):
    """Finishes the open shard: data first, then its list of contents, each by rename."""
    if not self._records and not self._open_files:
      return
    size = 0
    if self._writer is not None:
      with _full_disk(self.directory):
        self._writer.close()
      open_shard = self._shard_path(".tmp")
      size = open_shard.stat().st_size
      if self._remote:
        files.copy(open_shard, self.directory / f"{self._name}.array_record")
        open_shard.unlink()
      else:
        files.sync(open_shard)
        open_shard.replace(self._shard_path(""))
    shard = {
      "format_version": FORMAT_VERSION,
      "bytes": size,
      "records": self._records,
      "files": self._open_files,
    }
    files.write_json(self.directory / f"{self._name}.json", shard, depth=2)
    self._register(self._name, shard)
    self._open_shard()

  def finish(self, header: Mapping, null_text=(), null_text_SE=None):
    """Writes the index over all finished shards -> RecordIndex. Raises ValueError if there are no records.

    header: latent_channels, vae_stride, vae_fingerprint, text_fingerprint (JSON values).
    null_text: ids of the empty string.  null_text_SE: its embedding, if texts are embedded.
    """
    self.commit()
    shards = sorted(self._shards.items())
    contents = []
    for number, (_, shard) in enumerate(shards):
      for position, (file, start, *sizes) in enumerate(shard["records"]):
        contents.append((file, start, number, position, sizes))
    if not contents:
      raise ValueError("no records were written")
    contents.sort(key=lambda record: record[:2])
    sources = sorted({sizes[-1] for *_, sizes in contents})
    rows = np.array(
      [
        (uid(file, start), t, h, w, sources.index(source), fps, tokens, number, position)
        for file, start, number, position, (t, h, w, fps, tokens, source) in contents
      ],
      INDEX_DTYPE,
    )
    if len(np.unique(rows["uid"])) != len(rows):
      raise ValueError(
        "two records share a uid: the same file and start twice, or a collision of 64-bit hashes"
      )
    if null_text_SE is not None:
      embedding_SE = np.ascontiguousarray(null_text_SE, ml_dtypes.bfloat16)
      files.write_bytes(
        self.directory / "null_text.safetensors", files.to_safetensors({"text_embedding": embedding_SE})
      )
    with files.replacing(self.directory / "index.npy") as partial, partial.open("wb") as f:
      np.save(f, rows)
    shard_entries = [
      {"name": f"{name}.array_record", "records": len(shard["records"]), "bytes": shard["bytes"]}
      for name, shard in shards
    ]
    index = {
      "format_version": FORMAT_VERSION,
      **header,
      "records": len(rows),
      "index_crc32": zlib.crc32(rows.tobytes()),
      "sources": sources,
      "null_text": [int(i) for i in null_text],
      "null_text_embedding": null_text_SE is not None,
      "shards": shard_entries,
    }
    files.write_json(self.directory / "index.json", index, depth=2)
    return RecordIndex.open(self.directory)

  def _shard_path(self, suffix):
    return self._stage / f"{self._name}.array_record{suffix}"

  def __enter__(self):
    return self

  def __exit__(self, *_):
    """Deletes the open shard, as a kill would lose it."""
    if self._writer is not None:
      try:
        self._writer.close()
      except RuntimeError:  # a full disk; `add` raised the error that matters
        pass
      self._shard_path(".tmp").unlink(missing_ok=True)
      self._writer = None
    self._lock.close()


class RecordIndex:
  """The index of a directory of records: `rows` (memory-mapped, INDEX_DTYPE), `header` (dict), `len(index)`.

  Opening reads no record. Several threads may read at once. It can be pickled, for worker processes.
  local: the folder of its shards on this machine; of a bucket a cache, into which they come when needed.
  """

  def __init__(self, directory, header, rows, local=None):
    self.directory, self.header, self.rows = bucket.path_of(directory), header, rows
    self.local = local or self.directory
    counts = [shard["records"] for shard in header["shards"]]
    self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # [0:n] gives the source the number of records, so that it opens a shard only to read one of its records
    self._blobs = ArrayRecordDataSource(
      [f"{self.local / shard['name']}[0:{shard['records']}]" for shard in header["shards"]]
    )

  @classmethod
  def open(cls, directory):
    """Opens a directory.

    Raises BadInput, which names the fault, if it is incomplete, damaged or of another format.
    """
    directory = bucket.path_of(directory)
    path = directory / "index.json"
    if not path.exists():
      if (directory / "job.json").exists():
        raise BadInput(f"{directory}: its encoding is not finished; run the same launch.encode again")
      raise BadInput(
        f"{directory}: holds no records (no index.json); make them with launch.encode --out={directory}"
      )
    header = _read_json(path)
    if header.get("format_version") != FORMAT_VERSION:
      raise BadInput(
        f"{path}: format_version {header.get('format_version')}; this code reads {FORMAT_VERSION}; "
        "encode again"
      )
    local = directory
    try:
      if not files.is_local(directory):
        local = bucket.cache_of(directory, json.dumps(header))
        bucket.fetch(directory / "index.npy", local / "index.npy")
      rows = np.load(local / "index.npy", mmap_mode="r")
    except (OSError, ValueError) as e:
      raise BadInput(
        f"{directory / 'index.npy'}: cannot be read ({e}); run the same launch.encode again"
      ) from e
    if (
      rows.dtype != INDEX_DTYPE or len(rows) != header["records"] or zlib.crc32(rows) != header["index_crc32"]
    ):
      raise BadInput(
        f"{directory / 'index.npy'}: does not belong to the index.json beside it, or is damaged; "
        "run the same launch.encode again"
      )
    for shard in header["shards"] if files.is_local(directory) else ():
      path = directory / shard["name"]
      if shard["records"]:
        if not path.exists():
          raise BadInput(f"{path}: is missing; copy it again, or encode into an empty --out")
        if path.stat().st_size != shard["bytes"]:
          raise BadInput(
            f"{path}: has {path.stat().st_size} bytes of {shard['bytes']}; copy it again, or encode into an "
            "empty --out"
          )
    return cls(directory, header, rows, local)

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    return read(self, i)

  @property
  def null_text(self):
    """(ids, embedding [S, E] or None) of the empty string, for caption dropout and guidance."""
    ids = np.asarray(self.header["null_text"], np.int32)
    if not self.header["null_text_embedding"]:
      return ids, None
    return ids, files.read_safetensors(self.directory / "null_text.safetensors")["text_embedding"]

  def describe(self, i):
    """Names record i for a message, from the shard's list of contents (the record itself may be damaged)."""
    row = self.rows[i]
    shard = self.header["shards"][row["shard"]]["name"]
    try:
      file, start, *_ = _contents(self.directory / shard.replace(".array_record", ".json"))[row["position"]]
      return f"record {i}: {file} at {start:g} s ({self.directory / shard}, position {row['position']})"
    except (BadInput, OSError, LookupError):
      return f"record {i} ({self.directory / shard}, position {row['position']})"


def read(index, i) -> Record:
  """Record number i of a RecordIndex; safe from many threads.

  Raises DamagedRecord, which names it, if it cannot be read back. Raises BadInput if it can, but is not the
  record that the index describes: then no other record can be trusted either.
  """
  if not 0 <= i < len(index):
    raise IndexError(f"record {i} of {len(index)}")
  row = index.rows[i]
  if not files.is_local(index.directory):
    shard = index.header["shards"][row["shard"]]["name"]
    bucket.fetch(index.directory / shard, index.local / shard)
  try:
    record = from_blob(index._blobs[int(index._offsets[row["shard"]] + row["position"])])
  except (RuntimeError, ValueError, IndexError) as e:
    raise DamagedRecord(f"{index.describe(i)}: {e}") from e
  size, tokens = (row["t"], row["h"], row["w"]), row["text_tokens"]
  record_size, record_tokens = record.latents_THWC.shape[:3], record.text_tokens
  if record.uid != row["uid"] or record_size != size or record_tokens != tokens:
    raise BadInput(
      f"{index.directory}: the index does not match its records: for {index.describe(i)}, latents "
      f"{'x'.join(map(str, size))} and {tokens} text tokens, it holds {record.file} at {record.start:g} s, "
      f"latents {'x'.join(map(str, record_size))} and {record_tokens} text tokens; copy the directory "
      "again as a whole, or encode again"
    )
  return record


@functools.lru_cache(maxsize=64)
def _contents(path):
  """[file, start, ...] of each record of a shard."""
  return _read_json(path)["records"]


def _read_json(path):
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError) as e:
    raise BadInput(f"{path}: cannot be read ({e}); encode again, into an empty --out") from e


@contextlib.contextmanager
def _full_disk(directory):
  """Raises OSError if the disk is full. array_record itself raises RuntimeError for every fault."""
  try:
    yield
  except RuntimeError as e:
    if "No space left" in str(e):
      raise OSError(errno.ENOSPC, "the disk is full", str(directory)) from e
    raise


def _check_settings(path, settings):
  """Writes the settings of a new directory; compares them with those of an old one.

  A value that is off counts as absent.
  """
  settings = json.loads(json.dumps(settings))
  if not path.exists():
    files.write_json(path, settings, depth=2)
    return
  old = _read_json(path)
  for k in sorted(old.keys() | settings.keys()):
    if (old.get(k) or None) != (settings.get(k) or None):
      raise BadInput(
        f"{path.parent}: was begun with {k}={old.get(k)}, now {k}={settings.get(k)}; "
        "run with the same settings, or into another directory"
      )
