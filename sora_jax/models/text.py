"""Text: cleaning and cutting prompts into tokens, and the encoder that turns tokens into embeddings.

The encoder is UMT5's (arXiv:2304.09151; T5, arXiv:1910.10683; `UMT5EncoderModel` of transformers 5.23.0): no bias, no scaling of
scores, RMS norm before each part, gated GELU, and in every layer (unlike T5) its own bias for relative positions. A row holds
several prompts, which do not see each other; since a prompt's tokens stand together, the distance within it is the distance within
the row, and one bias [N, S, S] serves all rows.

`SIZES["tiny"]` is trained together with the DiT; `umt5-xxl` is the frozen encoder of Wan (weights/umt5.py).
"""

import dataclasses
import html
import io
import json
import math
import os
import pathlib
import re

import flax.linen as nn
import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from jax import lax
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from sora_jax.errors import BadInput
from sora_jax.layout import Layout, param
from sora_jax.models import unigram
from sora_jax.models.attention import attend

PAD, EOS, UNK = 0, 1, 2  # T5's layout of special ids; no begin of sentence


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Shape of a text encoder. Raises ValueError when it cannot be built."""

  vocab: int
  width: int  # E
  depth: int
  heads: int
  head_size: int
  mlp: int
  buckets: int = 32  # of relative positions
  max_distance: int = 128  # beyond which positions are alike
  eps: float = 1e-6
  dtype: str = "float32"

  def __post_init__(self):
    if min(self.vocab, self.width, self.depth, self.heads, self.head_size, self.mlp) < 1:
      raise ValueError(f"TextConfig: sizes must be at least 1, not {self}")
    if self.buckets % 4 or self.max_distance <= self.buckets // 4:
      raise ValueError(
        f"TextConfig: buckets {self.buckets} must be a multiple of 4, max_distance {self.max_distance} above a quarter of it"
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"TextConfig: dtype={self.dtype!r}; known: float32, bfloat16")


SIZES = {
  "tiny": TextConfig(vocab=512, width=128, depth=2, heads=4, head_size=32, mlp=256),  # vocab: what the tokenizer has
  "umt5-xxl": TextConfig(vocab=256384, width=4096, depth=24, heads=64, head_size=64, mlp=10240, dtype="bfloat16"),
}


def relative_bucket(distance, buckets, max_distance):
  """key position - query position -> bucket: half for each side, exact up to a quarter of all, then logarithmic. T5, sec. 2.1."""
  side = buckets // 2
  exact = side // 2
  far = jnp.abs(distance)
  logarithmic = exact + (jnp.log(jnp.maximum(far, 1) / exact) / math.log(max_distance / exact) * (side - exact)).astype(jnp.int32)
  return jnp.where(distance > 0, side, 0) + jnp.where(far < exact, far, jnp.minimum(logarithmic, side - 1))


def rms_norm(x, weight, eps):
  x = x.astype(jnp.float32)
  return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight


class Layer(nn.Module):
  """One layer: attention within a prompt, then the gated mlp."""

  cfg: TextConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x_BSE, row):
    cfg = self.cfg
    E, N, K, F = cfg.width, cfg.heads, cfg.head_size, cfg.mlp
    dtype = jnp.dtype(cfg.dtype)
    shard = lambda x, *axes: x if self.layout is None else self.layout.constrain(x, *axes)  # noqa: E731
    normal = lambda fan_in: nn.initializers.normal(fan_in**-0.5)  # noqa: E731

    def product(equation, x, name, shape, axes, init):
      return jnp.einsum(equation, x, param(self, name, init, shape, axes).astype(dtype))

    def norm(name):
      return rms_norm(x_BSE, param(self, name, nn.initializers.ones, (E,), ("text_embed",)), cfg.eps).astype(dtype)

    h_BSE = norm("attention_norm")
    query, key, value = (
      shard(
        product("BSE,ENK->BSNK", h_BSE, name, (E, N, K), ("text_embed", "heads", "head_dim"), init), "act_batch", None, "act_heads", None
      )
      for name, init in (("query", normal(E * K)), ("key", normal(E)), ("value", normal(E)))
    )  # scores are not scaled: the query's init is
    table_RN = param(self, "distance", nn.initializers.normal(0.1), (cfg.buckets, N), (None, "heads"))
    bias_NSM = jnp.moveaxis(table_RN[row["bucket_SM"]], -1, 0)
    out_BSNK = attend(query, key, value, row["prompt_BS"], row["prompt_BS"], scale=1.0, bias=bias_NSM)
    x_BSE = x_BSE + product("BSNK,NKE->BSE", out_BSNK, "out", (N, K, E), ("heads", "head_dim", "text_embed"), normal(N * K))

    h_BSE = norm("mlp_norm")
    gate_BSF, h_BSF = (product("BSE,EF->BSF", h_BSE, name, (E, F), ("text_embed", "mlp"), normal(E)) for name in ("gate", "in"))
    h_BSF = shard(nn.gelu(gate_BSF, approximate=True) * h_BSF, "act_batch", "act_text", "act_mlp")
    x_BSE = x_BSE + product("BSF,FE->BSE", h_BSF, "out_mlp", (F, E), ("mlp", "text_embed"), normal(F))
    return x_BSE, None


class TextEncoder(nn.Module):
  """Token ids [B, S] and the number of each token's prompt (0 padding) -> embeddings [B, S, E] float32, zeros in padding.

  A prompt's tokens must stand together. Results do not depend on the other prompts of the row.
  """

  cfg: TextConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, text_BS, prompt_BS):
    cfg, S = self.cfg, text_BS.shape[1]
    vocab_VE = param(self, "vocab", nn.initializers.normal(1.0), (cfg.vocab, cfg.width), ("vocab", "text_embed"))
    x_BSE = vocab_VE[text_BS].astype(cfg.dtype)
    at = jnp.arange(S)
    row = {"prompt_BS": prompt_BS, "bucket_SM": relative_bucket(at[None] - at[:, None], cfg.buckets, cfg.max_distance)}
    layers = nn.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x_BSE, _ = layers(cfg, self.layout, name="layers")(x_BSE, row)
    x_BSE = rms_norm(x_BSE, param(self, "norm", nn.initializers.ones, (cfg.width,), ("text_embed",)), cfg.eps)
    return jnp.where(prompt_BS[..., None] > 0, x_BSE, 0)


def clean(prompt):
  """Mojibake mended, HTML entities resolved twice, white space single: as `WanPipeline` cleans prompts (with ftfy installed)."""
  return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class Tokenizer:
  """A sentencepiece model: prompt <-> ids. `vocab` is its number of ids. Raises BadInput where the file is none.

  Unigram models are read as T5's family does (unigram.py), with the special tokens of tokenizer_config.json
  where it lies beside.
  """

  def __init__(self, path):
    path = pathlib.Path(path)
    try:
      data = path.read_bytes()
      self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (OSError, RuntimeError) as error:
      wanted = "give a spiece.model or tokenizer.model"
      raise BadInput(f"tokenizer: {path} is no sentencepiece model ({error}); {wanted}") from error
    self._encode = self._model.encode
    proto = ModelProto.FromString(data)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
      config = path.with_name("tokenizer_config.json")
      complete = any(piece.piece == "<extra_id_0>" for piece in proto.pieces)
      if config.exists() and not complete:
        unigram.add_tokens(proto, json.loads(config.read_text()))
      self._encode = unigram.Unigram(proto).encode
    self.vocab = len(proto.pieces)

  def encode(self, prompt, most=None):
    """Prompt -> list of ids that ends in EOS; at most `most` of them, the end cut off before EOS."""
    ids = self._encode(clean(prompt))
    return ids[: None if most is None else most - 1] + [EOS]

  def decode(self, ids):
    """ids -> text, without special ids."""
    return self._model.decode([int(i) for i in ids if i not in (PAD, EOS) and i < self._model.get_piece_size()])

  @property
  def null(self):
    """ids of the empty prompt."""
    return self.encode("")


def padded(text_SE, length):
  """An embedding with a zero after it, where it is shorter than `length`: for a DiT of this text_pad the zero stands for all padding up to it
  (`dit.log_count`), which public Wan models attend to. length 0: as it is."""
  return np.pad(text_SE, ((0, int(len(text_SE) < length)), (0, 0)))


def train_tokenizer(captions, path, vocab_size=512):
  """Captions -> a sentencepiece model at `path`, in T5's layout of ids; returns its real vocabulary size.

  Byte pairs (arXiv:1508.07909), which keep whole words from a few captions on, where a unigram model of a small corpus falls back
  to letters (29 ids a caption against 9 on the embedded world). Every byte has a piece, so nothing is unknown. The vocabulary is
  `vocab_size` at most, unless bytes and characters alone need more, and smaller where the captions support no more. The same
  captions in any order give the same file; a million of them at most are looked at. No captions at all give bytes and letters.
  """
  captions = sorted({clean(c) for c in captions} - {""}) or ["a b c d e f g h i j k l m n o p q r s t u v w x y z"]
  captions = captions[:: math.ceil(len(captions) / 1_000_000)]
  characters = {c for caption in captions for c in caption}
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(captions),
    model_writer=written,
    model_type="bpe",
    vocab_size=max(vocab_size, 3 + 256 + len(characters) + 16),
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=1.0,
    pad_id=PAD,
    eos_id=EOS,
    unk_id=UNK,
    bos_id=-1,
    max_sentence_length=1 << 20,
    num_threads=1,
    shuffle_input_sentence=False,
    minloglevel=2,
  )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(written.getvalue())
  os.replace(partial, path)
  return Tokenizer(path).vocab


def count_params(cfg):
  """Number of weights of an encoder of this shape, without making them."""
  row = jnp.zeros((1, 1), jnp.int32)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(TextEncoder(cfg).init, jax.random.key(0), row, row)))
