"""Dense optical flow: iterative Lucas-Kanade over a pyramid (Lucas and Kanade 1981; Le Besnerais and
Champagnat 2005, ICIP; as scikit-image's `optical_flow_ilk`, here with a Gaussian window). numpy and scipy.
"""

import numpy as np
from scipy import ndimage

WINDOW = 3.0  # pixels: width of the Gaussian that pixels are taken together with
LEAST = 16  # pixels: shortest side of the coarsest level
ITERATIONS = 6  # at each level


def flow(a_HW, b_HW):
  """Grey images -> [H, W, 2] displacements (y, x) in pixels: b at x + flow(x) looks like a at x."""
  a, b = np.asarray(a_HW, np.float32), np.asarray(b_HW, np.float32)
  if a.shape != b.shape or a.ndim != 2:
    raise ValueError(f"flow: needs two grey images of one size; got {a.shape} and {b.shape}")
  pyramid = [(a, b)]
  while min(pyramid[-1][0].shape) >= 2 * LEAST:
    pyramid.append(tuple(_zoom(ndimage.gaussian_filter(x, 1.0), 0.5) for x in pyramid[-1]))
  found = np.zeros((*pyramid[-1][0].shape, 2), np.float32)
  for a, b in reversed(pyramid):
    scale = np.array(a.shape) / found.shape[:2]
    found = np.stack([_zoom(found[..., i], scale) * scale[i] for i in range(2)], -1)
    found = _refine(a, b, found)
  return found


def _zoom(image, scale):
  """Linearly scaled; pixels are areas, so that edges stay edges."""
  return ndimage.zoom(image, scale, order=1, mode="nearest", grid_mode=True)


def _refine(a, b, found):
  """Gauss-Newton steps on the squared difference within the window of each pixel."""
  for _ in range(ITERATIONS):
    seen = warp(b, found)
    dy, dx = (ndimage.sobel((seen + a) / 2, axis) / 8 for axis in (0, 1))
    error = a - seen
    yy, xx, yx, ye, xe = (
      ndimage.gaussian_filter(product, WINDOW)
      for product in (dy * dy, dx * dx, dy * dx, dy * error, dx * error)
    )
    floor = 1e-3 * (yy + xx).mean() + 1e-9  # where nothing is to be seen, nothing moves
    yy, xx = yy + floor, xx + floor
    size = yy * xx - yx * yx
    step = np.stack([(xx * ye - yx * xe) / size, (yy * xe - yx * ye) / size], -1)
    found = found + np.clip(step, -1, 1)
  return ndimage.median_filter(found, size=(5, 5, 1))


def warp(image, displacement):
  """The image [H, W] or [H, W, C] as seen at x + displacement(x), linearly; edges are repeated."""
  h, w = image.shape[:2]
  at = np.stack(np.mgrid[:h, :w].astype(np.float32)) + np.moveaxis(displacement, -1, 0)
  if image.ndim == 2:
    return ndimage.map_coordinates(image, at, order=1, mode="nearest")
  return np.stack([warp(image[..., c], displacement) for c in range(image.shape[-1])], -1)


def between(before, after):
  """The frame in the middle of two, float [H, W, C]: both are moved half of the way, and averaged."""
  half = flow(before.mean(-1), after.mean(-1)) / 2
  return (warp(before, -half) + warp(after, half)) / 2
