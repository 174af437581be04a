"""The optimiser: Muon or AdamW, with warm-up, a cosine to a floor, and clipping by the global norm."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from sora_jax import layout as layouts

NAMES = ("adamw", "muon")
WINDOW = 128  # updates that a new one is compared with, as many as in OLMo-core's SkipStepOptimizer


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW (arXiv:1711.05101); or Muon (Jordan et al. 2024; arXiv:2502.16982) on matrices, and on the rest
  AdamW with Nesterov momentum.

  Steps are updates.

  Muon's updates are scaled to the size of AdamW's (0.2 of root mean square, arXiv:2502.16982, eq. 4), so that
  one learning rate fits both. Weight decay is on matrices alone.
  """

  name: str = "adamw"
  learning_rate: float = 1e-3
  warmup: int = 50
  steps: int = 1000  # length of the schedule
  final: float = 0.05  # the rate at its end, as a share of `learning_rate`
  weight_decay: float = 0.01
  clip: float = 1.0  # global norm of the gradient
  b1: float = 0.9  # AdamW's, also where Muon leaves weights to it
  b2: float = 0.99
  moment_dtype: str = "float32"  # what the moments are stored in; they are computed in float32

  def __post_init__(self):
    if self.name not in NAMES:
      raise ValueError(f"the optimiser is {self.name!r}; it must be one of {', '.join(NAMES)}")
    if (
      self.learning_rate <= 0
      or self.steps < 1
      or self.warmup < 0
      or self.clip <= 0
      or not 0 <= self.final <= 1
    ):
      raise ValueError(
        "the optimiser needs learning_rate > 0, steps >= 1, warmup >= 0, clip > 0, 0 <= final <= 1; "
        f"not {self}"
      )
    if self.moment_dtype not in ("float32", "bfloat16"):
      raise ValueError(f"moment_dtype is {self.moment_dtype!r}; it must be float32 or bfloat16")
    if not 0 <= self.b1 < 1 or not 0 <= self.b2 < 1:
      raise ValueError(f"the optimiser needs 0 <= b1 < 1 and 0 <= b2 < 1; not b1={self.b1}, b2={self.b2}")


def schedule(cfg):
  """Learning rate of an update, by its number."""
  warmup = min(cfg.warmup, cfg.steps // 2)
  return optax.warmup_cosine_decay_schedule(
    0.0, cfg.learning_rate, warmup, cfg.steps, cfg.final * cfg.learning_rate
  )


def optimizer(cfg, boxed):
  """OptimConfig and the weights with their logical axes (as `init` or `eval_shape(init)` gives them) -> optax
  transformation, which takes gradients and weights in float32.
  """
  roles = jax.tree.map(matrix_roles, boxed, is_leaf=layouts.is_box)
  matrices = jax.tree.map(
    lambda role: role is not None, roles, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
  )
  if cfg.name == "muon":
    update = muon(
      schedule(cfg),
      weight_decay=cfg.weight_decay,
      consistent_rms=0.2,
      adam_b1=cfg.b1,
      adam_b2=cfg.b2,
      muon_weight_dimension_numbers=roles,
    )
  else:
    update = optax.adamw(schedule(cfg), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=matrices)
  if cfg.moment_dtype != "float32":
    update = stored_as(update, cfg.moment_dtype)
  return optax.chain(optax.clip_by_global_norm(cfg.clip), update)


class Stored(NamedTuple):
  """State of `stored_as`: the number of updates, and the state of the transformation in its dtype."""

  count: jax.Array
  inner: tuple


def stored_as(tx, dtype):
  """tx, whose moments are stored in `dtype`, rounded stochastically, and updated in float32."""

  def cast(tree, count=None):
    def leaf(number, x):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
      return x.astype(dtype) if count is None else stochastic_round(x, dtype, (count, number))

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaf(number, x) for number, x in enumerate(leaves)])

  def init(params):
    return Stored(jnp.zeros((), jnp.int32), cast(tx.init(params)))

  def update(updates, state, params=None):
    updates, inner = tx.update(updates, in_float32(state.inner), params)
    return updates, Stored(state.count + 1, cast(inner, state.count))

  return optax.GradientTransformation(init, update)


def in_float32(tree):
  """A tree whose leaves of other floating dtypes are cast to float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def apply_updates(params, updates, step):
  """Weights in their dtype plus updates in float32; stochastically rounded where the dtype is not float32, or
  updates below half a digit would all be lost.
  """
  leaves, structure = jax.tree.flatten(params)
  added = [p.astype(jnp.float32) + u for p, u in zip(leaves, structure.flatten_up_to(updates), strict=True)]
  if all(p.dtype == jnp.float32 for p in leaves):
    return jax.tree.unflatten(structure, added)
  rounded = [
    stochastic_round(x, p.dtype, (step, -1 - number)) for number, (x, p) in enumerate(zip(added, leaves))
  ]
  return jax.tree.unflatten(structure, rounded)


def stochastic_round(x, dtype, seeds):
  """float32 -> bfloat16, up or down with probabilities that make the mean exact; float32 as it is.

  The probability is drawn from the position of each element and `seeds` (integers or traced integers) alone,
  by an integer hash (the finalizer of MurmurHash3): it costs no memory, and does not depend on the sharding.
  """
  if dtype == jnp.float32:
    return x
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  noise = position
  for seed in seeds:
    noise = _hash(noise ^ _hash(jnp.asarray(seed).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = (bits + (noise >> 16)) & jnp.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _hash(x):
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)


def matrix_roles(box):
  """Which axes of a weight are the input of a matrix and which its output; None: it is none (biases, norms,
  tables of modulation).

  The last axis is the output, or the last two where it is (heads, head_dim); layers are so many matrices; a
  convolution's taps are input.
  """
  names = box.names
  inside = [i for i, name in enumerate(names) if name != "layers"]
  outputs = inside[-2:] if names[-2:] == ("heads", "head_dim") else inside[-1:]
  inputs = [i for i in inside if i not in outputs]
  if not inputs or all(names[i] is None for i in inputs) or names[inside[0]] == "vocab":
    return None
  return MuonDimensionNumbers(tuple(inputs), tuple(outputs))


def ema_update(ema, params, step, decay):
  """Running mean of the weights, float32; it warms up as (1 + step) / (10 + step), so that a short run is not
  its own initialisation. {} stays {}: no mean is kept.
  """
  if not ema:
    return ema
  decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def no_history():
  """Loss and gradient norm of the last WINDOW updates, [2, W], before the first; NaN: none."""
  return jnp.full((2, WINDOW), jnp.nan, jnp.float32)


def judge(history_2W, step, loss, grad_norm, spike):
  """Compares an update with those before it -> (is it finite, is it a spike, the history with it).

  A spike is a loss or a gradient norm above `spike` times its median over the last WINDOW updates, once half
  of them are known; spike 0: nothing is one. OLMo-core and MaxText (skip_step_on_spikes) compare with mean
  and standard deviation, which a spike moves, a median not. As there, a spike enters the history: a level
  that stays becomes the usual one.
  """
  now_2 = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  finite = jnp.all(jnp.isfinite(now_2))
  spiking = jnp.zeros((), bool)
  if spike:
    known = jnp.sum(jnp.isfinite(history_2W[0])) >= WINDOW // 2
    spiking = finite & known & jnp.any(now_2 > spike * jnp.nanmedian(history_2W, axis=1))
  here_W = jnp.arange(WINDOW) == step % WINDOW
  return finite, spiking, jnp.where(finite & here_W, now_2[:, None], history_2W)


def count_bad(bad, taken):
  """Up by one for an update that is left out, down by one for one that is taken, never below 0.

  It rises over a stretch in which more are left out than taken, be they in a row or not, and forgets single
  ones.
  """
  return jnp.maximum(bad + jnp.where(taken, -1, 1), 0)


def keep_if(taken, new, old):
  """`new` where `taken` (a scalar) else `old`, leaf by leaf: an update that is left out changes nothing."""
  return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)


def abstract(tx, boxed, layout=None):
  """-> (params, optimiser state) of ShapeDtypeStructs; with their shardings where there is a layout: the
  state lies as its weights do.
  """
  params = layouts.unbox(boxed)
  opt = jax.eval_shape(lambda params: tx.init(in_float32(params)), params)
  if layout is None:
    return params, opt

  def struct(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  shardings = layouts.shardings(boxed, layout)
  by_name = {names_of(path): sharding for path, sharding in jax.tree.leaves_with_path(shardings)}

  def beside_its_weight(path, leaf):
    names = names_of(path)
    ends = (names[i:] for i in range(len(names)))
    sharding = next((by_name[end] for end in ends if end in by_name), None)
    fits = sharding is not None and len(sharding.spec) == leaf.ndim
    return struct(leaf, sharding if fits else layout.fitted(leaf.shape))

  return jax.tree.map(struct, params, shardings), jax.tree_util.tree_map_with_path(beside_its_weight, opt)


def names_of(path):
  """The names on the way to a leaf, those of dicts alone."""
  return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
