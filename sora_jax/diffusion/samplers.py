"""Samplers: integrate dx/dsigma = velocity(x, sigma) from noise (sigma 1) to data (sigma 0).

A sampler is a pair of functions; the loop is the caller's:

  init(x, aux)                                             -> carry
  step(velocity, x, carry, sigma, sigma_next, noise)       -> (x, carry)

`velocity`: (x, sigma, aux) -> (dx/dsigma, aux). aux belongs to the caller (for example caches) and is kept in
the carry. Sigmas broadcast against x: [] or [B, L, 1]; where both are 0, x is unchanged. `noise`: standard
normal, as x, new at each step, for those in STOCHASTIC; the others ignore it.

  euler      first order, one evaluation a step
  heun       second order, two evaluations a step       Karras et al., arXiv:2206.00364, Alg. 1
  dpmpp_2m   second order, one evaluation a step        Lu et al., DPM-Solver++, arXiv:2211.01095, Alg. 2
  unipc      the same, and each evaluation corrects the step before it; Zhao et al., UniPC, arXiv:2302.04867
  renoise    the predicted data, noised anew to the next sigma; for models that were distilled to few steps
             Song et al., Consistency Models, arXiv:2303.01469, Alg. 1; Yin et al., DMD2, arXiv:2405.14867
"""

import jax.numpy as jnp


def no_carry(x, aux=None):
  """Carry of the samplers without a state of their own: the caller's aux."""
  del x
  return aux


def euler_step(velocity, x, carry, sigma, sigma_next, noise):
  """One explicit Euler step."""
  del noise
  v, aux = velocity(x, sigma, carry)
  return x + (sigma_next - sigma) * v, aux


def heun_step(velocity, x, carry, sigma, sigma_next, noise):
  """One step of the trapezoidal rule.

  Unlike in Karras et al., the last step, to sigma 0, is corrected too: our velocity is finite there.
  """
  del noise
  v, aux = velocity(x, sigma, carry)
  v_next, aux = velocity(x + (sigma_next - sigma) * v, sigma_next, aux)
  return x + (sigma_next - sigma) * (v + v_next) / 2, aux


def dpmpp_init(x, aux=None):
  """Carry of `dpmpp_2m`: data prediction and sigma of the last evaluation."""
  return {
    "aux": aux,
    "count": jnp.zeros((), jnp.int32),
    "data": jnp.zeros_like(x),
    "sigma": jnp.zeros_like(x),
  }


def dpmpp_step(velocity, x, carry, sigma, sigma_next, noise):
  """One step of DPM-Solver++(2M): the predictor of `unipc_step` alone, `DPMSolverMultistepScheduler` of
  diffusers, with which tests/oracle compares it.
  """
  del noise
  sigma, sigma_next = (jnp.broadcast_to(s, x.shape).astype(x.dtype) for s in (sigma, sigma_next))
  v, aux = velocity(x, sigma, carry["aux"])
  data = x - sigma * v
  predicted = _predict(x, data, sigma, sigma_next, carry["data"], carry["sigma"], carry["count"] == 0)
  x_next = jnp.where(sigma_next > 0, predicted, data)
  carry = {"aux": aux, "count": carry["count"] + 1, "data": data, "sigma": sigma}
  return jnp.where(sigma > 0, x_next, x), carry


def unipc_init(x, aux=None):
  """Carry of `unipc`: data predictions and sigmas of the last two evaluations, and the last corrected x."""
  history = {name: jnp.zeros_like(x) for name in ("x", "data", "sigma", "data_before", "sigma_before")}
  return {"aux": aux, "count": jnp.zeros((), jnp.int32), **history}


def unipc_step(velocity, x, carry, sigma, sigma_next, noise):
  """One step of UniPC-2 with B(h) = expm1(h) and data prediction.

  The new evaluation corrects the last step (UniC), then predicts the next (UniP).

  With m the predicted data, lambda = log((1 - sigma) / sigma) and h = lambda_next - lambda, the linear part
  is solved exactly (DPM-Solver++, arXiv:2211.01095, eq. 9): x_next = (sigma_next / sigma) x - alpha_next
  expm1(-h) (m + differences of m). The orders of the steps are 1, 2, 2, ... The step to sigma 0, where h is
  infinite, is of first order: x_next = m (`lower_order_final` of diffusers' UniPCMultistepScheduler, with
  which tests/oracle compares this function).
  """
  del noise
  sigma, sigma_next = (jnp.broadcast_to(s, x.shape).astype(x.dtype) for s in (sigma, sigma_next))
  v, aux = velocity(x, sigma, carry["aux"])
  data = x - sigma * v  # from x before its correction, as in UniPC: one evaluation a step
  first, second = carry["count"] == 0, carry["count"] == 1
  x = jnp.where(first | (sigma <= 0), x, _correct(carry, data, sigma, second))
  predicted = _predict(x, data, sigma, sigma_next, carry["data"], carry["sigma"], first)
  carry = {
    "aux": aux,
    "count": carry["count"] + 1,
    "x": x,
    "data": data,
    "sigma": sigma,
    "data_before": carry["data"],
    "sigma_before": carry["sigma"],
  }
  x_next = jnp.where(sigma_next > 0, predicted, data)
  return jnp.where(sigma > 0, x_next, x), carry


def _lambda(sigma):
  """Half the log signal-to-noise ratio, log(1 - sigma) - log(sigma), clipped to be finite at both ends."""
  sigma = jnp.clip(sigma, 1e-6, 1 - 1e-6)
  return jnp.log1p(-sigma) - jnp.log(sigma)


def _nonzero(h):
  return jnp.where(h == 0, 1.0, h)


def _linear(x, data, sigma, sigma_next):
  """The linear part of a step -> (first-order update, its h, the factor of the differences of m)."""
  h = _nonzero(_lambda(sigma_next) - _lambda(sigma))
  factor = -(1 - sigma_next) * jnp.expm1(-h)
  update = sigma_next / jnp.where(sigma > 0, sigma, 1.0) * x + factor * data
  return update, h, factor


def _predict(x, data, sigma, sigma_next, data_before, sigma_before, first):
  """UniP-2: x at sigma_next, from the data predictions of this evaluation and the one before.

  first: there is no evaluation before.
  """
  linear, h, factor = _linear(x, data, sigma, sigma_next)
  ratio = _nonzero((_lambda(sigma_before) - _lambda(sigma)) / h)
  return linear + jnp.where(first, 0.0, factor * 0.5 * (data_before - data) / ratio)


def _correct(carry, data_now, sigma_now, second):
  """UniC: x at sigma_now once more, from the last x and the data prediction at sigma_now.

  second: there is only one evaluation before.
  """
  linear, h, factor = _linear(carry["x"], carry["data"], carry["sigma"], sigma_now)
  ratio = _nonzero((_lambda(carry["sigma_before"]) - _lambda(carry["sigma"])) / h)
  phi_1 = jnp.expm1(-h)
  phi_2 = phi_1 / -h - 1
  phi_3 = phi_2 / -h - 0.5
  b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1  # [1 1; ratio 1] [a c] = [b_1 b_2], arXiv:2302.04867, eq. 8
  a = (b_1 - b_2) / _nonzero(1 - ratio)
  difference = (carry["data_before"] - carry["data"]) / ratio
  jump = data_now - carry["data"]
  return linear + factor * jnp.where(second, 0.5 * jump, a * difference + (b_1 - a) * jump)


def renoise_step(velocity, x, carry, sigma, sigma_next, noise):
  """The predicted data, x - sigma v, at sigma_next, with new noise."""
  v, aux = velocity(x, sigma, carry)
  return (1 - sigma_next) * (x - sigma * v) + sigma_next * noise, aux


SAMPLERS = {
  "euler": (no_carry, euler_step),
  "heun": (no_carry, heun_step),
  "unipc": (unipc_init, unipc_step),
  "dpmpp_2m": (dpmpp_init, dpmpp_step),
  "renoise": (no_carry, renoise_step),
}
STOCHASTIC = ("renoise",)
