"""Low-rank adaptation of a DiT's linear layers (Hu et al., LoRA, arXiv:2106.09685): W + (alpha / rank) A B, with A and B trained, W frozen.

Adapters are a tree like the DiT's weights, holding at each adapted weight {"a": [layers, inputs..., rank], "b": [layers, rank, outputs...]}.
Each layer adds its product to its weight where it uses it (models/dit.py), so that no second copy of all weights is ever there.
Layers have the names of diffusers, which PEFT's `target_modules` match by their ends.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Their linear layer in a block: (our weight, how many of its axes are inputs).
LINEARS = {
  **{f"{theirs}.to_{name[0]}": ((ours, name), 1) for theirs, ours in (("attn1", "self"), ("attn2", "cross")) for name in ("query", "key", "value")},
  "attn1.to_out.0": (("self", "out"), 2),
  "attn2.to_out.0": (("cross", "out"), 2),
  "ffn.net.0.proj": (("mlp", "in"), 1),
  "ffn.net.2": (("mlp", "out"), 1),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """rank; alpha, which scales by alpha / rank; targets: ends of names in LINEARS. Raises ValueError for what cannot be."""

  rank: int
  alpha: float
  targets: tuple = ("to_q", "to_k", "to_v", "to_out.0")

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    if self.rank < 1 or self.alpha <= 0:
      raise ValueError(f"LoRA needs rank >= 1 and alpha > 0, not rank {self.rank}, alpha {self.alpha}")
    wrong = [target for target in self.targets if not any(_ends(name, target) for name in LINEARS)]
    if wrong or not self.targets:
      raise ValueError(f"LoRA targets {wrong or '()'}: no layer has such a name; there are {', '.join(LINEARS)}, or their ends")

  @property
  def scale(self):
    return self.alpha / self.rank

  def layers(self):
    """[(their name, our path in a block, input axes)] of what is adapted."""
    return [(name, *LINEARS[name]) for name in LINEARS if any(_ends(name, target) for target in self.targets)]


def _ends(name, target):
  return name == target or name.endswith("." + target)


def init(key, cfg, boxed):
  """Adapters for a DiT, boxed like its weights (`boxed`: as init or eval_shape(init) give them). A is random, B zero: nothing changes yet."""
  adapters = {}
  for i, (_, (part, name), inputs) in enumerate(cfg.layers()):
    box = boxed["blocks"][part][name]
    shape, axes = box.value.shape, box.names
    fan_in = math.prod(shape[1 : 1 + inputs])
    a = jax.random.uniform(jax.random.fold_in(key, i), (*shape[: 1 + inputs], cfg.rank), minval=-1, maxval=1) * fan_in**-0.5  # as PEFT draws it
    b = jnp.zeros((shape[0], cfg.rank, *shape[1 + inputs :]))
    pair = {
      "a": nn.LogicallyPartitioned(a, (*axes[: 1 + inputs], None)),
      "b": nn.LogicallyPartitioned(b, (axes[0], None, *axes[1 + inputs :])),
    }
    adapters.setdefault(part, {})[name] = pair
  return {"blocks": adapters}


def change(pair, scale):
  """{"a", "b"} of one layer -> what is added to its weight, float32."""
  return scale * jnp.tensordot(pair["a"], pair["b"], 1)


class Merged:
  """A weight with its adapter added when it is looked at, a layer at a time; numpy takes it for an array."""

  def __init__(self, weight, pair, scale):
    self._weight, self._pair, self._scale = weight, pair, scale
    self.shape, self.dtype, self.nbytes, self.ndim = weight.shape, weight.dtype, weight.nbytes, weight.ndim

  def __getitem__(self, i):
    weight = np.asarray(self._weight[i])
    return (weight + np.asarray(change({name: np.asarray(value[i]) for name, value in self._pair.items()}, self._scale))).astype(weight.dtype)

  def __array__(self, dtype=None, copy=None):
    return np.stack([self[i] for i in range(len(self._weight))]).astype(dtype or self.dtype)

  def astype(self, dtype, copy=True):
    return np.asarray(self).astype(dtype, copy=copy)


def merge(params, adapters, scale, lazy=False):
  """Weights of a DiT with adapters added for good, in the dtype they had; leaves that have none are as they were. lazy: as `Merged`."""

  def add(weight, pair):
    return jax.lax.map(lambda layer: (layer[0] + change(layer[1], scale)).astype(weight.dtype), (weight, pair))

  merged = dict(params, blocks={name: dict(part) if isinstance(part, dict) else part for name, part in params["blocks"].items()})
  for part, names in adapters["blocks"].items():
    for name, pair in names.items():
      weight = merged["blocks"][part][name]
      merged["blocks"][part][name] = Merged(weight, pair, scale) if lazy else jax.jit(add)(weight, pair)
  return merged
