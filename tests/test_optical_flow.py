"""Optical flow of known movements."""

import numpy as np
import pytest
from scipy import ndimage

from sora_jax import optical_flow


def scene(rng, size=(64, 96)):
  """A texture of soft spots."""
  return ndimage.gaussian_filter(rng.random(size), 3.0) * 1000


@pytest.mark.parametrize("way", [(0, 0), (2, 0), (0, -3), (4.5, 2.5), (-6, 7)])
def test_translations(way):
  """To a twentieth of a pixel and three hundredths of the way, away from the edges."""
  a = scene(np.random.default_rng(0))
  b = ndimage.shift(a, way, order=3, mode="nearest")
  found = optical_flow.flow(a, b)[12:-12, 12:-12]
  tolerance = 0.05 + 0.03 * np.linalg.norm(way)
  np.testing.assert_allclose(found.reshape(-1, 2).mean(0), way, atol=tolerance)
  assert np.abs(found - way).mean() < tolerance


def test_two_halves_move_apart():
  rng = np.random.default_rng(1)
  a = scene(rng)
  b = np.concatenate(
    [ndimage.shift(a[:, :48], (0, -2), mode="nearest"), ndimage.shift(a[:, 48:], (0, 2), mode="nearest")], 1
  )
  found = optical_flow.flow(a, b)[..., 1]
  assert found[12:-12, 12:32].mean() == pytest.approx(-2, abs=0.2)
  assert found[12:-12, -32:-12].mean() == pytest.approx(2, abs=0.2)


def test_nothing_to_see_does_not_move():
  assert not np.any(optical_flow.flow(np.full((40, 40), 7.0), np.full((40, 40), 9.0)).round(3))
  with pytest.raises(ValueError, match="of one size"):
    optical_flow.flow(np.zeros((4, 4)), np.zeros((4, 5)))


def test_the_frame_between():
  """Of a texture that moves by 4 pixels: the true one within a tenth of what averaging misses."""
  a = scene(np.random.default_rng(2))
  frames = [np.repeat(ndimage.shift(a, (0, x), mode="nearest")[..., None], 3, -1) for x in (0, 2, 4)]
  inner = (slice(12, -12), slice(12, -12))
  error = np.abs(optical_flow.between(frames[0], frames[2]) - frames[1])[inner].mean()
  assert error < 0.1 * np.abs((frames[0] + frames[2]) / 2 - frames[1])[inner].mean()
