"""The optimiser: an update on a mesh is that of one device; weight decay is on matrices alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import layout, optim

SHAPES = {
  "query": ((2, 16, 4, 8), ("layers", "embed", "heads", "head_dim")),
  "mlp": ((2, 16, 64), ("layers", "embed", "mlp")),
  "kernel": ((3, 3, 3, 8, 16), (None, None, None, "conv_in", "conv_out")),
  "bias": ((2, 16), ("layers", "embed")),
}
BOXED = {
  name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
  for name, (shape, axes) in SHAPES.items()
}


def arrays(seed):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in SHAPES.items()}


def second_update(name, where=None, weight_decay=0.1):
  """Weights and state of the optimiser after two updates."""
  tx = optim.optimizer(optim.OptimConfig(name=name, warmup=0, weight_decay=weight_decay), BOXED)
  params, opt = arrays(0), tx.init(arrays(0))
  places = None
  if where is not None:
    targets = optim.abstract(tx, BOXED, where)
    places = jax.tree.map(lambda leaf: leaf.sharding, targets)
    params, opt = jax.device_put((params, opt), places)

  def update(params, opt, grads):
    updates, opt = tx.update(grads, opt, params)
    return jax.tree.map(jnp.add, params, updates), opt

  step = jax.jit(update, out_shardings=places)
  for seed in (1, 2):
    params, opt = step(params, opt, arrays(seed))
  return params, opt


def apart(tree, reference):
  """The largest difference of a leaf, as a share of its maximum."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
  return max(np.abs(np.asarray(a) - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parametrize("name", optim.NAMES)
def test_an_update_on_a_mesh_is_that_of_one_device(name):
  """Weights and state lie cut on 8 devices, the state as its weights; both are what one device computes."""
  params, opt = second_update(name, layout.Layout(layout.make_mesh(data=2, fsdp=2, tensor=2)))
  wanted = second_update(name)
  assert apart((params, opt), wanted) < 1e-5
  assert params["query"].addressable_shards[0].data.shape == (2, 8, 2, 8)
  moments = [leaf for leaf in jax.tree.leaves(opt) if leaf.shape == SHAPES["query"][0]]
  assert moments and all(leaf.addressable_shards[0].data.shape == (2, 8, 2, 8) for leaf in moments)
  scaled = params | {"mlp": params["mlp"] * 1.0001}  # the comparison can fail
  assert apart((scaled, opt), wanted) > 1e-5


@pytest.mark.parametrize("name", optim.NAMES)
def test_weight_decay_is_on_matrices_alone(name):
  """Ten times the decay moves every matrix and no bias."""
  (little, _), (much, _) = (second_update(name, weight_decay=decay) for decay in (0.1, 1.0))
  np.testing.assert_array_equal(little["bias"], much["bias"])
  for matrix in ("query", "mlp", "kernel"):
    assert np.abs(little[matrix] - much[matrix]).max() > 1e-4


@pytest.mark.parametrize(
  "wrong", [{"name": "sgd"}, {"learning_rate": 0}, {"final": 2}, {"b1": 1.0}, {"b2": -0.1}]
)
def test_a_setting_out_of_range_says_so(wrong):
  with pytest.raises(ValueError, match="the optimiser"):
    optim.OptimConfig(**wrong)


def judged(norms, spike=5.0, loss=1.0):
  """Of updates with these gradient norms -> [(finite, spike)] and the history after them."""
  history, answers = optim.no_history(), []
  judge = jax.jit(optim.judge, static_argnums=4)
  for step, norm in enumerate(norms):
    finite, spiking, history = judge(history, step, jnp.float32(loss), jnp.float32(norm), spike)
    answers.append((bool(finite), bool(spiking)))
  return answers, history


def test_a_spike_is_far_above_the_usual():
  """Not before half of the window is known, not below the multiple, and never with 0."""
  half = optim.WINDOW // 2
  answers, _ = judged([1.0] * (half - 1) + [9.0] + [1.0] * 9 + [4.9, 5.1])
  assert [spiking for _, spiking in answers[-2:]] == [False, True] and not any(s for _, s in answers[:-1])
  assert not any(spiking for _, spiking in judged([1.0] * 99 + [1e9], spike=0.0)[0])


def test_a_level_that_stays_becomes_the_usual_one():
  """What is skipped is in the history too: after half a window of it, the median is there."""
  answers, _ = judged([1.0] * optim.WINDOW + [100.0] * optim.WINDOW)
  spiking = [s for _, s in answers[optim.WINDOW :]]
  assert spiking[0] and not spiking[-1] and sum(spiking) == optim.WINDOW // 2


def test_what_is_not_finite_leaves_the_history():
  answers, history = judged([1.0, np.nan, np.inf, 2.0])
  assert [finite for finite, _ in answers] == [True, False, False, True]
  np.testing.assert_array_equal(history[1, :5], [1.0, np.nan, np.nan, 2.0, np.nan])


def test_bad_updates_are_counted_up_and_good_ones_down():
  bad, levels = jnp.int32(0), []
  for taken in (True, False, False, True, False, True, True, True):
    bad = optim.count_bad(bad, jnp.bool_(taken))
    levels.append(int(bad))
  assert levels == [0, 1, 2, 1, 2, 1, 0, 0]


def test_stochastic_rounding_keeps_the_mean():
  """A float32 between two of bfloat16 becomes either, so that the mean is its value; the nearest loses it."""
  value = jnp.float32(1 + 0.3 / 128)  # bfloat16 has 1 and 1 + 1/128
  rounded = np.asarray(optim.stochastic_round(jnp.full((64, 512), value), jnp.bfloat16, (3, 1)), np.float32)
  assert set(np.unique(rounded)) == {1.0, 1 + 1 / 128}
  assert abs(rounded.mean() - value) < 4 * (0.46 / 128) / np.sqrt(rounded.size)
  assert float(jnp.bfloat16(value)) == 1.0
  again = optim.stochastic_round(jnp.full((64, 512), value), jnp.bfloat16, (4, 1))
  assert 0.3 < (np.asarray(again, np.float32) != rounded).mean() < 0.55  # another step, another draw
  special = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 0.0, -2.5], jnp.float32)
  np.testing.assert_array_equal(
    np.asarray(optim.stochastic_round(special, jnp.bfloat16, (0, 0)), np.float32), special
  )


def test_rounding_does_not_depend_on_the_mesh():
  """The draw belongs to an element, wherever it lies."""
  x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
  on_mesh = layout.Layout(layout.make_mesh(fsdp=2, tensor=4))
  rounded = jax.jit(lambda x: optim.stochastic_round(x, jnp.bfloat16, (7, 2)))
  cut = rounded(jax.device_put(x, on_mesh.fitted(x.shape, "embed", "mlp")))
  np.testing.assert_array_equal(np.asarray(cut), np.asarray(rounded(x)))


@pytest.mark.parametrize("name", optim.NAMES)
def test_moments_in_bfloat16(name):
  """They are stored in it, cut as their weights are, and 60 updates add up to those of float32."""

  def updates(moment_dtype):
    cfg = optim.OptimConfig(name=name, warmup=0, moment_dtype=moment_dtype, steps=1000)
    tx = optim.optimizer(cfg, BOXED)
    opt, params, total = tx.init(arrays(0)), arrays(0), 0.0
    step = jax.jit(lambda grads, opt: tx.update(grads, opt, params))
    for i in range(60):
      change, opt = step(arrays(i % 5 + 1), opt)
      total = jax.tree.map(lambda a, b: a + np.asarray(b), total, change) if i else change
    return total, opt, tx

  (ours, opt, tx), (theirs, _, _) = updates("bfloat16"), updates("float32")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(opt) if leaf.ndim} == {"bfloat16"}
  assert apart(ours, theirs) < 0.1
  placed = optim.abstract(tx, BOXED, layout.Layout(layout.make_mesh(fsdp=4, tensor=2)))[1]
  cut = [
    leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(placed) if leaf.shape == (2, 16, 64)
  ]
  assert cut and set(cut) == {(2, 4, 32)}
