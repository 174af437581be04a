"""Tasks: each is one function from a request to a timeline (timeline.py): which frames are given, and which
text each reads.

One model does all of them: given tokens stay at noise level 0 while the others are denoised, and the same
packing as in training puts canvases into rows. To add a task: one entry in TASKS. To add a field of a
request: one entry in FIELDS.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable

import numpy as np

from sora_jax.errors import BadInput, pick
from sora_jax.timeline import Timeline

MAX_PROMPT = 4000  # characters; a longer one is surely a mistake
MAX_SIDE = 16_384  # pixels
MAX_ID = 240  # bytes: an id names a file


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a request. `default` counts where neither the request nor the model's config gives a value."""

  type: type
  help: str
  default: object = None
  limits: tuple | None = None  # of a number: least, most


# The parser, the flags of launch.sample and the table in the README are made from this one.
FIELDS = {
  "id": Field(str, "name of the output file; the number of the line where a file of requests gives none"),
  "task": Field(str, "what to make: a task", "text_to_video"),
  "prompt": Field(str, "what to show, in words; the only field that is needed"),
  "negative_prompt": Field(str, "what guidance leads away from", ""),
  "image": Field(str, "path of the first frame"),
  "last_image": Field(str, "path of the last frame"),
  "video": Field(str, "path of the video to start from"),
  "video_b": Field(str, "path of the video that `connect` leads to"),
  "mask": Field(str, "path of a video or image that is white where `fill` is to make something new"),
  "given": Field(
    list, "ranges of frames of the video that are kept, as [[0, 8], [24, 32]]: from 0, both ends in"
  ),
  "strength": Field(float, "how much of the video `edit` and `upscale` may change", limits=(0.01, 1)),
  "shots": Field(list, 'prompts one after another, as [{"seconds": 2, "prompt": "..."}, ...]'),
  "size": Field(list, "height, width in pixels"),
  "frames": Field(int, "how many frames", limits=(1, 100_000)),
  "seconds": Field(float, "length, instead of frames", limits=(0.001, 3600)),
  "fps": Field(float, "frames a second", limits=(0.01, 1000)),
  "seed": Field(int, "another seed gives another video", 0, (0, 2**32 - 1)),
  "steps": Field(int, "steps of the sampler", limits=(1, 1000)),
  "times": Field(
    list, "instead of steps and shift: noise levels in thousandths, as [1000, 757, 522], of few-step models"
  ),
  "sampler": Field(str, "method of solving the ODE"),
  "shift": Field(float, "how far noise levels are moved towards noise", limits=(0.01, 1000)),
  "guidance": Field(float, "scale of classifier-free guidance; 1 is none", limits=(-1000, 1000)),
  "guidance_low": Field(
    float, "the same for the expert of low noise, in models of two experts", limits=(-1000, 1000)
  ),
  "guidance_interval": Field(list, "noise levels between which guidance acts, from 0 to 1", (0.0, 1.0)),
  "guidance_rescale": Field(
    float, "share of the guided velocity brought back to the unguided scale", 0.0, (0, 1)
  ),
  "cache": Field(
    float, "blocks are computed at one of so many steps, and extrapolated between; 1 is at each", 1.0, (1, 20)
  ),
  "category": Field(str, "a name under which launch.evaluate sums up; it changes nothing in the video"),
}
FILES = ("image", "last_image", "video", "video_b", "mask")  # fields that name one
STRENGTH = 0.7  # where a request gives none


@dataclasses.dataclass(frozen=True)
class Request:
  """One request, complete: every field has its value. Pixels [height, width], frames, frames a second."""

  id: str
  task: str
  prompt: str
  size: tuple
  frames: int
  fps: float
  seed: int
  steps: int
  sampler: str
  shift: float
  guidance: float
  guidance_low: float | None  # None: as guidance
  guidance_interval: tuple
  guidance_rescale: float
  negative_prompt: str
  image: str | None
  last_image: str | None = None
  video: str | None = None
  video_b: str | None = None
  mask: str | None = None
  given: tuple | None = None  # ((first, last), ...)
  strength: float | None = None
  shots: tuple | None = None  # ((seconds, prompt), ...)
  cache: float = 1.0
  times: tuple | None = None  # then `steps` is their number
  category: str | None = None

  @property
  def prompts(self):
    """The texts that frames read, in order."""
    return [prompt for _, prompt in self.shots] if self.shots else [self.prompt]


def parse_request(fields, defaults, samplers, probe=None):
  """A dict of a request's fields and the model's defaults -> Request.

  BadInput says which field is wrong, and what is allowed. samplers: names that `sampler` may have. probe:
  path of a video -> (frames, frames a second or None of a still, (height, width)); it raises BadInput. A
  request with a video has its size and rate where it gives none, and says with `frames` how long the result
  is, the video included; without, so many frames are made as usual.
  """
  for name, value in fields.items():
    _check_type(name, value)
  given = {name: _plain(value) for name, value in fields.items()}
  full = {name: field.default for name, field in FIELDS.items()} | dict(defaults) | given
  task = pick(TASKS, full["task"], "task")
  _check_combination(full["task"], task, full)
  pick(dict.fromkeys(samplers), full["sampler"], "sampler")
  full["shots"] = _parse_shots(full["shots"])
  full["times"] = _parse_times(full["times"], given)
  if full["times"]:
    full["steps"] = len(full["times"])
  if full["shots"] and not (full["prompt"] or "").strip():
    full["prompt"] = " ".join(prompt for _, prompt in full["shots"])
  if not (full["prompt"] or "").strip():
    raise BadInput("the prompt is empty; say in words what the video should show")
  for name in ("prompt", "negative_prompt"):
    if len(full[name]) > MAX_PROMPT:
      raise BadInput(
        f"the {name} has {len(full[name])} characters; at most {MAX_PROMPT} are taken: shorten it"
      )
  usual = _like_the_video(full, given, probe)
  size = full["size"]
  if len(size) != 2 or not all(isinstance(n, numbers.Integral) and 0 < n <= MAX_SIDE for n in size):
    raise BadInput(f"size is {size!r}; it must be [height, width] in pixels, at most {MAX_SIDE}")
  _check_limits(full)
  full["frames"] = _frames(full, given, usual)
  _check_limits(full)
  full["given"] = _parse_ranges(full["given"], full["frames"])
  interval = full["guidance_interval"]
  is_pair = len(interval) == 2 and all(isinstance(end, (int, float)) for end in interval)
  if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
    raise BadInput(f"guidance_interval is {interval!r}; it must be [from, to], noise levels between 0 and 1")
  if not full["id"]:
    raise BadInput("the request has no id; give it a short name for its output file")
  if "/" in full["id"] or full["id"].startswith(".") or len(full["id"].encode()) > MAX_ID:
    raise BadInput(
      f"id is {full['id']!r}; it names a file, so it must not hold a / nor begin with a dot, and has at most "
      f"{MAX_ID} bytes"
    )
  values = {field.name: full[field.name] for field in dataclasses.fields(Request)}
  return Request(
    **values
    | {"size": tuple(map(int, size)), "guidance_interval": tuple(interval), "fps": float(full["fps"])}
  )


def _check_combination(name, task, full):
  """BadInput where a field is missing that the task needs, or one is there that it has no use for."""
  for field in task.needs:
    if not full[field]:
      raise BadInput(f"{name} needs {field}: {FIELDS[field].help}")
  if task.one_of and not any(full[field] for field in task.one_of):
    raise BadInput(f"{name} needs {' or '.join(task.one_of)}: {FIELDS[task.one_of[0]].help}")
  for field in (*FILES, "given", "strength", "shots"):
    if full[field] and field not in (*task.needs, *task.one_of, *task.takes):
      tasks_with = [other for other, one in TASKS.items() if field in (*one.needs, *one.one_of, *one.takes)]
      raise BadInput(f"{field} does not go with {name}; it goes with {', '.join(tasks_with)}")


def _parse_shots(shots):
  """[{"seconds": ..., "prompt": ...}, ...] -> ((seconds, prompt), ...); None where there are none."""
  if shots is None:
    return None
  parsed = []
  for shot in shots:
    try:
      seconds, prompt = float(shot["seconds"]), shot["prompt"].strip()
    except (TypeError, KeyError, ValueError, AttributeError):
      seconds, prompt = 0.0, ""
    if not 0 < seconds < math.inf or not prompt or set(shot) != {"seconds", "prompt"}:
      raise BadInput(
        f'shots holds {shot!r}; each is {{"seconds": ..., "prompt": ...}}, seconds above 0 and words to show'
      )
    parsed.append((seconds, prompt))
  if not parsed:
    raise BadInput("shots is empty; give at least one, or leave it out")
  return tuple(parsed)


def _parse_times(times, given):
  """[1000, 757, 522] -> a tuple; None where there are none, or the request gives `steps` in their place."""
  if not times or "steps" in given and "times" not in given:
    return None
  if "steps" in given:
    raise BadInput(f"steps is {given['steps']} and times {list(times)}; give one of them")
  known = all(isinstance(time, numbers.Real) and 0 < time <= 1000 for time in times)
  if not known or list(times) != sorted(set(times), reverse=True):
    raise BadInput(f"times is {list(times)}; it must be numbers that fall, from 1000 at most to above 0")
  return tuple(map(float, times))


def _parse_ranges(ranges, frames):
  """[[first, last], ...] -> tuple of pairs within the video."""
  if ranges is None:
    return None
  for pair in ranges:
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int for n in pair)
    if not whole or not 0 <= pair[0] <= pair[1] < frames:
      raise BadInput(f"given holds {pair!r}; each is [first, last], from 0 to {frames - 1}, both included")
  return tuple(map(tuple, ranges))


def _like_the_video(full, given, probe):
  """Size and rate of the request are those of its video, unless it is to change -> frames that there are."""
  if not full["video"] or probe is None:
    return 0
  count, fps, size = probe(full["video"])
  if full["task"] != "upscale":
    if "size" in given and tuple(given["size"]) != size:
      raise BadInput(
        f"size is {list(given['size'])}, and the video is {list(size)}; leave size out, or scale the video"
      )
    full["size"] = list(size)
  if "fps" not in given and fps:
    full["fps"] = fps
  counts = [(count, fps), *([probe(full["video_b"])[:2]] if full["video_b"] else [])]
  return sum(max(1, round(n * full["fps"] / rate)) if rate else n for n, rate in counts)


def _frames(full, given, there):
  """How many frames the result has. there: how many are in its videos."""
  if full["task"] == "text_to_image":
    return 1
  frames = full["frames"] if "frames" in given else None
  if "seconds" in given:
    if frames is not None:
      raise BadInput(f"frames is {frames} and seconds {full['seconds']}; give one of them")
    frames = max(1, round(full["seconds"] * full["fps"]))
  if full["shots"]:
    total = round(sum(seconds for seconds, _ in full["shots"]) * full["fps"])
    if frames not in (None, total):
      raise BadInput(f"shots add up to {total} frames, and frames is {frames}; leave out frames and seconds")
    frames = max(1, total)
  if full["task"] in SAME_LENGTH and there:
    if frames is not None and frames > there:
      raise BadInput(f"frames is {frames}, and the video has {there}; ask for no more, or extend it first")
    return frames or there
  if frames is None:
    return full["frames"] + there
  if there and frames <= there:
    raise BadInput(f"frames is {frames}, and the given video has {there}; ask for more than that")
  return frames


def _plain(value):
  """A number of numpy -> one of Python, which JSON can write."""
  return value.item() if isinstance(value, np.generic) else value


def _check_type(name, value):
  """BadInput where there is no such field, or its value is of another type or no text."""
  if name not in FIELDS:
    raise BadInput(f"unknown field {name!r}; a request has {', '.join(FIELDS)}")
  wanted = FIELDS[name].type
  kinds = {int: numbers.Integral, float: numbers.Real, list: (list, tuple)}.get(wanted, wanted)
  if not isinstance(value, kinds) or isinstance(value, bool):
    raise BadInput(f"{name} is {value!r}; it must be {'an' if wanted is int else 'a'} {wanted.__name__}")
  if isinstance(value, str) and (value != value.encode("utf-8", "ignore").decode() or "\0" in value):
    raise BadInput(f"{name} is {value!r}, which holds something that is no character")


def _check_limits(fields):
  """BadInput names the first number that is out of its range, or not a number."""
  for name, field in FIELDS.items():
    if field.limits and fields[name] is not None:
      least, most = field.limits
      if not least <= fields[name] <= most:
        raise BadInput(f"{name} is {fields[name]}; it must be from {least} to {most}")


def latent_size(frames, size, stride, patch):
  """Latent (T, H, W) that covers `frames` frames of `size` pixels: rounded up to whole strides and patches.

  stride: (t, y, x) of the VAE. BadInput below one stride.
  """
  if min(size) < min(stride[1:]):
    raise BadInput(
      f"size is {list(size)}; at least {list(stride[1:])} pixels are needed, one stride of the VAE: ask for "
      "more"
    )
  t = 1 + math.ceil((frames - 1) / stride[0])
  h, w = (math.ceil(n / (s * p)) * p for n, s, p in zip(size, stride[1:], patch[1:], strict=True))
  return math.ceil(t / patch[0]) * patch[0], h, w


# --- the tasks: (request, media) -> Timeline. media.stride is the VAE's, in time; its functions read files at
# the size and rate of the request: image(path) -> uint8 [H, W, 3], video(path) -> uint8 [T, H, W, 3],
# mask(path) -> uint8 [T, H, W].


def _timeline(request, frames=None, **fields):
  """Nothing is given. Shots begin when those before them have ended; the last goes on."""
  frames = frames or request.frames
  prompt_F = np.ones(frames, int)
  if request.shots:
    ends = np.cumsum([round(seconds * request.fps) for seconds, _ in request.shots])[:-1]
    prompt_F = np.searchsorted(ends, np.arange(frames), side="right") + 1
  return Timeline(frames, request.size, request.prompts, prompt_F, **fields)


def text_to_video(request, media):
  """Nothing is given."""
  del media
  return _timeline(request)


def image_to_video(request, media):
  """The first frame is given, and the last one, too, where there is a last_image."""
  pieces = [(0, media.image(request.image)[None])]
  if not request.last_image:
    return _timeline(request, pieces=pieces)
  # The last image stands still for a latent after the end, so that what leads to it does not.
  stride, last = media.stride, request.frames - 1
  frames = 1 + stride * math.ceil((last + stride - 1) / stride)
  if last < 1:
    raise BadInput("frames is 1, and two images are given; ask for more frames")
  pieces.append((last, np.repeat(media.image(request.last_image)[None], frames - last, 0)))
  return _timeline(request, frames, pieces=pieces, out=request.frames)


def extend_forward(request, media):
  """The video is given, and goes on."""
  video = _shorter(media.video(request.video), request)
  return _timeline(request, pieces=[(0, video)])


def extend_backward(request, media):
  """The video is given at the end: what came before it is made."""
  video = _shorter(media.video(request.video), request)
  return _timeline(request, pieces=[(request.frames - len(video), video)])


def connect(request, media):
  """The result begins with one video and ends with another; what leads from one to the other is made: a whole
  number of latents, so up to a stride of frames more than asked.
  """
  first, second = media.video(request.video), media.video(request.video_b)
  made = request.frames - len(first) - len(second)
  if made < 1:
    raise BadInput(
      f"frames is {request.frames}, and the two videos have {len(first)} and {len(second)}; ask for more"
    )
  made = math.ceil(made / media.stride) * media.stride
  begin = len(first) + made
  return _timeline(request, begin + len(second), pieces=[(0, first), (begin, second)])


def loop(request, media):
  """After the video comes what leads back to its beginning, so that it can be repeated without a seam.

  Without a video, one is made first (`Pipeline`), of half the frames.
  """
  video = _shorter(media.video(request.video), request)
  stride = media.stride
  again = min(len(video) // stride, 2) * stride  # frames of its beginning, once more
  if not again:
    raise BadInput(f"the video to loop has {len(video)} frames; at least {stride} are needed")
  made = math.ceil((request.frames - len(video)) / stride) * stride
  out = len(video) + made
  return _timeline(request, out + again, pieces=[(0, video), (out, video[:again])], out=out)


def fill(request, media):
  """Ranges of frames are kept, or all that is not white in a mask, or both; the rest is made."""
  video = media.video(request.video)[: request.frames]
  kept = np.ones(len(video), bool)
  if request.given is not None:
    kept[:] = False
    for first, last in request.given:
      kept[first : last + 1] = True
  return _timeline(request, **_partly(video, kept), mask_FHW=_mask(request, media, len(video)))


def edit(request, media):
  """The video, with noise added to it and taken away again under the prompt (SDEdit, arXiv:2108.01073).

  strength is the noise level to begin with. Only what is white in a mask changes, if there is one.
  """
  video = media.video(request.video)[: request.frames]
  mask_FHW = _mask(request, media, len(video))
  kept = np.full(len(video), mask_FHW is not None)
  for first, last in request.given or ():
    kept[first : last + 1] = True
  return _timeline(
    request, pieces=[(0, video)], kept_F=kept, start=request.strength or STRENGTH, mask_FHW=mask_FHW
  )


def upscale(request, media):
  """The video at another size, with noise added and taken away: `edit` of what scaling gives."""
  return edit(request, media)


def _partly(video, kept):
  """Ranges of the video that are kept, as pieces; each is encoded by itself, so that nothing of the rest is
  in its latents.
  """
  edges = np.flatnonzero(np.diff(np.concatenate([[0], kept, [0]])))
  return {"pieces": [(int(i), video[i:end]) for i, end in zip(edges[::2], edges[1::2])]}


def _mask(request, media, frames):
  """The mask of a request, uint8 [F, H, W]; None without one. An image counts for all frames."""
  if not request.mask:
    return None
  mask = media.mask(request.mask)
  if len(mask) not in (1, frames):
    raise BadInput(f"the mask has {len(mask)} frames, and the video {frames}; give as many, or one image")
  if not mask.any():
    raise BadInput(
      "the mask is black everywhere, so nothing would be made; white is where something new goes"
    )
  return np.broadcast_to(mask, (frames, *mask.shape[1:]))


def _shorter(video, request):
  """The video; BadInput where it is not shorter than the result."""
  if len(video) >= request.frames:
    raise BadInput(
      f"frames is {request.frames}, and the given video has {len(video)}; ask for more than that"
    )
  return video


@dataclasses.dataclass(frozen=True)
class Task:
  """A task, and what is given: those that it needs, of which it needs one, that it takes."""

  timeline: Callable
  needs: tuple = ()
  one_of: tuple = ()
  takes: tuple = ("shots",)


TASKS = {
  "text_to_video": Task(text_to_video),
  "text_to_image": Task(text_to_video, takes=()),
  "image_to_video": Task(image_to_video, ("image",), takes=("last_image", "shots")),
  "extend_forward": Task(extend_forward, ("video",)),
  "extend_backward": Task(extend_backward, ("video",)),
  "loop": Task(loop, takes=("video", "shots")),
  "connect": Task(connect, ("video", "video_b")),
  "fill": Task(fill, ("video",), ("given", "mask")),
  "edit": Task(edit, ("video",), takes=("strength", "mask", "given", "shots")),
  "upscale": Task(upscale, ("video",), takes=("strength", "shots")),
}
SAME_LENGTH = ("fill", "edit", "upscale")  # tasks whose result is as long as their video
