"""Convolutions of video, by platform.

XLA on CPU is several times slower at a 3-D convolution than at the same as 2-D convolutions of frames, one for each tap in time,
summed; and at the gradient of a kernel, unless it is summed over pieces of about two thousand pixels (2.5 to 3 times faster so, for
16 x 16 pixels, 32 to 64 channels, 72 frames; XLA contracts all pixels in one go). Elsewhere the 3-D convolution and its own gradient are used.

Arrays are BTHWC; kernels (time, height, width, in, out).
"""

import jax
import jax.numpy as jnp

PLANE = ("NHWC", "HWIO", "NHWC")
KERNEL_GRADIENT = ("CHWN", "IHWO", "NHWC")      # the same sum read as a convolution of channels; gives (in, height, width, out)
VOLUME = ("NDHWC", "DHWIO", "NDHWC")
PIXELS = 2304                                   # of one piece of a kernel's gradient
SAME = ((1, 1), (1, 1))


def in_front(n):
  """Padding widths that put n frames before a video."""
  return ((0, 0), (n, 0), (0, 0), (0, 0), (0, 0))


def plane_conv(x_BTHWC, kernel, stride=1, padding=SAME):
  """A 2-D convolution of every frame; kernel (height, width, in, out)."""
  y = jax.lax.conv_general_dilated(_frames(x_BTHWC), kernel, (stride, stride), padding, dimension_numbers=PLANE)
  return y.reshape(*x_BTHWC.shape[:2], *y.shape[1:])


def causal_conv(before, x_BTHWC, kernel):
  """3 x 3 x 3 convolution over this frame and the two before it; `before` holds the two before the chunk, None for zeros."""
  if before is None:
    return _conv_of_first(x_BTHWC, kernel)
  x = jnp.concatenate([before, x_BTHWC], 1)
  return jax.lax.platform_dependent(x, kernel, cpu=_by_taps, default=_by_volume)


def _frames(x_BTHWC):
  return x_BTHWC.reshape(-1, *x_BTHWC.shape[2:])


def _by_volume(x_BTHWC, kernel, front=0):
  """Of the frames that have two before them; `front` zero frames are put there."""
  return jax.lax.conv_general_dilated(x_BTHWC, kernel, (1, 1, 1), ((front, 0), *SAME), dimension_numbers=VOLUME)


def _first_by_volume(x_BTHWC, kernel):
  return _by_volume(x_BTHWC, kernel, front=2)


def _by_taps(x_BTHWC, kernel):
  T = x_BTHWC.shape[1] - 2
  return sum(plane_conv(x_BTHWC[:, tap:tap + T], kernel[tap]) for tap in range(3))


def _first_by_taps(x_BTHWC, kernel):
  """With zeros before the first frame; a tap that would meet nothing else is left out: an image takes one tap, not three."""
  T = x_BTHWC.shape[1]
  return sum(jnp.pad(plane_conv(x_BTHWC[:, :T - late], kernel[2 - late]), in_front(late)) for late in range(min(3, T)))


@jax.custom_vjp
def _conv_of_first(x_BTHWC, kernel):
  return jax.lax.platform_dependent(x_BTHWC, kernel, cpu=_first_by_taps, default=_first_by_volume)


def _forward(x_BTHWC, kernel):
  return _conv_of_first(x_BTHWC, kernel), (x_BTHWC, kernel)


def _backward(kept, slope_BTHWC):
  by_volume = lambda x, kernel, slope: jax.vjp(_first_by_volume, x, kernel)[1](slope)  # noqa: E731
  return jax.lax.platform_dependent(*kept, slope_BTHWC, cpu=_slopes_by_taps, default=by_volume)


_conv_of_first.defvjp(_forward, _backward)


def _slopes_by_taps(x_BTHWC, kernel, slope_BTHWC):
  """Gradients of `_first_by_taps`: one convolution for x, one (in pieces) for the kernel, of the slopes of three frames side by side."""
  T, features = slope_BTHWC.shape[1], slope_BTHWC.shape[-1]
  later = [slope_BTHWC[:, late:] for late in range(3)]            # frame t of x meets tap 2 - late in the sum for frame t + late
  slopes = jnp.concatenate([jnp.pad(s, ((0, 0), (0, T - s.shape[1]), *[(0, 0)] * 3)) for s in later], -1)
  reversed_kernel = kernel[::-1, ::-1, ::-1].transpose(1, 2, 0, 4, 3).reshape(3, 3, 3 * features, -1)
  to_kernel = kernel_gradient(_frames(x_BTHWC), _frames(slopes)).reshape(3, 3, -1, 3, features)
  return plane_conv(slopes, reversed_kernel), to_kernel.transpose(3, 0, 1, 2, 4)[::-1]


def kernel_gradient(x_NHWC, slope_NHWC):
  """Gradient of the kernel of a 3 x 3 convolution that keeps the size -> (3, 3, in, out)."""
  frames, height, width, _ = x_NHWC.shape
  pieces = min(max(round(frames * height * width / PIXELS), 1), frames)
  cuts = [round(i * frames / pieces) for i in range(pieces + 1)]
  total = sum(jax.lax.conv_general_dilated(x_NHWC[a:b], slope_NHWC[a:b], (1, 1), SAME, dimension_numbers=KERNEL_GRADIENT)
              for a, b in zip(cuts, cuts[1:], strict=False))
  return total.transpose(1, 2, 0, 3)
