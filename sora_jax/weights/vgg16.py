"""VGG16's convolutions from a safetensors file that the user gives, for the perceptual loss of `train_vae`.

The file holds torchvision's names: `features.0.weight` [64, 3, 3, 3] (out, in, height, width), `features.0.bias` [64], ... to
`features.28`; others (`classifier.*`) are passed over. One line makes it, where torchvision is:

  safetensors.torch.save_file(torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict(), "vgg16.safetensors")
"""

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.critics import VGG_STAGES, VGG_WIDTHS
from sora_jax.weights import files


def load(path):
  """The file -> weights of `critics.vgg_features`. Raises BadInput where it cannot be read, or something in it does not fit."""
  return from_diffusers(files.Tensors(path))


def from_diffusers(tensors, dtype=np.float32):
  """Mapping of their names to arrays -> weights of `critics.vgg_features`. Raises BadInput that names what does not fit."""
  weights, inner = {}, 3
  for stage, width in zip(VGG_STAGES, VGG_WIDTHS, strict=True):
    for n in stage:
      shapes = {f"features.{n}.weight": (width, inner, 3, 3), f"features.{n}.bias": (width,)}
      for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
          there = f"of shape {tensors[name].shape}" if name in tensors else "missing"
          raise BadInput(f"weights: {name} is {there}; a torchvision vgg16 has it with {shape}; see sora_jax/weights/vgg16.py")
        value = np.asarray(tensors[name], dtype)
        weights[name] = np.ascontiguousarray(value.transpose(2, 3, 1, 0)) if value.ndim == 4 else value
      inner = width
  return weights
