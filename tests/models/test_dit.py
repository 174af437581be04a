"""Laws of the DiT: clips of a row are independent, sigma belongs to tokens, every size has its shape.

Wan's weights give Wan's outputs.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import layout as layouts, patches
from sora_jax.errors import BadInput
from sora_jax.models import dit, lora, primitives
from sora_jax.weights import files, wan_dit
from tests.golden.calls import dit_velocities

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CFG = dit.DiTConfig(depth=2, heads=2, head_size=16, mlp=48, channels=4, text_width=8, time_freqs=32)
# Three clips: size, text tokens, noise level.
GRIDS, PROMPTS, SIGMAS = [(2, 2, 3), (1, 3, 2), (3, 2, 2)], [3, 5, 4], [0.2, 0.5, 0.8]
LENGTH, TEXT = 33, 15
TOKENS = [slice(0, 12), slice(12, 18), slice(18, 30)]


def row_of(numbers):
  """Inputs of clips packed into one row of fixed shape; the first two tokens of each are given (sigma 0)."""
  row = {
    "tokens": np.zeros((1, LENGTH, CFG.values_in), np.float32),
    "coords": np.zeros((1, LENGTH, 3), np.float32),
    "segment": np.zeros((1, LENGTH), np.int32),
    "sigma": np.zeros((1, 4), np.float32),
    "index": np.zeros((1, LENGTH), np.int32),
    "text": np.zeros((1, TEXT, CFG.text_width), np.float32),
    "prompt": np.zeros((1, LENGTH), np.int32),
    "prompt_text": np.zeros((1, TEXT), np.int32),
  }
  at = text_at = 0
  for i, number in enumerate(numbers, start=1):
    rng, coords = np.random.default_rng(number), patches.coords(GRIDS[number])
    tokens, text = slice(at, at + len(coords)), slice(text_at, text_at + PROMPTS[number])
    row["tokens"][0, tokens] = rng.normal(size=(len(coords), CFG.values_in))
    row["text"][0, text] = rng.normal(size=(PROMPTS[number], CFG.text_width))
    row["coords"][0, tokens], row["sigma"][0, i] = coords, SIGMAS[number]
    row["segment"][0, tokens] = row["prompt"][0, tokens] = row["prompt_text"][0, text] = i
    row["index"][0, at + 2 : tokens.stop] = i
    at, text_at = tokens.stop, text.stop
  return row


def args(row):
  return [
    row[name] for name in ("tokens", "coords", "segment", "sigma", "index", "text", "prompt", "prompt_text")
  ]


def run(params, row, cfg=CFG, layout=None):
  return dit.DiT(cfg, layout).apply({"params": params}, *args(row))


def loss(params, row, cfg=CFG):
  error = (run(params, row, cfg) - row["tokens"]) ** 2
  return jnp.sum(jnp.where(row["segment"][..., None] > 0, error, 0))


velocity, gradient = jax.jit(run), jax.jit(jax.value_and_grad(loss))
ROW = row_of([0, 1, 2])


@pytest.fixture(scope="module")
def new_params():
  return layouts.unbox(jax.jit(dit.DiT(CFG).init)(jax.random.key(0), *args(ROW)))["params"]


@pytest.fixture(scope="module")
def params(new_params):
  """Initial weights, all perturbed, so that gates, tables and the last layer matter."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.normal(size=x.shape).astype(np.float32), new_params)


def assert_close(trees, others):
  """Asserts that trees of gradients are equal to 1e-5 of the largest entry of each leaf."""
  for (path, a), b in zip(jax.tree.leaves_with_path(trees), jax.tree.leaves(others), strict=True):
    np.testing.assert_allclose(
      a, b, atol=1e-5 * max(1.0, np.abs(b).max()), err_msg=jax.tree_util.keystr(path)
    )


def test_a_clip_does_not_see_its_neighbours(params):
  """The velocity of each clip of a row is that of the clip alone, unless segments or prompts are merged."""
  together = velocity(params, ROW)
  for number, tokens in enumerate(TOKENS):
    alone = velocity(params, row_of([number]))[:, : tokens.stop - tokens.start]
    np.testing.assert_allclose(together[:, tokens], alone, atol=1e-5)
  for names in (("segment",), ("prompt", "prompt_text")):
    merged = velocity(params, ROW | {name: np.minimum(ROW[name], 1) for name in names})
    assert np.abs(merged[:, TOKENS[2]] - alone).max() > 1e-3, names


def test_loss_and_gradients_of_a_row_are_the_sum_of_its_clips(params):
  together, alone = gradient(params, ROW), [gradient(params, row_of([number])) for number in range(3)]
  assert_close(together, jax.tree.map(lambda *g: sum(g), *alone))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(together))  # every weight matters


def test_padding_does_not_matter(params):
  pads, text_pads = ROW["segment"] == 0, ROW["prompt_text"] == 0
  other = ROW | {
    "coords": np.where(pads[..., None], np.float32(9), ROW["coords"]),
    "tokens": np.where(pads[..., None], np.float32(7), ROW["tokens"]),
    "index": np.where(pads, 2, ROW["index"]),
    "text": np.where(text_pads[..., None], np.float32(5), ROW["text"]),
  }
  jax.tree.map(np.testing.assert_array_equal, gradient(params, ROW), gradient(params, other))


def test_sigma_belongs_to_tokens(params):
  """It does not matter which entry of sigma_BU holds a token's sigma. Another sigma changes the velocity."""

  def run(sigma, index):
    return velocity(params, ROW | {"sigma": np.asarray([sigma], np.float32), "index": index})

  same = run((0.4, 0.4, 0.4, 0.4), ROW["index"])
  np.testing.assert_array_equal(same, run((0.9, 0.4, 0.1, 0.2), np.ones_like(ROW["index"])))
  changed = run((0.4, 0.9, 0.4, 0.4), np.where(np.arange(LENGTH) == 5, 1, 0)[None])
  assert np.abs(changed - same)[:, 6:12].max() > 1e-3


def test_text_can_be_prepared_once(params):
  @jax.jit
  def prepared(params, row):
    text_kv = dit.text_kv(CFG, params, row["text"])
    return dit.DiT(CFG).apply({"params": params}, *args(row | {"text": None}), text_kv=text_kv)

  np.testing.assert_allclose(prepared(params, ROW), velocity(params, ROW), atol=1e-5)


def test_one_zero_stands_for_all_the_padding_of_a_prompt(params):
  """text_pad: prompts of 5 and 9 tokens have the same velocities with one zero as with all 7 and 3 zeros.

  Without zeros they have others.
  """
  cfg = dataclasses.replace(CFG, text_pad=12)
  words = [ROW["text"][0, :5], ROW["text"][0, 5:14]]

  def run(zeros, once=False):
    padded = [np.pad(word, ((0, n), (0, 0))) for word, n in zip(words, zeros, strict=True)]
    text = np.concatenate(padded)[None]
    prompt = np.repeat([1, 2], [5 + zeros[0], 9 + zeros[1]])[None]
    row = ROW | {"text": text, "prompt_text": prompt, "prompt": np.minimum(ROW["prompt"], 2)}
    text_kv = None
    if once:
      text_kv, row = dit.text_kv(cfg, params, text, prompt), row | {"text": None}
    return np.asarray(jax.jit(dit.DiT(cfg).apply)({"params": params}, *args(row), text_kv=text_kv))

  full = run((7, 3))
  np.testing.assert_allclose(run((1, 1)), full, atol=1e-5)
  np.testing.assert_allclose(run((1, 1), once=True), full, atol=1e-5)
  assert np.abs(run((0, 0)) - full).max() > 1e-3


@pytest.mark.parametrize("scans", [1, 2])
def test_remat_changes_nothing_but_memory(params, scans):
  cfg = dataclasses.replace(CFG, remat="full", scans=scans)
  assert_close(jax.jit(jax.value_and_grad(lambda p: loss(p, ROW, cfg)))(params), gradient(params, ROW))


def test_adapters_in_several_scans(params):
  """Velocity and gradients of adapters are the same in two scans as in one."""
  boxed = jax.eval_shape(lambda: dit.DiT(CFG).init(jax.random.key(0), *args(ROW)))["params"]
  config = lora.LoRAConfig(rank=2, alpha=4.0, targets=("to_q", "ffn.net.2"))
  adapters = jax.tree.map(lambda a: a + 0.1, layouts.unbox(lora.init(jax.random.key(1), config, boxed)))

  @functools.partial(jax.jit, static_argnums=1)
  def run(adapters, scans):
    model = dit.DiT(dataclasses.replace(CFG, lora_scale=config.scale, remat="full", scans=scans))
    return model.apply({"params": params, "lora": adapters}, *args(ROW))

  one, two = (jax.vjp(lambda a, n=scans: run(a, n), adapters) for scans in (1, 2))
  assert np.abs(one[0] - velocity(params, ROW)).max() > 1e-3
  assert_close((two[0], two[1](two[0])), (one[0], one[1](one[0])))


def test_sharded_is_unsharded(params):
  """The velocity is the same with weights (checked), rows, tokens and heads sharded over 8 devices."""
  layout = layouts.Layout(layouts.make_mesh(fsdp=2, context=2, tensor=2))
  boxed = jax.eval_shape(lambda: dit.DiT(CFG, layout).init(jax.random.key(0), *args(ROW)))["params"]
  cut = jax.device_put(params, layouts.shardings(boxed, layout))
  assert cut["blocks"]["self"]["query"].addressable_shards[0].data.shape == (2, 8, 1, 16)
  two = jax.tree.map(lambda *x: np.concatenate(x), ROW, row_of([2, 0]))
  sharded = jax.jit(lambda p, row: run(p, row, layout=layout))(cut, two)
  np.testing.assert_allclose(sharded[:1, :30], velocity(params, ROW)[:, :30], atol=1e-5)
  np.testing.assert_allclose(sharded[1:, :24], velocity(params, row_of([2, 0]))[:, :24], atol=1e-5)


def test_a_new_model_predicts_zero_and_learns(new_params):
  """With initial weights the velocity is 0, and one step of gradient descent lowers the loss."""
  assert not np.any(velocity(new_params, ROW))
  before, grads = gradient(new_params, ROW)
  assert gradient(jax.tree.map(lambda p, g: p - 1e-3 * g, new_params, grads), ROW)[0] < before


@pytest.mark.parametrize("name", dit.SIZES)
def test_every_size(name):
  """The number of weights; for the public sizes that of their checkpoints (counted in tests/oracle)."""
  count = dit.count_params(dit.SIZES[name])
  public = {
    "wan-1.3b": 1_418_996_800,
    "wan-5b": 4_999_787_712,
    "wan-14b": 14_288_491_584,
    "wan-14b-i2v": 14_288_901_184,
  }
  if name in public:
    assert count == public[name]
  else:
    ranges = {
      "tiny": (1.4e6, 1.8e6),
      "quick": (1.4e6, 1.8e6),
      "quick-small": (5e5, 7e5),
      "world": (3e6, 5e6),
      "quick-large": (5e6, 6e6),
      "S": (4e7, 7e7),
      "B": (1e8, 1.5e8),
      "L": (3.5e8, 5e8),
      "XL": (9e8, 1.3e9),
    }
    low, high = ranges[name]
    assert low <= count <= high
    assert (
      name in ("tiny", "quick", "quick-small", "quick-large", "world") or dit.SIZES[name].head_size == 256
    )


@pytest.mark.parametrize(
  "wrong",
  [
    {"head_size": 15},
    {"depth": 0},
    {"remat": "some"},
    {"scans": 0},
    {"scans": 2},  # of a model that saves everything
    {"scans": 3, "remat": "full"},
    {"dtype": "int8"},
    {"conditioning": "channels"},
    {"patch": (1, 2)},
  ],
)
def test_a_config_that_cannot_be_built_says_so(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    dataclasses.replace(CFG, **wrong)


@pytest.mark.parametrize("name", ["dit", "dit_image"])
def test_wan_weights_give_wan_outputs(name):
  """Weights and outputs are those of diffusers' class (0.42.1; golden/make.py).

  Clips have odd sizes, one has a time for each token, and one model takes conditions.
  """
  tensors, theirs = files.Tensors(GOLDEN / name), files.read_config(GOLDEN / name)
  golden = np.load(GOLDEN / name / "golden.npz")
  cfg = wan_dit.config_from_diffusers(theirs)
  params = wan_dit.from_diffusers(tensors, cfg)
  count = len(golden) // 4
  clips = []
  for i in range(count):
    clips.append((golden[f"x{i}"].transpose(1, 2, 3, 0), golden[f"time{i}"], golden[f"text{i}"]))
  assert count >= 2
  for i, velocity in enumerate(dit_velocities(cfg, params, clips)):
    expected = golden[f"y{i}"]
    np.testing.assert_allclose(velocity.transpose(3, 0, 1, 2), expected, atol=1e-5 * np.abs(expected).max())

  back = dict(wan_dit.to_diffusers(params, cfg))
  assert back.keys() == tensors.keys()
  for key, value in back.items():
    np.testing.assert_array_equal(value, tensors[key])
  assert {**wan_dit.config_to_diffusers(cfg), "_diffusers_version": theirs["_diffusers_version"]} == theirs


def test_a_position_is_within_the_clip():
  """It is the same for a clip alone and beside others; the first wave of an axis falls from its start to its
  end.
  """
  packed, alone = row_of([0, 1, 2]), row_of([2])
  waves, same = (
    np.asarray(primitives.place_waves(row["coords"], row["segment"], 2)) for row in (packed, alone)
  )
  np.testing.assert_array_equal(waves[0, TOKENS[2]], same[0, :12])
  assert (waves[..., 0] == 1).all()
  np.testing.assert_allclose(waves[0, 18:30:4, 4], np.cos(np.pi * np.array([1, 3, 5]) / 6), atol=1e-6)


def test_a_model_that_knows_positions(params):
  """Its velocity depends on where a token is, not on what else is in the row. diffusers has no such model."""
  cfg = dataclasses.replace(CFG, place_waves=2)
  more = params | {"place": jax.random.normal(jax.random.key(3), (8, CFG.width))}
  packed, alone = (np.asarray(run(more, row, cfg)) for row in (ROW, row_of([0])))
  np.testing.assert_allclose(packed[0, TOKENS[0]], alone[0, :12], atol=1e-5)
  assert np.abs(packed - np.asarray(run(params, ROW)))[0, TOKENS[0]].max() > 1e-2
  with pytest.raises(BadInput, match="place_waves 2"):
    wan_dit.config_to_diffusers(cfg)


def test_attention_starts_at_a_neighbour():
  """By the biases alone, a head's highest score is at most one step away along each axis, wherever the token
  is. Heads differ.
  """
  size, steps_seen = 48, []
  coords = patches.coords((5, 5, 5)).astype(np.float32)
  angles = primitives.rotary(jnp.asarray(coords[None]), size, 30.0)
  inner = (np.abs(coords - 2) <= 1).all(-1)
  for seed in range(4):
    rotated = {}
    for name, init in dit.neighbour_bias(6.0).items():
      bias = jnp.broadcast_to(init(jax.random.key(seed), (3, size)), (1, 125, 3, size))
      rotated[name] = primitives.apply_rope(bias, *angles)[0]
    best = np.asarray(jnp.einsum("LNK,MNK->LNM", rotated["query"], rotated["key"]).argmax(-1))
    steps = (coords[best] - coords[:, None])[inner]
    assert (steps == steps[:1]).all() and np.abs(steps).max() <= 1
    steps_seen.extend(map(tuple, steps[0]))
  assert len(set(steps_seen)) > 4


def test_a_model_that_predicts_data_gives_its_velocity(params):
  """It is (x - data) / sigma, from the same last layer; the divisor is at least MIN_SIGMA."""
  cfg = dataclasses.replace(CFG, predicts="data")
  data = np.asarray(velocity(params, ROW))
  sigma = np.take_along_axis(ROW["sigma"], ROW["index"], 1)[..., None]
  predicted = np.asarray(jax.jit(lambda params, row: run(params, row, cfg))(params, ROW))
  np.testing.assert_allclose(predicted, (ROW["tokens"] - data) / np.maximum(sigma, dit.MIN_SIGMA), atol=1e-4)
  at = np.broadcast_to(sigma >= dit.MIN_SIGMA, data.shape)
  np.testing.assert_allclose((ROW["tokens"] - sigma * predicted)[at], data[at], atol=1e-4)
  with pytest.raises(ValueError, match="predicts='noise'; known: velocity, data"):
    dataclasses.replace(CFG, predicts="noise")
  with pytest.raises(BadInput, match="predicts='data'"):
    wan_dit.config_to_diffusers(cfg)
