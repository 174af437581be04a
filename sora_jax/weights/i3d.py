"""Reads the I3D of Kinetics-400 from the user's safetensors file, for the Frechet video distance.

The file holds the names of pytorch-i3d: `Conv3d_1a_7x7.conv3d.weight` [64, 3, 7, 7, 7] (out, in, time,
height, width), `Conv3d_1a_7x7.bn.weight`, `.bias`, `.running_mean`, `.running_var`, ...
`logits.conv3d.weight`. One line makes it from its `models/rgb_imagenet.pt`, where torch is installed:

  safetensors.torch.save_file(torch.load("rgb_imagenet.pt", weights_only=True), "i3d.safetensors")
"""

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models import i3d
from sora_jax.weights import files


def load(path):
  """Path of the file -> weights of `i3d.features`. Raises BadInput where that fails."""
  return from_torch(files.Tensors(path))


def shapes():
  """{name: shape} of all tensors."""
  wanted = {}
  for name, kernel, width, out in i3d.units():
    wanted[f"{name}.conv3d.weight"] = (out, width, kernel, kernel, kernel)
    wanted |= {f"{name}.bn.{part}": (out,) for part in ("weight", "bias", "running_mean", "running_var")}
  wanted["logits.conv3d.weight"] = (i3d.CLASSES, out_width(), 1, 1, 1)
  wanted["logits.conv3d.bias"] = (i3d.CLASSES,)
  return wanted


def out_width():
  """Channels before the logits."""
  ((b0, _, b1b, _, b2b, b3b),) = i3d.LAYERS[-1][1:]
  return b0 + b1b + b2b + b3b


def from_torch(tensors):
  """Mapping of names to arrays -> weights of `i3d.features`, with batch norms merged in. BadInput names a
  misfit.
  """
  for name, shape in shapes().items():
    found = tuple(tensors[name].shape) if name in tensors else "missing"
    if found != shape:
      raise BadInput(
        f"weights: {name} is {found}, and an I3D of Kinetics-400 has it with {shape}; see "
        "sora_jax/weights/i3d.py"
      )

  def get(name):
    return np.asarray(tensors[name], np.float32)

  weights = {}
  for name, *_ in i3d.units():
    scale = get(f"{name}.bn.weight") / np.sqrt(get(f"{name}.bn.running_var") + i3d.EPSILON)
    kernel = get(f"{name}.conv3d.weight").transpose(2, 3, 4, 1, 0) * scale
    weights[name] = {
      "kernel": kernel,
      "bias": get(f"{name}.bn.bias") - get(f"{name}.bn.running_mean") * scale,
    }
  logits = get("logits.conv3d.weight")[:, :, 0, 0, 0].T
  return weights | {"logits": {"kernel": logits, "bias": get("logits.conv3d.bias")}}
