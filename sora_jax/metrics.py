"""Image quality: PSNR, and the SSIM of Wang et al. 2004 (IEEE TIP 13:4, "Image quality assessment: from error
visibility to structural similarity"). Images are [..., H, W, C] in [0, 1]; `psnr` and `ssim` compute in
float64, by numpy.
"""

import numpy as np

WINDOW, WIDTH = 11, 1.5  # pixels; the paper's Gaussian window, sec. III-B
K1, K2 = 0.01, 0.03  # the paper's constants for a range of 1


def psnr(a, b) -> float:
  """Peak signal-to-noise ratio in dB over the whole arrays (peak 1); inf for equal arrays."""
  a, b = _pair(a, b)
  error = np.mean((a - b) ** 2)
  return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(a, b) -> float:
  """Mean structural similarity over all windows that lie entirely inside the image, as in the authors' code.

  It is computed for each channel, then averaged (the paper has grey images). Raises ValueError below 11 x 11
  pixels. scikit-image computes the same with gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
  data_range=1.
  """
  a, b = _pair(a, b)
  if min(a.shape[-3:-1]) < WINDOW:
    raise ValueError(
      f"ssim: images of {a.shape[-3]} x {a.shape[-2]}; at least {WINDOW} x {WINDOW} are needed"
    )
  return float(ssim_map(a, b).mean())


def ssim_map(a, b):
  """SSIM of each window: numpy or JAX arrays [..., H, W, C] -> [..., H - 10, W - 10, C], in their dtype."""
  mean_a, mean_b = _blur(a), _blur(b)
  var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
  covariance = _blur(a * b) - mean_a * mean_b
  c1, c2 = K1**2, K2**2
  numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
  return numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _pair(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or a.ndim < 3:
    raise ValueError(f"metrics: needs two arrays [..., H, W, C] of one shape; got {a.shape} and {b.shape}")
  return a, b


def _blur(x):
  """Weighted mean over each window inside the image: [..., H, W, C] -> [..., H - 10, W - 10, C].

  It is computed as two products with banded matrices.
  """
  *rest, height, width, channels = x.shape
  x = (_band(height) @ x.reshape(*rest, height, width * channels)).reshape(*rest, -1, width, channels)
  return _band(width) @ x


def _band(n):
  """[n - 10, n]: row i holds the window's weights from column i on."""
  tap = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / WIDTH) ** 2)
  shift = np.arange(n) - np.arange(n - WINDOW + 1)[:, None]
  return np.where((shift >= 0) & (shift < WINDOW), tap[shift.clip(0, WINDOW - 1)] / tap.sum(), 0)
