"""Patches: round trip, order of values, and coordinates."""

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax import patches


@pytest.mark.parametrize(
  "thw, patch", [((3, 4, 6), (1, 2, 2)), ((4, 3, 5), (2, 1, 1)), ((1, 2, 2), (1, 2, 2))]
)
def test_round_trip(thw, patch):
  latents = np.random.default_rng(0).normal(size=(*thw, 5)).astype(np.float32)
  tokens = patches.patchify(latents, patch)
  assert tokens.shape == (patches.token_count(thw, patch), np.prod(patch) * 5)
  np.testing.assert_array_equal(patches.unpatchify(tokens, thw, patch), latents)
  np.testing.assert_array_equal(patches.patchify(jnp.asarray(latents), patch), tokens)


def test_a_token_holds_the_patch_at_its_coordinates():
  """Token n is the patch at coords[n], its values in the order (pt, ph, pw, C)."""
  latents = np.random.default_rng(1).normal(size=(4, 4, 6, 3))
  tokens, tyx = patches.patchify(latents, (2, 2, 3)), patches.coords((2, 2, 2), time_scale=0.5)
  t, y, x = (tyx[5] * [2, 1, 1]).astype(int)
  patch = latents[2 * t : 2 * t + 2, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3]
  np.testing.assert_array_equal(tokens[5], patch.reshape(-1))
  assert tyx[5, 0] == 0.5 and tyx.dtype == np.float32


def test_a_patch_that_does_not_divide_is_an_error():
  with pytest.raises(ValueError, match="whole number of patches"):
    patches.token_count((3, 5, 4), (1, 2, 2))
