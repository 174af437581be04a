"""safetensors files of other frameworks: single files, or shards with an index, read a tensor at a time."""

import json
import pathlib
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open

from sora_jax.errors import BadInput

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # known dtypes of weights


class Tensors(Mapping):
  """Mapping of names to numpy arrays of a `.safetensors` file, or of a folder of them.

  bfloat16 is that of ml_dtypes. A tensor is read when it is looked up. stem: a glob pattern of the files'
  names. Raises BadInput where there is no such file, a shard is missing or truncated, two shards hold the
  same name, or a dtype is not in DTYPES.
  """

  def __init__(self, path, stem="*"):
    path = pathlib.Path(path)
    files = sorted(path.glob(f"{stem}.safetensors")) if path.is_dir() else [path]
    indices = sorted(path.glob(f"{stem}.safetensors.index.json")) if path.is_dir() else []
    if indices:
      try:
        weight_map = json.loads(indices[0].read_text())["weight_map"]
        files = [path / name for name in sorted(set(weight_map.values()))]
      except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(
          f"weights: {indices[0]} is not an index of shards ({error!r}); download it again"
        ) from error
    if not files:
      pickled = [name for pattern in ("*.pth", "*.pt", "*.bin") for name in path.glob(pattern)]
      if pickled:
        raise BadInput(
          f"weights: {pickled[0]} is a pickle of PyTorch, which is not read here; convert it to safetensors "
          "where torch is installed: safetensors.torch.save_file(torch.load(NAME, weights_only=True), NEW)"
        )
      raise BadInput(
        f"weights: {path} holds no .safetensors file; give the folder of one part of a model, such as "
        ".../transformer"
      )
    self._files, self._specs, self.metadata = {}, {}, {}
    for file in files:
      try:
        with safe_open(file, framework="numpy") as opened:
          self.metadata.update(opened.metadata() or {})
          slices = {name: opened.get_slice(name) for name in opened.keys()}
          specs = {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}
      except (OSError, SafetensorError) as error:
        raise BadInput(f"weights: {file} cannot be read ({error}); download it again") from error
      for name, (_, dtype) in specs.items():
        if name in self._files:
          raise BadInput(
            f"weights: {name} is both in {file} and in {self._files[name]}; keep one model in a folder"
          )
        if dtype not in DTYPES:
          raise BadInput(
            f"weights: {name} in {file} has dtype {dtype}; known: {', '.join(DTYPES)}; convert it first"
          )
      self._files.update(dict.fromkeys(specs, file))
      self._specs.update(specs)

  def shape(self, name):
    """Shape of a tensor, from the header."""
    return self._specs[name][0]

  def dtype(self, name):
    """Dtype of a tensor, from the header: a name known to numpy (with ml_dtypes)."""
    return DTYPES[self._specs[name][1]]

  def __getitem__(self, name):
    with safe_open(self._files[name], framework="numpy") as opened:
      return opened.get_tensor(name)

  def __iter__(self):
    return iter(self._files)

  def __len__(self):
    return len(self._files)


class Renamed(Mapping):
  """A mapping with other names. names: {new name: name in `tensors`}."""

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
  """Reads config.json in the folder of a part -> dict. Raises BadInput where it cannot be read."""
  try:
    config = json.loads((pathlib.Path(path) / "config.json").read_text())
    if not isinstance(config, dict):
      raise ValueError("it is not a JSON object")
    return config
  except (OSError, ValueError) as error:
    raise BadInput(
      f"weights: {path} has no readable config.json ({error}); give the folder of one part of a model"
    ) from error
