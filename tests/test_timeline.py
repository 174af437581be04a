"""Frames and latents: what is given of a timeline reaches the model as latents, and the result as it was."""

import numpy as np
import pytest

from sora_jax import timeline
from sora_jax.errors import BadInput

STRIDE, H, W = 4, 4, 6


def encode(frames):
  """A causal VAE of pictures of one grey each: a latent holds the sum of its frames and of the one before."""
  assert len(frames) % STRIDE == 1, len(frames)
  grey = frames[:, ::2, ::2].astype(np.float32)
  groups = [grey[:1], *np.split(grey[1:], (len(grey) - 1) // STRIDE)] if len(grey) > 1 else [grey]
  return np.stack(
    [np.stack([group.mean(0)[..., 0], np.full(group.shape[1:3], len(group))], -1) for group in groups]
  )


def decode(latents):
  for i, latent in enumerate(latents):
    for _ in range(STRIDE if i else 1):
      yield np.repeat(np.repeat(np.rint(latent[..., :1]), 2, 0), 2, 1).repeat(3, -1).astype(np.uint8)


CODEC = timeline.Codec(encode, decode, STRIDE, (H // 2, W // 2, 2), (2, 2))


def clip(first, count):
  """Frames whose grey is their number."""
  return np.broadcast_to(
    np.arange(first, first + count, dtype=np.uint8)[:, None, None, None], (count, H, W, 3)
  )


def line(frames, pieces=(), **fields):
  return timeline.Timeline(frames, (H, W), ["a"], np.ones(frames, int), list(pieces), **fields)


def finish(work):
  """Fills each canvas with 200 where nothing is given -> (result, the canvases)."""
  canvases = []
  while canvas := work.canvas():
    canvases.append(canvas)
    filled = canvas.latents_THWC.copy()
    filled[~canvas.given_THW] = 200
    work.take(filled)
  return np.stack(list(work.result())), canvases


def shown(given):
  """bool [n] -> "..xx"."""
  return "".join("x" if one else "." for one in given)


def greys(video):
  assert (video == video[:, :1, :1, :1]).all()
  return video[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
  ("frames", "pieces", "start", "given"),
  [
    (17, [], 0, "....."),
    (18, [], 0, "......"),
    (17, [(0, 1)], 0, "x...."),  # an image
    (17, [(0, 9)], 0, "xxx.."),
    (17, [(0, 8)], 3, "xx..."),  # frames 0 to 2 are not needed: 3 to 7 touch what is made
    (17, [(0, 10)], 1, "xxx.."),
    (17, [(9, 8)], 0, "...xx"),
    (17, [(11, 6)], -2, "....x"),  # two frames are made and cut off, so that 11 begins a latent
    (25, [(0, 9), (17, 8)], 0, "xxx..xx"),
    (26, [(0, 10), (18, 8)], 1, "xxx..xx"),
    (21, [(16, 5)], -1, ".....x"),  # last image, still for a latent after the end
  ],
)
def test_where_a_canvas_lies(frames, pieces, start, given):
  """Frames next to made ones are in given latents, in a canvas no longer than it must be."""
  work = timeline.Work(line(frames, [(first, clip(first, n)) for first, n in pieces]), CODEC)
  assert (work.start, shown(work.known)) == (start, given)


@pytest.mark.parametrize(
  "pieces", [[(0, 9)], [(0, 8)], [(9, 8)], [(11, 6)], [(0, 5), (13, 4)], [(2, 3), (7, 6)], [(1, 15)]]
)
def test_given_frames_come_back(pieces):
  """They are in the result as they were, the others as the model made them; latents are of the kind of their
  place.
  """
  given = {f for first, n in pieces for f in range(first, first + n)}
  result, (canvas,) = finish(timeline.Work(line(17, [(first, clip(first, n)) for first, n in pieces]), CODEC))
  assert greys(result) == [f if f in given else 200 for f in range(17)]
  kinds = canvas.latents_THWC[..., 1][canvas.given_THW]
  first = canvas.given_THW[0].sum()
  assert (kinds[:first] == 1).all() and (kinds[first:] == STRIDE).all()


def test_latents_of_a_piece_do_not_know_other_frames():
  """Latents of later pieces are of their own frames: the lead-in is dropped."""
  _, (canvas,) = finish(timeline.Work(line(17, [(0, clip(0, 5)), (13, clip(13, 4))]), CODEC))
  assert canvas.latents_THWC[[0, 1, 4], 0, 0, 0].tolist() == [0.0, 2.5, 14.5]


def test_a_long_video_is_made_in_windows():
  """Each is given the latents before it, which are kept, and the frame that it begins with, encoded."""
  work = timeline.Work(line(61), CODEC, window=6)
  assert (work.count, work.windows) == (16, 4)
  result, canvases = finish(work)
  assert greys(result) == [200] * 61
  texts = [shown(canvas.given_THW.all((1, 2))) for canvas in canvases]
  assert texts == ["......", "xx....", "xx....", "xxxx.."]
  assert canvases[1].latents_THWC[:2, 0, 0].tolist() == [[200.0, 1.0], [200.0, 200.0]]


def test_a_long_video_is_extended_backwards():
  """From the end on; what a window makes of its first frame is made again by the next, as a later latent."""
  work = timeline.Work(line(61, [(53, clip(53, 8))]), CODEC, window=6)
  result, canvases = finish(work)
  assert greys(result) == [200] * 53 + list(range(53, 61))
  texts = [shown(canvas.given_THW.all((1, 2))) for canvas in canvases]
  assert texts == [".....x", ".....x", ".....x", "..xxxx"]


def test_what_is_given_of_a_long_video_is_cut():
  """Of what lies far from what is made no latent is needed."""
  work = timeline.Work(line(100, [(0, clip(0, 80))]), CODEC, window=8)
  assert work.start == 80 - 1 - 4 * 4 and work.known.sum() == 5
  assert greys(finish(work)[0]) == [*range(80), *[200] * 20]


def test_a_region():
  """What is white in the mask is new, in every frame that it covers; latents that touch it are not given."""
  mask = np.zeros((9, H, W), np.uint8)
  mask[:, :2, :3] = 255
  video = np.full((9, H, W, 3), 50, np.uint8)
  work = timeline.Work(line(9, [(0, video)], mask_FHW=mask), CODEC)
  result, (canvas,) = finish(work)
  assert (result[mask == 255] == 200).all() and (result[mask == 0] == 50).all()
  assert (~canvas.given_THW).sum() == 3 * 2 and not canvas.given_THW[:, 0, :2].any()


def test_noise_is_added_to_a_video():
  """All latents hold the video, none is given; a video of 10 frames is filled up with its last."""
  video = clip(0, 10)
  work = timeline.Work(line(10, [(0, video)], start=0.6, kept_F=np.zeros(10, bool)), CODEC)
  result, (canvas,) = finish(work)
  assert canvas.start == 0.6 and not canvas.given_THW.any() and greys(result) == [200] * 10
  assert canvas.latents_THWC[:, 0, 0, 0].tolist() == [0.0, 2.5, 6.5, 9.0]


def test_shots():
  """A latent frame reads the text of the frame in its middle; a window has only the texts that it reads."""
  prompts = np.repeat([1, 2, 3], [8, 5, 24])
  made = timeline.Timeline(37, (H, W), ["a", "b", "c"], prompts)
  _, (canvas,) = finish(timeline.Work(made, CODEC))
  assert canvas.prompt_T.tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3, 3] and canvas.texts == ["a", "b", "c"]
  _, canvases = finish(timeline.Work(made, CODEC, window=4))
  assert [canvas.texts for canvas in canvases][-1] == ["c"] and canvases[0].texts == ["a", "b"]


def test_nothing_to_make():
  with pytest.raises(BadInput, match="none is left"):
    timeline.Work(line(9, [(0, clip(0, 9))]), CODEC)
