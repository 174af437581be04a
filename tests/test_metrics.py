"""PSNR and SSIM have the values of their definitions; SSIM equals a plain loop over windows."""

import numpy as np
import pytest

from sora_jax import metrics


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  a = rng.random((2, 17, 19, 3))
  return a, np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1)


def test_psnr_of_a_known_error():
  """A constant error of 0.1 is 20 dB, one of 0.01 is 40 dB; equal images have infinite PSNR."""
  a = np.full((4, 8, 8, 3), 0.5)
  assert metrics.psnr(a, a + 0.1) == pytest.approx(20)
  assert metrics.psnr(a, a + 0.01) == pytest.approx(40)
  assert metrics.psnr(a, a) == np.inf


def test_ssim_is_that_of_the_paper(images):
  """Equation 13 of Wang et al. 2004, window by window, with its Gaussian weights."""
  a, b = images
  offsets = np.arange(11) - 5
  weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
  weights /= weights.sum()
  scores = []
  images_a, images_b = (np.moveaxis(x, -1, 1).reshape(-1, 17, 19) for x in (a, b))
  for image, other in zip(images_a, images_b):
    for y in range(7):
      for x in range(9):
        p, q = image[y : y + 11, x : x + 11], other[y : y + 11, x : x + 11]
        mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
        var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
        covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
        luminance = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
        scores.append(luminance * (2 * covariance + 9e-4) / (var_p + var_q + 9e-4))
  assert metrics.ssim(a, b) == pytest.approx(np.mean(scores), abs=1e-10)


def test_ssim_distinguishes_luminance_and_structure(images):
  """SSIM is 1 for equal images, little less for a constant error, much less for noise of the same PSNR."""
  a, b = images
  error = np.sqrt(np.mean((a - b) ** 2))
  assert metrics.ssim(a, a) == pytest.approx(1)
  assert metrics.ssim(a, a + error) > 0.98 > 0.95 > metrics.ssim(a, b)
  assert metrics.ssim(a, b) == pytest.approx(metrics.ssim(b, a))
  assert metrics.psnr(a, a + error) == pytest.approx(metrics.psnr(a, b))


def test_ssim_of_two_flat_images():
  """Without structure only the luminance term is left, (2 m n + c1) / (m^2 + n^2 + c1)."""
  a = np.full((11, 11, 1), 0.25)
  assert metrics.ssim(a, 2 * a) == pytest.approx((2 * 0.25 * 0.5 + 1e-4) / (0.0625 + 0.25 + 1e-4))


@pytest.mark.parametrize(
  "shapes", [((10, 30, 3), (10, 30, 3)), ((30, 30, 3), (30, 31, 3)), ((30, 30), (30, 30))]
)
def test_shapes_that_cannot_be_compared_raise(shapes):
  with pytest.raises(ValueError, match=r"\d+"):
    metrics.ssim(*(np.zeros(shape) for shape in shapes))
