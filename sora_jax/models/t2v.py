"""The text-to-video model: a DiT, or two experts that share the noise levels, and a trained text encoder.

The text encoder is part of the model only if it is trained with it.

Weights are keyed "dit" and "text"; those of two experts (Wan 2.2 A14B) "dit_high" and "dit_low".
"""

import dataclasses

import jax
import jax.numpy as jnp

from sora_jax.layout import Layout
from sora_jax.models import eight_bits, lora
from sora_jax.models.dit import DiT, DiTConfig, text_kv
from sora_jax.models.lora import LoRAConfig
from sora_jax.models.text import TextConfig, TextEncoder


@dataclasses.dataclass(frozen=True)
class Model:
  """Configs of the parts, and the layout of their arrays. It is hashable, so it is static under jit.

  text: None where embeddings come with the batch.
  boundary: if > 0, "dit_high" is used for sigma >= boundary, "dit_low" for smaller sigmas.
  lora: the trained weights are adapters, keyed "lora"; the weights that they adapt are frozen.
  param_dtype: of the trained weights; what they are computed in is `dit.dtype`.
  weights: of the frozen ones, those of a sampling job or beneath adapters: a key of eight_bits.KINDS; "": as
  they come.
  """

  dit: DiTConfig
  text: TextConfig | None = None
  layout: Layout | None = None
  boundary: float = 0.0
  lora: LoRAConfig | None = None
  param_dtype: str = "float32"
  weights: str = ""

  def __post_init__(self):
    if self.weights and self.weights not in eight_bits.KINDS:
      raise ValueError(f"weights is {self.weights!r}; known: {', '.join(eight_bits.KINDS)}, or none")
    if self.weights and self.dit.scans > 1:
      raise ValueError(f"weights {self.weights!r} need scans 1, not {self.dit.scans}")
    if self.param_dtype not in ("float32", "bfloat16"):
      raise ValueError(f"param_dtype is {self.param_dtype!r}; known: float32, bfloat16")

  def init(self, key):
    """The trained weights, boxed (see layout.param): {"dit": ..., "text": ...}, or {"lora": {"dit": ...}}."""
    return jax.tree.map(lambda x: x.astype(self.param_dtype), self._init(key))

  def _init(self, key):
    """As `init`, in float32."""
    if self.lora is not None:
      boxed = jax.eval_shape(dataclasses.replace(self, lora=None).init, key)
      return {"lora": {name: lora.init(key, self.lora, boxed[name]) for name in boxed if name != "text"}}
    dit_key, text_key = jax.random.split(key)
    row = jnp.zeros((1, 1), jnp.int32)
    tokens, coords = jnp.zeros((1, 1, self.dit.values_in)), jnp.zeros((1, 1, 3))
    sigma, text = jnp.zeros((1, 2)), jnp.zeros((1, 1, self.dit.text_width))
    params = {}
    for name in ("dit_high", "dit_low") if self.boundary else ("dit",):
      dit = DiT(self.dit, self.layout)
      params[name] = dit.init(dit_key, tokens, coords, row, sigma, row, text, row, row)["params"]
    if self.text is not None:
      params["text"] = TextEncoder(self.text, self.layout).init(text_key, row, row)["params"]
    return params

  def expert(self, params, sigma):
    """Selects the expert for a noise level -> (its weights, keyed "dit"; whether it is the low-noise one)."""
    if not self.boundary:
      return params, False
    low = bool(sigma < self.boundary)
    return {"dit": params["dit_low" if low else "dit_high"]}, low

  def embed_text(self, params, batch):
    """Text embeddings of a batch, [B, S, E]: those in the batch, or the encoder's output for its ids."""
    if self.text is None:
      return batch.text_BSE
    return TextEncoder(self.text, self.layout).apply(
      {"params": params["text"]}, batch.text_BS, batch.prompt_BS
    )

  def text_kv(self, params, text_BSE, prompt_BS):
    """Keys and values of the text, which `velocity` takes in place of text_BSE; None with adapters.

    They are the same at every noise level.
    """
    return None if "lora" in params else text_kv(self.dit, params["dit"], text_BSE, prompt_BS)

  def velocity(
    self, params, x_BLP, batch, sigma_BU, sigma_index_BL, text_BSE, text_kv=None, change=None, keep=False
  ):
    """Predicts the velocity of every token, [B, L, P] float32.

    change: [B, L, D], stands in for the blocks, which are not computed. keep: returns (velocity, the change
    that they made).
    """
    variables = {"params": params["dit"]}
    if "lora" in params:
      variables["lora"] = params["lora"]["dit"]
    out = DiT(self.dit, self.layout).apply(
      variables,
      x_BLP,
      batch.coords_BL3,
      batch.segment_BL,
      sigma_BU,
      sigma_index_BL,
      text_BSE,
      batch.prompt_BL,
      batch.prompt_BS,
      batch.cond_BLQ,
      text_kv=text_kv,
      change_BLD=change,
      mutable=["cache"] if keep else False,
    )
    return (out[0], out[1]["cache"]["change_BLD"][0]) if keep else out
