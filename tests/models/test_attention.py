"""Attention by segments: both kernels against plain softmax, skipped tiles, queries without keys, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.layout import Layout, make_mesh
from sora_jax.models import attention, splash


def plain(query, key, value, segment_BL, segment_BM, scale):
  score = jnp.einsum("BLNK,BMNK->BNLM", query, key) * scale
  same = (segment_BL[:, None, :, None] == segment_BM[:, None, None, :]) & (segment_BL[:, None, :, None] > 0)
  weight = jnp.where(same, jax.nn.softmax(jnp.where(same, score, -1e9)), 0)
  return jnp.einsum("BNLM,BMNK->BLNK", weight, value)


def inputs(B, L, M, N, K):
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(k, (B, n, N, K)) for k, n in zip(keys, (L, M, M, L), strict=True)]


def segments(*rows):
  """Run lengths of each row, as (id, count) pairs -> int32 ids."""
  return jnp.asarray([np.concatenate([np.full(n, i) for i, n in row]) for row in rows], jnp.int32)


# Two rows. In the second, segment 2 has no key, and the ids of the keys do not ascend.
QUERIES = segments([(1, 70), (2, 50), (3, 9), (0, 21)], [(1, 33), (2, 40), (4, 77)])
KEYS = segments([(1, 3), (2, 90), (3, 30), (0, 7)], [(4, 20), (1, 60), (3, 50)])


@pytest.mark.parametrize(
  "kernel, fused_bytes",
  [
    pytest.param("blocks", None, id="blocks"),
    pytest.param("splash_interpret", (1 << 30, 1 << 30), id="splash"),
    pytest.param("splash_interpret", (0, 1 << 30), id="splash-head-by-head"),
    pytest.param("splash_interpret", (0, 256 * 128 * 4), id="splash-large-tiles"),
    pytest.param("splash_interpret", (0, 0), id="splash-two-backward-kernels"),
  ],
)
@pytest.mark.parametrize("cross", [False, True])
def test_a_query_attends_to_the_keys_of_its_segment(kernel, fused_bytes, cross, monkeypatch):
  """Output and gradients are those of plain softmax, also for queries without a key and for padding."""
  monkeypatch.setattr(splash, "FUSED_BYTES", fused_bytes)
  query, key, value, weight = inputs(2, 150, 130 if cross else 150, 2, 16)
  ids = (QUERIES, KEYS) if cross else (QUERIES, QUERIES)

  def run(f):
    def loss(*args):
      out = f(*args)
      return (out * weight).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

  (_, ours), grads = run(lambda q, k, v: attention.attend(q, k, v, *ids, kernel=kernel))(query, key, value)
  (_, theirs), expected = run(lambda q, k, v: plain(q, k, v, *ids, 16**-0.5))(query, key, value)
  np.testing.assert_allclose(ours, theirs, atol=2e-6)
  for ours, theirs in zip(grads, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  if cross:
    assert not np.any(np.asarray(grads[0])[1, 33:73])  # finite, and zero


def test_merged_segments_differ():
  query, key, value, _ = inputs(2, 150, 150, 2, 16)
  run = jax.jit(lambda ids: attention.attend(query, key, value, ids, ids))
  apart, merged = run(QUERIES), run(jnp.minimum(QUERIES, 1))
  assert np.abs(apart - merged)[0, :120].max() > 1e-2


def test_a_long_row_in_tiles():
  """Beyond 1,024 tokens there are tiles of 128, head by head.

  The result is the same, and no array has length x length entries.
  """
  query, key, value, weight = inputs(1, 1500, 1500, 2, 8)
  ids = segments([(1, 700), (2, 130), (3, 600), (0, 70)])

  def loss(q, k, v, f):
    return (f(q, k, v) * weight).sum()

  ours = jax.jit(
    jax.grad(lambda *a: loss(*a, lambda q, k, v: attention.attend(q, k, v, ids, ids)), (0, 1, 2))
  )
  theirs = jax.jit(
    jax.grad(lambda *a: loss(*a, lambda q, k, v: plain(q, k, v, ids, ids, 8**-0.5)), (0, 1, 2))
  )
  for a, b in zip(ours(query, key, value), theirs(query, key, value), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)

  def memory(f):
    return f.lower(query, key, value).compile().memory_analysis().temp_size_in_bytes

  assert memory(ours) < 7e6 < memory(theirs) / 4


def test_tiles_of_other_segments_are_skipped():
  """Keys are NaN in tiles that some queries do not meet; multiplied, they would give NaN there."""
  query, key, value, _ = inputs(1, 256, 256, 1, 8)
  ids = segments([(1, 64), (2, 128), (3, 64)])
  key = key.at[:, 64:192].set(jnp.nan)
  out = jax.jit(attention.attend)(query, key, value, ids, ids)
  assert np.isfinite(out[0, :64]).all() and np.isfinite(out[0, 192:]).all()
  assert np.isnan(out[0, 64:192]).all()
  meet = splash.tiles_meet(ids.reshape(4, 64), ids.reshape(4, 64))
  np.testing.assert_array_equal(meet, [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
  assert not splash.tiles_meet(jnp.zeros((1, 64), int), ids.reshape(4, 64)).any()  # padding meets nothing


def test_how_the_backward_pass_runs():
  """One kernel for few heads, with larger tiles of keys where memory needs them; else two kernels."""
  assert splash.backward_plan(6, 1024, 1024, 128, 128, 2) == (6, 128, True)
  assert splash.backward_plan(10, 75_776, 75_776, 1024, 128, 2) == (1, 2048, True)
  assert splash.backward_plan(6, 40_960, 40_960, 1024, 256, 2) == (1, 1024, True)
  assert splash.backward_plan(40, 19_456, 512, 128, 256, 2) == (5, 128, True)
  assert splash.backward_plan(3, 81_920, 81_920, 1024, 256, 2) == (1, 2048, True)
  assert splash.backward_plan(3, 81_920, 81_920, 1024, 256, 2, "TPU v5 lite") == (3, 1024, False)
  assert splash.backward_plan(5, 65_536, 524_288, 1024, 128, 2) == (5, 1024, False)


@pytest.mark.parametrize("kernel", ["blocks", "splash_interpret"])
@pytest.mark.parametrize("dtype, within", [("float32", 5e-6), ("bfloat16", 2e-2)])
def test_a_key_that_counts_for_many(kernel, dtype, within):
  """One key with log_count log(399) equals 399 equal keys; the other keys count once."""
  query, key, value, _ = (x.astype(dtype) for x in inputs(1, 140, 131, 2, 16))
  ids, log_count = jnp.ones((1, 140), int), jnp.zeros((1, 131)).at[0, 130].set(np.log(399))

  def repeat_last(x):
    return jnp.concatenate([x, jnp.repeat(x[:, 130:], 398, 1)], 1)

  @jax.jit
  def run(k, v, **kwargs):
    return attention.attend(query, k, v, ids, jnp.ones(k.shape[:2], int), kernel=kernel, **kwargs)

  counted, repeated = run(key, value, log_count_BM=log_count), run(repeat_last(key), repeat_last(value))
  np.testing.assert_allclose(counted.astype("float32"), repeated.astype("float32"), atol=within)
  assert np.abs(counted - run(key, value)).max() > 0.1


@pytest.mark.parametrize("most", [4096, 512])
def test_one_clip_in_a_long_row(most, monkeypatch):
  """Where most tiles meet, tiles of keys are larger; outputs and gradients are the same."""
  monkeypatch.setattr(attention, "COARSE", most)
  query, key, value, weight = inputs(1, 1100, 1100, 2, 8)
  ids = segments([(1, 1000), (2, 70), (0, 30)])

  def run(f):
    def loss(*args):
      return (f(*args) * weight).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

  ours = run(lambda *a: attention.attend(*a, ids, ids))
  theirs = run(lambda *a: plain(*a, ids, ids, 8**-0.5))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bias_is_added_to_scores():
  query, key, value, _ = inputs(2, 40, 40, 2, 8)
  ids = segments([(1, 20), (2, 15), (0, 5)], [(1, 40)])
  biased = jax.jit(lambda bias: attention.attend(query, key, value, ids, ids, bias=bias))
  same = jax.jit(attention.attend)(query, key, value, ids, ids)
  np.testing.assert_allclose(biased(jnp.full((2, 40, 40), 3.0)), same, atol=2e-6)
  only_self = biased(jnp.where(jnp.eye(40, dtype=bool), 0.0, -1e4))
  np.testing.assert_allclose(only_self, jnp.where(ids[..., None, None] > 0, value, 0), atol=1e-6)


@pytest.mark.parametrize(
  "mesh, rows, heads, keys, sent",
  [
    pytest.param({"data": 2, "context": 2, "tensor": 2}, 2, 4, 160, (4, 2), id="heads-for-tokens"),
    pytest.param({"data": 2, "context": 2, "tensor": 2}, 2, 2, 160, (0, 3), id="too-few-heads"),
    pytest.param({"data": 2, "context": 2, "tensor": 2}, 2, 2, 40, (0, 0), id="text"),
    pytest.param({"fsdp": 4, "context": 2}, 1, 2, 160, (4, 5), id="one-row-both-ways"),
    pytest.param({"fsdp": 2, "context": 4}, 1, 8, 160, (4, 2), id="one-row-heads-over-both"),
    pytest.param({"fsdp": 4, "context": 2}, 4, 1, 160, (0, 3), id="rows-over-fsdp"),
  ],
)
def test_sharded_is_unsharded(mesh, rows, heads, keys, sent):
  """The same with rows, tokens and heads over 8 devices; a device sends what it must.

  sent: all-to-alls and all-gathers of the forward pass (of segments, too).
  """
  layout = Layout(make_mesh(**mesh))
  query, key, value, weight = inputs(rows, 160, keys, heads, 16)
  ids = segments(*[[(1, 70 - 9 * i), (2, 40), (3, 35 + 9 * i), (0, 15)] for i in range(rows)])
  ids = ids, ids[:, :keys]

  def run(layout):
    def loss(*args):
      return (attention.attend(*args, *ids, layout=layout) * weight).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)

  for a, b in zip(jax.tree.leaves(run(layout)), jax.tree.leaves(run(None)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  forward = jax.jit(lambda *args: attention.attend(*args, *ids, layout=layout))
  text = forward.lower(query, key, value).as_text()
  assert (text.count("stablehlo.all_to_all"), text.count("stablehlo.all_gather")) == sent
