"""The optimiser: AdamW with warm-up, a cosine to a floor, and clipping by the global norm."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW (arXiv:1711.05101). Steps are updates; weight decay is on matrices alone (arrays of two axes or more)."""
  learning_rate: float = 1e-3
  warmup: int = 50
  steps: int = 1000                # length of the schedule
  final: float = 0.05              # the rate at its end, as a share of `learning_rate`
  weight_decay: float = 0.01
  clip: float = 1.0                # global norm of the gradient
  b1: float = 0.9
  b2: float = 0.99

  def __post_init__(self):
    if self.learning_rate <= 0 or self.steps < 1 or self.warmup < 0 or self.clip <= 0 or not 0 <= self.final <= 1:
      raise ValueError(f"the optimiser needs learning_rate > 0, steps >= 1, warmup >= 0, clip > 0, 0 <= final <= 1; not {self}")


def schedule(cfg):
  """Learning rate of an update, by its number."""
  warmup = min(cfg.warmup, cfg.steps // 2)
  return optax.warmup_cosine_decay_schedule(0.0, cfg.learning_rate, warmup, cfg.steps, cfg.final * cfg.learning_rate)


def optimizer(cfg):
  """OptimConfig -> optax.GradientTransformation."""
  decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
  return optax.chain(optax.clip_by_global_norm(cfg.clip),
                     optax.adamw(schedule(cfg), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=decayed))


def ema_update(ema, params, step, decay):
  """Running mean of the weights; it warms up as (1 + step) / (10 + step), so that a short run is not its own initialisation."""
  decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def keep_if_finite(finite, new, old):
  """`new` where `finite` (a scalar) else `old`, leaf by leaf: a bad update changes nothing."""
  return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
