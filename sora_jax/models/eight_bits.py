"""Weights of 8 bits: those of a DiT's blocks, nearly all that it has, with a scale for each output channel.

  W[i, o] ~ q[i, o] s[o]        s[o] = max_i |W[i, o]| / most

q is int8 (most 127), or float8_e4m3 (most 448). Beside a weight `query` lies `query_scale`, float32. Products
are those of the compute dtype: a layer's weights are converted where they are used (models/dit.py). So these
weights take half of the memory of bfloat16, half as much of them is sent between devices, and numbers differ
by the rounding of weights alone. Compare weight-only int8 in torchao and MaxText's AQT.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.models.lora import LINEARS

KINDS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
_INPUTS = {path: inputs for path, inputs in LINEARS.values()}  # (part, name) in a block: number of input axes


def scale_name(name):
  return f"{name}_scale"


def weight_of(weights, name):
  """A weight among those of one module, whether it has 8 bits or not."""
  scale = weights.get(scale_name(name))
  return weights[name] if scale is None else weights[name].astype(jnp.float32) * scale


@functools.partial(jax.jit, static_argnames=("inputs", "kind"))
def quantised(weight, *, inputs, kind):
  """[layers, inputs..., outputs...] -> (q of the same shape, s [layers, outputs...])."""
  dtype, most = KINDS[kind]
  weight = weight.astype(jnp.float32)
  axes = tuple(range(1, 1 + inputs))
  scale = jnp.maximum(jnp.abs(weight).max(axes), 1e-30) / most
  values = weight / jnp.expand_dims(scale, axes)
  if kind == "int8":
    values = jnp.round(values)
  return values.astype(dtype), scale


def quantise(params, kind, target, put):
  """Weights of a DiT -> the same, those of blocks as q and s.

  put(leaf, like): places a leaf on devices as its counterpart in `target` says. One leaf is there at a time
  before it has 8 bits.
  """

  def walk(tree, target, path):
    out = {}
    for name, value in tree.items():
      here = (*path, name)
      if isinstance(value, dict):
        out[name] = walk(value, target[name], here)
      elif path[:1] == ("blocks",) and here[1:] in _INPUTS:
        out[name], out[scale_name(name)] = quantised(
          put(value, target[name]), inputs=_INPUTS[here[1:]], kind=kind
        )
      else:
        out[name] = put(value, target[name])
    return out

  return walk(params, target, ())


def boxed(boxes, kind):
  """What `quantise` makes of boxed weights (as eval_shape(init) gives them), as boxed shapes."""
  dtype, _ = KINDS[kind]
  blocks = {}
  for part, weights in boxes["blocks"].items():
    if not isinstance(weights, dict):
      blocks[part] = weights
      continue
    blocks[part] = dict(weights)
    for name, box in weights.items():
      if (part, name) in _INPUTS:
        rest = slice(1 + _INPUTS[part, name], None)
        shape = box.value.shape
        blocks[part][name] = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), box.names)
        scale = jax.ShapeDtypeStruct((shape[0], *shape[rest]), jnp.float32)
        blocks[part][scale_name(name)] = nn.LogicallyPartitioned(scale, (box.names[0], *box.names[rest]))
  return {**boxes, "blocks": blocks}
