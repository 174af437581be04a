"""Video latents <-> spacetime patches.

A latent video [T, H, W, C] is cut into patches of (pt, ph, pw). A patch is one token of P = pt * ph * pw * C
values, in the order (pt, ph, pw, C). Tokens are in raster order: t slowest, x fastest. Every function takes
numpy or jax arrays and returns the same kind. The idea is from the Sora technical report (2024), "Spacetime
latent patches", and ViT, arXiv:2010.11929.
"""

import math

import numpy as np


def grid(thw, patch):
  """(T, H, W) of a latent video and (pt, ph, pw) of a patch -> (nt, ny, nx), the patches along each axis.

  Raises ValueError where patches do not divide the video.
  """
  if any(n % p or n < p for n, p in zip(thw, patch, strict=True)):
    raise ValueError(
      f"a latent video of {tuple(thw)} (t, h, w) is not a whole number of patches {tuple(patch)}"
    )
  return tuple(n // p for n, p in zip(thw, patch, strict=True))


def whole(latents_THWC, patch):
  """The latents that fill whole patches: the last frames, rows and columns that do not are cropped."""
  t, h, w = (n // p * p for n, p in zip(latents_THWC.shape[:3], patch, strict=True))
  return latents_THWC[:t, :h, :w]


def token_count(thw, patch):
  """Number of tokens of a latent video of (T, H, W)."""
  return math.prod(grid(thw, patch))


def patchify(latents_THWC, patch):
  """[T, H, W, C] -> tokens [N, P]."""
  *thw, channels = latents_THWC.shape
  (nt, ny, nx), (pt, ph, pw) = grid(thw, patch), patch
  cut = latents_THWC.reshape(nt, pt, ny, ph, nx, pw, channels).transpose(0, 2, 4, 1, 3, 5, 6)
  return cut.reshape(nt * ny * nx, pt * ph * pw * channels)


def unpatchify(tokens_NP, thw, patch):
  """tokens [N, P] -> [T, H, W, C]; the inverse of `patchify`."""
  (nt, ny, nx), (pt, ph, pw) = grid(thw, patch), patch
  channels = tokens_NP.shape[-1] // (pt * ph * pw)
  cut = tokens_NP.reshape(nt, ny, nx, pt, ph, pw, channels).transpose(0, 3, 1, 4, 2, 5, 6)
  return cut.reshape(*thw, channels)


def time_scale(base_fps, fps):
  """Factor that makes t count frames at `base_fps`, whatever the clip's fps. 1 where base_fps is None."""
  return base_fps / fps if base_fps else 1.0


def coords(grid_tyx, time_scale=1.0):
  """(nt, ny, nx) -> [N, 3] float32: t, y, x of each token in the patch grid, in token order.

  t is multiplied by `time_scale`.
  """
  nt, ny, nx = grid_tyx
  tyx_TYX3 = np.empty((nt, ny, nx, 3), np.float32)
  tyx_TYX3[..., 0] = np.arange(nt)[:, None, None]
  tyx_TYX3[..., 1] = np.arange(ny)[:, None]
  tyx_TYX3[..., 2] = np.arange(nx)
  tyx_N3 = tyx_TYX3.reshape(-1, 3)
  tyx_N3[:, 0] *= time_scale
  return tyx_N3
