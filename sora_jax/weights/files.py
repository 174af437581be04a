"""Files of weights of other frameworks, read a tensor at a time: safetensors, single or in shards, with eight
bits and scales, too; and pickles, where PyTorch is installed.
"""

import json
import pathlib
import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sora_jax.errors import BadInput

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # known dtypes of weights
EIGHT_BITS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# Beside weights of eight bits: their scales, in both names of ComfyUI, and what its programs alone need.
SCALES = (".scale_weight", ".weight_scale")
MARKS = re.compile(r"scaled_fp8|spiece_model|.+\.(scale_input|input_scale|comfy_quant)")
CONVERT = "safetensors.torch.save_file(torch.load('{0}', weights_only=True), '{1}.safetensors')"


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
          f"weights: {path} holds no .safetensors file; {pickled[0].name} is a pickle of PyTorch: convert "
          f"it where that is installed, with {CONVERT.format(pickled[0].name, pickled[0].stem)}"
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
        if dtype not in (*DTYPES, *EIGHT_BITS) and not MARKS.fullmatch(name):
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
    kind = self._specs[name][1]
    return DTYPES.get(kind) or np.dtype(EIGHT_BITS.get(kind, np.uint8)).name

  def __getitem__(self, name):
    kind = self._specs[name][1]
    if kind in EIGHT_BITS:  # which safe_open does not know in numpy
      return _raw(self._files[name], name).view(EIGHT_BITS[kind]).reshape(self.shape(name))
    with safe_open(self._files[name], framework="numpy") as opened:
      return opened.get_tensor(name)

  def __iter__(self):
    return iter(self._files)

  def __len__(self):
    return len(self._files)


def _raw(file, name):
  """The bytes of a tensor, uint8."""
  with open(file, "rb") as stream:
    size = int.from_bytes(stream.read(8), "little")
    first, last = json.loads(stream.read(size))[name]["data_offsets"]
    stream.seek(8 + size + first)
    return np.frombuffer(stream.read(last - first), np.uint8)


class Plain(Mapping):
  """The weights of a file as ComfyUI distributes them: without a prefix of all names, weights of eight bits
  times their scales as bfloat16, and without marks.
  """

  def __init__(self, tensors):
    self._tensors = tensors
    names = [name for name in tensors if not name.endswith(SCALES) and not MARKS.fullmatch(name)]
    prefixes = ("model.diffusion_model.", "diffusion_model.")
    prefix = next((one for one in prefixes if names and all(name.startswith(one) for name in names)), "")
    self._names = {name.removeprefix(prefix): name for name in names}

  def shape(self, name):
    return self._tensors.shape(self._names[name])

  def dtype(self, name):
    kind = self._tensors.dtype(self._names[name])
    return "bfloat16" if kind.startswith("float8") else kind

  def __getitem__(self, name):
    stored = self._names[name]
    tensor = self._tensors[stored]
    if not self._tensors.dtype(stored).startswith("float8"):
      return tensor
    module = stored.removesuffix(".weight")
    scale = next((self._tensors[module + end] for end in SCALES if module + end in self._tensors), 1.0)
    scale = np.asarray(scale, np.float32)
    if scale.ndim == 1 and scale.size > 1:  # one for each output
      scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))
    return (tensor.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)

  def __iter__(self):
    return iter(self._names)

  def __len__(self):
    return len(self._names)


class Pickle(Mapping):
  """A `.pth` file of PyTorch, where that is installed. Raises BadInput where it is not, or where the file is
  no dict of tensors.
  """

  metadata = {}

  def __init__(self, path):
    try:
      import torch
    except ImportError:
      path = pathlib.Path(path)
      raise BadInput(
        f"weights: {path} is a pickle of PyTorch, which is not installed here; where it is, "
        f"{CONVERT.format(path.name, path.stem)} makes it a file that is read"
      ) from None
    self._torch = torch
    try:
      self._tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
      self._kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self._tensors.items()}
    except Exception as error:  # torch raises what it meets: of pickles, of zip files, of what they name
      reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
      raise BadInput(f"weights: {path} is no file of tensors alone ({reason})") from None

  def shape(self, name):
    return tuple(self._tensors[name].shape)

  def dtype(self, name):
    return self._kinds[name]

  def __getitem__(self, name):
    tensor = self._tensors[name]
    if tensor.dtype == self._torch.bfloat16:
      return tensor.contiguous().view(self._torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  def __iter__(self):
    return iter(self._tensors)

  def __len__(self):
    return len(self._tensors)


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
