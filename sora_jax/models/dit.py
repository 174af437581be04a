"""The diffusion transformer: it predicts the velocity of every latent patch of packed clips.

  x_l      = patch embedding of token l
  e(sigma) = mlp(sinusoids(1000 sigma))
  (shift, scale, gate) x 2 = table + proj(silu(e))
  x       += gate * self_attention(norm(x) * (1 + scale) + shift)  over tokens of a clip; rotary positions
  x       += cross_attention(affine norm(x), text)                 over the span of text that the token reads
  x       += gate * mlp(norm(x) * (1 + scale) + shift)
  velocity = linear(norm(x) * (1 + scale) + shift)

The architecture is that of `WanTransformer3DModel` (diffusers 0.42.1; Wan, arXiv:2503.20314, sec. 4.2), so
its weights load (weights/wan_dit.py). adaLN: DiT, arXiv:2212.09748, sec. 3.2. Rotary positions:
arXiv:2104.09864, with the head split over three axes.

The implementation differs from Wan's in three ways. The two halves of a head hold what Wan keeps in its even
and odd entries (the rotation is the same, its pairs are half a head apart; the converter permutes). Sigma
belongs to tokens: modulation is computed for the U distinct sigmas of a row and gathered at each use. Scores,
norms, modulation and residual sums are float32 whatever the compute dtype.

`place_waves` > 0: x_l += linear(cosines of the position within the clip). Rotary positions only tell how far
apart two tokens are. A token needs its absolute position to know that what moves left starts on the right.

`near` > 0: each head of self-attention starts by looking at one neighbour of a token, as a convolution does
(ConViT, arXiv:2103.10697), through the initial biases of query and key.

`predicts="data"`: the last layer predicts the data, and velocity = (x - data) / max(sigma, 0.05). Patches of
many values that lie near a space of few dimensions are easier to predict than their noise, which fills all
dimensions (Li and He, arXiv:2511.13720).

Initial weights for training from scratch: residual branches start open, with gates at 1 and output weights
scaled by (3 depth) ** -0.5. Only the last layer starts at zero, so that the first velocity is 0. Measured on
soft blobs that move as a prompt says (4 layers of width 96, 180 steps of 48 clips, mean loss of the last 30):
0.60. Gates at 0.2 with unscaled outputs: 0.76. Gates at 0 (adaLN-zero): 0.78. Gates at 1 with unscaled
outputs: 0.87.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from sora_jax.layout import Layout, param
from sora_jax.models import lora
from sora_jax.models.attention import attend
from sora_jax.models.dit_config import (
  BLOCK_INPUT,
  MIN_SIGMA,
  MLP_OUT,
  REMAT,
  SELF_OUT,
  SIZES as SIZES,
  DiTConfig,
)
from sora_jax.models.eight_bits import scale_name, weight_of
from sora_jax.models.primitives import (
  apply_rope,
  gate,
  gather_rows,
  gradients_together,
  layer_norm,
  modulate,
  normal,
  place_waves,
  rms_norm,
  rotary,
  sinusoids,
)
from sora_jax.models.scan import scan_layers


class Part(nn.Module):
  """Base of the modules below: a config, a layout, and weights that name their axes."""

  cfg: DiTConfig
  layout: Layout | None = None

  def weight(self, name, shape, axes, init=nn.initializers.zeros):
    """A weight, plus the delta weight of its adapter (models/lora.py) if the collection "lora" has one."""
    value = param(self, name, init, shape, axes)
    if self.has_variable("lora", name):
      value = value + lora.delta_weight(self.get_variable("lora", name), self.cfg.lora_scale)
    return value

  def shard(self, x, *axes):
    return x if self.layout is None else self.layout.constrain(x, *axes)

  def kernel(self, name, shape, axes, init, whole=True):
    """A weight in the compute dtype. whole: gathered from the devices that it is cut over.

    A weight of 8 bits is gathered as such, and then multiplied by its scale (models/eight_bits.py).
    """

    def placed(value):
      if self.layout is None:
        return value
      return self.layout.gathered(value, *axes) if whole else self.layout.as_stored(value, *axes)

    scale = scale_name(name)
    if not self.has_variable("params", scale):
      return placed(self.weight(name, shape, axes, init).astype(self.cfg.dtype))
    stored = placed(param(self, name, init, shape, axes))
    value = stored.astype(jnp.float32) * self.get_variable("params", scale)
    if self.has_variable("lora", name):
      value += placed(lora.delta_weight(self.get_variable("lora", name), self.cfg.lora_scale))
    return value.astype(self.cfg.dtype)

  def product(self, x, kernel):
    """x [B, L, inputs...] times a weight [inputs..., outputs...] -> [B, L, outputs...], in the compute dtype.

    On one device it is computed as a product of two matrices. Its gradients are then matrix products too, and
    XLA on CPU transposes none of their operands.
    """
    x, kernel = (a.astype(self.cfg.dtype) for a in (x, kernel))
    outputs, size = kernel.shape[x.ndim - 2 :], math.prod(x.shape[2:])
    several = self.layout is not None and self.layout.mesh.size > 1
    tokens = x.reshape(*x.shape[:2], size) if several else x.reshape(-1, size)
    return (tokens @ kernel.reshape(size, -1)).reshape(*x.shape[:2], *outputs)

  def linear(self, x, name, shape, axes, init):
    """`product` with the weight `name`, plus a bias over its last axis."""
    x, kernel = gradients_together(x, self.kernel(name, shape, axes, init))
    return self.product_and_bias(x, kernel, name, axes)

  def product_and_bias(self, x, kernel, name, axes):
    y, shape = self.product(x, kernel), kernel.shape
    return y + self.weight(f"{name}_bias", shape[-1:], axes[-1:]).astype(y.dtype)


def neighbour_bias(near):
  """{"query", "key"}: initial biases [N, K] by which each head looks at one neighbour, or at the token.

  The neighbour is -1, 0 or 1 away along each of t, y and x, at random. Only the fastest rotary pair of each
  axis has a bias; that of the key is rotated back by the step.
  """

  def initialiser(step):
    def init(key, shape, dtype=jnp.float32):
      heads, size = shape
      half, space = size // 2, size // 6
      pairs = jnp.array([0, half - 2 * space, half - space])
      angle_N3 = -step * jax.random.randint(key, (heads, 3), -1, 2)
      bias = jnp.zeros(shape, dtype).at[:, pairs].set(near * jnp.cos(angle_N3))
      return bias.at[:, pairs + half].set(near * jnp.sin(angle_N3))

    return init

  return {"query": initialiser(0), "key": initialiser(1)}


class Attention(Part):
  """Attention with q/k RMS norm over all heads: self-attention of a row, or cross-attention to the text.

  The keys and values of the text may be given as `text_kv`.
  """

  @nn.compact
  def __call__(self, x_BLD, text_BSD, segment_BL, segment_BM, angles=None, text_kv=None, log_count_BM=None):
    """Self-attention, with rotary positions, where `angles` are given; cross-attention otherwise."""
    cfg = self.cfg
    D, N, K = cfg.width, cfg.heads, cfg.head_size
    heads, dtype = ("embed", "heads", "head_dim"), jnp.dtype(cfg.dtype)
    kernels, biases, norms = {}, {}, {}
    biases_init = neighbour_bias(cfg.near) if cfg.near and angles is not None else {}
    for name in ("query", "key", "value"):
      # Products with the text are few: they are added up over the devices that its weights are cut over.
      whole = angles is not None or name == "query"
      kernels[name] = self.kernel(name, (D, N, K), heads, normal(D), whole)
      init = biases_init.get(name, nn.initializers.zeros)
      biases[name] = self.weight(f"{name}_bias", (N, K), heads[1:], init).astype(dtype)
      if name != "value":
        norms[name] = self.weight(f"{name}_norm", (N, K), heads[1:], nn.initializers.ones)
    x_BLD, *together = gradients_together(x_BLD, *kernels.values())
    kernels = dict(zip(kernels, together))

    def project(x_BLD, length, *names):
      """One product for all names on one device: fewer passes over x. One product each where joining weights
      costs more, as on several devices, which would all-reduce the gradient of the joined weights.
      """
      tokens = x_BLD.shape[0] * x_BLD.shape[1]
      symbolic = not jax.core.is_constant_dim(tokens)  # so it is when a model is exported
      several = self.layout is not None and self.layout.mesh.size > 1
      if symbolic or several or tokens < 4 * D:
        return [joined(x_BLD, length, name)[0] for name in names]
      return joined(x_BLD, length, *names)

    def joined(x_BLD, length, *names):
      kernel_DcNK = jnp.stack([kernels[n] for n in names], 1)
      bias_cNK = jnp.stack([biases[n] for n in names])
      y_BLcNK = self.product(x_BLD, kernel_DcNK) + bias_cNK
      y_BLcNK = self.shard(y_BLcNK, "act_batch", length, None, "act_heads", "act_head_dim")
      outputs = []
      for i, name in enumerate(names):
        y_BLNK = y_BLcNK[:, :, i]
        outputs.append(rms_norm(y_BLNK, norms[name], cfg.eps) if name in norms else y_BLNK)
      return outputs

    if angles is not None:
      query, key, value = project(x_BLD, "act_length", "query", "key", "value")
      query = apply_rope(query, *angles).astype(dtype)
      query, key = lax.optimization_barrier((query, key))  # one of them is in float32 at a time
      key = apply_rope(key, *angles)
    else:
      (query,) = project(x_BLD, "act_length", "query")
      if text_kv is None:
        text_BSD = self.shard(text_BSD, "act_batch", "act_text", "act_text_embed")
        text_kv = project(text_BSD, "act_text", "key", "value")
      key, value = text_kv
    query, key = query.astype(dtype), key.astype(dtype)
    out_BLNK = attend(
      query, key, value, segment_BL, segment_BM, log_count_BM=log_count_BM, layout=self.layout
    )
    out_BLNK = self.shard(out_BLNK, "act_batch", "act_length", "act_heads", "act_head_dim")
    init = normal(D, (3 * cfg.depth) ** -0.5)
    return self.linear(out_BLNK, "out", (N, K, D), ("heads", "head_dim", "embed"), init)


class Mlp(Part):
  """Two linear layers with a GELU (tanh approximation) between them."""

  @nn.compact
  def __call__(self, x_BLD):
    D, F = self.cfg.width, self.cfg.mlp
    in_DF = self.kernel("in", (D, F), ("embed", "mlp"), normal(D))
    out_FD = self.kernel("out", (F, D), ("mlp", "embed"), normal(F, (3 * self.cfg.depth) ** -0.5))
    x_BLD, in_DF, out_FD = gradients_together(x_BLD, in_DF, out_FD)
    h_BLF = self.product_and_bias(x_BLD, in_DF, "in", ("embed", "mlp"))
    h_BLF = nn.gelu(self.shard(h_BLF, "act_batch", "act_length", "act_mlp"), approximate=True)
    return self.product_and_bias(h_BLF, out_FD, "out", ("mlp", "embed"))


def _gates_open(key, shape, dtype=jnp.float32):
  """[6, D]: shift, scale and gate of attention, then of the mlp. Gates are 1, the rest 0."""
  del key
  return jnp.zeros(shape, dtype).at[jnp.array([2, 5])].set(1)


class Block(Part):
  """One layer.

  `row` holds the inputs that all layers share. `text_kv` holds this layer's keys and values of the text, or
  is None.
  """

  @nn.compact
  def __call__(self, x_BLD, text_kv, row):
    cfg = self.cfg
    dtype = x_BLD.dtype
    x_BLD = checkpoint_name(x_BLD, BLOCK_INPUT)
    table_6D = self.weight("table", (6, cfg.width), (None, "embed"), _gates_open)
    modulation_BU6D = table_6D + row["modulation_BU6D"]

    def modulation(*parts):
      return (*(modulation_BU6D[:, :, i] for i in parts), row["index_BL"])

    def residual(x):
      return self.shard(x, "act_batch", "act_length", "act_embed")

    h_BLD = modulate(layer_norm(x_BLD, cfg.eps), *modulation(0, 1)).astype(dtype)
    self_attention = Attention(cfg, self.layout, name="self")
    h_BLD = self_attention(h_BLD, None, row["segment_BL"], row["segment_BL"], row["angles"])
    h_BLD = checkpoint_name(h_BLD, SELF_OUT)
    x_BLD = residual((x_BLD + gate(h_BLD, *modulation(2))).astype(dtype))

    h_BLD = x_BLD
    if cfg.cross_norm:
      scale_D = self.weight("cross_scale", (cfg.width,), ("embed",), nn.initializers.ones)
      h_BLD = layer_norm(x_BLD, cfg.eps) * scale_D
      h_BLD = (h_BLD + self.weight("cross_shift", (cfg.width,), ("embed",))).astype(dtype)
    cross_attention = Attention(cfg, self.layout, name="cross")
    h_BLD = cross_attention(
      h_BLD,
      row["text_BSD"],
      row["prompt_BL"],
      row["prompt_BS"],
      text_kv=text_kv,
      log_count_BM=row["log_count_BS"],
    )
    x_BLD = residual(x_BLD + h_BLD)

    h_BLD = modulate(layer_norm(x_BLD, cfg.eps), *modulation(3, 4)).astype(dtype)
    h_BLD = checkpoint_name(Mlp(cfg, self.layout, name="mlp")(h_BLD), MLP_OUT)
    x_BLD = residual((x_BLD + gate(h_BLD, *modulation(5))).astype(dtype))
    return x_BLD, None


class DiT(Part):
  """The diffusion transformer of the module docstring."""

  @nn.compact
  def __call__(
    self,
    tokens_BLP,
    coords_BL3,
    segment_BL,
    sigma_BU,
    sigma_index_BL,
    text_BSE,
    prompt_BL,
    prompt_BS,
    cond_BLQ=None,
    *,
    text_kv=None,
    change_BLD=None,
  ):
    """Predicts the velocity of every token, [B, L, P] float32. Values in padding are arbitrary.

    change_BLD is what all blocks together add to their input; where it is given, they are not computed. They
    leave it in the collection "cache", if that is mutable.

    sigma_BU is in [0, 1]; sigma_index_BL is the index of each token's sigma in it. text_BSE is the output of
    the text encoder; `text_kv`, from `text_kv(...)` below, replaces it. Raises ValueError where cond_BLQ is
    missing from a model that needs it, or is given to a model that takes none.
    """
    cfg, D = self.cfg, self.cfg.width
    if (cond_BLQ is not None) != (cfg.cond_channels > 0) and not self.is_initializing():
      raise ValueError(
        f"this DiT takes {cfg.values_cond} condition values a token, and got cond_BLQ={cond_BLQ!r}"
      )

    P, Q, axes = cfg.values_in, cfg.values_cond, ("patch", "embed")
    x_BLD = self.linear(tokens_BLP, "patch", (P, D), axes, normal(P))
    if cfg.place_waves:
      waves_BLW = place_waves(coords_BL3, segment_BL, cfg.place_waves)
      size = cfg.place_waves**3
      x_BLD += self.product(waves_BLW, self.kernel("place", (size, D), (None, "embed"), normal(size)))
    if cfg.cond_channels:
      cond_QD = self.weight("patch_cond", (Q, D), axes, normal(Q))
      if cond_BLQ is not None:
        x_BLD += self.product(cond_BLQ, cond_QD)
    x_BLD = self.shard(x_BLD, "act_batch", "act_length", "act_embed")

    log_count_BS = None
    if text_kv is not None:
      *text_kv, log_count_BS = text_kv
    elif cfg.text_pad:
      log_count_BS = log_count(text_BSE, prompt_BS, cfg.text_pad)

    time_BUD, modulation_BU6D = Time(cfg, self.layout, name="time")(sigma_BU)
    text_BSD = None if text_kv is not None else Text(cfg, self.layout, name="text")(text_BSE)
    row = {
      "modulation_BU6D": modulation_BU6D,
      "index_BL": sigma_index_BL,
      "angles": rotary(coords_BL3, cfg.head_size, cfg.rope_theta),
      "segment_BL": segment_BL,
      "text_BSD": text_BSD,
      "prompt_BL": prompt_BL,
      "prompt_BS": prompt_BS,
      "log_count_BS": log_count_BS,
    }

    if change_BLD is None:
      before_BLD = x_BLD
      x_BLD = self.layers(x_BLD, text_kv, row)
      if not self.is_initializing():
        self.sow("cache", "change_BLD", x_BLD - before_BLD)
    else:
      x_BLD += change_BLD.astype(x_BLD.dtype)

    modulation_BU2D = self.weight("table", (2, D), (None, "embed")) + time_BUD[:, :, None]
    shift_BUD, scale_BUD = modulation_BU2D[:, :, 0], modulation_BU2D[:, :, 1]
    x_BLD = modulate(layer_norm(x_BLD, cfg.eps), shift_BUD, scale_BUD, sigma_index_BL)
    out_BLP = self.linear(x_BLD, "velocity", (D, P), ("embed", "patch"), nn.initializers.zeros)
    out_BLP = out_BLP.astype(jnp.float32)
    if cfg.predicts == "velocity":
      return out_BLP
    sigma_BL1 = gather_rows(sigma_BU[..., None], sigma_index_BL)
    return (tokens_BLP - out_BLP) / jnp.maximum(sigma_BL1, MIN_SIGMA)

  def layers(self, x_BLD, text_kv, row):
    """All blocks, one after another."""
    cfg, policy = self.cfg, REMAT[self.cfg.remat]
    if cfg.scans > 1 and not self.is_initializing():
      weights, adapters = (self.variables.get(name, {}).get("blocks", {}) for name in ("params", "lora"))

      def layer(x_BLD, weights, inputs):
        adapters, text_kv = inputs
        variables = {"params": weights, "lora": adapters}
        return Block(cfg, self.layout).apply(variables, x_BLD, text_kv, row)[0]

      return scan_layers(layer, x_BLD, weights, (adapters, text_kv), cfg.scans, policy)

    block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return blocks(cfg, self.layout, name="blocks")(x_BLD, text_kv, row)[0]


class Time(Part):
  """sigma_BU -> embedding [B, U, D] and modulation [B, U, 6, D], float32."""

  @nn.compact
  def __call__(self, sigma_BU):
    D, freqs = self.cfg.width, self.cfg.time_freqs

    def linear(equation, x, name, shape, axes, init):
      y = jnp.einsum(equation, x, self.weight(name, shape, axes, init), precision=lax.Precision.HIGHEST)
      return y + self.weight(f"{name}_bias", shape[1:], axes[1:])

    time = sinusoids(1000.0 * sigma_BU.astype(jnp.float32), freqs)
    time = nn.silu(linear("BUf,fD->BUD", time, "in", (freqs, D), ("time", "embed"), normal(freqs)))
    time = linear("BUD,De->BUe", time, "out", (D, D), ("embed", None), normal(D))
    init, axes = nn.initializers.normal(0.02), ("embed", None, None)
    modulation = linear("BUD,Dse->BUse", nn.silu(time), "change", (D, 6, D), axes, init)
    return time, modulation


class Text(Part):
  """Projects the text encoder's output to the text that blocks attend to, [B, S, D]."""

  @nn.compact
  def __call__(self, text_BSE):
    D, E = self.cfg.width, self.cfg.text_width
    h_BSD = self.linear(text_BSE, "in", (E, D), ("text_embed", None), normal(E))
    h_BSD = nn.gelu(h_BSD, approximate=True)
    return self.linear(h_BSD, "out", (D, D), ("embed", None), normal(D))


def log_count(text_BSE, prompt_BS, text_pad):
  """Logarithm of the number of tokens that each text token stands for, [B, S].

  It is 0 except at the zeros that pad a prompt to text_pad tokens. Attention to n equal keys with equal
  values is attention to one of them with weight n. So a single zero token at the end of a prompt replaces all
  its padding, and 512 tokens become the tokens of the prompt plus one. A prompt with all its padding, or with
  none, is attended to as it is.
  """
  zero_BS = ~jnp.any(text_BSE, -1) & (prompt_BS > 0)
  same_BSS = prompt_BS[:, :, None] == prompt_BS[:, None]
  zeros_BS = jnp.sum(same_BSS & zero_BS[:, None], -1)
  words_BS = jnp.sum(same_BSS & ~zero_BS[:, None], -1)
  count_BS = jnp.maximum(text_pad - words_BS, 1) / jnp.maximum(zeros_BS, 1)
  return jnp.where(zero_BS, jnp.log(count_BS), 0.0)


def text_kv(cfg, params, text_BSE, prompt_BS=None):
  """Keys and values of the text in every layer, and `log_count` of its tokens, or None.

  Keys and values are [depth, B, S, N, K]. They do not depend on the noise level, so a sampling job computes
  them once, and passes them to the DiT as `text_kv`, with text_BSE None. `params` are those of a DiT,
  unboxed. Models with text_pad need `prompt_BS`; ValueError without it.
  """
  if cfg.text_pad and prompt_BS is None:
    raise ValueError(
      f"text_kv of a model with text_pad={cfg.text_pad} needs prompt_BS, to know how much of each prompt "
      "is padding"
    )
  count_BS = log_count(text_BSE, prompt_BS, cfg.text_pad) if cfg.text_pad else None
  text_BSD = Text(cfg).apply({"params": params["text"]}, text_BSE)

  def layer(cross):
    dtype = jnp.dtype(cfg.dtype)

    def project(name):
      product = jnp.einsum("BSD,DNK->BSNK", text_BSD, weight_of(cross, name).astype(dtype))
      return product + cross[f"{name}_bias"].astype(dtype)

    return rms_norm(project("key"), cross["key_norm"], cfg.eps).astype(dtype), project("value")

  return *lax.map(layer, params["blocks"]["cross"]), count_BS


def count_params(cfg):
  """Number of weights of a DiT of this shape; no weight is allocated."""
  row = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(
    DiT(cfg).init,
    jax.random.key(0),
    jnp.zeros((1, 1, cfg.values_in)),
    jnp.zeros((1, 1, 3)),
    row,
    jnp.zeros((1, 1)),
    row,
    jnp.zeros((1, 1, cfg.text_width)),
    row,
    row,
  )
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
