"""Weights of `UMT5EncoderModel` (transformers 5.23.0; `text_encoder` of the Wan models) <-> `models.text`."""

import dataclasses

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.text import SIZES, TextConfig
from sora_jax.weights import files, table

# V vocabulary, E width, N heads, K head size, F mlp width, R buckets of distance
_LAYER, _ATTENTION, _MLP = "encoder.block.{}.layer.", "0.SelfAttention.", "1.DenseReluDense."
TABLE = [
  (("vocab",), "shared.weight", "V E", "V E"),
  (("layers", "query"), f"{_LAYER}{_ATTENTION}q.weight", "(NK) E", "E N K"),
  (("layers", "key"), f"{_LAYER}{_ATTENTION}k.weight", "(NK) E", "E N K"),
  (("layers", "value"), f"{_LAYER}{_ATTENTION}v.weight", "(NK) E", "E N K"),
  (("layers", "out"), f"{_LAYER}{_ATTENTION}o.weight", "E (NK)", "N K E"),
  (("layers", "distance"), f"{_LAYER}{_ATTENTION}relative_attention_bias.weight", "R N", "R N"),
  (("layers", "attention_norm"), f"{_LAYER}0.layer_norm.weight", "E", "E"),
  (("layers", "gate"), f"{_LAYER}{_MLP}wi_0.weight", "F E", "E F"),
  (("layers", "in"), f"{_LAYER}{_MLP}wi_1.weight", "F E", "E F"),
  (("layers", "out_mlp"), f"{_LAYER}{_MLP}wo.weight", "E F", "F E"),
  (("layers", "mlp_norm"), f"{_LAYER}1.layer_norm.weight", "E", "E"),
  (("norm",), "encoder.final_layer_norm.weight", "E", "E"),
]
# Two names of one array; save_pretrained keeps one of them.
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


def rows(cfg):
  """The table of an encoder of this shape."""
  sizes = {"V": cfg.vocab, "E": cfg.width, "N": cfg.heads, "K": cfg.head_size, "F": cfg.mlp, "R": cfg.buckets}
  return [table.Row(*row, sizes, cfg.depth) for row in TABLE]


def names(tensors):
  """{name in the table: name in `tensors`}. The embedding may have either of its names, or both."""
  embedding = next((name for name in EMBEDDINGS if name in tensors), None)
  out = {name: name for name in tensors if name not in EMBEDDINGS}
  if embedding is not None:
    out[EMBEDDINGS[0]] = embedding
  return out


def from_diffusers(tensors, cfg, dtype=np.float32):
  """Mapping of their names to arrays -> params of a TextEncoder. Raises BadInput, which names a misfit."""
  return table.from_diffusers(files.Renamed(tensors, names(tensors)), rows(cfg), dtype)


def to_diffusers(params, cfg):
  """Params of a TextEncoder -> iterator of (their name, numpy array)."""
  return table.to_diffusers(params, rows(cfg))


def config_from_diffusers(theirs):
  """Their config.json -> TextConfig. Raises BadInput for another kind of T5."""
  for name, allowed in (("model_type", "umt5"), ("feed_forward_proj", "gated-gelu")):
    if theirs.get(name) != allowed:
      raise BadInput(f"weights: {name}={theirs.get(name)!r}; only {allowed} is known")
  return TextConfig(
    vocab=theirs["vocab_size"],
    width=theirs["d_model"],
    depth=theirs["num_layers"],
    heads=theirs["num_heads"],
    head_size=theirs["d_kv"],
    mlp=theirs["d_ff"],
    buckets=theirs["relative_attention_num_buckets"],
    max_distance=theirs["relative_attention_max_distance"],
    eps=theirs["layer_norm_epsilon"],
  )


def config_of(tensors):
  """The config of an encoder without a config.json, from the shapes of its weights. The rest is UMT5-XXL's.

  tensors: with a method `shape`, as files.Tensors.
  """
  layer = "encoder.block.{}.layer.0.SelfAttention.{}.weight"
  vocab, width = tensors.shape(EMBEDDINGS[0])
  buckets, heads = tensors.shape(layer.format(0, "relative_attention_bias"))
  return dataclasses.replace(
    SIZES["umt5-xxl"],
    vocab=vocab,
    width=width,
    depth=sum(name.endswith("SelfAttention.q.weight") for name in tensors),
    heads=heads,
    head_size=tensors.shape(layer.format(0, "q"))[0] // heads,
    mlp=tensors.shape("encoder.block.0.layer.1.DenseReluDense.wo.weight")[1],
    buckets=buckets,
    dtype="float32",
  )


def config_to_diffusers(cfg):
  """TextConfig -> their config.json."""
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": cfg.vocab,
    "d_model": cfg.width,
    "num_layers": cfg.depth,
    "num_decoder_layers": cfg.depth,
    "num_heads": cfg.heads,
    "d_kv": cfg.head_size,
    "d_ff": cfg.mlp,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "relative_attention_num_buckets": cfg.buckets,
    "relative_attention_max_distance": cfg.max_distance,
    "layer_norm_epsilon": cfg.eps,
    "dropout_rate": 0.1,
    "dtype": "float32",
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
  }
