"""Records are read back as written, after any kill; damaged ones are named."""

import concurrent.futures
import errno
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from data import records
from data.records import INDEX_DTYPE, DamagedRecord, Record, RecordIndex, RecordWriter, read
from sora_jax.errors import BadInput

HEADER = {
  "latent_channels": 4,
  "vae_stride": [4, 16, 16],
  "vae_fingerprint": "abc",
  "text_fingerprint": "def",
}


def record(i, embedded=False, source="folder"):
  rng = np.random.default_rng(i)
  t, h, w, s = 1 + i % 3, 2 + i % 2, 3, 1 + i % 5
  return Record(
    rng.normal(size=(t, h, w, 4)).astype(ml_dtypes.bfloat16),
    np.arange(s, dtype=np.int32),
    f"eine Katze, naïve 猫 {i}",
    f"b/{(i * 7) % 13:02d}.mp4",
    i / 8,
    8.0 + i % 3,
    source,
    rng.normal(size=(s, 6)).astype(ml_dtypes.bfloat16) if embedded else None,
    text_spans_N2=np.array([(1, 0), (s - 1, 1)], np.int32) if s > 3 else None,
  )


def equal(a, b):
  arrays = "latents_THWC", "text_ids_S", "text_SE", "text_spans_N2"
  for x, y in ((getattr(a, name), getattr(b, name)) for name in arrays):
    assert (x is None) == (y is None)
    if x is not None:
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x.astype(np.float32), y.astype(np.float32))
  assert [getattr(a, n) for n in ("caption", "file", "start", "fps", "source", "uid")] == [
    getattr(b, n) for n in ("caption", "file", "start", "fps", "source", "uid")
  ]
  return True


def write(directory, wanted, per_shard=4, settings=None, **null):
  """As launch.encode: adds the missing records, a shard every `per_shard` of them, then the index."""
  with RecordWriter(directory, settings) as writer:
    add_missing(writer, wanted, per_shard)
    return writer.finish(HEADER, null_text=[1], **null)


def add_missing(writer, wanted, per_shard):
  for one in wanted:
    if one.uid not in writer.uids:
      writer.add(one)
    if one.file not in writer.files:
      writer.close_file(one.file, {"pieces": 1})
    if writer.pending == per_shard:
      writer.commit()


@pytest.mark.parametrize("embedded", [False, True])
def test_what_was_written_comes_back(tmp_path, embedded):
  wanted = [record(i, embedded) for i in range(10)]
  null_SE = np.ones((1, 6), ml_dtypes.bfloat16) if embedded else None
  index = write(tmp_path, wanted, null_text_SE=null_SE)
  assert len(index) == 10 and index.rows.dtype == INDEX_DTYPE and isinstance(index.rows, np.memmap)
  ordered = sorted(wanted, key=lambda one: (one.file, one.start))
  for i, one in enumerate(ordered):
    assert equal(read(index, i), one)
    row = index.rows[i]
    assert (row["t"], row["h"], row["w"]) == one.latents_THWC.shape[:3]
    assert (row["uid"], row["text_tokens"], row["fps"]) == (one.uid, one.text_tokens, one.fps)
  ids, embedding = index.null_text
  assert ids.tolist() == [1] and (embedding is None) == (not embedded)
  if embedded:
    assert embedding.shape == (1, 6) and embedding.dtype == ml_dtypes.bfloat16
  assert index.header["vae_fingerprint"] == "abc" and index.header["sources"] == ["folder"]
  with pytest.raises(IndexError):
    read(index, 10)


def test_uids_are_of_file_and_start():
  """The same on every machine and in every version: training draws its noise from them.

  (Number from this code, 2026-11.)
  """
  assert records.uid("a/b.mp4", 1.5) == records.uid("a/b.mp4", 1.5000000001)
  assert len({records.uid(f, s) for f in ("a", "b", "a\0b") for s in (0, 0.04, 1)}) == 9
  assert records.uid("a/b.mp4", 1.5) == 10552471034892410136


def test_threads_and_processes_may_read(tmp_path):
  wanted = sorted((record(i) for i in range(40)), key=lambda one: (one.file, one.start))
  index = pickle.loads(pickle.dumps(write(tmp_path, wanted)))
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    positions = np.random.default_rng(0).integers(0, 40, 400)
    for i, result in zip(positions, pool.map(lambda i: read(index, i), positions)):
      assert equal(result, wanted[i])


class Killed(BaseException):
  pass


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_moment_it_ends_the_same(tmp_path, monkeypatch, before):
  """After a kill just before or after any rename, a second run gives the same files as one without it."""
  wanted = [record(i) for i in range(10)]
  write(tmp_path / "whole", wanted)
  names = {path.name for path in (tmp_path / "whole").iterdir()}
  rename = os.replace

  def run(directory, kill_at):
    """Returns False if it was killed. As after SIGKILL, nothing is cleaned up; only the lock is released."""
    calls = 0

    def replace(source, target):
      nonlocal calls
      calls += 1
      if calls == kill_at and before:
        raise Killed
      rename(source, target)
      if calls == kill_at:
        raise Killed

    monkeypatch.setattr(os, "replace", replace)
    writer = RecordWriter.__new__(RecordWriter)
    try:
      writer.__init__(directory, {})
      add_missing(writer, wanted, 4)
      return bool(writer.finish(HEADER, null_text=[1]))
    except Killed:
      return False
    finally:
      getattr(writer, "_lock", open(os.devnull)).close()

  kill_at = 1
  while not run(tmp_path / f"{kill_at}", kill_at):
    directory = tmp_path / f"{kill_at}"
    if before or not (directory / "index.json").exists():
      with pytest.raises(BadInput):
        RecordIndex.open(directory)
    assert run(directory, None)
    assert {path.name for path in directory.iterdir()} == names
    for name in names:
      assert (directory / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (kill_at, name)
    kill_at += 1
  assert kill_at == 10, "settings, three shards of two files each, the index, its header: nine moments"


def test_more_can_be_added_later(tmp_path):
  wanted = [record(i) for i in range(10)]
  write(tmp_path, wanted[:6])
  index = write(tmp_path, wanted)
  assert sorted(index.rows["uid"].tolist()) == sorted(one.uid for one in wanted)
  with RecordWriter(tmp_path) as writer, pytest.raises(ValueError, match="already written"):
    writer.add(wanted[0])


def test_an_open_shard_is_dropped(tmp_path):
  with RecordWriter(tmp_path) as writer:
    writer.add(record(0))
  assert not list(tmp_path.glob("shard-*"))


def test_a_flipped_byte_costs_one_record_and_is_named(tmp_path):
  wanted = [record(i) for i in range(4)]
  index = write(tmp_path, wanted)
  path = tmp_path / "shard-000-00000.array_record"
  content = bytearray(path.read_bytes())
  content[content.find(wanted[2].latents_THWC.tobytes()) + 3] ^= 1
  path.write_bytes(content)
  index = RecordIndex.open(tmp_path)
  bad = []
  for i in range(4):
    try:
      read(index, i)
    except DamagedRecord as e:
      bad.append(i)
      assert f"{wanted[2].file} at {wanted[2].start:g} s" in str(e) and "shard-000-00000" in str(e)
  assert [index.rows[i]["uid"] for i in bad] == [wanted[2].uid]


def test_a_record_of_another_place_is_noticed(tmp_path):
  """Shards of another directory, of the same size: no record is damaged, but none is that of the index."""
  for name, first in (("a", 0), ("b", 6)):
    write(tmp_path / name, [record(i) for i in range(first, first + 4)])
  (tmp_path / "b" / "shard-000-00000.array_record").write_bytes(
    (tmp_path / "a" / "shard-000-00000.array_record").read_bytes()
  )
  index = RecordIndex.open(tmp_path / "b")
  with pytest.raises(BadInput, match="the index does not match its records: for record 0"):
    read(index, 0)


def test_opening_names_what_is_wrong(tmp_path):
  def broken(change, *match):
    directory = tmp_path / str(len(list(tmp_path.iterdir())))
    write(directory, [record(i) for i in range(5)])
    change(directory)
    with pytest.raises(BadInput) as e:
      RecordIndex.open(directory)
    assert all(m in str(e.value) for m in match), e.value
    assert "\n" not in str(e.value)

  def rewrite(name, change):
    def do(directory):
      content = bytearray((directory / name).read_bytes())
      (directory / name).write_bytes(change(content))

    return do

  def header(**changes):
    return rewrite("index.json", lambda content: json.dumps(json.loads(content) | changes).encode())

  shard = "shard-000-00001.array_record"
  broken(lambda d: (d / "index.json").unlink(), "not finished")
  broken(lambda d: [(d / n).unlink() for n in ("index.json", "job.json")], "no index.json", "launch.encode")
  broken(header(format_version=2), "format_version 2")
  broken(rewrite("index.json", lambda content: content[:50]), "index.json", "cannot be read")
  broken(rewrite("index.npy", lambda content: content[:-20]), "index.npy")
  broken(rewrite("index.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1])), "damaged")
  broken(header(records=4), "index.npy")
  broken(rewrite(shard, lambda content: content[:-100]), shard, "bytes of")
  broken(lambda d: (d / shard).unlink(), shard, "missing")


def test_settings_and_writers_are_one_at_a_time(tmp_path):
  with RecordWriter(tmp_path, {"fps": 8}):
    with pytest.raises(BadInput, match="another program"):
      RecordWriter(tmp_path, {"fps": 8})
  with pytest.raises(BadInput, match="fps=8, now fps=9"):
    RecordWriter(tmp_path, {"fps": 9})
  with RecordWriter(tmp_path, {"fps": 8}) as writer, pytest.raises(ValueError, match="no records"):
    writer.finish(HEADER)


def test_a_full_disk_is_told_and_costs_only_the_open_shard(tmp_path):
  big = Record(
    np.zeros((1, 64, 64, 64), ml_dtypes.bfloat16), np.ones(1, np.int32), "", "z", 0.0, 1.0, "folder"
  )
  with pytest.raises(OSError) as e, RecordWriter(tmp_path) as writer:
    add_missing(writer, [record(i) for i in range(4)], 4)
    os.symlink("/dev/full", tmp_path / "shard-000-00001.array_record.tmp")
    writer.add(big)
    writer.commit()
  assert e.value.errno == errno.ENOSPC
  assert len(write(tmp_path, [*(record(i) for i in range(4)), big])) == 5


def test_blobs_are_safetensors(tmp_path):
  """The safetensors library reads them."""
  import safetensors

  one = record(5, embedded=True)
  (tmp_path / "a.safetensors").write_bytes(records.to_blob(one))
  with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as f:
    assert set(f.keys()) == {"latents", "text_ids", "text_embedding"}
    assert f.metadata()["caption"] == one.caption
    assert f.get_slice("latents").get_shape() == list(one.latents_THWC.shape)
    assert f.get_slice("latents").get_dtype() == "BF16"
    np.testing.assert_array_equal(f.get_tensor("text_ids"), one.text_ids_S)


def test_not_a_record():
  for blob in (b"", b"\xff" * 100, records.to_blob(record(0))[:100]):
    with pytest.raises(ValueError):
      records.from_blob(blob)
