"""A training step: packed equals alone in loss and gradient, sharded equals unsharded, a bad update changes nothing, a resumed run is the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import batch as batches, checkpoint, layout, optim, patches, train
from sora_jax.diffusion import flow
from sora_jax.models import dit, t2v, text

TINY = dit.DiTConfig(depth=2, heads=2, head_size=16, mlp=64, channels=4, text_width=16, time_freqs=32)
TEXT = text.TextConfig(vocab=32, width=16, depth=1, heads=2, head_size=8, mlp=32)
SHAPE = batches.RowShape(length=48, clips=4, text=24)
SIGMA = flow.SigmaConfig()


def model(where=None):
  return t2v.Model(TINY, TEXT, where)


def clip(uid, thw):
  rng = np.random.default_rng(uid)
  tokens = patches.patchify(rng.normal(size=(*thw, 4)).astype(np.float32), (1, 1, 1))
  return batches.Clip(tokens, patches.coords(thw), [rng.integers(2, 32, rng.integers(2, 6)).astype(np.int32)], uid=uid, size=thw, fps=8.0)


def rows():
  """Eight rows of clips, one of them half empty."""
  return [[clip(10 * r + 1, (2, 2, 3)), clip(10 * r + 2, (3, 2, 2))] + ([clip(10 * r + 3, (1, 2, 4))] if r else []) for r in range(8)]


def weights(of):
  """Random weights of a model, the last layer included, which starts at zero and would hide everything."""
  rng, params = np.random.default_rng(0), layout.unbox(jax.jit(of.init)(jax.random.key(0)))
  return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), jax.device_get(params))


@functools.cache
def loss_and_grad():
  return jax.jit(jax.value_and_grad(functools.partial(train.loss_fn, model=model(), sigma=SIGMA), argnums=0))


def test_packed_equals_alone():
  """The loss and gradient of packed rows are those of each clip in a row of its own; other neighbours change nothing."""
  params, key = weights(model()), jax.random.key(5)
  clips = [c for row in rows()[:2] for c in row]
  packed = batches.pack([clips[:3], clips[3:]] + [[]] * 6, SHAPE)
  alone = batches.pack([[c] for c in clips] + [[]] * (8 - len(clips)), SHAPE)
  mixed = batches.pack([clips[2:], clips[:2]] + [[]] * 6, SHAPE)
  results = [loss_and_grad()(params, batch=b, key=key) for b in (packed, alone, mixed)]
  for loss, grad in results[1:]:
    np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(results[0][1]), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
  other = dataclasses.replace(packed, segment_BL=np.minimum(packed.segment_BL, 1))      # clips that see each other
  assert abs(float(loss_and_grad()(params, batch=other, key=key)[0]) - float(results[0][0])) > 1e-4


MESH = {"fsdp": 2, "context": 2, "tensor": 2}


@functools.cache
def setting(sharded):
  """(layout, tx, compiled step) on one device, or on eight; few compilations serve all tests."""
  where = layout.Layout(layout.make_mesh(**MESH)) if sharded else layout.single_device()
  tx = optim.optimizer(optim.OptimConfig(steps=60, warmup=5, learning_rate=5e-3, name="muon"), train.boxed_weights(model()))
  step = jax.jit(train.train_step, static_argnames=("model", "tx", "ema_decay", "sigma"), out_shardings=(train.shardings(model(where), tx), None))
  return where, tx, functools.partial(step, key=jax.random.key(1), model=model(where), tx=tx, ema_decay=0.9, sigma=SIGMA)


def start(where, tx):
  return train.init_state(model(where), tx, jax.random.key(0)), train.place_batch(batches.pack(rows(), SHAPE), where)


def test_sharded_equals_unsharded():
  """Two updates on eight devices give the weights that one device gives; weights and optimiser are cut over the mesh."""
  states = []
  for sharded in (False, True):
    where, tx, step = setting(sharded)
    state, batch = start(where, tx)
    for _ in range(2):
      state, metrics = step(state, batch)
    states.append((state, metrics))
  (one, m_one), (many, m_many) = states
  np.testing.assert_allclose(m_many["loss"], m_one["loss"], rtol=2e-5)
  for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-3)
  for tree in (many.params, many.opt):
    parts = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(tree)}
    assert min(parts) <= 1 / 4, parts


def test_a_bad_update_changes_nothing_but_the_count():
  """A batch with a NaN leaves weights, EMA and optimiser to the bit; the step goes on; a good one after it trains."""
  where, tx, run = setting(False)
  state, good = start(where, tx)
  broken = dataclasses.replace(good, tokens_BLP=good.tokens_BLP.at[:, 3].set(np.nan))
  after, metrics = run(state, broken)
  assert int(metrics["bad"]) == 1 and int(after.bad) == 1 and int(after.step) == 1
  for part in ("params", "ema", "opt"):
    for a, b in zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(state, part)), strict=True):
      np.testing.assert_array_equal(a, b)
  later, metrics = run(run(state, good)[0], good)
  assert int(metrics["bad"]) == 0 and float(jnp.abs(later.params["dit"]["velocity"] - state.params["dit"]["velocity"]).max()) > 0


def test_two_steps_save_restore_two_steps(tmp_path):
  """4 steps equal 2 + save + restore on another mesh + 2."""
  names = ("params", "ema", "opt", "step", "bad")
  where, tx, run = setting(False)
  state, batch = start(where, tx)
  for step in range(1, 5):
    state, _ = run(state, batch)
    if step == 2:
      saved = checkpoint.Checkpoints(tmp_path)
      saved.save(2, {"state": {name: getattr(state, name) for name in names}}, {"step": 2})
      saved.close()
  where, tx, run = setting(True)
  target = train.abstract_state(model(where), tx)
  again = train.State(**checkpoint.Checkpoints(tmp_path).restore(2, {"state": {name: getattr(target, name) for name in names}})["state"])
  batch = start(where, tx)[1]
  for _ in range(2):
    again, _ = run(again, batch)
  for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-3)


def test_overfits_a_handful_of_clips():
  """Sixty updates on one batch at a high rate bring the loss well down: the sign of the velocity and the text are wired right."""
  where, tx, run = setting(False)
  (state, batch), losses = start(where, tx), []
  for _ in range(60):
    state, metrics = run(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.6 * losses[0], losses[::10]


@dataclasses.dataclass(frozen=True)
class Held:
  """A layout of which only the rows that this process's devices hold are known, as (first, after)."""
  rows: tuple

  def fitted(self, shape, *axes):
    return self

  def addressable_devices_indices_map(self, shape):
    return {number: (slice(*held),) for number, held in enumerate(self.rows)}


@pytest.mark.parametrize(("rows", "part"), [
    (((0, 2), (2, 4)), (0, 4)), (((12, 14), (14, 16)), (3, 4)), (((4, 8), (4, 8)), (1, 4)), (((None,), (None,)), (0, 1)),
    (((0, 2), (8, 10)), (0, 1))])
def test_a_process_loads_the_rows_that_its_devices_hold(rows, part):
  """Of 16: a quarter each; the same where others hold other tokens of it; all, where rows are not cut, or not in one piece."""
  assert train.part_of_rows(Held(rows), 16) == part


def test_a_checksum_is_of_the_batch_however_it_is_cut():
  where = [layout.Layout(layout.make_mesh(**axes)) for axes in ({}, {"fsdp": 2, "context": 2})]
  whole, cut = (int(jax.jit(train.checksum)(train.place_batch(batches.pack(rows(), SHAPE), place))) for place in where)
  assert whole == cut
  other = batches.pack(rows(), SHAPE)
  other.tokens_BLP[0, [0, 1]] = other.tokens_BLP[0, [1, 0]]
  assert int(train.checksum(other)) != whole
