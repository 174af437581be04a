"""Files are written whole or not at all; what is damaged is told in one line."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sora_jax import files
from sora_jax.errors import BadInput


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a" / "x.json"
  files.write_json(path, {"old": 1})
  with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:
    partial.write_text("{")
    raise KeyboardInterrupt
  assert files.read_json(path) == {"old": 1} and [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("depth", [None, 0, 1, 2])
def test_json_comes_back(tmp_path, depth):
  """At any depth, and with what is no character; with a depth, as many levels of dicts have a line for each
  entry.
  """
  value = {"a": {"b": {"c": [1, 2]}, "d": "\udcff"}, "e": {}}
  files.write_json(tmp_path / "x", value, depth)
  assert files.read_json(tmp_path / "x") == value
  lines = len((tmp_path / "x").read_text().splitlines())
  assert lines == {0: 1, 1: 4, 2: 7}.get(depth, lines)


def test_a_report_has_a_line_for_each_file(tmp_path):
  value = {
    "a": 1,
    "b": {"x.mp4": {"size": [1, 2], "deep": {"er": None}}, 'q"é\n猫': [{}, {"s": 1}]},
    "empty": {},
    "list": [1],
  }
  files.write_json(tmp_path / "a.json", value, depth=2)
  text = (tmp_path / "a.json").read_text("utf-8")
  assert json.loads(text) == value and len(text.splitlines()) == 9


def test_broken_json_is_one_line(tmp_path):
  (tmp_path / "x").write_text("{")
  for path, says in ((tmp_path / "x", "not valid JSON"), (tmp_path / "y", "there is no")):
    with pytest.raises(BadInput, match=says):
      files.read_json(path)
  assert files.read_json_if_exists(tmp_path / "y") == {}


def test_lines_that_a_kill_cut_short_are_left_out(tmp_path):
  path = tmp_path / "log.jsonl"
  assert list(files.read_jsonl(path)) == []
  files.append_jsonl(path, {"n": 1})
  with open(path, "a") as f:
    f.write('{"n": 2, "torn')
  files.append_jsonl(path, {"n": 3})
  assert list(files.read_jsonl(path)) == [{"n": 1}, {"n": 3}]


ARRAYS = {
  "b": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a": np.array([1.5, -2], ml_dtypes.bfloat16),
  "empty": np.zeros((0, 4), np.int32),
}


def test_safetensors_are_those_of_the_library(tmp_path):
  """Ours is read by safetensors, theirs by us; in pieces or at once, the same bytes."""
  specs = {name: (array.shape, array.dtype) for name, array in ARRAYS.items()}
  pieces = [("b", ARRAYS["b"][:1]), ("b", ARRAYS["b"][1:]), ("a", ARRAYS["a"]), ("empty", ARRAYS["empty"])]
  files.write_safetensors(tmp_path / "x", specs, pieces, {"k": "v"})
  assert (tmp_path / "x").read_bytes() == files.to_safetensors(ARRAYS, {"k": "v"})
  theirs = safetensors.numpy.load_file(tmp_path / "x")
  safetensors.numpy.save_file(ARRAYS, tmp_path / "y")
  for found in (theirs, files.read_safetensors(tmp_path / "x"), files.read_safetensors(tmp_path / "y")):
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
      assert found[name].dtype == array.dtype
      np.testing.assert_array_equal(found[name], array)
  assert files.parse_safetensors((tmp_path / "x").read_bytes())[1] == {"k": "v"}


@pytest.mark.parametrize(
  "pieces", [[("b", ARRAYS["b"])], [("a", ARRAYS["a"]), ("b", ARRAYS["b"])], [("b", np.zeros(9, np.float32))]]
)
def test_pieces_that_do_not_add_up(tmp_path, pieces):
  specs = {name: (ARRAYS[name].shape, ARRAYS[name].dtype) for name in ("b", "a")}
  with pytest.raises(ValueError):
    files.write_safetensors(tmp_path / "x", specs, pieces)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: data[:-1],
    lambda data: data[:5],
    lambda data: data.replace(b"BF16", b"XX16"),
    lambda data: b"",
  ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage):
  (tmp_path / "x").write_bytes(damage(files.to_safetensors(ARRAYS)))
  with pytest.raises(BadInput, match="cannot be read"):
    files.read_safetensors(tmp_path / "x")


def test_names_of_nested_weights():
  tree = {"b": {"c": 1, "a": 2}, "a": 3}
  assert files.flatten(tree) == {"a": 3, "b/a": 2, "b/c": 1} and files.unflatten(files.flatten(tree)) == tree
  assert json.dumps(files.flatten({})) == "{}"
