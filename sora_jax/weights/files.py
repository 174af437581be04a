"""Folders of safetensors as other frameworks write them: one file, or shards with an index; opened lazily, a tensor at a time."""

import json
import pathlib
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open

from sora_jax.errors import BadInput

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of weights that we take


class Tensors(Mapping):
  """Name -> numpy array (bfloat16 as ml_dtypes) of a `.safetensors` file or a folder of them. Nothing is read before it is asked for.

  `stem`: a pattern of the files' names. Raises BadInput where there is no such file, a shard is missing or cut short, two shards hold the
  same name, or a dtype is not of DTYPES.
  """

  def __init__(self, path, stem="*"):
    path = pathlib.Path(path)
    files = sorted(path.glob(f"{stem}.safetensors")) if path.is_dir() else [path]
    indices = sorted(path.glob(f"{stem}.safetensors.index.json")) if path.is_dir() else []
    if indices:
      try:
        files = [path / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
      except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(f"weights: {indices[0]} is no index of shards ({error!r}); download it again") from error
    if not files:
      pickled = [name for pattern in ("*.pth", "*.pt", "*.bin") for name in path.glob(pattern)]
      if pickled:
        raise BadInput(
          f"weights: {pickled[0]} is a pickle of PyTorch, which is not read here; make a safetensors file of it where torch is: "
          "safetensors.torch.save_file(torch.load(NAME, weights_only=True), NEW)"
        )
      raise BadInput(f"weights: {path} holds no .safetensors file; give the folder of one part of a model, such as .../transformer")
    self._where, self._specs, self.metadata = {}, {}, {}
    for file in files:
      try:
        with safe_open(file, framework="numpy") as opened:
          self.metadata.update(opened.metadata() or {})
          slices = {name: opened.get_slice(name) for name in opened.keys()}
          specs = {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}
      except (OSError, SafetensorError) as error:
        raise BadInput(f"weights: {file} cannot be read ({error}); download it again") from error
      for name, (_, dtype) in specs.items():
        if name in self._where:
          raise BadInput(f"weights: {name} is both in {file} and in {self._where[name]}; keep one model in a folder")
        if dtype not in DTYPES:
          raise BadInput(f"weights: {name} in {file} has dtype {dtype}; {', '.join(DTYPES)} are known: convert it first")
      self._where.update(dict.fromkeys(specs, file))
      self._specs.update(specs)

  def shape(self, name):
    """Of a tensor, from the header."""
    return self._specs[name][0]

  def dtype(self, name):
    """Of a tensor, from the header: a name that numpy (with ml_dtypes) knows."""
    return DTYPES[self._specs[name][1]]

  def __getitem__(self, name):
    with safe_open(self._where[name], framework="numpy") as opened:
      return opened.get_tensor(name)

  def __iter__(self):
    return iter(self._where)

  def __len__(self):
    return len(self._where)


class Renamed(Mapping):
  """A mapping under other names: `names` is {new name: name there}."""

  def __init__(self, tensors, names):
    self._tensors, self._names = tensors, names

  def shape(self, name):
    tensors, name = self._tensors, self._names[name]
    return tensors.shape(name) if hasattr(tensors, "shape") else tuple(tensors[name].shape)

  def dtype(self, name):
    return self._tensors.dtype(self._names[name])

  def __getitem__(self, name):
    return self._tensors[self._names[name]]

  def __iter__(self):
    return iter(self._names)

  def __len__(self):
    return len(self._names)


def read_config(path):
  """config.json of a part's folder -> dict. Raises BadInput where there is none."""
  try:
    config = json.loads((pathlib.Path(path) / "config.json").read_text())
    if not isinstance(config, dict):
      raise ValueError("it is no JSON object")
    return config
  except (OSError, ValueError) as error:
    raise BadInput(f"weights: {path} has no readable config.json ({error}); give the folder of one part of a model") from error
