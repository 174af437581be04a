"""I3D: Inception v1 inflated to three dimensions (Carreira and Zisserman 2017, arXiv:1705.07750), as far as
the Frechet video distance needs it: RGB clips -> 400 logits of Kinetics.

Names of weights, epsilon and padding are those of pytorch-i3d (`InceptionI3d`), whose `rgb_imagenet.pt` is
DeepMind's checkpoint; weights/i3d.py reads them.
"""

import jax
import jax.numpy as jnp
from jax import lax

SIZE = 224  # pixels: sides of a frame
CLASSES = 400
EPSILON = 1e-3  # of batch norm
# Stage: (name, kernel, stride, width) of a convolution; (name, window, stride) of a maximum; or an Inception
# block: (name, widths of b0, b1a, b1b, b2a, b2b, b3b).
LAYERS = (
  ("Conv3d_1a_7x7", 7, 2, 64),
  ("MaxPool3d_2a_3x3", (1, 3, 3), (1, 2, 2)),
  ("Conv3d_2b_1x1", 1, 1, 64),
  ("Conv3d_2c_3x3", 3, 1, 192),
  ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
  ("Mixed_3b", (64, 96, 128, 16, 32, 32)),
  ("Mixed_3c", (128, 128, 192, 32, 96, 64)),
  ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
  ("Mixed_4b", (192, 96, 208, 16, 48, 64)),
  ("Mixed_4c", (160, 112, 224, 24, 64, 64)),
  ("Mixed_4d", (128, 128, 256, 24, 64, 64)),
  ("Mixed_4e", (112, 144, 288, 32, 64, 64)),
  ("Mixed_4f", (256, 160, 320, 32, 128, 128)),
  ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
  ("Mixed_5b", (256, 160, 320, 32, 128, 128)),
  ("Mixed_5c", (384, 192, 384, 48, 128, 128)),
)


def units():
  """Yields (name, kernel, width in, width out) of every convolution with batch norm."""
  width = 3
  for name, *rest in LAYERS:
    if len(rest) == 3:
      kernel, _, out = rest
      yield name, kernel, width, out
      width = out
    elif len(rest) == 1:
      ((b0, b1a, b1b, b2a, b2b, b3b),) = rest
      yield f"{name}.b0", 1, width, b0
      yield f"{name}.b1a", 1, width, b1a
      yield f"{name}.b1b", 3, b1a, b1b
      yield f"{name}.b2a", 1, width, b2a
      yield f"{name}.b2b", 3, b2a, b2b
      yield f"{name}.b3b", 1, width, b3b
      width = b0 + b1b + b2b + b3b


def features(weights, video_BTHWC):
  """Clips of 10 or more frames of SIZE x SIZE in [-1, 1] -> logits, their mean over time, [B, 400] float32.

  weights: of weights/i3d.py.
  """
  x = jnp.asarray(video_BTHWC, jnp.float32)
  for name, *rest in LAYERS:
    if len(rest) == 3:
      x = _unit(weights, name, x, rest[1])
    elif len(rest) == 2:
      x = _maximum(x, *rest)
    else:
      a = _unit(weights, f"{name}.b1a", x)
      b = _unit(weights, f"{name}.b2a", x)
      c = _maximum(x, (3, 3, 3), (1, 1, 1))
      branches = [_unit(weights, f"{name}.b0", x), _unit(weights, f"{name}.b1b", a)]
      branches += [_unit(weights, f"{name}.b2b", b), _unit(weights, f"{name}.b3b", c)]
      x = jnp.concatenate(branches, -1)
  window = (1, 2, 7, 7, 1)
  x = lax.reduce_window(x, 0.0, lax.add, window, (1, 1, 1, 1, 1), "VALID") / (2 * 7 * 7)
  logits = jnp.einsum("bthwc,cn->bthwn", x, weights["logits"]["kernel"]) + weights["logits"]["bias"]
  return logits.mean((1, 2, 3))


def _unit(weights, name, x, stride=1):
  """Convolution, batch norm and ReLU; batch norm is in the weights."""
  one = weights[name]
  x = lax.conv_general_dilated(
    x,
    one["kernel"],
    (stride,) * 3,
    "SAME",
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    precision=lax.Precision.HIGHEST,
  )
  return jax.nn.relu(x + one["bias"])


def _maximum(x, window, stride):
  return lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
