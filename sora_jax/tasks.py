"""Tasks: each is one function from a request to a canvas, which says what is given, where, and under which
prompt.

A canvas is a latent video, partly given. The sampler fills the rest; the same packing as in training puts
canvases into rows. To add a task: one entry in TASKS. To add a field of a request: one entry in FIELDS.
"""

import dataclasses
import math
import numbers

import numpy as np

from sora_jax import masks
from sora_jax.errors import BadInput, pick

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
  "image": Field(str, "path of the first frame, for image_to_video"),
  "size": Field(list, "height, width in pixels"),
  "frames": Field(int, "how many frames", limits=(1, 100_000)),
  "seconds": Field(float, "length, instead of frames", limits=(0, 3600)),
  "fps": Field(float, "frames a second", limits=(0.01, 1000)),
  "seed": Field(int, "another seed gives another video", 0, (0, 2**32 - 1)),
  "steps": Field(int, "steps of the sampler", limits=(1, 1000)),
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
}
LATER = ("last_image", "video", "video_b", "mask", "given", "strength", "shots")


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


@dataclasses.dataclass
class Canvas:
  """What the sampler fills.

  Latents are normalised; `frames` and `size` are what to cut from the decoded video.
  """

  latents_THWC: np.ndarray  # float32; values count only where given
  given_THW: np.ndarray  # bool: latents that are kept
  prompt_T: np.ndarray  # int: which of `texts` a latent frame reads, from 1
  texts: list
  frames: int
  size: tuple
  # channels joined to the latents, for a model that takes conditions so (Wan I2V)
  cond_THWC: np.ndarray | None = None


def parse_request(fields, defaults, samplers):
  """A dict of a request's fields and the model's defaults -> Request.

  BadInput says which field is wrong, and what is allowed. samplers: names that `sampler` may have.
  """
  for name, value in fields.items():
    _check_type(name, value)
  given = {name: _plain(value) for name, value in fields.items()}
  full = {name: field.default for name, field in FIELDS.items()} | dict(defaults) | given
  if full["task"] not in TASKS:
    raise BadInput(f"task is {full['task']!r}; this version has {', '.join(TASKS)}")
  pick(dict.fromkeys(samplers), full["sampler"], "sampler")
  if not (full["prompt"] or "").strip():
    raise BadInput("the prompt is empty; say in words what the video should show")
  for name in ("prompt", "negative_prompt"):
    if len(full[name]) > MAX_PROMPT:
      raise BadInput(
        f"the {name} has {len(full[name])} characters; at most {MAX_PROMPT} are taken: shorten it"
      )
  size = full["size"]
  if len(size) != 2 or not all(isinstance(n, numbers.Integral) and 0 < n <= MAX_SIDE for n in size):
    raise BadInput(f"size is {size!r}; it must be [height, width] in pixels, at most {MAX_SIDE}")
  _check_limits(full)
  if full["task"] == "text_to_image":
    full["frames"] = 1
  elif "seconds" in fields and "frames" not in fields:
    full["frames"] = max(1, round(fields["seconds"] * full["fps"]))
    _check_limits(full)
  interval = full["guidance_interval"]
  is_pair = len(interval) == 2 and all(isinstance(end, (int, float)) for end in interval)
  if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
    raise BadInput(f"guidance_interval is {interval!r}; it must be [from, to], noise levels between 0 and 1")
  if full["task"] == "image_to_video" and not full["image"]:
    raise BadInput("image_to_video needs an image: give the path of one in the field image")
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


def _plain(value):
  """A number of numpy -> one of Python, which JSON can write."""
  return value.item() if isinstance(value, np.generic) else value


def _check_type(name, value):
  """BadInput where there is no such field, or its value is of another type or no text."""
  if name in LATER:
    raise BadInput(
      f"{name} is for a task that this version does not have yet; its tasks are {', '.join(TASKS)}"
    )
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


def _empty(request, stride, patch, channels):
  """A canvas of which nothing is given."""
  thw = latent_size(request.frames, request.size, stride, patch)
  latents_THWC, given_THW = np.zeros((*thw, channels), np.float32), np.zeros(thw, bool)
  return Canvas(latents_THWC, given_THW, np.ones(thw[0], int), [request.prompt], request.frames, request.size)


def text_to_video(request, *, stride, patch, channels, encode):
  """Nothing is given."""
  del encode
  return _empty(request, stride, patch, channels)


def image_to_video(request, *, stride, patch, channels, encode):
  """The first frame is given: the image, scaled to cover the size and cropped to it.

  Its tokens have sigma 0.
  """
  canvas = _empty(request, stride, patch, channels)
  pixels = tuple(n * s for n, s in zip(canvas.latents_THWC.shape[1:3], stride[1:], strict=True))
  canvas.latents_THWC[:1] = encode(request.image, request.size, pixels)
  canvas.given_THW[masks.from_ranges([(0, 0)], len(canvas.given_THW), stride[0])] = True
  return canvas


# Each: (request, stride, patch, channels, encode) -> Canvas. encode(path, size, padded size) -> latents [1,
# H, W, C] of an image.
TASKS = {"text_to_video": text_to_video, "text_to_image": text_to_video, "image_to_video": image_to_video}
