"""Model FLOPs are those of the compiled products; chips are found by what jax calls them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import batch as batches, chips, flops, layout as layouts, patches, train
from sora_jax.models import dit, t2v

CFG = dit.DiTConfig(depth=1, heads=4, head_size=64, mlp=1024, channels=16, text_width=128, time_freqs=32)


def clip(uid, thw, words):
  tokens = np.zeros((int(np.prod(thw)), CFG.values_in), np.float32)
  text = np.ones((words, CFG.text_width), np.float32)
  return batches.Clip(tokens, patches.coords(thw), [text], uid=uid, size=thw, fps=8.0)


def counted(function, *arguments):
  """FLOPs of a program, as XLA counts them."""
  return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def dense(query_BLNK, key_BMNK, value_BMNK, *_, **__):
  """Attention of rows of one clip, without loops."""
  weights = jax.nn.softmax(jnp.einsum("BLNK,BMNK->BNLM", query_BLNK, key_BMNK))
  return jnp.einsum("BNLM,BMNK->BLNK", weights, value_BMNK)


def test_they_are_those_of_the_program(monkeypatch):
  """One clip that fills its row, one layer, dense attention: XLA counts the body of a loop once. What the
  formula leaves out, norms and activations, is a few hundredths.
  """
  monkeypatch.setattr(dit, "attend", dense)
  model = t2v.Model(CFG)
  batch = batches.pack([[clip(1, (4, 8, 16), 64)]], batches.RowShape(512, 1, 64))
  params = layouts.unbox(jax.eval_shape(model.init, jax.random.key(0)))
  sigma_BU, index_BL = jnp.zeros((1, 2)), jnp.zeros((1, 512), jnp.int32)

  def loss(params):
    velocity = model.velocity(params, batch.tokens_BLP, batch, sigma_BU, index_BL, batch.text_BSE)
    return jnp.sum(velocity**2)

  tokens, text = np.array([512]), np.array([64])
  assert counted(loss, params) == pytest.approx(flops.forward(CFG, tokens, text), rel=0.06)
  assert counted(jax.grad(loss), params) == pytest.approx(flops.step(CFG, tokens, text), rel=0.1)


def test_layers_and_clips_add_up():
  """Clips do not attend to each other; a longer one costs more than its share of tokens."""
  deep = dataclasses.replace(CFG, depth=7)
  both, one, other = (
    flops.forward(deep, np.array(n), np.array(s)) for n, s in [([300, 50], [9, 7]), ([300], [9]), ([50], [7])]
  )
  assert both == pytest.approx(one + other)
  assert flops.forward(deep, np.array([350]), np.array([16])) > 1.02 * both
  layer = flops.forward(dataclasses.replace(CFG, depth=2), np.array([300]), np.array([9])) - flops.forward(
    CFG, np.array([300]), np.array([9])
  )
  assert one == pytest.approx(flops.forward(CFG, np.array([300]), np.array([9])) + 6 * layer)


def test_of_a_batch_its_clips_count_alone():
  """Padding, empty places and the rows' sharing of clips change nothing; frozen weights cost a third less."""
  small, large = (4, (2, 4, 4), 5), (5, (3, 4, 8), 11)
  want = flops.step(CFG, np.array([32, 96]), np.array([5, 11]))
  for rows, shape in (([[small, large]], (200, 5, 40)), ([[small], [large], []], (128, 2, 16))):
    batch = batches.pack([[clip(*c) for c in row] for row in rows], batches.RowShape(*shape))
    assert float(train.model_flops(batch, t2v.Model(CFG))) == pytest.approx(want, rel=1e-6)
  assert (
    0.6
    < flops.step(CFG, np.array([32]), np.array([5]), frozen=True)
    / flops.step(CFG, np.array([32]), np.array([5]))
    < 0.7
  )


def test_wan_14b_is_what_maxdiffusion_counts():
  """Its README logs 4,893 TFLOP a device and step on a v5p-8: one clip of 75,600 tokens over 4 chips."""
  total = flops.step(dit.SIZES["wan-14b"], np.array([75_600]), np.array([512]))
  assert total / 4 / 1e12 == pytest.approx(4893, rel=0.002)


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU7x", "tpu7x"),
  ],
)
def test_chips(kind, name):
  assert chips.chip_of(kind) is chips.CHIPS[name]
  assert chips.chip_of("cpu") is None
