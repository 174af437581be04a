"""Samplers on an ODE with a known solution: the flow from N(0, 1) noise to data of one Gaussian."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import flow, samplers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "schedulers.npz"

MEAN, STD = 0.7, 0.4


def exact_velocity(x, sigma, aux):
  """Marginal velocity of the path from N(MEAN, STD^2) data to N(0, 1) noise.

  Albergo et al., arXiv:2303.08797, Gaussian case.
  """
  variance = (1 - sigma) ** 2 * STD**2 + sigma**2
  factor = (sigma - (1 - sigma) * STD**2) / variance
  return -MEAN + factor * (x - (1 - sigma) * MEAN), aux


def exact_end(noise, sigma=1.0):
  """Data at the end of the flow from `noise`: the monotone map between the two Gaussians."""
  start = np.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)
  return MEAN + STD * (noise - (1 - sigma) * MEAN) / start


def run(name, x, sigmas, velocity=exact_velocity):
  init, step = samplers.SAMPLERS[name]
  carry = init(x, None)
  for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
    x, carry = step(velocity, x, carry, jnp.float32(sigma), jnp.float32(sigma_next), 0.5 * np.ones_like(x))
  return np.asarray(x)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("unipc", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
  """Twice the steps divide the error by at least 2^order (UniPC's corrector adds up to one order).

  The numbers of steps are such that float32 does not limit the error.
  """
  x = np.linspace(-2, 2, 7).astype(np.float32)
  errors = []
  for steps in (16, 32, 64):
    sigmas = np.linspace(0.9, 0.2, steps + 1)
    half = run(name, x, sigmas)
    width = np.sqrt(0.8**2 * STD**2 + 0.2**2), np.sqrt(0.1**2 * STD**2 + 0.9**2)
    exact = 0.8 * MEAN + width[0] * (x - 0.1 * MEAN) / width[1]
    errors.append(np.abs(half - exact).max())
  rates = np.log2(np.asarray(errors[:-1]) / errors[1:])
  assert (rates > order - 0.35).all(), (errors, rates)
  if order == 1:
    assert (rates < 1.5).all()  # the test distinguishes orders


@pytest.mark.parametrize("name", sorted(set(samplers.SAMPLERS) - set(samplers.STOCHASTIC)))
def test_reaches_the_data(name):
  """From pure noise to sigma 0 in 40 steps."""
  x = np.linspace(-2, 2, 7).astype(np.float32)
  end = run(name, x, np.linspace(1, 0, 41))
  np.testing.assert_allclose(end, exact_end(x), atol={"euler": 4e-2, "dpmpp_2m": 1e-2}.get(name, 3e-3))


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_given_tokens_stay_and_do_not_disturb(name):
  """Tokens at sigma 0 keep their values bit for bit; the others are sampled as if alone."""
  x = np.linspace(-2, 2, 6).astype(np.float32).reshape(1, 6, 1)
  given = np.asarray([1, 0, 0, 1, 0, 0], bool).reshape(1, 6, 1)
  init, step = samplers.SAMPLERS[name]
  mixed, carry = x, init(x, None)
  for sigma, sigma_next in zip(np.linspace(1, 0, 9)[:-1], np.linspace(1, 0, 9)[1:], strict=True):
    per_token = [jnp.where(given, 0.0, s).astype(jnp.float32) for s in (sigma, sigma_next)]
    mixed, carry = step(exact_velocity, mixed, carry, *per_token, 0.5 * np.ones_like(x))
  np.testing.assert_array_equal(np.asarray(mixed)[given], x[given])
  np.testing.assert_allclose(np.asarray(mixed)[~given], run(name, x, np.linspace(1, 0, 9))[~given], atol=1e-6)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_loop_in_jit(name):
  """init and step give the same in lax.scan, with an aux that counts evaluations."""
  sigmas = jnp.linspace(1, 0, 6)
  init, step = samplers.SAMPLERS[name]

  def counted(x, sigma, aux):
    return exact_velocity(x, sigma, aux)[0], aux + 1

  @jax.jit
  def sample(x):
    def body(state, pair):
      x, carry = state
      return step(counted, x, carry, pair[0], pair[1], 0.5 * jnp.ones_like(x)), None

    (x, carry), _ = jax.lax.scan(body, (x, init(x, jnp.zeros((), jnp.int32))), (sigmas[:-1], sigmas[1:]))
    return x, carry["aux"] if isinstance(carry, dict) else carry

  x = np.linspace(-1, 1, 5).astype(np.float32)
  end, evaluations = sample(x)
  np.testing.assert_allclose(end, run(name, x, np.asarray(sigmas)), atol=1e-5)
  assert int(evaluations) == (10 if name == "heun" else 5)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_steps_are_those_of_diffusers(name):
  """Sigmas, times and every x are those of diffusers (golden/make.py), at 1, 2, 3, 10 and 50 steps."""
  golden = np.load(GOLDEN)
  init, step = samplers.SAMPLERS[name]

  def velocity(x, sigma, time):
    return jnp.tanh(1.3 * x) * (1.5 - time) - 0.4 * jnp.cos(3 * x + 2 * time), time

  jitted_step = jax.jit(lambda *state: step(velocity, *state, None))
  for key in [key for key in golden if key.startswith(name) and key.endswith("_x")]:
    _, steps, shift, _ = key.split("_")
    sigmas, times = flow.schedule("diffusers", name, int(steps), float(shift))
    np.testing.assert_allclose(sigmas, golden[key[:-1] + "sigmas"], atol=1e-7)
    np.testing.assert_allclose(1000 * times, golden[key[:-1] + "times"], atol=1e-3)
    x, carry = golden["start"], init(golden["start"], jnp.float32(0))
    for i, time in enumerate(times):  # the aux of the sampler is the time here
      carry = carry | {"aux": jnp.float32(time)} if name == "unipc" else jnp.float32(time)
      x, carry = jitted_step(x, carry, jnp.float32(sigmas[i]), jnp.float32(sigmas[i + 1]))
      np.testing.assert_allclose(x, golden[key][i], atol=1e-5, err_msg=f"{key} after step {i + 1}")


def test_renoise_goes_by_predicted_data_and_new_noise():
  """Of a model that knows its data, each step is that data, noised anew to the next level; the last is it."""
  data, rng = np.linspace(-1, 1, 5).astype(np.float32), np.random.default_rng(0)
  sigmas, times = flow.listed_schedule((1000, 757, 522))
  np.testing.assert_allclose(sigmas, [1, 0.757, 0.522, 0])
  np.testing.assert_array_equal(times, sigmas[:-1])
  init, step = samplers.SAMPLERS["renoise"]
  x, carry = rng.normal(size=5).astype(np.float32), init(None)
  for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
    noise = rng.normal(size=5).astype(np.float32)
    x, carry = step(lambda x, sigma, aux: ((x - data) / sigma, aux), x, carry, sigma, sigma_next, noise)
    np.testing.assert_allclose(x, flow.interpolate(data, noise, sigma_next), atol=1e-6)
  np.testing.assert_allclose(x, data, atol=1e-6)


def test_listed_times_from_a_noise_level_on():
  """Of an edit: those up to its level, or the last."""
  np.testing.assert_allclose(flow.listed_schedule((1000, 757, 522), 0.8)[0], [0.757, 0.522, 0])
  np.testing.assert_allclose(flow.listed_schedule((1000, 757, 522), 0.1)[0], [0.522, 0])
