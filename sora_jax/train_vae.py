"""Training the video VAE: what a step is.

  loss = L1 + kl_weight * KL + perceptual_weight * VGG + lambda * adversarial_weight * (- D(reconstruction))

L1 is a mean over pixel values, KL a sum over latents divided by the same number of pixel values (the ratio of arXiv:2112.10752 sec. G),
posteriors are sampled. The adversarial part works as in VQGAN (arXiv:2012.09841 eq. 7): hinge loss, from `adversarial_start` on, and
lambda = |gradient of the rest| / |gradient of D|, both at the decoder's last layer. Clips and images are one batch: each value counts the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax import layout as layouts, optim
from sora_jax.models import critics, vae
from sora_jax.models.vae_blocks import by_rows

REST = ("step", "opt", "bad", "critic", "critic_opt")      # fields of the state beside params and ema


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the terms; 0 leaves one out. `adversarial_start` is a step."""
  kl_weight: float = 1e-4
  adversarial_weight: float = 0.0
  adversarial_start: int = 0
  perceptual_weight: float = 0.0

  def __post_init__(self):
    if min(self.kl_weight, self.adversarial_weight, self.adversarial_start, self.perceptual_weight) < 0:
      raise ValueError(f"weights of losses and adversarial_start are 0 or more; not {self}")


def loss_config(config):
  """The page of configs/vae.py -> LossConfig."""
  return LossConfig(config.kl_weight, config.adversarial.weight, config.adversarial.start, config.perceptual.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class VAETrainState:
  """All that training carries from step to step. `bad` counts updates that were left out; critic: {} without the adversarial term."""
  step: jax.Array
  params: dict
  ema: dict
  opt: tuple
  bad: jax.Array
  critic: dict
  critic_opt: tuple


def _state(params, critic, tx):
  zero = jnp.zeros((), jnp.int32)
  return VAETrainState(zero, params, params, tx.init(params), zero, critic, tx.init(critic))


def abstract_state(cfg, tx, losses, layout=None):
  """State of ShapeDtypeStructs, with shardings where there is a layout: what a checkpoint is restored into."""
  def boxed(key):
    video = jnp.zeros((1, 1, *cfg.stride[1:], 3))
    critic = critics.Discriminator().init(key, video)["params"] if losses.adversarial_weight else {}
    return _state(vae.VAE(cfg).init(key, video)["params"], critic, tx)
  shapes = jax.eval_shape(boxed, jax.random.key(0))
  plain = layouts.unbox(shapes)
  if layout is None:
    return plain
  return jax.tree.map(lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where), plain,
                      layouts.shardings(shapes, layout))


def init_state(cfg, tx, losses, key, layout=None):
  """A new state, placed by the layout."""
  params_key, critic_key = jax.random.split(key)
  video = jnp.zeros((1, 1, *cfg.stride[1:], 3))
  critic = {}
  if losses.adversarial_weight:
    critic = layouts.unbox(jax.jit(critics.Discriminator().init)(critic_key, video))["params"]
  state = _state(vae.init(params_key, cfg), critic, tx)
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, tx, losses, layout))
  return jax.tree.map(jnp.copy, state) if layout is None else jax.device_put(state, where, may_alias=False)


def gaussian_kl(mean, logvar):
  """KL(N(mean, var) || N(0, 1)), summed over all latents, in nats."""
  return 0.5 * jnp.sum(mean * mean + jnp.exp(logvar) - 1 - logvar)


def reconstruct(params, batch, key, cfg, layout=None):
  """{name: video [B, T, H, W, 3]} -> ({name: reconstruction from a sample of the posterior, not clipped}, KL in nats)."""
  model, found, kl = vae.VAE(cfg, layout), {}, 0.0
  for name, video in sorted(batch.items()):
    mean, logvar = model.apply({"params": params}, video, method="encode")
    noise = jax.random.normal(jax.random.fold_in(key, len(found)), mean.shape, mean.dtype)
    found[name] = model.apply({"params": params}, mean + jnp.exp(logvar / 2) * noise, method="decode")
    kl += gaussian_kl(mean, logvar)
  return found, kl


def mean_over(function, *batches):
  """Mean of function(video, ...) over all pixel values of clips and images together."""
  parts = [(function(*(batch[name] for batch in batches)), video.size) for name, video in batches[0].items()]
  return sum(value * size for value, size in parts) / sum(size for _, size in parts)


def train_step(state, batch, key, *, cfg, tx, losses, ema_decay, features=None, layout=None):
  """One update. (state, {"clips": [B, T, H, W, 3], "images": [B, 1, H, W, 3]} in [-1, 1], key of the run) -> (state, metrics).

  features: weights of VGG16 (weights/vgg16.py) for the perceptual term. An update whose loss or gradient is not finite leaves params,
  ema, opt and the critic as they were; `step` goes on, `bad` counts it, metrics["bad"] is 1.
  """
  if losses.perceptual_weight and features is None:
    raise ValueError("train_step: perceptual_weight needs `features`, the weights of VGG16")
  batch = {name: by_rows(layout, video) for name, video in batch.items() if video.shape[0]}
  values = sum(video.size for video in batch.values())
  forward = lambda params: reconstruct(params, batch, jax.random.fold_in(key, state.step), cfg, layout)  # noqa: E731
  (made, kl), pull = jax.vjp(forward, state.params)

  def likeness(made):
    l1 = mean_over(lambda a, b: jnp.mean(jnp.abs(a - b)), made, batch)
    if not losses.perceptual_weight:
      return l1, {"l1": l1}
    far = mean_over(lambda a, b: critics.perceptual_distance(features, a, b), made, batch)
    return l1 + losses.perceptual_weight * far, {"l1": l1, "perceptual": far}

  (loss, metrics), slope = jax.value_and_grad(likeness, has_aux=True)(made)
  critic, critic_opt, finite = state.critic, state.critic_opt, True
  if losses.adversarial_weight:
    slope, critic, critic_opt, judged = adversarial(state, made, batch, slope, pull, tx, losses, layout)
    finite, metrics = jnp.isfinite(judged["critic_loss"]), metrics | judged
  grads, = pull((slope, jnp.asarray(losses.kl_weight / values, kl.dtype)))
  loss += losses.kl_weight * kl / values
  grad_norm = optax.tree.norm(grads)
  finite &= jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  updates, opt = tx.update(grads, state.opt, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optim.ema_update(state.ema, params, state.step, ema_decay)
  old = (state.params, state.ema, state.opt, state.critic, state.critic_opt)
  params, ema, opt, critic, critic_opt = optim.keep_if_finite(finite, (params, ema, opt, critic, critic_opt), old)
  bad = 1 - finite.astype(jnp.int32)
  error = mean_over(lambda a, b: jnp.mean((jnp.clip(a, -1, 1) - b) ** 2), made, batch)
  metrics |= {"loss": loss, "kl": kl / values, "psnr": -10 * jnp.log10(error / 4), "grad_norm": grad_norm, "bad": bad}
  return VAETrainState(state.step + 1, params, ema, opt, state.bad + bad, critic, critic_opt), metrics


def adversarial(state, made, batch, slope, pull, tx, losses, layout):
  """The critic's part of a step -> (slope of the loss at the reconstructions with its share, critic, its optimiser, metrics).

  Before `adversarial_start` nothing of it runs.
  """
  judge = lambda critic, video: critics.Discriminator(layout).apply({"params": critic}, video)  # noqa: E731
  at_last = lambda slope: optax.tree.norm(pull((slope, jnp.zeros(())))[0]["decoder"]["conv_out"]["kernel"])  # noqa: E731

  def hinge(critic):
    real = mean_over(lambda video: jnp.mean(jax.nn.relu(1 - judge(critic, video))), batch)
    fake = mean_over(lambda video: jnp.mean(jax.nn.relu(1 + judge(critic, video))), made)
    return (real + fake) / 2

  def take_part():
    fooling, against = jax.value_and_grad(lambda made: -mean_over(lambda video: jnp.mean(judge(state.critic, video)), made))(made)
    share = losses.adversarial_weight * jnp.clip(at_last(slope) / (at_last(against) + 1e-4), 0, 1e4)
    critic_loss, grads = jax.value_and_grad(hinge)(state.critic)
    updates, critic_opt = tx.update(grads, state.critic_opt, state.critic)
    joint = jax.tree.map(lambda a, b: a + share * b, slope, against)
    return joint, optax.apply_updates(state.critic, updates), critic_opt, {
        "critic_loss": critic_loss, "adversarial": fooling, "adversarial_share": share}

  def stand_by():
    zero = jnp.zeros(())
    return slope, state.critic, state.critic_opt, {"critic_loss": zero, "adversarial": zero, "adversarial_share": zero}

  return jax.lax.cond(state.step >= losses.adversarial_start, take_part, stand_by)


def latent_statistics(params, clips, cfg):
  """Mean and standard deviation of each latent channel over the posterior means of clips [1 + 4n, H, W, 3] -> two arrays [z], float64."""
  total, square, count = np.zeros(cfg.z_dim), np.zeros(cfg.z_dim), 0
  for clip in clips:
    mean = np.asarray(vae.encode(params, clip[None], cfg)[0], np.float64)
    total += mean.sum((0, 1, 2, 3))
    square += (mean ** 2).sum((0, 1, 2, 3))
    count += mean[..., 0].size
  if not count:
    raise ValueError("latent_statistics: no clips")
  centre = total / count
  return centre, np.sqrt(np.maximum(square / count - centre ** 2, 1e-12))


def with_statistics(params, clips, cfg):
  """cfg with latents_mean and latents_std as measured on these clips."""
  mean, std = latent_statistics(params, clips, cfg)
  return dataclasses.replace(cfg, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
