"""I3D against the same network of torch's own layers, with random weights in the names of pytorch-i3d."""

import jax
import numpy as np
import torch
from torch.nn import functional

from sora_jax.models import i3d
from sora_jax.weights import i3d as reader


def random_tensors():
  rng, tensors = np.random.default_rng(0), {}
  for name, shape in reader.shapes().items():
    value = rng.normal(size=shape)
    if len(shape) == 5:
      value *= np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith(("bn.weight", "running_var")):
      value = 1 + 0.2 * np.abs(value)
    else:
      value *= 0.1
    tensors[name] = value.astype(np.float32)
  return tensors


def padded(x, kernel, stride):
  """TensorFlow's padding: as little as gives ceil(n / stride), the odd one at the end."""
  pads = []
  for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride)):
    total = max(k - s if size % s == 0 else k - size % s, 0)
    pads += [total // 2, total - total // 2]
  return functional.pad(x, pads)


def theirs(tensors, x):
  """InceptionI3d.forward: [B, C, T, H, W] -> [B, 400]."""
  weights = {name: torch.from_numpy(value) for name, value in tensors.items()}

  def unit(x, name, kernel=1, stride=1):
    x = functional.conv3d(
      padded(x, (kernel,) * 3, (stride,) * 3), weights[f"{name}.conv3d.weight"], stride=stride
    )
    parts = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return functional.relu(functional.batch_norm(x, *parts, eps=1e-3))

  def maximum(x, kernel, stride):
    return functional.max_pool3d(padded(x, kernel, stride), kernel, stride)

  def mixed(x, name):
    branches = [unit(x, f"{name}.b0"), unit(unit(x, f"{name}.b1a"), f"{name}.b1b", 3)]
    branches += [unit(unit(x, f"{name}.b2a"), f"{name}.b2b", 3)]
    return torch.cat([*branches, unit(maximum(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

  x = maximum(unit(x, "Conv3d_1a_7x7", 7, 2), (1, 3, 3), (1, 2, 2))
  x = maximum(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3", 3), (1, 3, 3), (1, 2, 2))
  x = maximum(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
  for letter in "bcdef":
    x = mixed(x, f"Mixed_4{letter}")
  x = mixed(mixed(maximum(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
  x = functional.avg_pool3d(x, (2, 7, 7), 1)
  x = functional.conv3d(x, weights["logits.conv3d.weight"], weights["logits.conv3d.bias"])
  return x.mean((2, 3, 4)).numpy()


def test_logits():
  tensors = random_tensors()
  clips = np.random.default_rng(1).uniform(-1, 1, (1, 16, 224, 224, 3)).astype(np.float32)
  ours = np.asarray(jax.jit(i3d.features)(reader.from_torch(tensors), clips))
  expected = theirs(tensors, torch.from_numpy(clips.transpose(0, 4, 1, 2, 3).copy()))
  assert ours.shape == (1, 400) and np.abs(expected).max() > 0.1
  np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max())
