"""The diffusion transformer: velocity of every latent patch of packed clips, at a noise level of its own.

  x_l     = patch embedding of token l;   e(sigma) = mlp(sinusoids(1000 sigma));   (shift, scale, gate) x 2 = table + proj(silu(e))
  x      += gate * self_attention(norm(x) * (1 + scale) + shift)      among the tokens of a clip, queries and keys turned by (t, y, x)
  x      += cross_attention(affine norm(x), text)                     over the span of text that the token reads
  x      += gate * mlp(norm(x) * (1 + scale) + shift)
  velocity = linear(norm(x) * (1 + scale) + shift)

Same architecture as `WanTransformer3DModel` (diffusers 0.42.1; Wan, arXiv:2503.20314, sec. 4.2), so its weights load
(weights/wan_dit.py); adaLN: DiT, arXiv:2212.09748, sec. 3.2; rotary positions: arXiv:2104.09864, the head split over three axes.

Where it differs inside: the two halves of a head are what Wan keeps as even and odd entries (the same rotation, its pairs stand apart;
the converter permutes); sigma belongs to tokens, and modulation is computed for the U distinct sigmas of a row, then gathered at
each use. Scores, norms, modulation and residual sums are float32 whatever the compute dtype.

`predicts="data"`: the last layer gives data, and velocity = (x - data) / max(sigma, 0.05). Patches of many values that lie near few
dimensions are easier to predict than their noise, which has all of them (Li and He, arXiv:2511.13720).

Initial weights (for training from nothing): residual branches start open, gates at 1, with output weights scaled by
(3 depth) ** -0.5, and only the last layer at zero, so that the first velocity is 0. Measured on soft blobs that move as a prompt
says (4 layers of width 96, 180 steps of 48 clips, mean loss of the last 30): 0.60; gates at 0.2 and unscaled outputs 0.76; gates at
0 (adaLN-zero) 0.78; gates at 1 and unscaled outputs 0.87.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sora_jax.layout import Layout, param
from sora_jax.models import lora
from sora_jax.models.attention import SAVED, attend

REMAT = {  # what a block keeps for its backward pass
  "none": None,  # everything
  "full": jax.checkpoint_policies.nothing_saveable,  # its input
  "dots": jax.checkpoint_policies.save_from_both_policies(  # its input, the products with weights, attention's output
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
  ),
}
CONDITIONING = ("token_sigma", "channels", "replacement")
PREDICTS = ("velocity", "data")
SMALLEST = 0.05  # the least divisor, where sigma is smaller (as in arXiv:2511.13720)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Shape of a DiT, and how it is to be fed. Raises ValueError when it cannot be built."""

  depth: int
  heads: int
  head_size: int
  mlp: int  # width of the mlp
  channels: int = 32  # of a latent
  patch: tuple = (1, 1, 1)  # latents in a token: t, y, x
  text_width: int = 128
  cond_channels: int = 0  # joined to each latent: cond_BLQ, Q = patch values times these
  time_freqs: int = 256  # sinusoids of the noise level
  rope_theta: float = 10_000.0  # wave lengths of the rotary positions go up to 2 pi times this
  cross_norm: bool = True  # affine norm before cross-attention
  eps: float = 1e-6
  conditioning: str = "token_sigma"  # how given tokens enter: at sigma 0 | joined channels | replaced by noised truth at each step
  predicts: str = "velocity"  # what the last layer gives: velocity | data, from which velocity follows
  text_pad: int = 0  # a prompt with zeros at its end counts as padded with them to so many tokens, which are attended to (Wan: 512); 0 not
  lora_scale: float = 1.0  # of adapters, where there are any
  dtype: str = "float32"  # of activations; weights are float32
  remat: str = "none"

  def __post_init__(self):
    object.__setattr__(self, "patch", tuple(self.patch))
    if min(self.depth, self.heads, self.mlp, self.channels, self.text_width, *self.patch) < 1 or len(self.patch) != 3:
      raise ValueError(f"DiTConfig: sizes must be at least 1, with patch (t, y, x), not {self}")
    if self.head_size % 2 or self.head_size < 6 or self.time_freqs % 2:
      raise ValueError(f"DiTConfig: head_size {self.head_size} and time_freqs {self.time_freqs} must be even, head_size at least 6")
    for name, table in (("conditioning", CONDITIONING), ("predicts", PREDICTS), ("remat", tuple(REMAT)), ("dtype", ("float32", "bfloat16"))):
      if getattr(self, name) not in table:
        raise ValueError(f"DiTConfig: {name}={getattr(self, name)!r}; known: {', '.join(table)}")
    if (self.conditioning == "channels") != (self.cond_channels > 0):
      raise ValueError(f"DiTConfig: conditioning={self.conditioning!r} with cond_channels={self.cond_channels}")

  @property
  def width(self):
    return self.heads * self.head_size

  @property
  def values_in(self):
    """P: values in a token."""
    return math.prod(self.patch) * self.channels

  @property
  def values_cond(self):
    """Q: condition values in a token."""
    return math.prod(self.patch) * self.cond_channels


def _ours(depth, heads):
  return DiTConfig(
    depth=depth, heads=heads, head_size=256, mlp=heads * 1024, channels=48, patch=(1, 2, 2), text_width=4096, dtype="bfloat16", remat="dots"
  )


def _wan(depth, heads, mlp, channels=16, conditioning="replacement", **kwargs):
  return DiTConfig(
    depth=depth,
    heads=heads,
    head_size=128,
    mlp=mlp,
    channels=channels,
    patch=(1, 2, 2),
    text_width=4096,
    text_pad=512,
    conditioning=conditioning,
    dtype="bfloat16",
    remat="full",
    **kwargs,
  )


SIZES = {
  # For two CPU cores; what ships. Its grids are few patches wide: longer waves would tell neighbours apart no better than none.
  "tiny": DiTConfig(depth=5, heads=3, head_size=48, mlp=432, channels=48, patch=(1, 2, 2), rope_theta=30.0, predicts="data", remat="dots"),
  "S": _ours(12, 2),
  "B": _ours(12, 3),
  "L": _ours(24, 4),
  "XL": _ours(28, 6),  # head size 256: the width of the MXU on v6e, v7x
  "wan-1.3b": _wan(30, 12, 8960),
  "wan-5b": _wan(30, 24, 14336, channels=48, conditioning="token_sigma"),  # Wan 2.2 TI2V
  "wan-14b": _wan(40, 40, 13824),  # Wan 2.1 T2V; each expert of Wan 2.2 T2V-A14B
  "wan-14b-i2v": _wan(40, 40, 13824, conditioning="channels", cond_channels=20),  # each expert of I2V-A14B: 16 + 4 + 16 channels
}


def normal(fan_in, scale=1.0):
  """Normal initial weights of variance scale^2 / fan_in."""
  return nn.initializers.normal(scale * fan_in**-0.5)


def rotary(coords_BL3, head_size, theta=10_000.0):
  """Positions t, y, x (any floats) -> cos and sin, each [B, L, 1, K/2] float32.

  The K/2 pairs of a head are shared out as in Wan: y and x get K // 6 each, t the rest; within an axis of n pairs, theta ** (-i / n).
  """
  space = head_size // 6
  angles = [
    coords_BL3[..., axis, None] * theta ** (-jnp.arange(n, dtype=jnp.float32) / n)
    for axis, n in enumerate((head_size // 2 - 2 * space, space, space))
  ]
  angle_BL1K = jnp.concatenate(angles, axis=-1)[:, :, None]
  return jnp.cos(angle_BL1K), jnp.sin(angle_BL1K)


def turn(x_BLNK, cos, sin):
  """Rotates pairs (i, i + K/2) of each head by the token's angles."""
  first, second = jnp.split(x_BLNK, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def sinusoids(time_BU, freqs):
  """Diffusion time 0..1000 -> [B, U, freqs]: cosines, then sines. DDPM, arXiv:2006.11239, app. B."""
  angle = time_BU[..., None] * jnp.exp(-math.log(10_000) * jnp.arange(freqs // 2, dtype=jnp.float32) / (freqs // 2))
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@jax.custom_vjp
def spread(values_BUD, index_BL):
  """[B, U, D] -> [B, L, D] by index. A gather forward; backward a product with one-hot rows (a scatter is slow on CPU and TPU)."""
  return jnp.take_along_axis(values_BUD, index_BL[..., None], axis=1)


def _spread_backward(saved, d_out_BLD):
  index_BL, U = saved
  one_hot_BLU = jax.nn.one_hot(index_BL, U.shape[0], dtype=d_out_BLD.dtype)
  return jnp.einsum("BLU,BLD->BUD", one_hot_BLU, d_out_BLD, precision=lax.Precision.HIGHEST), None


spread.defvjp(lambda values, index: (spread(values, index), (index, jnp.zeros(values.shape[1]))), _spread_backward)


def layer_norm(x, eps):
  """Over the last axis, without weights, in float32."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  return (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)


def rms_norm(x_BLNK, weight_NK, eps):
  """q/k norm of Wan: over all heads together, float32."""
  x = x_BLNK.astype(jnp.float32)
  return x * lax.rsqrt(jnp.square(x).mean((-2, -1), keepdims=True) + eps) * weight_NK


class Part(nn.Module):
  """What the modules below share: a config, a layout, and weights that say their axes."""

  cfg: DiTConfig
  layout: Layout | None = None

  def weight(self, name, shape, axes, init=nn.initializers.zeros):
    """A weight, with the change that an adapter (models/lora.py) in the collection "lora" makes to it."""
    value = param(self, name, init, shape, axes)
    if self.has_variable("lora", name):
      value = value + lora.change(self.get_variable("lora", name), self.cfg.lora_scale)
    return value

  def shard(self, x, *axes):
    return x if self.layout is None else self.layout.constrain(x, *axes)

  def product(self, equation, x, kernel):
    """einsum of x [batch, length, ...] with a weight, in the compute dtype.

    On one device as a product of two matrices: its gradients are such products too, and XLA on CPU transposes no operand of them.
    """
    x, kernel = (a.astype(self.cfg.dtype) for a in (x, kernel))
    if self.layout is not None and self.layout.mesh.size > 1:
      return jnp.einsum(equation, x, kernel)
    size = math.prod(x.shape[2:])
    return (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*x.shape[:2], *kernel.shape[x.ndim - 2 :])

  def linear(self, equation, x, name, shape, axes, init):
    """`product` with weight `name`, plus a bias over its last axis."""
    dtype = jnp.dtype(self.cfg.dtype)
    y = self.product(equation, x, self.weight(name, shape, axes, init))
    return y + self.weight(f"{name}_bias", shape[-1:], axes[-1:]).astype(dtype)


class Attention(Part):
  """Attention with q/k RMS norm over all heads: of a row to itself, or to the text, whose keys and values may be given."""

  @nn.compact
  def __call__(self, x_BLD, text_BSD, segment_BL, segment_BM, angles=None, text_kv=None, log_count_BM=None):
    """`text_BSD` None and no `text_kv`: self-attention, with positions."""
    cfg = self.cfg
    D, N, K = cfg.width, cfg.heads, cfg.head_size
    heads, dtype = ("embed", "heads", "head_dim"), jnp.dtype(cfg.dtype)
    kernels, biases, norms = {}, {}, {}
    for name in ("query", "key", "value"):
      kernels[name] = self.weight(name, (D, N, K), heads, normal(D)).astype(dtype)
      biases[name] = self.weight(f"{name}_bias", (N, K), heads[1:]).astype(dtype)
      if name != "value":
        norms[name] = self.weight(f"{name}_norm", (N, K), heads[1:], nn.initializers.ones)

    def project(x_BLD, length, *names):
      """One product for all of them, fewer passes over x, forward and backward; unless joining their weights costs more."""
      tokens = x_BLD.shape[0] * x_BLD.shape[1]
      if not jax.core.is_constant_dim(tokens) or tokens < 4 * D:  # symbols, where a model is exported
        return [one for name in names for one in joined(x_BLD, length, name)]
      return joined(x_BLD, length, *names)

    def joined(x_BLD, length, *names):
      kernel_DcNK, bias_cNK = jnp.stack([kernels[n] for n in names], 1), jnp.stack([biases[n] for n in names])
      y_BLcNK = self.product("BLD,DcNK->BLcNK", x_BLD, kernel_DcNK) + bias_cNK
      y_BLcNK = self.shard(y_BLcNK, "act_batch", length, None, "act_heads", "act_head_dim")
      return [rms_norm(y_BLcNK[:, :, i], norms[n], cfg.eps) if n in norms else y_BLcNK[:, :, i] for i, n in enumerate(names)]

    if angles is not None:
      query, key, value = project(x_BLD, "act_length", "query", "key", "value")
      query, key = turn(query, *angles), turn(key, *angles)
    else:
      (query,) = project(x_BLD, "act_length", "query")
      key, value = text_kv if text_kv is not None else project(text_BSD, "act_text", "key", "value")
    out_BLNK = attend(query.astype(dtype), key.astype(dtype), value, segment_BL, segment_BM, log_count_BM=log_count_BM, layout=self.layout)
    out_BLNK = self.shard(out_BLNK, "act_batch", "act_length", "act_heads", "act_head_dim")
    small = (3 * cfg.depth) ** -0.5
    return self.linear("BLNK,NKD->BLD", out_BLNK, "out", (N, K, D), ("heads", "head_dim", "embed"), normal(D, small))


class Mlp(Part):
  @nn.compact
  def __call__(self, x_BLD):
    D, F = self.cfg.width, self.cfg.mlp
    h_BLF = self.linear("BLD,DF->BLF", x_BLD, "in", (D, F), ("embed", "mlp"), normal(D))
    h_BLF = nn.gelu(self.shard(h_BLF, "act_batch", "act_length", "act_mlp"), approximate=True)
    return self.linear("BLF,FD->BLD", h_BLF, "out", (F, D), ("mlp", "embed"), normal(F, (3 * self.cfg.depth) ** -0.5))


def _gates_open(key, shape, dtype=jnp.float32):
  """[6, D]: shift, scale, gate of attention, then of the mlp; gates 1, the rest 0."""
  del key
  return jnp.zeros(shape, dtype).at[jnp.array([2, 5])].set(1)


class Block(Part):
  """One layer. `row` is what all layers share; `text_kv` this layer's keys and values of the text, or None."""

  @nn.compact
  def __call__(self, x_BLD, text_kv, row):
    cfg = self.cfg
    change_BU6D = self.weight("table", (6, cfg.width), (None, "embed"), _gates_open) + row["change_BU6D"]
    change = lambda i: spread(change_BU6D[:, :, i], row["index_BL"])  # noqa: E731
    dtype, residual = x_BLD.dtype, lambda x: self.shard(x, "act_batch", "act_length", "act_embed")

    h_BLD = (layer_norm(x_BLD, cfg.eps) * (1 + change(1)) + change(0)).astype(dtype)
    h_BLD = Attention(cfg, self.layout, name="self")(h_BLD, None, row["segment_BL"], row["segment_BL"], row["angles"])
    x_BLD = residual((x_BLD + h_BLD * change(2)).astype(dtype))

    h_BLD = x_BLD
    if cfg.cross_norm:
      scale_D = self.weight("cross_scale", (cfg.width,), ("embed",), nn.initializers.ones)
      h_BLD = (layer_norm(x_BLD, cfg.eps) * scale_D + self.weight("cross_shift", (cfg.width,), ("embed",))).astype(dtype)
    x_BLD = residual(
      x_BLD
      + Attention(cfg, self.layout, name="cross")(
        h_BLD, row["text_BSD"], row["prompt_BL"], row["prompt_BS"], text_kv=text_kv, log_count_BM=row["log_count_BS"]
      )
    )

    h_BLD = (layer_norm(x_BLD, cfg.eps) * (1 + change(4)) + change(3)).astype(dtype)
    x_BLD = residual((x_BLD + Mlp(cfg, self.layout, name="mlp")(h_BLD) * change(5)).astype(dtype))
    return x_BLD, None


class DiT(Part):
  """See the module docstring."""

  @nn.compact
  def __call__(
    self, tokens_BLP, coords_BL3, segment_BL, sigma_BU, sigma_index_BL, text_BSE, prompt_BL, prompt_BS, cond_BLQ=None, *, text_kv=None
  ):
    """Velocity of every token, [B, L, P] float32; anything at all in padding.

    sigma_BU in [0, 1], sigma_index_BL which of them is a token's; text_BSE the encoder's output. `text_kv`, from `text_kv(...)` below,
    takes the place of text_BSE. ValueError where cond_BLQ is missing from a model that needs it, or the other way round.
    """
    cfg, D = self.cfg, self.cfg.width
    if (cond_BLQ is not None) != (cfg.cond_channels > 0) and not self.is_initializing():
      raise ValueError(f"this DiT takes {cfg.values_cond} condition values a token, and got cond_BLQ={cond_BLQ!r}")

    x_BLD = self.linear("BLP,PD->BLD", tokens_BLP, "patch", (cfg.values_in, D), ("patch", "embed"), normal(cfg.values_in))
    if cfg.cond_channels:
      cond_QD = self.weight("patch_cond", (cfg.values_cond, D), ("patch", "embed"), normal(cfg.values_cond))
      if cond_BLQ is not None:
        x_BLD += self.product("BLQ,QD->BLD", cond_BLQ, cond_QD)
    x_BLD = self.shard(x_BLD, "act_batch", "act_length", "act_embed")

    log_count_BS = None
    if text_kv is not None:
      *text_kv, log_count_BS = text_kv
    elif cfg.text_pad:
      log_count_BS = log_count(text_BSE, prompt_BS, cfg.text_pad)

    time_BUD, change_BU6D = Time(cfg, self.layout, name="time")(sigma_BU)
    text_BSD = None if text_kv is not None else Text(cfg, self.layout, name="text")(text_BSE)
    row = {
      "change_BU6D": change_BU6D,
      "index_BL": sigma_index_BL,
      "angles": rotary(coords_BL3, cfg.head_size, cfg.rope_theta),
      "segment_BL": segment_BL,
      "text_BSD": text_BSD,
      "prompt_BL": prompt_BL,
      "prompt_BS": prompt_BS,
      "log_count_BS": log_count_BS,
    }

    block = Block if REMAT[cfg.remat] is None else nn.remat(Block, policy=REMAT[cfg.remat], prevent_cse=False)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=cfg.depth,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x_BLD, _ = blocks(cfg, self.layout, name="blocks")(x_BLD, text_kv, row)

    change_BU2D = self.weight("table", (2, D), (None, "embed")) + time_BUD[:, :, None]
    shift_BLD, scale_BLD = (spread(change_BU2D[:, :, i], sigma_index_BL) for i in range(2))
    x_BLD = layer_norm(x_BLD, cfg.eps) * (1 + scale_BLD) + shift_BLD
    out_BLP = self.linear("BLD,DP->BLP", x_BLD, "velocity", (D, cfg.values_in), ("embed", "patch"), nn.initializers.zeros).astype(jnp.float32)
    if cfg.predicts == "velocity":
      return out_BLP
    return (tokens_BLP - out_BLP) / jnp.maximum(spread(sigma_BU[..., None], sigma_index_BL), SMALLEST)


class Time(Part):
  """sigma_BU -> embedding [B, U, D] and modulation [B, U, 6, D], float32."""

  @nn.compact
  def __call__(self, sigma_BU):
    D, freqs = self.cfg.width, self.cfg.time_freqs
    product = lambda *args: jnp.einsum(*args, precision=lax.Precision.HIGHEST)  # noqa: E731

    def linear(equation, x, name, shape, axes, init):
      return product(equation, x, self.weight(name, shape, axes, init)) + self.weight(f"{name}_bias", shape[1:], axes[1:])

    time = sinusoids(1000.0 * sigma_BU.astype(jnp.float32), freqs)
    time = nn.silu(linear("BUf,fD->BUD", time, "in", (freqs, D), ("time", "embed"), normal(freqs)))
    time = linear("BUD,De->BUe", time, "out", (D, D), ("embed", None), normal(D))
    change = linear("BUD,Dse->BUse", nn.silu(time), "change", (D, 6, D), ("embed", None, None), nn.initializers.normal(0.02))
    return time, change


class Text(Part):
  """The encoder's output -> what blocks attend to, [B, S, D]."""

  @nn.compact
  def __call__(self, text_BSE):
    D, E = self.cfg.width, self.cfg.text_width
    h_BSD = self.linear("BSE,ED->BSD", text_BSE, "in", (E, D), ("text_embed", None), normal(E))
    return self.linear("BSD,De->BSe", nn.gelu(h_BSD, approximate=True), "out", (D, D), ("embed", None), normal(D))


def log_count(text_BSE, prompt_BS, text_pad):
  """How many tokens each token of text stands for, as a logarithm [B, S]: 0, but for the zeros that pad a prompt to text_pad tokens.

  Equal keys with equal values are one that counts as often: a single zero token at the end of a prompt does for all its padding, and
  512 tokens become as many as the prompt has, and one. A prompt with all its padding, or without any, gets what it is.
  """
  zero_BS = ~jnp.any(text_BSE, -1) & (prompt_BS > 0)
  same_BSS = prompt_BS[:, :, None] == prompt_BS[:, None]
  zeros_BS, words_BS = (jnp.sum(same_BSS & what_BS[:, None], -1) for what_BS in (zero_BS, ~zero_BS))
  return jnp.where(zero_BS, jnp.log(jnp.maximum(text_pad - words_BS, 1) / jnp.maximum(zeros_BS, 1)), 0.0)


def text_kv(cfg, params, text_BSE, prompt_BS=None):
  """Keys and values of the text in every layer, each [depth, B, S, N, K], and the `log_count` of its tokens, or None: they do not depend on
  the noise level, so compute them once.

  `params` are those of a DiT, unboxed. For `DiT.apply(..., text_BSE=None, ..., text_kv=this)`. Models with text_pad need `prompt_BS`.
  """
  if cfg.text_pad and prompt_BS is None:
    raise ValueError(f"text_kv of a model with text_pad={cfg.text_pad} needs prompt_BS, to tell how much of each prompt is padding")
  count_BS = log_count(text_BSE, prompt_BS, cfg.text_pad) if cfg.text_pad else None
  text_BSD = Text(cfg).apply({"params": params["text"]}, text_BSE)

  def layer(cross):
    dtype = jnp.dtype(cfg.dtype)
    project = lambda name: jnp.einsum("BSD,DNK->BSNK", text_BSD, cross[name].astype(dtype)) + cross[f"{name}_bias"].astype(dtype)  # noqa: E731
    return rms_norm(project("key"), cross["key_norm"], cfg.eps).astype(dtype), project("value")

  return *lax.map(layer, params["blocks"]["cross"]), count_BS


def count_params(cfg):
  """Number of weights of a DiT of this shape, without making them."""
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
