"""Weights of 8 bits: close to what they were, half the bytes, the same on any mesh, beneath adapters too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import layout as layouts, workdir as workdirs
from sora_jax.models import dit, eight_bits, lora, t2v

CFG = dit.DiTConfig(
  depth=2, heads=4, head_size=16, mlp=128, channels=4, patch=(1, 2, 2), text_width=24, cross_norm=True
)


@pytest.fixture(scope="module")
def params():
  """Of one model, none of whose weights is zero."""
  plain = layouts.unbox(jax.jit(t2v.Model(CFG).init)(jax.random.key(0)))["dit"]
  leaves, tree = jax.tree.flatten(plain)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


def velocity(params, layout=None, adapters=None, scale=1.0):
  rng = np.random.default_rng(0)
  row = jnp.ones((2, 16), jnp.int32)
  variables = {"params": params} | ({"lora": adapters} if adapters else {})
  cfg = dataclasses.replace(CFG, lora_scale=scale)

  @jax.jit
  def apply(variables):
    return dit.DiT(cfg, layout).apply(
      variables,
      jnp.asarray(rng.normal(size=(2, 16, 16)), jnp.float32),
      jnp.asarray(rng.integers(0, 4, (2, 16, 3)), jnp.float32),
      row,
      jnp.full((2, 2), 0.5),
      row,
      jnp.asarray(rng.normal(size=(2, 8, 24)), jnp.float32),
      row,
      jnp.ones((2, 8), jnp.int32),
    )

  return np.asarray(apply(variables))


def stack_of(weights, name):
  """The weights of all layers, in float32."""
  pair = {key: weights[key] for key in (name, eight_bits.scale_name(name))}
  return jax.vmap(lambda own: eight_bits.weight_of(own, name))(pair)


def in_place(params, kind):
  return eight_bits.quantise(params, kind, params, lambda leaf, like: leaf)


@pytest.mark.parametrize("kind, error", [("int8", 0.008), ("fp8", 0.035)])
def test_weights_and_velocity_stay_close(params, kind, error):
  """Each weight by half a step of its channel; the velocity by little more; the bytes are near a quarter."""
  small = in_place(params, kind)
  for (part, name), inputs in lora.LINEARS.values():
    weight, own = params["blocks"][part][name], small["blocks"][part]
    assert own[name].dtype == eight_bits.KINDS[kind][0]
    assert own[eight_bits.scale_name(name)].shape == (CFG.depth, *weight.shape[1 + inputs :])
    off = np.linalg.norm(stack_of(own, name) - weight) / np.linalg.norm(weight)
    assert 0 < off < error
  reference, found = velocity(params), velocity(small)
  assert 1e-5 < np.linalg.norm(found - reference) / np.linalg.norm(reference) < 2 * error
  bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree["blocks"])) for tree in (small, params)]
  assert bytes_of[0] < 0.3 * bytes_of[1]


def test_what_is_placed_is_what_was_announced(params):
  """`targets` of a model in 8 bits are the shapes, dtypes and places of its weights, on a mesh, too."""
  layout = layouts.Layout(layouts.make_mesh(fsdp=2, context=2, tensor=2))
  model = t2v.Model(CFG, layout=layout, weights="int8")
  plain = workdirs.targets(dataclasses.replace(model, weights=""), "bfloat16")
  placed = workdirs.in_eight_bits({"dit": jax.tree.map(np.asarray, params)}, plain, "int8")
  announced = workdirs.targets(model, "bfloat16")
  for path, like in jax.tree.leaves_with_path(announced):
    leaf = placed
    for key in path:
      leaf = leaf[key.key]
    assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), path
  assert jax.tree.structure(placed) == jax.tree.structure(announced)


def test_the_same_on_a_mesh(params):
  """Weights of 8 bits, cut over devices, give the velocity of one device."""
  layout = layouts.Layout(layouts.make_mesh(fsdp=2, context=2, tensor=2))
  target = workdirs.targets(t2v.Model(CFG, layout=layout))
  placed = workdirs.in_eight_bits({"dit": jax.tree.map(np.asarray, params)}, target, "int8")["dit"]
  np.testing.assert_allclose(velocity(placed, layout), velocity(in_place(params, "int8")), atol=2e-5)


def test_adapters_upon_weights_of_8_bits(params):
  """What an adapter adds is added in full precision, and has gradients."""
  small, config = in_place(params, "int8"), lora.LoRAConfig(2, 4.0, ("to_q", "ffn.net.2"))
  boxed = jax.eval_shape(t2v.Model(CFG).init, jax.random.key(0))["dit"]
  adapters = layouts.unbox(lora.init(jax.random.key(2), config, boxed))
  adapters = jax.tree.map(lambda leaf: leaf + 0.05, adapters)
  merged = {
    **small,
    "blocks": jax.tree.map(lambda leaf: leaf, small["blocks"]),
  }
  for part, names in adapters["blocks"].items():
    for name, pair in names.items():
      delta = jax.vmap(lora.delta_weight, (0, None))(pair, 2.0)
      merged["blocks"][part][name] = stack_of(small["blocks"][part], name) + delta
      del merged["blocks"][part][eight_bits.scale_name(name)]
  np.testing.assert_allclose(velocity(small, None, adapters, 2.0), velocity(merged), atol=2e-5)


def test_what_does_not_go_together():
  with pytest.raises(ValueError, match="weights is 'int4'; known: int8, fp8"):
    t2v.Model(CFG, weights="int4")
  with pytest.raises(ValueError, match="need scans 1"):
    t2v.Model(dataclasses.replace(CFG, scans=2, remat="full"), weights="int8")
