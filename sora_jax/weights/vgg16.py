"""Reads VGG16's convolutions from the user's safetensors file, for the perceptual loss of `train_vae`.

The file holds torchvision's names: `features.0.weight` [64, 3, 3, 3] (out, in, height, width),
`features.0.bias` [64], ... to `features.28`; others (`classifier.*`) are skipped. One line makes it, where
torchvision is installed:

  safetensors.torch.save_file(torchvision.models.vgg16(weights="IMAGENET1K_V1").state_dict(),
  "vgg16.safetensors")
"""

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.critics import VGG_STAGES, VGG_WIDTHS
from sora_jax.weights import files


def load(path):
  """Path of the file -> weights of `critics.vgg_features`. Raises BadInput where that fails."""
  return from_diffusers(files.Tensors(path))


def from_diffusers(tensors, dtype=np.float32):
  """Mapping of names to arrays -> weights of `critics.vgg_features`. BadInput names a misfit."""
  weights, width_in = {}, 3
  for stage, width in zip(VGG_STAGES, VGG_WIDTHS, strict=True):
    for n in stage:
      shapes = {f"features.{n}.weight": (width, width_in, 3, 3), f"features.{n}.bias": (width,)}
      for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
          state = f"of shape {tensors[name].shape}" if name in tensors else "missing"
          raise BadInput(
            f"weights: {name} is {state}; a torchvision vgg16 has it with {shape}; "
            "see sora_jax/weights/vgg16.py"
          )
        value = np.asarray(tensors[name], dtype)
        if value.ndim == 4:
          value = np.ascontiguousarray(value.transpose(2, 3, 1, 0))
        weights[name] = value
      width_in = width
  return weights
