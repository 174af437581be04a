"""Requests: what is allowed is taken, what is not is told in one line; each task gives the frames that it
says.
"""

import dataclasses

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


def probe(path):
  """33 frames of 48 x 80 pixels, 12 a second."""
  if path == "nowhere":
    raise BadInput("video 'nowhere' does not exist")
  return 33, 12.0, (48, 80)


def parse(**fields):
  fields = {"id": "a", "prompt": "a red ball moves left", **fields}
  return tasks.parse_request(fields, DEFAULTS, SAMPLERS, probe)


# --- what is asked


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
    ({"task": "image_to_video"}, "needs image: path of the first frame"),
    ({"task": "connect", "video": "a.mp4"}, "connect needs video_b"),
    ({"task": "fill", "video": "a.mp4"}, "fill needs given or mask"),
    ({"image": "a.png"}, "image does not go with text_to_video; it goes with image_to_video"),
    ({"task": "loop", "video": "a.mp4", "strength": 0.5}, "strength does not go with loop; .* edit, upscale"),
    ({"task": "edit", "video": "a.mp4", "strength": 1.5}, "strength is 1.5"),
    ({"frames": 9, "seconds": 2}, "frames is 9 and seconds 2; give one of them"),
    ({"shots": []}, "shots is empty"),
    ({"times": [757, 1000]}, r"times is \[757, 1000\]; it must be numbers that fall"),
    ({"times": [1000, 757, 757]}, "numbers that fall"),
    ({"times": [1001, 5]}, "from 1000 at most"),
    ({"times": [500, 0]}, "above 0"),
    ({"times": [500, "a"]}, "numbers that fall"),
    ({"times": [1000, 500], "steps": 4}, "steps is 4 and times"),
    ({"shots": ["a"]}, "shots holds 'a'; each is"),
    ({"shots": [{"seconds": 0, "prompt": "a"}]}, "seconds above 0"),
    ({"shots": [{"seconds": 1, "prompt": "a", "fps": 3}]}, "each is"),
    ({"shots": 2 * [{"seconds": 1, "prompt": "a"}], "frames": 17}, "add up to 16 frames, and frames is 17"),
    ({"task": "fill", "video": "v", "given": [[0, 40]]}, r"given holds \[0, 40\]; .* from 0 to 32"),
    ({"task": "fill", "video": "v", "given": [[5, 3]]}, "given holds"),
    ({"task": "fill", "video": "v", "given": [3]}, "given holds 3"),
    ({"task": "fill", "video": "v", "given": [[0, 1]], "frames": 40}, "frames is 40, and the video has 33"),
    ({"task": "extend_forward", "video": "v", "frames": 33}, "the given video has 33; ask for more"),
    ({"task": "edit", "video": "v", "size": [64, 64]}, r"size is \[64, 64\], and the video is \[48, 80\]"),
    ({"task": "extend_forward", "video": "nowhere"}, "nowhere"),
    ({"id": "../x"}, "names a file"),
    ({"guidance_interval": [0.9, 0.1]}, "noise levels"),
    ({"steps": True}, "must be an int"),
  ],
)
def test_bad_requests(fields, message):
  with pytest.raises(BadInput, match=message):
    parse(**fields)


def test_seconds_and_images():
  assert parse(seconds=2).frames == 16
  assert parse(task="text_to_image", frames=33).frames == 1


def test_a_request_is_like_its_video():
  """Size, rate and length are those of the video where the request says nothing else."""
  for task, more, frames in (
    ("extend_forward", {}, 33 + 17), ("extend_backward", {"frames": 40}, 40), ("loop", {}, 33 + 17),
    ("connect", {"video_b": "w"}, 66 + 17), ("fill", {"given": [[0, 8]]}, 33), ("edit", {"frames": 9}, 9),
  ):  # fmt: skip
    request = parse(task=task, video="v", **more)
    assert (request.frames, request.size, request.fps) == (frames, (48, 80), 12.0), task
  assert parse(task="upscale", video="v", size=[96, 160]).size == (96, 160)
  assert parse(task="edit", video="v", fps=6.0).frames == 16  # every second frame


def test_shots_are_as_long_as_they_say():
  shots = [{"seconds": 1, "prompt": " a "}, {"seconds": 2.5, "prompt": "b"}]
  request = parse(prompt="", shots=shots)
  assert (request.frames, request.prompt, request.prompts) == (28, "a b", ["a", "b"])
  assert parse(shots=shots).prompt == "a red ball moves left" and parse().prompts == ["a red ball moves left"]
  line = tasks.TASKS[request.task].timeline(request, None)
  assert line.prompt_F.tolist() == 8 * [1] + 20 * [2]


@pytest.mark.parametrize(
  "frames, size, thw",
  [(17, (64, 64), (5, 4, 4)), (16, (50, 90), (5, 4, 6)), (1, (33, 32), (1, 4, 2)), (18, (64, 64), (6, 4, 4))],
)
def test_latents_cover_what_was_asked(frames, size, thw):
  assert tasks.latent_size(frames, size, (4, 16, 16), (1, 2, 2)) == thw
  with pytest.raises(BadInput, match="one stride"):
    tasks.latent_size(frames, (8, 64), (4, 16, 16), (1, 2, 2))


# --- what is given, in frames


class Media:
  """Files by name; each frame has the grey of its number, those of "b" from 100 on."""

  stride = 4

  def image(self, path):
    return np.full((4, 4, 3), {"first": 50, "last": 60}[path], np.uint8)

  def video(self, path):
    count, begin = {"v": (9, 0), "b": (10, 100), "long": (33, 0)}[path]
    return np.broadcast_to(
      np.arange(begin, begin + count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3)
    )

  def mask(self, path):
    return np.full(
      ({"one": 1, "nine": 9, "black": 1, "two": 2}[path], 4, 4), 255 * (path != "black"), np.uint8
    )


def timeline(frames, **fields):
  """The timeline of a request with a size of 4 x 4."""
  return tasks.TASKS[fields["task"]].timeline(
    dataclasses.replace(parse(), frames=frames, size=(4, 4), **fields), Media()
  )


def given(line):
  """{frame: grey} of what is given."""
  return {f: int(line.pixels(f, f)[0, 0, 0, 0]) for f in np.flatnonzero(line.given_F).tolist()}


def test_what_tasks_give():
  v, b = dict(enumerate(range(9))), {f: 100 + f for f in range(10)}
  assert given(timeline(17, task="text_to_video")) == {}
  assert given(timeline(17, task="image_to_video", image="first")) == {0: 50}
  line = timeline(17, task="image_to_video", image="first", last_image="last")
  assert given(line) == {0: 50} | dict.fromkeys(range(16, 21), 60) and (line.frames, line.out) == (21, 17)
  assert given(timeline(20, task="extend_forward", video="v")) == v
  assert given(timeline(20, task="extend_backward", video="v")) == {f + 11: grey for f, grey in v.items()}
  line = timeline(26, task="connect", video="v", video_b="b")  # 7 frames between: 8 are made
  assert given(line) == v | {f + 17: grey for f, grey in b.items()} and line.frames == 27 and line.out is None
  line = timeline(17, task="loop", video="v")
  assert given(line) == v | {f + 17: f for f in range(8)} and (line.frames, line.out) == (25, 17)
  line = timeline(9, task="fill", video="v", given=((0, 2), (7, 8)))
  assert given(line) == {f: f for f in (0, 1, 2, 7, 8)} and line.mask_FHW is None
  line = timeline(9, task="fill", video="v", mask="nine")
  assert given(line) == v and line.mask_FHW.shape == (9, 4, 4)
  line = timeline(9, task="edit", video="v", strength=0.4)
  assert given(line) == {} and line.start == 0.4 and len(line.pieces[0][1]) == 9
  line = timeline(9, task="edit", video="v", given=((0, 0),))
  assert given(line) == {0: 0} and line.start == tasks.STRENGTH
  assert given(timeline(9, task="edit", video="v", mask="one")) == v
  assert timeline(9, task="upscale", video="v").start == tasks.STRENGTH


@pytest.mark.parametrize(
  ("frames", "fields", "message"),
  [
    (9, {"task": "extend_forward", "video": "v"}, "has 9; ask for more"),
    (19, {"task": "connect", "video": "v", "video_b": "b"}, "the two videos have 9 and 10; ask for more"),
    (9, {"task": "fill", "video": "v", "mask": "two"}, "the mask has 2 frames, and the video 9"),
    (9, {"task": "fill", "video": "v", "mask": "black"}, "black everywhere"),
    (1, {"task": "image_to_video", "image": "first", "last_image": "last"}, "ask for more frames"),
  ],
)
def test_files_that_do_not_fit(frames, fields, message):
  with pytest.raises(BadInput, match=message):
    timeline(frames, **fields)
