"""Low-rank adaptation of a DiT's linear layers (Hu et al., LoRA, arXiv:2106.09685).

  W + (alpha / rank) A B        A and B are trained, W is frozen

Adapters are a tree like that of the DiT's weights. At each adapted weight it holds {"a": [layers, inputs...,
rank], "b": [layers, rank, outputs...]}. Each layer adds the delta weight where it uses the weight
(models/dit.py), so that there is never a second copy of all weights. Layers have the names of diffusers,
which PEFT's `target_modules` match by suffix.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Linear layer of a block in diffusers: (our weight, how many of its axes are inputs).
LINEARS = {
  "attn1.to_q": (("self", "query"), 1),
  "attn1.to_k": (("self", "key"), 1),
  "attn1.to_v": (("self", "value"), 1),
  "attn2.to_q": (("cross", "query"), 1),
  "attn2.to_k": (("cross", "key"), 1),
  "attn2.to_v": (("cross", "value"), 1),
  "attn1.to_out.0": (("self", "out"), 2),
  "attn2.to_out.0": (("cross", "out"), 2),
  "ffn.net.0.proj": (("mlp", "in"), 1),
  "ffn.net.2": (("mlp", "out"), 1),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which layers are adapted, and how. Raises ValueError for values out of range and unknown targets.

  alpha: the delta weight is scaled by alpha / rank. targets: suffixes of names in LINEARS.
  """

  rank: int
  alpha: float
  targets: tuple = ("to_q", "to_k", "to_v", "to_out.0")

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    if self.rank < 1 or self.alpha <= 0:
      raise ValueError(f"LoRA needs rank >= 1 and alpha > 0, not rank {self.rank}, alpha {self.alpha}")
    wrong = [target for target in self.targets if not any(_ends(name, target) for name in LINEARS)]
    if wrong or not self.targets:
      raise ValueError(
        f"LoRA targets {wrong or '()'}: no layer has such a name; known: {', '.join(LINEARS)}, "
        "or suffixes of these"
      )

  @property
  def scale(self):
    return self.alpha / self.rank

  def layers(self):
    """[(name in diffusers, our path in a block, number of input axes)] of the adapted layers."""
    return [(name, *LINEARS[name]) for name in LINEARS if any(_ends(name, target) for target in self.targets)]


def _ends(name, target):
  return name == target or name.endswith("." + target)


def init(key, cfg, boxed):
  """Initial adapters for a DiT, boxed like its weights. A is random and B zero: the delta weights are zero.

  boxed: the DiT's weights as init or eval_shape(init) return them.
  """
  adapters = {}
  for i, (_, (part, name), inputs) in enumerate(cfg.layers()):
    box = boxed["blocks"][part][name]
    shape, axes = box.value.shape, box.names
    fan_in = math.prod(shape[1 : 1 + inputs])
    a_shape = (*shape[: 1 + inputs], cfg.rank)
    a = jax.random.uniform(jax.random.fold_in(key, i), a_shape, minval=-1, maxval=1)
    a = a * fan_in**-0.5  # as in PEFT
    b = jnp.zeros((shape[0], cfg.rank, *shape[1 + inputs :]))
    pair = {
      "a": nn.LogicallyPartitioned(a, (*axes[: 1 + inputs], None)),
      "b": nn.LogicallyPartitioned(b, (axes[0], None, *axes[1 + inputs :])),
    }
    adapters.setdefault(part, {})[name] = pair
  return {"blocks": adapters}


def delta_weight(pair, scale):
  """{"a", "b"} of one layer, or {"diff"}, or both -> what is added to its weight, float32."""
  product = scale * jnp.tensordot(pair["a"], pair["b"], 1) if "a" in pair else 0.0
  return product + pair.get("diff", 0.0)


def is_delta(tree):
  """Whether a node of a tree of adapters is what one weight gets."""
  return "a" in tree or "diff" in tree


class Merged:
  """An array-like of stacked weights with their adapters added, a layer at a time when it is indexed."""

  def __init__(self, weight, pair, scale):
    self._weight, self._pair, self._scale = weight, pair, scale
    self.shape, self.dtype, self.nbytes, self.ndim = weight.shape, weight.dtype, weight.nbytes, weight.ndim

  def __getitem__(self, i):
    weight = np.asarray(self._weight[i])
    pair = {name: np.asarray(value[i]) for name, value in self._pair.items()}
    return (weight + np.asarray(delta_weight(pair, self._scale))).astype(weight.dtype)

  def __array__(self, dtype=None, copy=None):
    return np.stack([self[i] for i in range(len(self._weight))]).astype(dtype or self.dtype)

  def astype(self, dtype, copy=True):
    return np.asarray(self).astype(dtype, copy=copy)


def merge(params, adapters, scale=1.0, lazy=False):
  """Weights of a DiT with their adapters added, in the dtype that they had.

  adapters: a tree like that of the weights, with {"a", "b"} or {"diff"} or both at each weight that changes.
  Leaves without an adapter are returned as they are. lazy: merged leaves of blocks are `Merged`.
  """
  blocks = adapters.get("blocks", {})
  rest = {name: value for name, value in adapters.items() if name != "blocks"}
  merged = {**params, **_merge(params, rest, lambda weight, pair: _add(weight, pair, scale))}

  def add_layers(weight, pair):
    return Merged(weight, pair, scale) if lazy else _add_layers(weight, pair, scale)

  return {**merged, "blocks": _merge(params["blocks"], blocks, add_layers)}


def _merge(params, adapters, add):
  if unknown := adapters.keys() - params.keys():
    raise KeyError(f"adapters for {sorted(unknown)}, which the model does not have")
  changed = {
    name: add(params[name], some) if is_delta(some) else _merge(params[name], some, add)
    for name, some in adapters.items()
  }
  return {**params, **changed}


@jax.jit
def _add(weight, pair, scale):
  return (weight + delta_weight(pair, scale)).astype(weight.dtype)


@jax.jit
def _add_layers(weight, pair, scale):
  """As `_add`, of all layers: one at a time, so that one delta is in memory."""
  return jax.lax.map(lambda layer: _add(*layer, scale), (weight, pair))
