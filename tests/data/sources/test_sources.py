"""Which source reads a path."""

import pytest

from data import sources
from sora_jax.errors import BadInput


def test_a_path_says_its_kind(tmp_path):
  assert (
    sources.kind_of(tmp_path) == "folder"
    and sources.kind_of("shapes:40") is None
    and sources.kind_of("no/such") == "folder"
  )
  assert (
    sources.kind_of(tmp_path / "a.csv") == "manifest" and sources.kind_of("shards-{000..009}.tar") == "tar"
  )
  (tmp_path / "a.tar").touch()
  assert sources.kind_of(tmp_path) == "tar"
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "dataset_info.json").touch()
  assert sources.kind_of(tmp_path / "deep") == "tfds"


def test_clips_are_not_hidden_by_a_tar_beside_them(tmp_path):
  (tmp_path / "a.tar").touch()
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "b.mp4").touch()
  with pytest.raises(BadInput, match="b.mp4"):
    sources.kind_of(tmp_path)
