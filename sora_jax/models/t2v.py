"""The text-to-video model: a DiT, or two that share the noise levels, and, where it is trained with it, a text encoder.

Weights are keyed "dit" and "text"; of two experts (Wan 2.2 A14B) "dit_high" and "dit_low".
"""

import dataclasses

import jax
import jax.numpy as jnp

from sora_jax.layout import Layout
from sora_jax.models import lora
from sora_jax.models.dit import DiT, DiTConfig, text_kv
from sora_jax.models.lora import LoRAConfig
from sora_jax.models.text import TextConfig, TextEncoder


@dataclasses.dataclass(frozen=True)
class Model:
  """Configs of the parts and where their arrays live; hashable, so it is static under jit. `text` None: embeddings come with the batch.
  `boundary` > 0: "dit_high" takes sigmas from there on, "dit_low" those below. `lora`: the weights to train are adapters, keyed "lora",
  and those that they adapt stay as they are."""
  dit: DiTConfig
  text: TextConfig | None = None
  layout: Layout | None = None
  boundary: float = 0.0
  lora: LoRAConfig | None = None

  def init(self, key):
    """Boxed weights (see layout.param) that are trained: {"dit": ..., "text": ...}, or {"lora": {"dit": ...}}."""
    if self.lora is not None:
      boxed = jax.eval_shape(dataclasses.replace(self, lora=None).init, key)
      return {"lora": {name: lora.init(key, self.lora, boxed[name]) for name in boxed if name != "text"}}
    dit_key, text_key = jax.random.split(key)
    row = jnp.zeros((1, 1), jnp.int32)
    params = {name: DiT(self.dit, self.layout).init(
        dit_key, jnp.zeros((1, 1, self.dit.values_in)), jnp.zeros((1, 1, 3)), row, jnp.zeros((1, 2)), row,
        jnp.zeros((1, 1, self.dit.text_width)), row, row)["params"] for name in (("dit_high", "dit_low") if self.boundary else ("dit",))}
    if self.text is not None:
      params["text"] = TextEncoder(self.text, self.layout).init(text_key, row, row)["params"]
    return params

  def expert(self, params, sigma):
    """Weights of all experts -> (those for this noise level, keyed "dit"; is it the expert of low noise?)."""
    if not self.boundary:
      return params, False
    low = bool(sigma < self.boundary)
    return {"dit": params["dit_low" if low else "dit_high"]}, low

  def embed_text(self, params, batch):
    """Text embeddings of a batch, [B, S, E]: the batch's own, or its ids through the encoder."""
    if self.text is None:
      return batch.text_BSE
    return TextEncoder(self.text, self.layout).apply({"params": params["text"]}, batch.text_BS, batch.prompt_BS)

  def text_kv(self, params, text_BSE, prompt_BS):
    """What `velocity` takes in the place of text_BSE: keys and values of the text, which no noise level changes. None with adapters."""
    return None if "lora" in params else text_kv(self.dit, params["dit"], text_BSE, prompt_BS)

  def velocity(self, params, x_BLP, batch, sigma_BU, sigma_index_BL, text_BSE, text_kv=None):
    """The predicted velocity of every token, [B, L, P] float32."""
    adapters = {"lora": params["lora"]["dit"]} if "lora" in params else {}
    return DiT(self.dit, self.layout).apply(
        {"params": params["dit"], **adapters}, x_BLP, batch.coords_BL3, batch.segment_BL, sigma_BU, sigma_index_BL, text_BSE,
        batch.prompt_BL, batch.prompt_BS, batch.cond_BLQ, text_kv=text_kv)
