"""PSNR and SSIM against values that follow from their definitions, and SSIM against a plain loop over windows."""

import numpy as np
import pytest

from sora_jax import metrics


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  a = rng.random((2, 17, 19, 3))
  return a, np.clip(a + 0.1 * rng.standard_normal(a.shape), 0, 1)


def test_psnr_of_a_known_error():
  """A constant error of 0.1 is 20 dB, a tenth of it 40 dB; equal images have no noise."""
  a = np.full((4, 8, 8, 3), 0.5)
  assert metrics.psnr(a, a + 0.1) == pytest.approx(20)
  assert metrics.psnr(a, a + 0.01) == pytest.approx(40)
  assert metrics.psnr(a, a) == np.inf


def test_ssim_is_that_of_the_paper(images):
  """Equation 13 of Wang et al. 2004, window by window, with its Gaussian weights."""
  a, b = images
  offsets = np.arange(11) - 5
  weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5 ** 2))
  weights /= weights.sum()
  scores = []
  for image, other in zip(np.moveaxis(a, -1, 1).reshape(-1, 17, 19), np.moveaxis(b, -1, 1).reshape(-1, 17, 19)):
    for y in range(7):
      for x in range(9):
        p, q = image[y:y + 11, x:x + 11], other[y:y + 11, x:x + 11]
        mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
        covariance = np.array([[(weights * (m - mm) * (n - nn)).sum() for n, nn in ((p, mean_p), (q, mean_q))]
                               for m, mm in ((p, mean_p), (q, mean_q))])
        light = (2 * mean_p * mean_q + 1e-4) / (mean_p ** 2 + mean_q ** 2 + 1e-4)
        scores.append(light * (2 * covariance[0, 1] + 9e-4) / (np.trace(covariance) + 9e-4))
  assert metrics.ssim(a, b) == pytest.approx(np.mean(scores), abs=1e-10)


def test_ssim_knows_light_from_structure(images):
  """1 for equal images; hardly less for a shift of light; far less for noise of the same PSNR; symmetric."""
  a, b = images
  error = np.sqrt(np.mean((a - b) ** 2))
  assert metrics.ssim(a, a) == pytest.approx(1)
  assert metrics.ssim(a, a + error) > 0.98 > 0.95 > metrics.ssim(a, b)
  assert metrics.ssim(a, b) == pytest.approx(metrics.ssim(b, a))
  assert metrics.psnr(a, a + error) == pytest.approx(metrics.psnr(a, b))


def test_ssim_of_two_flat_images():
  """No structure: what is left is the term of light, (2 m n + c1) / (m^2 + n^2 + c1)."""
  a = np.full((11, 11, 1), 0.25)
  assert metrics.ssim(a, 2 * a) == pytest.approx((2 * 0.25 * 0.5 + 1e-4) / (0.0625 + 0.25 + 1e-4))


@pytest.mark.parametrize("shapes", [((10, 30, 3), (10, 30, 3)), ((30, 30, 3), (30, 31, 3)), ((30, 30), (30, 30))])
def test_what_cannot_be_compared_is_refused(shapes):
  with pytest.raises(ValueError, match=r"\d+"):
    metrics.ssim(*(np.zeros(shape) for shape in shapes))
