"""Laws of the noise: it belongs to a clip and a place, not to a row, a host or a neighbour."""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import batch as batches, patches
from sora_jax.diffusion import flow

PATCH = (1, 2, 2)


def make_clip(uid, thw, epoch=0, text=3):
  """A clip of random latents with 4 channels."""
  tokens = patches.patchify(np.random.default_rng(uid % 2**32).normal(size=(*thw, 4)).astype(np.float32), PATCH)
  return batches.Clip(tokens, patches.coords(patches.grid(thw, PATCH)), [np.arange(1, text + 1, dtype=np.int32)],
                      uid=uid, size=thw, fps=8.0, epoch=epoch)


SHAPE = batches.RowShape(length=32, clips=4, text=16)


def noise_and_sigma(rows):
  packed = batches.pack(rows, SHAPE)
  keys = flow.clip_keys(jax.random.key(7), packed.uid_BG2, packed.epoch_BG)
  tokens_BG = jax.vmap(lambda s: jnp.bincount(s, length=SHAPE.clips + 1)[1:])(packed.segment_BL)
  noise = flow.token_noise(keys, packed.segment_BL, packed.coords_BL3, packed.tokens_BLP.shape[-1])
  return packed, np.asarray(noise), np.asarray(flow.draw_sigma(keys, tokens_BG, flow.SigmaConfig()))


def test_noise_is_independent_of_packing():
  """The same clip after another one, and alone in another row, gets the same noise and sigma, to the bit; another epoch does not."""
  a, b = make_clip(2**60 + 11, (3, 4, 4)), make_clip(12, (2, 4, 6))
  again = make_clip(2**60 + 11, (3, 4, 4), epoch=1)
  _, noise, sigma = noise_and_sigma([[b, a], [a], [again]])
  np.testing.assert_array_equal(noise[0, 12:24], noise[1, :12])
  assert sigma[0, 1] == sigma[1, 0]
  assert sigma[2, 0] != sigma[1, 0] and np.abs(noise[2, :12] - noise[1, :12]).max() > 0.1


def test_every_token_has_its_own_noise():
  """Standard normal, no two tokens alike, nothing in padding; the high word of a uid counts."""
  packed, noise, _ = noise_and_sigma([[make_clip(5, (3, 4, 4)), make_clip(2**32 + 5, (3, 4, 4))]])
  alive = noise[packed.segment_BL > 0]
  assert len(np.unique(alive)) == alive.size and abs(alive.std() - 1) < 0.1 and abs(alive.mean()) < 0.15
  assert not noise[packed.segment_BL == 0].any()


def test_sigma_is_shifted_towards_noise_by_length():
  """Longer clips see more noise; all sigmas lie strictly between 0 and 1."""
  keys = jax.random.split(jax.random.key(0), 4096).reshape(1, -1)
  cfg = flow.SigmaConfig()
  short, long = (np.asarray(flow.draw_sigma(keys, jnp.full((1, 4096), n), cfg)) for n in (64, 4096))
  assert 0 < short.min() and long.max() <= 1 and (long > short).mean() > 0.99
  assert 0.3 < np.median(short) < 0.5 < np.median(long) < 0.9


def test_given_tokens_and_padding_have_no_sigma_and_no_loss():
  """Given tokens read sigma 0; changing what the model says of them does not change the loss, of others it does."""
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


def test_the_path_and_its_velocity():
  """x at both ends, and dx/dsigma by automatic differentiation."""
  data, noise = np.float32(0.3), np.float32(-1.2)
  assert flow.interpolate(data, noise, 0.0) == data and flow.interpolate(data, noise, 1.0) == noise
  slope = jax.grad(lambda s: flow.interpolate(data, noise, s))(0.4)
  loss, _ = flow.velocity_loss(jnp.full((1, 1, 1), slope), jnp.full((1, 1, 1), data), jnp.full((1, 1, 1), noise),
                               jnp.ones((1, 1), int), jnp.zeros((1, 1), bool))
  assert float(loss) < 1e-12


def test_an_expert_sees_its_range_alone():
  """Cut off, not squeezed: within the range, sigma has the law that it has without one."""
  keys, tokens = jax.random.split(jax.random.key(0), 4000).reshape(1, -1), jnp.full((1, 4000), 256)
  plain = np.asarray(flow.draw_sigma(keys, tokens, flow.SigmaConfig(base_shift=3.0)))[0]
  for low, high in ((0.0, 0.8), (0.8, 1.0)):
    drawn = np.asarray(flow.draw_sigma(keys, tokens, flow.SigmaConfig(base_shift=3.0, uniform=0.0, low=low, high=high)))[0]
    of_range = np.asarray(flow.draw_sigma(keys, tokens, flow.SigmaConfig(base_shift=3.0, uniform=0.0)))[0]
    of_range = of_range[(of_range >= low) & (of_range <= high)]
    assert low <= drawn.min() and drawn.max() <= high and len(of_range) > 500
    np.testing.assert_allclose(np.quantile(drawn, (0.1, 0.5, 0.9)), np.quantile(of_range, (0.1, 0.5, 0.9)), atol=0.02)
  assert plain.min() < 0.3 and plain.max() > 0.95
