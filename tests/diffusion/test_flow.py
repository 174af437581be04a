"""Laws of the noise: it depends on the clip and the position, not on the row, the host or neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import batch as batches, patches
from sora_jax.diffusion import flow

PATCH = (1, 2, 2)


def make_clip(uid, thw, epoch=0, text=3):
  """A clip of random latents with 4 channels."""
  tokens = patches.patchify(
    np.random.default_rng(uid % 2**32).normal(size=(*thw, 4)).astype(np.float32), PATCH
  )
  return batches.Clip(
    tokens,
    patches.coords(patches.grid(thw, PATCH)),
    [np.arange(1, text + 1, dtype=np.int32)],
    uid=uid,
    size=thw,
    fps=8.0,
    epoch=epoch,
  )


SHAPE = batches.RowShape(length=32, clips=4, text=16)


def noise_and_sigma(rows):
  packed = batches.pack(rows, SHAPE)
  keys = flow.clip_keys(jax.random.key(7), packed.uid_BG2, packed.epoch_BG)
  tokens_BG = jax.vmap(lambda s: jnp.bincount(s, length=SHAPE.clips + 1)[1:])(packed.segment_BL)
  noise = flow.token_noise(keys, packed.segment_BL, packed.coords_BL3, packed.tokens_BLP.shape[-1])
  return packed, np.asarray(noise), np.asarray(flow.draw_sigma(keys, tokens_BG, flow.SigmaConfig()))


def test_noise_is_independent_of_packing():
  """A clip after another one, and alone in another row, has bit-equal noise and sigma.

  In another epoch it has others.
  """
  a, b = make_clip(2**60 + 11, (3, 4, 4)), make_clip(12, (2, 4, 6))
  again = make_clip(2**60 + 11, (3, 4, 4), epoch=1)
  _, noise, sigma = noise_and_sigma([[b, a], [a], [again]])
  np.testing.assert_array_equal(noise[0, 12:24], noise[1, :12])
  assert sigma[0, 1] == sigma[1, 0]
  assert sigma[2, 0] != sigma[1, 0]
  assert np.abs(noise[2, :12] - noise[1, :12]).max() > 0.1


def test_every_token_has_its_own_noise():
  """Noise is standard normal, different for all tokens, and 0 in padding; the high word of a uid matters."""
  packed, noise, _ = noise_and_sigma([[make_clip(5, (3, 4, 4)), make_clip(2**32 + 5, (3, 4, 4))]])
  of_clips = noise[packed.segment_BL > 0]
  assert len(np.unique(of_clips)) == of_clips.size
  assert abs(of_clips.std() - 1) < 0.1 and abs(of_clips.mean()) < 0.15
  assert not noise[packed.segment_BL == 0].any()


def test_sigma_is_shifted_towards_noise_by_length():
  """Longer clips have more noise; all sigmas are between 0 and 1."""
  keys = jax.random.split(jax.random.key(0), 4096).reshape(1, -1)
  cfg = flow.SigmaConfig()
  short, long = (np.asarray(flow.draw_sigma(keys, jnp.full((1, 4096), n), cfg)) for n in (64, 4096))
  assert 0 < short.min() and long.max() <= 1 and (long > short).mean() > 0.99
  assert 0.3 < np.median(short) < 0.5 < np.median(long) < 0.9


def test_given_tokens_and_padding_have_no_sigma_and_no_loss():
  """Given tokens have sigma 0. Predictions for them and for padding do not change the loss; others do."""
  clip = make_clip(3, (3, 4, 4))
  clip.given_L = np.arange(12) < 4
  packed, noise, sigma_BG = noise_and_sigma([[make_clip(9, (1, 4, 4)), clip]])
  sigma_BU, index_BL = flow.token_sigma(sigma_BG, packed.segment_BL, packed.given_BL)
  sigma_BL1 = np.asarray(flow.gather_sigma(sigma_BU, index_BL))
  assert not sigma_BL1[packed.given_BL].any() and (sigma_BL1[0, 8:16] == sigma_BG[0, 1]).all()
  predicted = np.zeros_like(noise)
  loss, count = flow.velocity_loss(predicted, packed.tokens_BLP, noise, packed.segment_BL, packed.given_BL)
  predicted[0, 4:8], predicted[0, 16:] = 9.0, 9.0
  same, _ = flow.velocity_loss(predicted, packed.tokens_BLP, noise, packed.segment_BL, packed.given_BL)
  predicted[0, 8] = 9.0
  other, _ = flow.velocity_loss(predicted, packed.tokens_BLP, noise, packed.segment_BL, packed.given_BL)
  assert int(count) == 12 and float(loss) == float(same) and float(other) > float(loss)


def test_errors_at_low_noise_count_less():
  """Below `light` the weight makes the error that of the data, whatever sigma; above it nothing changes."""
  sigma, cfg = jnp.array([0.1, 0.2, 0.5, 0.9]), flow.SigmaConfig(light=0.4)
  weight = np.asarray(flow.loss_weight(sigma, cfg))
  error_of_data = weight / np.square(sigma)
  assert error_of_data[0] == pytest.approx(error_of_data[1]) and (weight[2:] == 1).all()
  assert (np.asarray(flow.loss_weight(sigma, flow.SigmaConfig())) == 1).all()
  one = jnp.ones((1, 1, 1))
  arrays = (3 * one, 0 * one, 0 * one, jnp.ones((1, 1), int), jnp.zeros((1, 1), bool))
  loss, count = flow.velocity_loss(*arrays, jnp.full((1, 1), 0.25))
  assert float(loss) == 2.25 and int(count) == 1


def test_the_path_and_its_velocity():
  """x at both ends, and dx/dsigma by automatic differentiation."""
  data, noise = np.float32(0.3), np.float32(-1.2)
  assert flow.interpolate(data, noise, 0.0) == data and flow.interpolate(data, noise, 1.0) == noise
  velocity = jax.grad(lambda s: flow.interpolate(data, noise, s))(0.4)
  arrays = [jnp.full((1, 1, 1), value) for value in (velocity, data, noise)]
  loss, _ = flow.velocity_loss(*arrays, jnp.ones((1, 1), int), jnp.zeros((1, 1), bool))
  assert float(loss) < 1e-12


def test_an_expert_is_trained_in_its_range():
  """Sigma is truncated, not rescaled: in the range it is distributed as without a range."""
  keys, tokens = jax.random.split(jax.random.key(0), 4000).reshape(1, -1), jnp.full((1, 4000), 256)
  plain = np.asarray(flow.draw_sigma(keys, tokens, flow.SigmaConfig(base_shift=3.0)))[0]
  for low, high in ((0.0, 0.8), (0.8, 1.0)):
    cfg = flow.SigmaConfig(base_shift=3.0, uniform=0.0, low=low, high=high)
    drawn = np.asarray(flow.draw_sigma(keys, tokens, cfg))[0]
    expected = np.asarray(flow.draw_sigma(keys, tokens, flow.SigmaConfig(base_shift=3.0, uniform=0.0)))[0]
    expected = expected[(expected >= low) & (expected <= high)]
    assert low <= drawn.min() and drawn.max() <= high and len(expected) > 500
    quantiles = (0.1, 0.5, 0.9)
    np.testing.assert_allclose(np.quantile(drawn, quantiles), np.quantile(expected, quantiles), atol=0.02)
  assert plain.min() < 0.3 and plain.max() > 0.95
