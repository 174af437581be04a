"""Text: the tokenizer of prompts, and the encoder that turns tokens into embeddings.

The encoder is UMT5's (arXiv:2304.09151; T5, arXiv:1910.10683; `UMT5EncoderModel` of transformers 5.23.0): no
bias, no scaling of scores, RMS norm before each part, gated GELU, and (unlike T5) a bias for relative
positions of its own in every layer. A row holds several prompts, which do not see each other. The tokens of a
prompt are consecutive, so the distance of two of them in the prompt is their distance in the row, and one
bias [N, S, S] serves all rows.

`SIZES["tiny"]` and `["small"]` are trained together with the DiT. `umt5-xxl` is the frozen encoder of Wan
(weights/umt5.py). What is trained here begins with heads that look at one neighbour each (compare Mimetic
initialisation, arXiv:2305.09828): the order of words is learned in hundreds of updates then; otherwise not in
ten thousand.
"""

import dataclasses
import html
import io
import json
import math
import re

import flax.linen as nn
import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from etils import epath
from jax import lax
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from sora_jax.errors import BadInput
from sora_jax.layout import Layout, param
from sora_jax.models import unigram
from sora_jax.models.attention import attend

PAD, EOS, UNK = 0, 1, 2  # special ids as in T5; there is no begin of sentence


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
  max_distance: int = 128  # from there on all distances share the last bucket
  eps: float = 1e-6
  dtype: str = "float32"
  # Queries and keys have unit RMS norm. Without, scores grow under Muon until each token looks at one other,
  # whatever its place: "tiny" knows which words there are, and not which belong together.
  unit_norm: bool = False

  def __post_init__(self):
    if min(self.vocab, self.width, self.depth, self.heads, self.head_size, self.mlp) < 1:
      raise ValueError(f"TextConfig: sizes must be at least 1, not {self}")
    if self.buckets % 4 or self.max_distance <= self.buckets // 4:
      raise ValueError(
        f"TextConfig: buckets {self.buckets} must be a multiple of 4, and max_distance "
        f"{self.max_distance} more than a quarter of it"
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"TextConfig: dtype={self.dtype!r}; known: float32, bfloat16")


SIZES = {
  # vocab is replaced by that of the tokenizer.
  "tiny": TextConfig(vocab=512, width=128, depth=2, heads=4, head_size=32, mlp=256),
  "small": TextConfig(vocab=512, width=128, depth=2, heads=4, head_size=32, mlp=256, unit_norm=True),
  "umt5-xxl": TextConfig(
    vocab=256384, width=4096, depth=24, heads=64, head_size=64, mlp=10240, dtype="bfloat16"
  ),
}


def relative_bucket(distance, buckets, max_distance):
  """Key position - query position -> bucket. T5, sec. 2.1.

  Half of the buckets are for each side. Distances below a quarter of `buckets` have a bucket each; larger
  ones share buckets of logarithmic width.
  """
  side = buckets // 2
  exact = side // 2
  size = jnp.abs(distance)
  fraction = jnp.log(jnp.maximum(size, 1) / exact) / math.log(max_distance / exact)
  logarithmic = exact + (fraction * (side - exact)).astype(jnp.int32)
  return jnp.where(distance > 0, side, 0) + jnp.where(size < exact, size, jnp.minimum(logarithmic, side - 1))


def rms_norm(x, weight, eps):
  """RMS norm over the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight


def neighbours(key, shape, cfg):
  """Initial bias of relative positions, [R, N]: the first head prefers the token before, then the one after,
  then two before, and so on.
  """
  offsets = jnp.array([(head // 2 + 1) * (1 if head % 2 else -1) for head in range(cfg.heads)])
  buckets = relative_bucket(offsets, cfg.buckets, cfg.max_distance)
  return 0.1 * jax.random.normal(key, shape) + 4.0 * jax.nn.one_hot(buckets, cfg.buckets).T


def normal(fan_in):
  """Normal initial weights of variance 1 / fan_in."""
  return nn.initializers.normal(fan_in**-0.5)


class Layer(nn.Module):
  """One layer: attention within each prompt, then a gated mlp."""

  cfg: TextConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x_BSE, row):
    cfg = self.cfg
    E, N, K, F = cfg.width, cfg.heads, cfg.head_size, cfg.mlp
    dtype = jnp.dtype(cfg.dtype)

    def shard(x, *axes):
      return x if self.layout is None else self.layout.constrain(x, *axes)

    def product(equation, x, name, shape, axes, init):
      return jnp.einsum(equation, x, param(self, name, init, shape, axes).astype(dtype))

    def norm(name):
      weight_E = param(self, name, nn.initializers.ones, (E,), ("text_embed",))
      return rms_norm(x_BSE, weight_E, cfg.eps).astype(dtype)

    h_BSE = norm("attention_norm")
    heads = ("text_embed", "heads", "head_dim")
    # Scores are not scaled; the initial query weights are instead.
    inits = {"query": normal(E * K), "key": normal(E), "value": normal(E)}
    projected = []
    for name, init in inits.items():
      x_BSNK = product("BSE,ENK->BSNK", h_BSE, name, (E, N, K), heads, init)
      projected.append(shard(x_BSNK, "act_batch", None, "act_heads", None))
    query, key, value = projected
    if cfg.unit_norm:
      query, key = (rms_norm(x, K**-0.25, cfg.eps).astype(dtype) for x in (query, key))
    first = (lambda key, shape: neighbours(key, shape, cfg)) if cfg.unit_norm else nn.initializers.normal(0.1)
    table_RN = param(self, "distance", first, (cfg.buckets, N), (None, "heads"))
    bias_NSM = jnp.moveaxis(table_RN[row["bucket_SM"]], -1, 0)
    out_BSNK = attend(query, key, value, row["prompt_BS"], row["prompt_BS"], scale=1.0, bias=bias_NSM)
    axes = ("heads", "head_dim", "text_embed")
    x_BSE = x_BSE + product("BSNK,NKE->BSE", out_BSNK, "out", (N, K, E), axes, normal(N * K))

    h_BSE = norm("mlp_norm")
    gate_BSF = product("BSE,EF->BSF", h_BSE, "gate", (E, F), ("text_embed", "mlp"), normal(E))
    h_BSF = product("BSE,EF->BSF", h_BSE, "in", (E, F), ("text_embed", "mlp"), normal(E))
    h_BSF = shard(nn.gelu(gate_BSF, approximate=True) * h_BSF, "act_batch", "act_text", "act_mlp")
    x_BSE = x_BSE + product("BSF,FE->BSE", h_BSF, "out_mlp", (F, E), ("mlp", "text_embed"), normal(F))
    return x_BSE, None


class TextEncoder(nn.Module):
  """Token ids [B, S] and the number of each token's prompt (0: padding) -> embeddings [B, S, E].

  Embeddings are float32, with zeros in padding. The tokens of a prompt must be consecutive. Results do not
  depend on the other prompts of the row.
  """

  cfg: TextConfig
  layout: Layout | None = None

  @nn.compact
  def __call__(self, text_BS, prompt_BS):
    cfg, S = self.cfg, text_BS.shape[1]
    shape, axes = (cfg.vocab, cfg.width), ("vocab", "text_embed")
    vocab_VE = param(self, "vocab", nn.initializers.normal(1.0), shape, axes)
    x_BSE = vocab_VE[text_BS].astype(cfg.dtype)
    at = jnp.arange(S)
    bucket_SM = relative_bucket(at[None] - at[:, None], cfg.buckets, cfg.max_distance)
    row = {"prompt_BS": prompt_BS, "bucket_SM": bucket_SM}
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
  """Cleans a prompt as `WanPipeline` does (with ftfy installed).

  Mojibake is repaired, HTML entities are resolved twice, and white space becomes single spaces.
  """
  return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class Tokenizer:
  """A sentencepiece model: prompt <-> ids. `vocab` is the number of ids.

  Unigram models are read as in T5's family (unigram.py), with the special tokens of a tokenizer_config.json
  in the same folder, if there is one. Raises BadInput where the file is not a sentencepiece model.
  """

  def __init__(self, path):
    path = epath.Path(path)
    try:
      data = path.read_bytes()
      self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (OSError, RuntimeError) as error:
      wanted = "give a spiece.model or tokenizer.model"
      raise BadInput(f"tokenizer: {path} is not a sentencepiece model ({error}); {wanted}") from error
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
    """Prompt -> list of ids that ends in EOS. At most `most` ids: a longer prompt is cut before EOS."""
    ids = self._encode(clean(prompt))
    if most is not None:
      ids = ids[: most - 1]
    return ids + [EOS]

  def decode(self, ids):
    """ids -> text; special ids are left out."""
    pieces = self._model.get_piece_size()
    return self._model.decode([int(i) for i in ids if i not in (PAD, EOS) and i < pieces])

  @property
  def null(self):
    """Ids of the empty prompt."""
    return self.encode("")


def padded(text_SE, length):
  """An embedding, with one zero token added where it is shorter than `length`.

  For a DiT with text_pad=length the zero stands for all padding up to that length (`dit.log_count`), which
  public Wan models attend to. length 0: the embedding is returned as it is.
  """
  return np.pad(text_SE, ((0, int(len(text_SE) < length)), (0, 0)))


def train_tokenizer(captions, path, vocab_size=512):
  """Trains a sentencepiece model on captions and writes it to `path`. Returns its vocabulary size.

  The model uses byte pair encoding (arXiv:1508.07909), which keeps whole words even for a few captions. A
  unigram model of a small corpus falls back to letters (29 ids a caption against 9 on the embedded world).
  Special ids are T5's. Every byte has a piece, so nothing is unknown. The vocabulary has at most `vocab_size`
  ids, unless bytes and characters alone need more; it has fewer where the captions support no more. The same
  captions in any order give the same file. At most a million captions are used. Without captions the pieces
  are bytes and letters.
  """
  captions = sorted({clean(c) for c in captions} - {""})
  if not captions:
    captions = ["a b c d e f g h i j k l m n o p q r s t u v w x y z"]
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
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(written.getvalue())
  partial.replace(path)
  return Tokenizer(path).vocab


def count_params(cfg):
  """Number of weights of an encoder of this shape; no weight is allocated."""
  row = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(TextEncoder(cfg).init, jax.random.key(0), row, row)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
