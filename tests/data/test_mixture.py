"""Several directories of records are used as one if they are of the same kind."""

import numpy as np
import pytest

from data.mixture import Mixture, open_all
from data.records import Record, RecordIndex, RecordWriter, read
from sora_jax.errors import BadInput

HEADER = {
  "latent_channels": 2,
  "vae_stride": [4, 16, 16],
  "vae_fingerprint": "abc",
  "text_fingerprint": "def",
  "conditions": False,
}


def write(directory, count, source, **changes):
  with RecordWriter(directory) as writer:
    for i in range(count):
      writer.add(
        Record(
          np.full((1 + i % 2, 2, 3, 2), i),
          np.arange(1 + i % 3),
          "",
          f"{i}.mp4",
          0.0,
          8.0,
          f"{source} {i % 2}",
        )
      )
    return writer.finish(HEADER | changes, null_text=[1])


@pytest.fixture
def directories(tmp_path):
  write(tmp_path / "a", 5, "folder")
  write(tmp_path / "b", 3, "film")
  return tmp_path


def test_records_are_counted_through(directories):
  a, b = (RecordIndex.open(directories / name) for name in "ab")
  both = open_all(f"{directories}/a, {directories}/b")
  assert (
    isinstance(both, Mixture)
    and len(both) == len(both.rows) == 8
    and both.directory == f"{directories}/a, {directories}/b"
  )
  assert (
    both.header["sources"] == ["folder 0", "folder 1", "film 0", "film 1"]
    and both.header["latent_channels"] == 2
  )
  assert both.null_text[0].tolist() == [1] and both.null_text[1] is None
  for i in range(8):
    index, own = (a, i) if i < 5 else (b, i - 5)
    np.testing.assert_array_equal(both[i].latents_THWC, read(index, own).latents_THWC)
    assert both.rows[i]["uid"] == index.rows[own]["uid"] and both.describe(i) == index.describe(own)
    assert both.header["sources"][both.rows[i]["source"]] == both[i].source
  np.testing.assert_array_equal(
    both.rows[[7, 0, 5]]["uid"], [b.rows[2]["uid"], a.rows[0]["uid"], b.rows[0]["uid"]]
  )
  np.testing.assert_array_equal(both.rows[3:7]["uid"], both.rows["uid"][3:7])
  assert both.rows[4]["uid"] == a.rows[4]["uid"] and a.rows["source"].max() == 1, (
    "the index on disk is as it was"
  )
  for i in (8, -1):
    with pytest.raises(IndexError):
      both[i]


def test_one_directory_is_no_mixture(directories):
  assert isinstance(open_all(str(directories / "a")), RecordIndex)
  with pytest.raises(BadInput, match="c: holds no records"):
    open_all(f"{directories}/a,{directories}/c")
  for path in (f"{directories}/a,{directories}/a", f"{directories}/a,"):
    with pytest.raises(BadInput, match="several different ones"):
      open_all(path)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"vae_fingerprint": "xyz"}, "VAE abc and xyz"),
    ({"text_fingerprint": None}, "text encoder def and None"),
    ({"latent_channels": 3}, "latent channels 2 and 3"),
    ({"conditions": True}, "conditions of an image model False and True"),
  ],
)
def test_records_of_another_kind_are_refused(directories, change, match):
  write(directories / "c", 2, "film", **change)
  with pytest.raises(BadInput, match=f"a and .*c: {match}"):
    open_all(f"{directories}/a,{directories}/c")
