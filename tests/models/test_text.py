"""Prompts: cleaning, tokenizers of any corpus, independent prompts in a row, UMT5's own outputs."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import layout as layouts
from sora_jax.errors import BadInput
from sora_jax.models import text
from sora_jax.weights import files, umt5

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "umt5"
CFG = text.TextConfig(vocab=50, width=16, depth=2, heads=2, head_size=8, mlp=24, buckets=8, max_distance=10)
CAPTIONS = [
  f"a {colour} {shape} moves {direction}"
  for colour in ("red", "blue")
  for shape in ("ball", "square", "ring")
  for direction in ("left", "right", "up")
]


def test_prompts_are_cleaned_as_wan_does():
  assert text.clean("  a &amp;amp; b\n\t c  â€œquotedâ€\x9d ") == 'a & b c "quoted"'
  assert text.clean("") == ""


@pytest.mark.parametrize(
  "captions",
  [CAPTIONS, CAPTIONS[:1], [], ["", "  "], ["猫が走る", "naïve 🙂"]],
  ids=["several", "one", "none", "blank", "not-latin"],
)
def test_a_tokenizer_from_any_corpus(captions, tmp_path):
  """With few captions or none, every prompt survives a round trip, ids end in EOS, and nothing is unknown."""
  vocab = text.train_tokenizer(captions, tmp_path / "a" / "tokenizer.model", vocab_size=400)
  tokenizer = text.Tokenizer(tmp_path / "a" / "tokenizer.model")
  assert vocab == tokenizer.vocab <= 400
  for prompt in ("a red ball", "naïve 猫 🙂", "x" * 10_000):
    ids = tokenizer.encode(prompt)
    assert ids[-1] == text.EOS and text.UNK not in ids and max(ids) < vocab
    assert tokenizer.decode(ids) == prompt
  assert tokenizer.null == [text.EOS]
  ids = tokenizer.encode("x " * 1000, most=12)
  assert len(ids) == 12 and ids[-1] == text.EOS


def test_the_same_captions_give_the_same_tokenizer(tmp_path):
  text.train_tokenizer(CAPTIONS, tmp_path / "1")
  text.train_tokenizer(reversed(CAPTIONS), tmp_path / "2")
  assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
  text.train_tokenizer(CAPTIONS[1:], tmp_path / "3")
  assert (tmp_path / "1").read_bytes() != (tmp_path / "3").read_bytes()
  assert len(text.Tokenizer(tmp_path / "1").encode("a blue ring moves up")) == 6  # words, not letters


def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path):
  (tmp_path / "x.model").write_bytes(b"no model")
  for name in ("x.model", "missing.model"):
    with pytest.raises(BadInput, match=name):
      text.Tokenizer(tmp_path / name)


@pytest.fixture(scope="module")
def params():
  row = jnp.ones((1, 4), jnp.int32)
  return layouts.unbox(jax.jit(text.TextEncoder(CFG).init)(jax.random.key(0), row, row))["params"]


@jax.jit
def encode(params, ids, prompt):
  return text.TextEncoder(CFG).apply({"params": params}, ids, prompt)


def test_a_prompt_does_not_see_its_neighbours(params):
  """Each of two prompts in a row has the embeddings that it has alone, at any position; padding is zero."""
  ids = jax.random.randint(jax.random.key(1), (2, 24), 3, CFG.vocab)
  prompt = jnp.asarray([[1] * 9 + [2] * 12 + [0] * 3, [3] * 24])
  out = encode(params, ids, prompt)
  ids_alone, prompt_alone = (
    jnp.pad(ids[:1, 9:21], [(0, 1), (0, 12)]),
    jnp.asarray([[1] * 12 + [0] * 12, [0] * 24]),
  )
  alone = encode(params, ids_alone, prompt_alone)
  np.testing.assert_allclose(out[0, 9:21], alone[0, :12], atol=1e-5)
  assert not np.any(out[0, 21:]) and not np.any(alone[1])
  merged = encode(params, ids, jnp.asarray([[1] * 21 + [0] * 3, [3] * 24]))
  assert np.abs(merged[0, 9:21] - alone[0, :12]).max() > 1e-3


def test_position_matters_and_gradients_are_finite(params):
  ids, prompt = jnp.arange(3, 27)[None].repeat(2, 0), jnp.asarray([[1] * 24, [1] * 8 + [0] * 16])
  reversed_ids = encode(params, ids[:, ::-1], prompt)[0, ::-1]
  assert np.abs(reversed_ids - encode(params, ids, prompt)[0]).max() > 1e-3
  grads = jax.jit(jax.grad(lambda p: jnp.sum(encode(p, ids, prompt) ** 2)))(params)
  assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_heads_begin_at_neighbours():
  """With `unit_norm` each head looks at one neighbour at first, so what a token becomes tells its order; and
  scores stay small, however large the weights of queries and keys.
  """
  cfg = dataclasses.replace(CFG, unit_norm=True, heads=4, head_size=4, buckets=16)
  encoder, ids = text.TextEncoder(cfg), jnp.asarray([[3, 4, 5, 6, 7, 8]])
  params = layouts.unbox(encoder.init(jax.random.key(0), ids, jnp.ones_like(ids)))["params"]
  favourite = params["layers"]["distance"].argmax(1)  # of each layer and head
  wanted = [text.relative_bucket(jnp.asarray(o), cfg.buckets, cfg.max_distance) for o in (-1, 1, -2, 2)]
  np.testing.assert_array_equal(favourite, [wanted] * cfg.depth)

  def embedded(ids, params=params):
    return encoder.apply({"params": params}, jnp.asarray([ids]), jnp.ones((1, len(ids)), jnp.int32))[0]

  words = list(range(3, 13))
  beside, far = (embedded([*words[:i], 20, *words[i + 1 :]])[2] for i in (3, 9))
  before = embedded(words)[2]
  assert np.abs(far - before).max() < 0.3 * np.abs(beside - before).max()
  large = {**params, "layers": {**params["layers"], "query": 1e3 * params["layers"]["query"]}}
  np.testing.assert_allclose(embedded([3, 4, 5], large), embedded([3, 4, 5]), atol=1e-3)


def test_sizes():
  """umt5-xxl has the 5.68 billion weights of google/umt5-xxl's encoder; tiny is small."""
  assert text.count_params(text.SIZES["umt5-xxl"]) == 5_680_910_336
  assert text.count_params(text.SIZES["tiny"]) < 5e5


def test_umt5_weights_give_umt5_outputs():
  """Weights and outputs are those of transformers' class (5.23.0; golden/make.py).

  Prompts of 7, 1 and 140 tokens are in one row, in another order.
  """
  cfg = umt5.config_from_diffusers(files.read_config(GOLDEN))
  tensors, golden = files.Tensors(GOLDEN), np.load(GOLDEN / "golden.npz")
  weights = umt5.from_diffusers(tensors, cfg)
  row = np.concatenate([golden[f"ids{i}"] for i in (2, 0, 1)])[None].astype(np.int32)
  prompt = np.repeat([3, 1, 2], [len(golden[f"ids{i}"]) for i in (2, 0, 1)])[None].astype(np.int32)
  ours = np.asarray(jax.jit(lambda w: text.TextEncoder(cfg).apply({"params": w}, row, prompt))(weights))
  for i in range(3):
    expected = golden[f"h{i}"]
    np.testing.assert_allclose(ours[prompt == i + 1], expected, atol=1e-5 * np.abs(expected).max())

  back = dict(umt5.to_diffusers(weights, cfg))
  assert set(tensors) <= {*back, *umt5.EMBEDDINGS}
  for name, value in back.items():
    np.testing.assert_array_equal(value, tensors[name if name in tensors else umt5.EMBEDDINGS[1]])
  theirs = files.read_config(GOLDEN)
  assert {k: theirs.get(k) for k in umt5.config_to_diffusers(cfg)} == umt5.config_to_diffusers(cfg)


def test_weights_that_do_not_fit_are_named():
  cfg, tensors = umt5.config_from_diffusers(files.read_config(GOLDEN)), dict(files.Tensors(GOLDEN))
  with pytest.raises(BadInput, match="encoder.final_layer_norm.weight"):
    missing = "encoder.final_layer_norm.weight"
    umt5.from_diffusers({name: value for name, value in tensors.items() if name != missing}, cfg)
  with pytest.raises(BadInput, match="bogus"):
    umt5.from_diffusers(tensors | {"bogus": np.zeros(1)}, cfg)
  name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
  with pytest.raises(BadInput, match=f"{name}.*shape"):
    umt5.from_diffusers(tensors | {name: np.zeros((2, 2))}, cfg)
