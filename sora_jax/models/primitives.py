"""Functions of arrays that the DiT is made of: initial weights, rotary positions, norms, gathers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def normal(fan_in, scale=1.0):
  """Normal initial weights of variance scale^2 / fan_in."""
  return nn.initializers.normal(scale * fan_in**-0.5)


def rotary(coords_BL3, head_size, theta=10_000.0):
  """Positions t, y, x (any floats) -> cos and sin, each [B, L, 1, K/2] float32.

  The K/2 pairs of a head are divided as in Wan: y and x get K // 6 pairs each, t the rest. Within an axis of
  n pairs the frequencies are theta ** (-i / n).
  """
  space = head_size // 6
  angles = []
  for axis, n in enumerate((head_size // 2 - 2 * space, space, space)):
    frequencies = theta ** (-jnp.arange(n, dtype=jnp.float32) / n)
    angles.append(coords_BL3[..., axis, None] * frequencies)
  angle_BL1K = jnp.concatenate(angles, axis=-1)[:, :, None]
  return jnp.cos(angle_BL1K), jnp.sin(angle_BL1K)


def place_waves(coords_BL3, segment_BL, waves):
  """The position of each token within its clip, [B, L, waves ** 3]: the first terms of a cosine transform
  (DCT-II) over t, y and x together.
  """

  def largest(coords_L3, segment_L):
    return jax.ops.segment_max(coords_L3, segment_L, num_segments=segment_L.shape[0] + 1)[segment_L]

  share_BL3 = (coords_BL3 + 0.5) / (1 + jax.vmap(largest)(coords_BL3, segment_BL))
  wave_BL3W = jnp.cos(jnp.pi * share_BL3[..., None] * jnp.arange(waves))
  product = jnp.einsum("BLt,BLy,BLx->BLtyx", *jnp.moveaxis(wave_BL3W, 2, 0))
  return product.reshape(*segment_BL.shape, waves**3)


def apply_rope(x_BLNK, cos, sin):
  """Rotates pairs (i, i + K/2) of each head by the token's angles."""
  first, second = jnp.split(x_BLNK, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def sinusoids(time_BU, freqs):
  """Diffusion time 0..1000 -> [B, U, freqs]: cosines, then sines. DDPM, arXiv:2006.11239, app. B."""
  half = freqs // 2
  angle = time_BU[..., None] * jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@jax.custom_vjp
def gather_rows(values_BUD, index_BL):
  """[B, U, D] -> [B, L, D] by index.

  The forward pass is a gather. The backward pass is a product with one-hot rows: a scatter is slow on CPU and
  TPU.
  """
  return jnp.take_along_axis(values_BUD, index_BL[..., None], axis=1)


def _gather_rows_forward(values_BUD, index_BL):
  return gather_rows(values_BUD, index_BL), (index_BL, jnp.zeros(values_BUD.shape[1]))


def _gather_rows_backward(saved, d_out_BLD):
  index_BL, U = saved
  return _sums_by_index(d_out_BLD, index_BL, U.shape[0]), None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def _sums_by_index(x_BLD, index_BL, length):
  """[B, L, D] -> sums over the tokens of each index, [B, U, D]."""
  one_hot_BLU = jax.nn.one_hot(index_BL, length, dtype=x_BLD.dtype)
  return jnp.einsum("BLU,BLD->BUD", one_hot_BLU, x_BLD, precision=lax.Precision.HIGHEST)


@jax.custom_vjp
def gate(x_BLD, gate_BUD, index_BL):
  """x times the gate of each token's noise level, float32.

  The backward pass gathers the gates again. They are [B, L, D] in float32, too much to keep.
  """
  return x_BLD * gather_rows(gate_BUD, index_BL)


def _gate_forward(*args):
  return gate(*args), args


def _gate_backward(saved, d_out_BLD):
  x_BLD, gate_BUD, index_BL = saved
  d_out_BLD, index_BL = lax.optimization_barrier((d_out_BLD, index_BL))
  d_x_BLD = d_out_BLD * gather_rows(gate_BUD, index_BL)
  return d_x_BLD.astype(x_BLD.dtype), _sums_by_index(d_out_BLD * x_BLD, index_BL, gate_BUD.shape[1]), None


gate.defvjp(_gate_forward, _gate_backward)


@jax.custom_vjp
def modulate(x_BLD, shift_BUD, scale_BUD, index_BL):
  """x (1 + scale) + shift of each token's noise level, float32; gathered again as in `gate`."""
  return x_BLD * (1 + gather_rows(scale_BUD, index_BL)) + gather_rows(shift_BUD, index_BL)


def _modulate_forward(x_BLD, shift_BUD, scale_BUD, index_BL):
  return modulate(x_BLD, shift_BUD, scale_BUD, index_BL), (x_BLD, scale_BUD, index_BL)


def _modulate_backward(saved, d_out_BLD):
  x_BLD, scale_BUD, index_BL = saved
  d_out_BLD, index_BL = lax.optimization_barrier((d_out_BLD, index_BL))
  d_x_BLD = d_out_BLD * (1 + gather_rows(scale_BUD, index_BL))
  d_shift_BUD = _sums_by_index(d_out_BLD, index_BL, scale_BUD.shape[1])
  d_scale_BUD = _sums_by_index(d_out_BLD * x_BLD, index_BL, scale_BUD.shape[1])
  return d_x_BLD, d_shift_BUD, d_scale_BUD, None


modulate.defvjp(_modulate_forward, _modulate_backward)


@jax.custom_vjp
def gradients_together(*args):
  """The identity. None of the arguments' gradients is used before all are there.

  Around a part of a block: the compiler would put off the gradients of its weights, and keep what they are
  computed from.
  """
  return args


def _gradients_together_forward(*args):
  return args, None


def _gradients_together_backward(_, gradients):
  return tuple(lax.optimization_barrier(gradients))


gradients_together.defvjp(_gradients_together_forward, _gradients_together_backward)


def layer_norm(x, eps):
  """Layer norm over the last axis, without weights, in float32."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


def rms_norm(x_BLNK, weight_NK, eps):
  """The q/k norm of Wan: RMS over all heads together, in float32."""
  x = x_BLNK.astype(jnp.float32)
  return x * lax.rsqrt(jnp.square(x).mean((-2, -1), keepdims=True) + eps) * weight_NK
