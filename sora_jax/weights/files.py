"""Folders of safetensors as other frameworks write them: one file, or shards with an index; opened lazily, a tensor at a time."""

import json
import pathlib
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open

from sora_jax.errors import BadInput


class Tensors(Mapping):
  """Name -> numpy array (bfloat16 as ml_dtypes) of a `.safetensors` file or a folder of them. Nothing is read before it is asked for.

  Raises BadInput where there is no such file, a shard is missing or cut short, or two shards hold the same name.
  """

  def __init__(self, path):
    path = pathlib.Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    indices = sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else []
    if indices:
      files = [path / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
    if not files:
      raise BadInput(f"weights: {path} holds no .safetensors file; give the folder of one part of a model, such as .../transformer")
    self._where = {}
    for file in files:
      try:
        with safe_open(file, framework="numpy") as opened:
          names = list(opened.keys())
      except (OSError, SafetensorError) as error:
        raise BadInput(f"weights: {file} cannot be read ({error}); download it again") from error
      twice = self._where.keys() & names
      if twice:
        raise BadInput(f"weights: {sorted(twice)[0]} is both in {file} and in {self._where[min(twice)]}; keep one model in a folder")
      self._where.update(dict.fromkeys(names, file))

  def __getitem__(self, name):
    with safe_open(self._where[name], framework="numpy") as opened:
      return opened.get_tensor(name)

  def __iter__(self):
    return iter(self._where)

  def __len__(self):
    return len(self._where)


def read_config(path):
  """config.json of a part's folder -> dict. Raises BadInput where there is none."""
  try:
    return json.loads((pathlib.Path(path) / "config.json").read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise BadInput(f"weights: {path} has no readable config.json ({error}); give the folder of one part of a model") from error
