"""Training the video VAE: what a step is.

  loss = L1 + square_weight * L2 + kl_weight * KL + ssim_weight * (1 - SSIM) + perceptual_weight * VGG
         + lambda * adversarial_weight * (- D(reconstruction))

L1 is a mean over pixel values, KL a sum over latents divided by the same number of pixel values (the ratio of
arXiv:2112.10752 sec. G), posteriors are sampled. The adversarial part works as in VQGAN (arXiv:2012.09841,
eq. 7): hinge loss, from `adversarial_start` on, and lambda = |gradient of the rest| / |gradient of D|, both
at the decoder's last layer. Clips and images are one batch: each value counts the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from sora_jax import layout as layouts, metrics as image_quality, optim
from sora_jax.models import critics, vae
from sora_jax.models.vae_blocks import clips_alone, sharded

REST = ("step", "opt", "bad", "history", "critic", "critic_opt")  # fields of the state beside params and ema


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the terms; 0 leaves one out. `adversarial_start` is a step."""

  kl_weight: float = 1e-4
  # squared error beside L1, whose gradient alone keeps small things at the background for long
  square_weight: float = 4.0
  ssim_weight: float = 0.0
  adversarial_weight: float = 0.0
  adversarial_start: int = 0
  perceptual_weight: float = 0.0

  def __post_init__(self):
    if min(dataclasses.astuple(self)) < 0:
      raise ValueError(f"weights of losses and adversarial_start are 0 or more; not {self}")


def loss_config(config):
  """The page of configs/vae.py -> LossConfig."""
  if config.ssim_weight and min(config.data.crop) < image_quality.WINDOW:
    raise ValueError(
      f"data.crop is {config.data.crop}; SSIM needs {image_quality.WINDOW} x {image_quality.WINDOW} pixels"
    )
  return LossConfig(
    config.kl_weight,
    config.square_weight,
    config.ssim_weight,
    config.adversarial.weight,
    config.adversarial.start,
    config.perceptual.weight,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class VAETrainState:
  """All that training carries from step to step.

  `bad` tells of updates that were left out lately (optim.count_bad), `history` is what the next one is
  compared with (optim.judge); critic: {} without the adversarial term.
  """

  step: jax.Array
  params: dict
  ema: dict
  opt: tuple
  bad: jax.Array
  history: jax.Array  # [2, W]
  critic: dict
  critic_opt: tuple


CRITIC = optax.adam(1e-4, b1=0.5, b2=0.9)  # taming-transformers, vqgan.py


def boxed_weights(cfg):
  """Shapes of the weights with their logical axes."""
  return jax.eval_shape(vae.VAE(cfg).init, jax.random.key(0), jnp.zeros((1, 1, *cfg.stride[1:], 3)))["params"]


def abstract_state(cfg, tx, losses, layout=None):
  """State of ShapeDtypeStructs, with shardings if there is a layout: what a checkpoint is restored into."""
  critic = jax.eval_shape(
    critics.Discriminator().init, jax.random.key(0), jnp.zeros((1, 1, *cfg.stride[1:], 3))
  )["params"]
  params, opt = optim.abstract(tx, boxed_weights(cfg), layout)
  critic, critic_opt = optim.abstract(CRITIC, critic if losses.adversarial_weight else {}, layout)

  def everywhere(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=None if layout is None else layout.fitted(shape))

  scalar, history = everywhere((), jnp.int32), everywhere((2, optim.WINDOW), jnp.float32)
  return VAETrainState(scalar, params, params, opt, scalar, history, critic, critic_opt)


def init_state(cfg, tx, losses, key, layout=None, video_BTHWC=None, params=None):
  """A new state, placed by the layout. `params`: weights to start from, instead of random ones.
  `video_BTHWC`: some clips in [-1, 1], for a VAE with a linear codec to begin with."""
  params_key, critic_key = jax.random.split(key)
  critic = {}
  if losses.adversarial_weight:
    critic = layouts.unbox(
      jax.jit(critics.Discriminator().init)(critic_key, jnp.zeros((1, 1, *cfg.stride[1:], 3)))
    )["params"]
  params = vae.init(params_key, cfg) if params is None else params
  if cfg.linear and video_BTHWC is not None:
    params = vae.fit_linear(params, cfg, video_BTHWC)
  zero = jnp.zeros((), jnp.int32)
  history, critic_opt = optim.no_history(), CRITIC.init(critic)
  state = VAETrainState(zero, params, params, tx.init(params), zero, history, critic, critic_opt)
  if layout is None:
    return jax.tree.map(jnp.copy, state)
  state = multihost_utils.broadcast_one_to_all(state)  # no two processes begin with other weights
  return jax.tree.map(_placed, state, shardings(cfg, tx, losses, layout))


def _placed(x, sharding):
  """A whole array of each process, as one that is cut over their devices. (jax.device_put compares those of
  the processes, and refuses NaN, with which the history of losses begins.)"""
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))


def shardings(cfg, tx, losses, layout):
  """Where the leaves of a state live; None without a layout."""
  return (
    None
    if layout is None
    else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, tx, losses, layout))
  )


def gaussian_kl(mean, logvar):
  """KL(N(mean, var) || N(0, 1)), summed over all latents, in nats."""
  return 0.5 * jnp.sum(mean * mean + jnp.exp(logvar) - 1 - logvar)


def reconstruct(params, batch, key, cfg, layout=None):
  """{name: video [B, T, H, W, 3]} -> ({name: reconstruction from a sample of the posterior, not clipped}, KL
  in nats).
  """
  model, reconstructions, kl = vae.VAE(cfg, clips_alone(layout)), {}, 0.0
  for name, video in sorted(batch.items()):
    mean, logvar = model.apply({"params": params}, video, method="encode")
    noise = jax.random.normal(jax.random.fold_in(key, len(reconstructions)), mean.shape, mean.dtype)
    reconstructions[name] = model.apply(
      {"params": params}, mean + jnp.exp(logvar / 2) * noise, method="decode"
    )
    kl += gaussian_kl(mean, logvar)
  return reconstructions, kl


def mean_over(function, *batches):
  """Mean of function(video, ...) over all pixel values of clips and images together."""
  parts = [(function(*(batch[name] for batch in batches)), video.size) for name, video in batches[0].items()]
  return sum(value * size for value, size in parts) / sum(size for _, size in parts)


def train_step(
  state, batch, key, *, cfg, tx, losses, ema_decay, spike=0.0, features=None, layout=None, decoder_only=False
):
  """One update. (state, {"clips": [B, T, H, W, 3], "images": [B, 1, H, W, 3]} in [-1, 1], key of the run) ->
  (state, metrics).

  features: weights of VGG16 (weights/vgg16.py) for the perceptual term. decoder_only: what latents depend on
  stays, bit by bit, so that records and DiTs of them stay good (as the public `sd-vae-ft-mse` was made). An
  update whose loss or gradient is not finite, or a spike (optim.judge), leaves params, ema, opt and the
  critic as they were; `step` goes on, `bad` counts it, and metrics["not_finite"] or metrics["spike"] is 1.
  """
  if losses.perceptual_weight and features is None:
    raise ValueError("train_step: perceptual_weight needs `features`, the weights of VGG16")
  batch = {name: sharded(clips_alone(layout), video) for name, video in batch.items() if video.shape[0]}
  values = sum(video.size for video in batch.values())
  kept = [name for name in vae.ENCODER if decoder_only and name in state.params]

  def forward(params):
    params = params | {name: jax.lax.stop_gradient(params[name]) for name in kept}
    return reconstruct(params, batch, jax.random.fold_in(key, state.step), cfg, layout)

  (reconstruction, kl), vjp = jax.vjp(forward, state.params)

  def distance(reconstruction):
    l1 = mean_over(lambda a, b: jnp.mean(jnp.abs(a - b)), reconstruction, batch)
    loss, terms = (
      l1 + losses.square_weight * mean_over(lambda a, b: jnp.mean(jnp.square(a - b)), reconstruction, batch),
      {"l1": l1},
    )
    if losses.ssim_weight:
      terms["ssim"] = mean_over(
        lambda a, b: jnp.mean(image_quality.ssim_map(a / 2 + 0.5, b / 2 + 0.5)), reconstruction, batch
      )
      loss += losses.ssim_weight * (1 - terms["ssim"])
    if losses.perceptual_weight:
      terms["perceptual"] = mean_over(
        lambda a, b: critics.perceptual_distance(features, a, b), reconstruction, batch
      )
      loss += losses.perceptual_weight * terms["perceptual"]
    return loss, terms

  (loss, metrics), grad = jax.value_and_grad(distance, has_aux=True)(reconstruction)
  critic, critic_opt, sound = state.critic, state.critic_opt, True
  if losses.adversarial_weight:
    grad, critic, critic_opt, judged = adversarial(state, reconstruction, batch, grad, vjp, losses, layout)
    sound, metrics = jnp.isfinite(judged["critic_loss"]), metrics | judged
  (grads,) = vjp((grad, jnp.asarray(losses.kl_weight / values, kl.dtype)))
  loss += losses.kl_weight * kl / values
  grad_norm = optax.tree.norm(grads)
  finite, spiking, history = optim.judge(state.history, state.step, loss, grad_norm, spike)
  finite &= sound
  taken = finite & ~spiking

  updates, opt = tx.update(grads, state.opt, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optim.ema_update(state.ema, params, state.step, ema_decay)
  params, ema = (
    {**new, **{name: old[name] for name in kept}} for new, old in ((params, state.params), (ema, state.ema))
  )
  old = (state.params, state.ema, state.opt, state.critic, state.critic_opt)
  params, ema, opt, critic, critic_opt = optim.keep_if(taken, (params, ema, opt, critic, critic_opt), old)
  bad = optim.count_bad(state.bad, taken)
  error = mean_over(lambda a, b: jnp.mean((jnp.clip(a, -1, 1) - b) ** 2), reconstruction, batch)
  metrics |= {
    "loss": loss,
    "kl": kl / values,
    "psnr": -10 * jnp.log10(error / 4),
    "grad_norm": grad_norm,
    "bad": bad,
    "not_finite": (~finite).astype(jnp.int32),
    "spike": spiking.astype(jnp.int32),
  }
  return VAETrainState(state.step + 1, params, ema, opt, bad, history, critic, critic_opt), metrics


def jit_step(cfg, tx, losses, *, ema_decay, spike=0.0, layout=None, decoder_only=False):
  """The compiled update, (VAETrainState, batch, key, features=None) -> (VAETrainState, metrics), see
  `train_step`. It donates the state.
  """
  settings = {
    "cfg": cfg,
    "tx": tx,
    "losses": losses,
    "ema_decay": ema_decay,
    "spike": spike,
    "layout": layout,
    "decoder_only": decoder_only,
  }

  def step(state, batch, key, features=None):
    return train_step(state, batch, key, features=features, **settings)

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings(cfg, tx, losses, layout), None))


def batch_shapes(clips, images, frames, size, layout=None):
  """A batch of ShapeDtypeStructs: so many clips of `frames` frames and images of one, each of `size` (height,
  width), in [-1, 1].
  """
  shapes = {"clips": (clips, frames, *size, 3), "images": (images, 1, *size, 3)}
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(shape, layout))
    for name, shape in shapes.items()
  }


def batch_sharding(shape, layout):
  """Where an array of a batch lives: rows are cut over the mesh's data and fsdp axes."""
  return None if layout is None else layout.fitted(shape, "act_batch")


def adversarial(state, reconstruction, batch, grad, vjp, losses, layout):
  """The critic's part of a step -> (gradient at the reconstructions with its share, critic, its optimiser,
  metrics).

  Before `adversarial_start` nothing of it runs.
  """

  def norm_at_last_layer(grad):
    return optax.tree.norm(vjp((grad, jnp.zeros(())))[0]["decoder"]["conv_out"]["kernel"])

  def judge(critic, video):
    return critics.Discriminator(layout).apply({"params": critic}, video)

  def hinge(critic):
    real = mean_over(lambda video: jnp.mean(jax.nn.relu(1 - judge(critic, video))), batch)
    fake = mean_over(lambda video: jnp.mean(jax.nn.relu(1 + judge(critic, video))), reconstruction)
    return (real + fake) / 2

  def fool(reconstruction):
    return -mean_over(lambda video: jnp.mean(judge(state.critic, video)), reconstruction)

  def take_part():
    adversarial_loss, adversarial_grad = jax.value_and_grad(fool)(reconstruction)
    ratio = norm_at_last_layer(grad) / (norm_at_last_layer(adversarial_grad) + 1e-4)
    share = losses.adversarial_weight * jnp.clip(ratio, 0, 1e4)
    critic_loss, grads = jax.value_and_grad(hinge)(state.critic)
    updates, critic_opt = CRITIC.update(grads, state.critic_opt, state.critic)
    joint = jax.tree.map(lambda a, b: a + share * b, grad, adversarial_grad)
    return (
      joint,
      optax.apply_updates(state.critic, updates),
      critic_opt,
      {"critic_loss": critic_loss, "adversarial": adversarial_loss, "adversarial_share": share},
    )

  def stand_by():
    zero = jnp.zeros(())
    return (
      grad,
      state.critic,
      state.critic_opt,
      {"critic_loss": zero, "adversarial": zero, "adversarial_share": zero},
    )

  return jax.lax.cond(state.step >= losses.adversarial_start, take_part, stand_by)


def with_statistics(latents, cfg):
  """cfg with the mean and standard deviation of each channel over raw latents, a list of [t, h, w, z].

  ValueError where there are none.
  """
  if not latents:
    raise ValueError("with_statistics: no latents")
  every_NC = np.concatenate([np.asarray(one, np.float64).reshape(-1, cfg.z_dim) for one in latents])
  return dataclasses.replace(
    cfg,
    latents_mean=tuple(every_NC.mean(0).tolist()),
    latents_std=tuple(np.maximum(every_NC.std(0), 1e-6).tolist()),
  )
