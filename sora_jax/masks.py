"""What is given of a video: conditions, which the model sees clean. Drawn in training, made from ranges of
frames and from masks by tasks. One model learns all tasks so.

A causal VAE of temporal stride s gives the first frame a latent frame of its own, then one to every s frames.
A latent frame is given only if all its pixel frames are; a token only if all its latents are. numpy only.
"""

import math

import numpy as np


def pixel_frames(latent_frames, stride):
  """How many frames so many latent frames stand for."""
  return 1 + stride * (latent_frames - 1)


def latent_of_frame(frame, stride):
  """The first latent frame most of whose frames are not before this one; 0 for the first frame and before."""
  return max(0, math.ceil((frame + (stride - 1) / 2) / stride)) if frame > 0 else 0


def from_ranges(ranges, latent_frames, stride):
  """Ranges [first, last] of given frames, counted from 0, both ends included -> which latent frames are
  given, bool [T].
  """
  given_F = np.zeros(pixel_frames(latent_frames, stride), bool)
  for first, last in ranges:
    given_F[first : last + 1] = True
  return np.concatenate([given_F[:1], given_F[1:].reshape(-1, stride).all(1)])


def _first(rng, steps):
  return np.arange(steps) < 1


def _start(rng, steps):
  return np.arange(steps) < rng.integers(1, steps)


def _end(rng, steps):
  return ~_start(rng, steps)


def _ends(rng, steps):
  if steps < 3:
    return _first(rng, steps)
  first, last = np.sort(rng.choice(steps - 1, 2, replace=False)) + 1
  return (np.arange(steps) < first) | (np.arange(steps) >= last)


def _frames(rng, steps):
  given = rng.random(steps) < 0.5
  given[rng.integers(steps)] = False
  return given


# What may be given of a training clip: (rng, how many tokens it has in time, at least 2) -> which, bool
IN_TIME = {
  "first": _first,  # the first token: an image to animate
  "start": _start,  # to extend forwards
  "end": _end,  # to extend backwards
  "ends": _ends,  # to connect two videos, or the ends of one to a loop
  "frames": _frames,  # any: to fill gaps
}
KINDS = (*IN_TIME, "region")  # region: all around a box, in all frames


def draw(rng, shares, size_THW, patch):
  """What is given of a training clip: which of its latents, bool [T, H, W].

  shares: {one of KINDS: share of the clips}; of the others nothing is given. Something is always left to
  learn, so of a clip of one token in time only a region is given, and nothing of one of two tokens in space.
  """
  pick, given_THW = rng.random(), np.zeros(size_THW, bool)
  ends = np.cumsum([shares.get(kind, 0.0) for kind in KINDS])
  kind = dict(enumerate(KINDS)).get(int(np.searchsorted(ends, pick, side="right")))
  steps, *sides = (n // p for n, p in zip(size_THW, patch, strict=True))
  if kind in IN_TIME and steps > 1:
    given_THW |= np.repeat(IN_TIME[kind](rng, steps), patch[0])[:, None, None]
  elif kind == "region" and min(sides) > 1:
    box = [slice(0, size_THW[0])]
    for side, p in zip(sides, patch[1:]):
      length = rng.integers(1, side)
      start = rng.integers(side - length + 1)
      box.append(slice(start * p, (start + length) * p))
    given_THW[:] = True
    given_THW[tuple(box)] = False
  return given_THW


def tokens(given_THW, patch):
  """Which latents are given, bool [T, H, W] -> which tokens are, bool [N], in the order of
  `patches.patchify`.
  """
  T, H, W = given_THW.shape
  pt, ph, pw = patch
  cut = given_THW.reshape(T // pt, pt, H // ph, ph, W // pw, pw)
  return cut.all((1, 3, 5)).reshape(-1)
