"""What is given of a video: conditions, which the model sees clean. Drawn in training, made from ranges of
frames by tasks.

A causal VAE of temporal stride s gives the first frame a latent frame of its own, then one to every s frames.
A latent frame is given only if all its pixel frames are; a token only if all its latents are. numpy only.
"""

import numpy as np


def pixel_frames(latent_frames, stride):
  """How many frames so many latent frames stand for."""
  return 1 + stride * (latent_frames - 1)


def from_ranges(ranges, latent_frames, stride):
  """Ranges [first, last] of given frames, counted from 0, both ends included -> which latent frames are
  given, bool [T].
  """
  given_F = np.zeros(pixel_frames(latent_frames, stride), bool)
  for first, last in ranges:
    given_F[first : last + 1] = True
  return np.concatenate([given_F[:1], given_F[1:].reshape(-1, stride).all(1)])


def draw(uniform, share, latent_frames, patch_frames=1):
  """What is given of a training clip, bool [T]: its first token in time for a `share` of clips, nothing for
  the others.

  uniform: a number of the clip in [0, 1). A clip of one token in time is never given: nothing would be left
  to learn.
  """
  given_T = np.zeros(latent_frames, bool)
  if uniform < share and latent_frames > patch_frames:
    given_T[:patch_frames] = True
  return given_T


def tokens(given_THW, patch):
  """Which latents are given, bool [T, H, W] -> which tokens are, bool [N], in the order of
  `patches.patchify`.
  """
  T, H, W = given_THW.shape
  pt, ph, pw = patch
  cut = given_THW.reshape(T // pt, pt, H // ph, ph, W // pw, pw)
  return cut.all((1, 3, 5)).reshape(-1)
