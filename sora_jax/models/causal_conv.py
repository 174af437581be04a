"""Convolutions of video, by platform.

On CPU, XLA is several times slower at a 3-D convolution than at the equal sum of 2-D convolutions of frames,
one for each tap in time. It is also slow at the gradient of a kernel, because it contracts all pixels at
once. Summed over pieces of about two thousand pixels the gradient is 2.5 to 3 times faster (16 x 16 pixels,
32 to 64 channels, 72 frames). Other platforms use the 3-D convolution and its own gradient.

Arrays are BTHWC; kernels (time, height, width, in, out).
"""

import jax
import jax.numpy as jnp

PLANE = ("NHWC", "HWIO", "NHWC")
# The gradient of a kernel as a convolution over channels; its result is (in, height, width, out).
KERNEL_GRADIENT = ("CHWN", "IHWO", "NHWC")
VOLUME = ("NDHWC", "DHWIO", "NDHWC")
PIXELS = 2304  # in one piece of a kernel's gradient
SAME = ((1, 1), (1, 1))


def in_front(n):
  """Padding widths that put n frames before a video."""
  return ((0, 0), (n, 0), (0, 0), (0, 0), (0, 0))


def plane_conv(x_BTHWC, kernel, stride=1, padding=SAME):
  """A 2-D convolution of every frame; kernel (height, width, in, out)."""
  y = jax.lax.conv_general_dilated(
    _frames(x_BTHWC), kernel, (stride, stride), padding, dimension_numbers=PLANE
  )
  return y.reshape(*x_BTHWC.shape[:2], *y.shape[1:])


def causal_conv(before, x_BTHWC, kernel):
  """3 x 3 x 3 convolution over each frame and the two before it.

  before: the two frames before the chunk; None for zeros.
  """
  if before is None:
    return _conv_of_first(x_BTHWC, kernel)
  x = jnp.concatenate([before, x_BTHWC], 1)
  return jax.lax.platform_dependent(x, kernel, cpu=_by_taps, default=_by_volume)


def _frames(x_BTHWC):
  return x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])


def _by_volume(x_BTHWC, kernel, front=0):
  """3-D convolution without padding in time, except for `front` zero frames before the video."""
  return jax.lax.conv_general_dilated(
    x_BTHWC, kernel, (1, 1, 1), ((front, 0), *SAME), dimension_numbers=VOLUME
  )


def _first_by_volume(x_BTHWC, kernel):
  return _by_volume(x_BTHWC, kernel, front=2)


def _by_taps(x_BTHWC, kernel):
  T = x_BTHWC.shape[1] - 2
  return sum(plane_conv(x_BTHWC[:, tap : tap + T], kernel[tap]) for tap in range(3))


def _first_by_taps(x_BTHWC, kernel):
  """Convolution of a first chunk, with zeros before it.

  A tap that would see only zeros is left out: an image takes one tap, not three.
  """
  T = x_BTHWC.shape[1]
  taps = []
  for late in range(min(3, T)):
    y_BTHWC = plane_conv(x_BTHWC[:, : T - late], kernel[2 - late])
    taps.append(jnp.pad(y_BTHWC, in_front(late)))
  return sum(taps)


@jax.custom_vjp
def _conv_of_first(x_BTHWC, kernel):
  return jax.lax.platform_dependent(x_BTHWC, kernel, cpu=_first_by_taps, default=_first_by_volume)


def _forward(x_BTHWC, kernel):
  return _conv_of_first(x_BTHWC, kernel), (x_BTHWC, kernel)


def _backward(saved, grad_BTHWC):
  return jax.lax.platform_dependent(*saved, grad_BTHWC, cpu=_grads_by_taps, default=_grads_by_volume)


_conv_of_first.defvjp(_forward, _backward)


def _grads_by_volume(x_BTHWC, kernel, grad_BTHWC):
  _, vjp = jax.vjp(_first_by_volume, x_BTHWC, kernel)
  return vjp(grad_BTHWC)


def _grads_by_taps(x_BTHWC, kernel, grad_BTHWC):
  """Gradients of `_first_by_taps`, from the output gradients of three frames side by side as channels.

  One convolution gives the gradient of x, another (in pieces) that of the kernel.
  """
  T, features = grad_BTHWC.shape[1], grad_BTHWC.shape[-1]
  # Frame t of x is multiplied by tap 2 - late in the sum for frame t + late.
  later = [grad_BTHWC[:, late:] for late in range(3)]
  grads = jnp.concatenate([jnp.pad(g, ((0, 0), (0, T - g.shape[1]), *[(0, 0)] * 3)) for g in later], -1)
  reversed_kernel = kernel[::-1, ::-1, ::-1].transpose(1, 2, 0, 4, 3).reshape(3, 3, 3 * features, -1)
  grad_kernel = kernel_gradient(_frames(x_BTHWC), _frames(grads)).reshape(3, 3, -1, 3, features)
  return plane_conv(grads, reversed_kernel), grad_kernel.transpose(3, 0, 1, 2, 4)[::-1]


def kernel_gradient(x_NHWC, grad_NHWC):
  """Gradient of the kernel of a 3 x 3 convolution that keeps the size: [3, 3, in, out].

  grad_NHWC: the gradient of the convolution's output.
  """
  frames, height, width, _ = x_NHWC.shape
  pieces = min(max(round(frames * height * width / PIXELS), 1), frames)
  cuts = [round(i * frames / pieces) for i in range(pieces + 1)]
  grads = []
  for a, b in zip(cuts, cuts[1:], strict=False):
    piece, grad = x_NHWC[a:b], grad_NHWC[a:b]
    grads.append(jax.lax.conv_general_dilated(piece, grad, (1, 1), SAME, dimension_numbers=KERNEL_GRADIENT))
  total = sum(grads)
  return total.transpose(1, 2, 0, 3)
