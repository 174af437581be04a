"""A stack of layers in several scans: the same numbers and gradients as in one, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.scan import scan_layers

DEPTH, WIDTH = 8, 128
WEIGHTS = {"w": jax.random.normal(jax.random.key(0), (DEPTH, WIDTH, WIDTH)) * WIDTH**-0.5}
X = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH))
SHIFTS = jnp.linspace(-1, 1, DEPTH)


def layer(x, weights, shift):
  return jnp.sin(x @ weights["w"] + shift)


def loss(x, weights, shifts, scans):
  out = scan_layers(layer, x, weights, shifts, scans, jax.checkpoint_policies.nothing_saveable)
  return jnp.sum(out**2)


def expected(x, weights, shifts):
  for i in range(DEPTH):
    x = layer(x, {"w": weights["w"][i]}, shifts[i])
  return jnp.sum(x**2)


@pytest.mark.parametrize("scans", [1, 3, DEPTH])
def test_layers_one_after_another(scans):
  """Value and gradients of the weights, the input and the layers' own inputs are those of a Python loop."""
  run = jax.jit(jax.value_and_grad(functools.partial(loss, scans=scans), (0, 1, 2)))
  value, grads = run(X, WEIGHTS, SHIFTS)
  value_2, grads_2 = jax.jit(jax.value_and_grad(expected, (0, 1, 2)))(X, WEIGHTS, SHIFTS)
  np.testing.assert_allclose(value, value_2, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4), grads, grads_2)


def test_inputs_of_no_layer():
  """Layers without inputs of their own: None, as where the text's keys are not computed before."""
  out = scan_layers(lambda x, w, _: layer(x, w, 0.0), X, WEIGHTS, ({}, None), 2, None)
  np.testing.assert_allclose(jnp.sum(out**2), expected(X, WEIGHTS, SHIFTS * 0), rtol=1e-5)


@pytest.mark.parametrize("scans", [1, 4])
def test_no_scan_holds_what_others_save(scans):
  """Forward and backward, a scan stacks what its own layers save and their gradients, and no more."""
  jaxpr = jax.make_jaxpr(jax.grad(lambda w: loss(X, w, SHIFTS, scans)))(WEIGHTS)
  found = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
  assert [eqn.params["length"] for eqn in found] == 2 * scans * [DEPTH // scans]
  stacked = [var.aval.shape for eqn in found for var in eqn.outvars if var.aval.shape[1:] == X.shape]
  assert stacked == 2 * scans * [(DEPTH // scans, *X.shape)]


def equations(jaxpr):
  """Those of a jaxpr, and of the functions that it calls."""
  for eqn in jaxpr.eqns:
    yield eqn
    for name in ("jaxpr", "call_jaxpr"):
      if name in eqn.params and eqn.primitive.name != "scan":
        inner = eqn.params[name]
        yield from equations(getattr(inner, "jaxpr", inner))
