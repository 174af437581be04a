"""Our samplers against the schedulers of diffusers, step for step, with the same velocity and sigmas."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
  DPMSolverMultistepScheduler,
  FlowMatchEulerDiscreteScheduler,
  UniPCMultistepScheduler,
)

from sora_jax.diffusion import flow, samplers


def velocity(x, sigma):
  """A smooth function of both, not linear in x."""
  return np.tanh(1.3 * x) * (1.5 - sigma) - 0.4 * np.cos(3 * x + 2 * sigma)


def jax_velocity(x, sigma, aux):
  """`velocity`, in jax."""
  return jnp.tanh(1.3 * x) * (1.5 - sigma) - 0.4 * jnp.cos(3 * x + 2 * sigma), aux


def theirs(kind, shift):
  if kind == "euler":
    return FlowMatchEulerDiscreteScheduler(shift=shift)
  scheduler = {"unipc": UniPCMultistepScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}[kind]
  return scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("kind", ["euler", "unipc", "dpmpp_2m"])
def test_step_for_step(kind, steps, shift):
  """With their sigmas, every x of our sampler equals theirs to 1e-4."""
  scheduler = theirs(kind, shift)
  scheduler.set_timesteps(steps)
  sigmas = scheduler.sigmas.numpy().astype(np.float32)
  assert sigmas[-1] == 0 and len(sigmas) == steps + 1
  ours, times = flow.schedule("diffusers", kind, steps, shift)
  np.testing.assert_allclose(ours, sigmas, atol=1e-6)
  np.testing.assert_allclose(1000 * times, scheduler.timesteps.numpy(), atol=1e-3)
  x = start = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
  wanted = torch.from_numpy(start)
  init, step = samplers.SAMPLERS[kind]
  carry = init(jnp.asarray(x), None)
  for t, sigma, sigma_next in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
    v = torch.from_numpy(velocity(wanted.numpy(), sigma).astype(np.float32))
    wanted = scheduler.step(v, t, wanted, return_dict=False)[0]
    x, carry = step(jax_velocity, x, carry, jnp.float32(sigma), jnp.float32(sigma_next), None)
    np.testing.assert_allclose(x, wanted.numpy(), atol=1e-4, err_msg=f"at sigma {sigma_next}")
  assert np.abs(np.asarray(x) - start).max() > 0.1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels(shift):
  """Our `shifted` is their shift. (Our sigmas begin at 1, theirs at 1 - 1/1000 or 1.)"""
  scheduler = theirs("euler", shift)
  scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
  np.testing.assert_allclose(
    flow.shifted(np.linspace(1, 0.1, 10), shift), scheduler.sigmas.numpy()[:-1], atol=1e-6
  )
