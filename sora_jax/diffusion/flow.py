"""Flow matching: the path from data to noise, the loss, and the distribution of noise levels.

  x_sigma  = (1 - sigma) * data + sigma * noise          sigma in [0, 1]: 0 is data, 1 is noise
  velocity = dx/dsigma = noise - data                    what the model predicts; data = x - sigma * velocity
  loss     = E weight(sigma) |model(x_sigma, sigma, text) - velocity|^2

Lipman et al., Flow Matching, arXiv:2210.02747; Liu et al., Rectified Flow, arXiv:2209.03003. Sigma is drawn
from a logit-normal distribution and shifted towards noise, more for longer clips (Esser et al., SD3,
arXiv:2403.03206, sec. 3.1 and 5.3.2):

  sigma' = shift * sigma / (1 + (shift - 1) * sigma)

Laws (tests/diffusion/test_flow.py): the sigma of a clip depends only on (key, uid, epoch), the noise of a
token only on (key, uid, epoch; t, y, x). Neither depends on the clip's neighbours in a row, nor on its row,
host or position.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SigmaConfig:
  """Distribution of sigma in training. Raises ValueError for values out of range."""

  mean: float = 0.0  # of the logit-normal
  std: float = 1.0
  base_shift: float = 1.0  # the shift of a clip of `base_tokens`
  base_tokens: int = 256
  shift_power: float = 0.5  # shift = base_shift * (tokens / base_tokens) ** shift_power; SD3 eq. 23 has 0.5
  uniform: float = 0.1  # share of clips whose sigma is drawn uniformly, so that both ends are trained
  # Below this sigma an error counts (sigma / light)^2, as the same error of the data does at every sigma
  # (compare Min-SNR, arXiv:2303.09556); 0: all errors of velocity count the same.
  light: float = 0.0
  low: float = 0.0  # sigma lies in [low, high]: the range of an expert
  high: float = 1.0

  def __post_init__(self):
    positive = self.std > 0 and self.base_shift > 0 and self.base_tokens >= 1
    shares = 0 <= self.uniform <= 1 and 0 <= self.light <= 1
    if not positive or not shares or not 0 <= self.low < self.high <= 1:
      raise ValueError(
        "sigma needs std > 0, base_shift > 0, base_tokens >= 1, 0 <= uniform <= 1, 0 <= light <= 1, "
        f"0 <= low < high <= 1; not {self}"
      )


def interpolate(data, noise, sigma):
  """x at noise level sigma. sigma broadcasts against data."""
  return (1 - sigma) * data + sigma * noise


def shifted(sigma, shift):
  """Sigma, moved towards 1 by shift > 1. Shift 1 is the identity; 0 and 1 are fixed points. SD3 eq. 23."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def uniform_schedule(steps, shift, start=1.0):
  """Noise levels of a sampling job, [steps + 1] from `start` down to 0, and the model's time at each step.

  The times are the noise levels.
  """
  sigmas = shifted(np.linspace(start, 0.0, steps + 1), shift)
  return sigmas, sigmas[:-1]


def unipc_schedule(steps, shift, start=1.0):
  """The schedule of `UniPCMultistepScheduler` of diffusers 0.42.1 with flow sigmas.

  Sigmas are float32, the first is 1 - 1e-6, and the last step goes from a sigma near 1/1000 to 0. The model's
  times are truncated to thousandths.
  """
  sigmas = shifted(np.linspace(start, start / 1000, steps + 1)[:-1], shift)
  if abs(sigmas[0] - 1) < 1e-6:
    sigmas[0] -= 1e-6
  return np.append(sigmas, 0.0).astype(np.float32), np.trunc(1000 * sigmas) / 1000


def dpmpp_schedule(steps, shift, start=1.0):
  """The schedule of `DPMSolverMultistepScheduler` of diffusers 0.42.1 with flow sigmas: from 0.999 to 0."""
  sigmas = shifted(np.linspace(start * 0.999, 0.0, steps + 1)[:-1], shift)
  return np.append(sigmas, 0.0).astype(np.float32), np.trunc(1000 * sigmas) / 1000


def euler_schedule(steps, shift, start=1.0):
  """The schedule of `FlowMatchEulerDiscreteScheduler` of diffusers 0.42.1.

  It shifts twice: first the ends of the range, then all sigmas of the range.
  """
  last = float(shifted(np.float32(1 / 1000), np.float32(shift)))
  sigmas = shifted(np.linspace(1000 * start, 1000 * last, steps) / 1000, shift).astype(np.float32)
  return np.append(sigmas, np.float32(0.0)), sigmas


# Keyed by kind, then sampler. Public models are sampled with "diffusers". A sampler without an entry uses
# uniform_schedule.
SCHEDULES = {
  "uniform": {},
  "diffusers": {"unipc": unipc_schedule, "euler": euler_schedule, "dpmpp_2m": dpmpp_schedule},
}


def schedule(kind, sampler, steps, shift, start=1.0):
  """The schedule of a kind and a sampler -> (sigmas [steps + 1], times [steps])."""
  return SCHEDULES[kind].get(sampler, uniform_schedule)(steps, shift, start)


def listed_schedule(times, start=1.0):
  """Times as public few-step models name them, falling from 1000 (sigma 1) -> (sigmas [n + 1], times [n]).

  start: the noise level that the first must not exceed; the last is taken in any case.
  """
  sigmas = np.array([time / 1000 for time in times], np.float32)
  kept = sigmas[sigmas <= start + 1e-6] if (sigmas <= start + 1e-6).any() else sigmas[-1:]
  return np.append(kept, np.float32(0.0)), kept


def token_shift(tokens, cfg):
  """The shift of a clip of `tokens` tokens (number or array).

  It grows with tokens ** shift_power, and is clipped to [1 / 4, 16].
  """
  return jnp.clip(cfg.base_shift * (tokens / cfg.base_tokens) ** cfg.shift_power, 0.25, 16.0)


def clip_keys(key, uid_BG2, epoch_BG):
  """One key for each clip, [B, G], from a run's key, the clip's uid and its epoch, whatever its row."""

  def one(uid_2, epoch):
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, uid_2[0]), uid_2[1]), epoch)

  return jax.vmap(jax.vmap(one))(uid_BG2, epoch_BG)


def draw_sigma(keys_BG, tokens_BG, cfg):
  """Keys and token counts of clips -> sigma of each clip, [B, G] float32 in (0, 1)."""

  def standard_logit(p):
    return (jnp.log(p) - jnp.log1p(-p) - cfg.mean) / cfg.std

  def one(key, tokens):
    normal, uniform, which = jax.random.split(key, 3)
    shift = token_shift(tokens, cfg)
    if (cfg.low, cfg.high) == (0.0, 1.0):
      z, low, high = jax.random.normal(normal), 0.0, 1.0
    else:  # both distributions are truncated so that the shifted sigma is in the range
      low, high = shifted(cfg.low, 1 / shift), shifted(cfg.high, 1 / shift)
      z = jax.random.truncated_normal(normal, standard_logit(low), standard_logit(high))
    logit_normal = jax.nn.sigmoid(cfg.mean + cfg.std * z)
    is_uniform = jax.random.uniform(which) < cfg.uniform
    sigma = jnp.where(is_uniform, jax.random.uniform(uniform, minval=low, maxval=high), logit_normal)
    return shifted(sigma, shift)

  return jax.vmap(jax.vmap(one))(keys_BG, jnp.maximum(tokens_BG, 1).astype(jnp.float32))


def token_noise(keys_BG, segment_BL, coords_BL3, width):
  """Standard normal noise, [B, L, width]; zeros in padding.

  The noise of a token depends on the key of its clip and on its t, y, x.
  """

  def one(keys_G, segment, coords_3):
    key = keys_G[jnp.maximum(segment - 1, 0)]
    for word in jax.lax.bitcast_convert_type(coords_3, jnp.uint32):
      key = jax.random.fold_in(key, word)
    return jnp.where(segment > 0, jax.random.normal(key, (width,)), 0.0)

  return jax.vmap(jax.vmap(one, (None, 0, 0)))(keys_BG, segment_BL, coords_BL3.astype(jnp.float32))


def token_sigma(sigma_BG, segment_BL, given_BL):
  """Sigma of each clip -> (sigma_BU, sigma_index_BL).

  sigma_BU holds the distinct values of a row. Its entry 0 is 0, for given tokens and padding.
  """
  sigma_BU = jnp.concatenate([jnp.zeros_like(sigma_BG[:, :1]), sigma_BG], axis=1)
  return sigma_BU, jnp.where(given_BL, 0, segment_BL)


def gather_sigma(sigma_BU, sigma_index_BL):
  """Sigma of each token, [B, L, 1], which broadcasts against tokens."""
  return jnp.take_along_axis(sigma_BU, sigma_index_BL, axis=1)[..., None]


def loss_weight(sigma, cfg):
  """The weight of the squared error of a velocity at noise level sigma.

  Since velocity = (x - data) / sigma, a model of the data otherwise spends itself on the least noise.
  """
  return jnp.minimum(1.0, jnp.square(sigma / cfg.light)) if cfg.light else jnp.ones_like(sigma)


def velocity_loss(predicted_BLP, data_BLP, noise_BLP, segment_BL, given_BL, weight_BL=1.0):
  """(sum over tokens of the mean squared error of a token's velocity, times weight_BL; number of tokens).

  Given tokens and padding are left out. Divide the sums over all rows and hosts, so that every token has the
  same weight.
  """
  counts_BL = (segment_BL > 0) & ~given_BL
  velocity_BLP = noise_BLP - data_BLP
  error_BL = jnp.mean(jnp.square(predicted_BLP.astype(jnp.float32) - velocity_BLP), axis=-1) * weight_BL
  return jnp.sum(jnp.where(counts_BL, error_BL, 0.0)), jnp.sum(counts_BL)
