"""The Frechet distance of distributions that are known."""

import numpy as np
import pytest

from sora_jax import frechet


def test_known_normals():
  """In one dimension (m1 - m2)^2 + (s1 - s2)^2; of independent dimensions the sum; turned, the same."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(200_000, 3)) * (1, 2, 3), rng.normal(size=(200_000, 3)) * (2, 2, 1) + (1, 0, -2)
  wanted = (1 + 0 + 4) + (1 + 0 + 4)
  assert frechet.distance(a, b) == pytest.approx(wanted, rel=0.02)
  turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  assert frechet.distance(a @ turn, b @ turn) == pytest.approx(frechet.distance(a, b), rel=1e-6)
  assert frechet.distance(a, a) == pytest.approx(0, abs=1e-6)


def test_few_clips_of_many_features():
  """Covariances without full rank: finite, zero for the same set, and it grows with what is added."""
  a = np.random.default_rng(1).normal(size=(5, 40))
  assert frechet.distance(a, a) == pytest.approx(0, abs=1e-6)
  assert frechet.distance(a, a + 1) == pytest.approx(40, rel=1e-6)
  for bad in (a[:1], a[:, :3]):
    with pytest.raises(ValueError, match="of one D"):
      frechet.distance(a, bad)
