"""Requests: what is allowed is taken, what is not is told in one line; a canvas has the right size and what
is given.
"""

import numpy as np
import pytest

from sora_jax import tasks
from sora_jax.errors import BadInput

DEFAULTS = {
  "size": [64, 64],
  "frames": 17,
  "fps": 8.0,
  "steps": 20,
  "sampler": "unipc",
  "shift": 1.0,
  "guidance": 3.0,
}
SAMPLERS = ("euler", "heun", "unipc")


def parse(**fields):
  return tasks.parse_request({"id": "a", "prompt": "a red ball moves left", **fields}, DEFAULTS, SAMPLERS)


def canvas(request):
  return tasks.TASKS[request.task](
    request,
    stride=(4, 16, 16),
    patch=(1, 2, 2),
    channels=3,
    encode=lambda path, size, padded: np.full((1, padded[0] // 16, padded[1] // 16, 3), 7.0),
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"promt": "x"}, "unknown field 'promt'"),
    ({"prompt": "  "}, "prompt is empty"),
    ({"prompt": "x" * 10_000}, "10000 characters"),
    ({"size": [64]}, "height, width"),
    ({"size": "64x64"}, "must be a list"),
    ({"frames": 0}, "frames is 0; it must be from 1"),
    ({"fps": -1}, "fps is -1"),
    ({"fps": float("nan")}, "fps is nan"),
    ({"seconds": float("inf")}, "seconds is inf"),
    ({"seed": -1}, "seed is -1"),
    ({"size": [10**6, 64]}, "at most 16384"),
    ({"guidance_interval": ["a", "b"]}, "noise levels"),
    ({"id": "x" * 300}, "240 bytes"),
    ({"prompt": "a \ud800"}, "no character"),
    ({"image": "a\0b"}, "no character"),
    ({"frames": 2.5}, "must be an int"),
    ({"sampler": "ddim"}, "must be one of euler, heun, unipc"),
    ({"task": "fly"}, "text_to_video"),
    ({"task": "image_to_video"}, "needs an image"),
    ({"id": "../x"}, "names a file"),
    ({"guidance_interval": [0.9, 0.1]}, "noise levels"),
    ({"shots": []}, "does not have yet"),
    ({"steps": True}, "must be an int"),
  ],
)
def test_bad_requests(fields, message):
  with pytest.raises(BadInput, match=message):
    parse(**fields)


def test_seconds_and_images():
  assert parse(seconds=2).frames == 16 and parse(seconds=2, frames=9).frames == 9
  assert parse(task="text_to_image", frames=33).frames == 1


@pytest.mark.parametrize(
  "frames, size, thw",
  [(17, (64, 64), (5, 4, 4)), (16, (50, 90), (5, 4, 6)), (1, (33, 32), (1, 4, 2)), (18, (64, 64), (6, 4, 4))],
)
def test_a_canvas_covers_what_was_asked(frames, size, thw):
  result = canvas(parse(frames=frames, size=list(size)))
  assert (
    result.latents_THWC.shape == (*thw, 3)
    and (result.frames, result.size) == (frames, size)
    and not result.given_THW.any()
  )


def test_below_one_stride():
  with pytest.raises(BadInput, match="one stride"):
    canvas(parse(size=[8, 64]))


def test_image_to_video_gives_the_first_frame():
  result = canvas(parse(task="image_to_video", image="x.png", size=[60, 64]))
  assert result.given_THW[0].all() and not result.given_THW[1:].any() and (result.latents_THWC[0] == 7).all()
