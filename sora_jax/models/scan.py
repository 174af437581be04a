"""A stack of equal layers as several scans, so that less is in memory in the backward pass.

A scan keeps what all its layers have saved until its backward pass ends, and has room for the gradients of
all its weights when that begins. Of several scans, one after another, what one has saved is freed before the
gradients of the next are made. With n scans the two together need (n + 1) / 2n of their memory where they are
as large as each other; the work is the same, and the compiler has n times as much to read.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def scan_layers(layer, x, weights, inputs, scans, policy):
  """layer(x, its weights, its inputs) -> x, of each layer in turn.

  weights and inputs: trees of arrays [depth, ...], of which each layer gets its own. scans: how many, 1 to
  depth. policy: of jax.checkpoint, what a layer saves.
  """
  depth = jax.tree.leaves(weights)[0].shape[0]
  ends = tuple(depth * n // scans for n in range(scans + 1))
  handles, weights = _handles(weights, ends), lax.stop_gradient(weights)

  def body(x, xs):
    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def run(x, xs):
      i, handle, inputs = xs
      own = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, i, keepdims=False), weights)
      return layer(x, jax.tree.map(_with_gradient, own, handle), inputs)

    return run(x, xs), None

  for handle, first, end in zip(handles, ends, ends[1:]):
    own = jax.tree.map(lambda a, first=first, end=end: a[first:end], inputs)
    x, _ = lax.scan(body, x, (jnp.arange(first, end), handle, own))
  return x


# Each scan reads the layers that it wants from all weights: to cut the stack would copy it. The gradients of
# its layers it gives to a handle, zeros that are never read, of which the compiler makes nothing.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _handles(weights, ends):
  """Handles of the layers of each scan. Their gradients, joined, are those of the weights."""

  def handle(first, end):
    return jax.tree.map(lambda w: jnp.zeros((end - first, *w.shape[1:]), w.dtype), weights)

  return [handle(first, end) for first, end in zip(ends, ends[1:])]


def _handles_backward(ends, _, gradients):
  return (jax.tree.map(lambda *parts: jnp.concatenate(parts), *gradients),)


_handles.defvjp(lambda weights, ends: (_handles(weights, ends), None), _handles_backward)


@jax.custom_vjp
def _with_gradient(weight, handle):
  """A weight whose gradient is its handle's."""
  return weight


_with_gradient.defvjp(lambda weight, handle: (weight, None), lambda _, gradient: (None, gradient))
