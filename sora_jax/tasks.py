"""Tasks: each is one function from a request to a canvas, which says what is given, where, and under which prompt.

A canvas is a latent video of 1 + 4 n frames (n >= 0; a latent frame after the first stands for `stride` frames), partly given. The
sampler fills the rest; the same packing as in training puts canvases into rows. To add a task: one entry in TASKS.
"""

import dataclasses
import math

import numpy as np

from sora_jax.errors import BadInput

MAX_PROMPT = 4000          # characters; a longer one is surely a mistake
LIMITS = {"frames": (1, 100_000), "fps": (0.01, 1000), "steps": (1, 1000), "seed": (0, 2 ** 32 - 1), "shift": (0.01, 1000),
          "guidance": (-1000, 1000), "guidance_low": (-1000, 1000), "guidance_rescale": (0, 1), "seconds": (0, 3600)}
MAX_SIDE = 16_384          # pixels

FIELDS = {
    "id": str, "task": str, "prompt": str, "size": list, "frames": int, "seconds": float, "fps": float, "seed": int, "steps": int,
    "sampler": str, "shift": float, "guidance": float, "guidance_low": float, "guidance_interval": list, "guidance_rescale": float,
    "negative_prompt": str, "image": str,
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
  guidance_low: float | None       # of the expert of low noise, where a model has two; None: as guidance
  guidance_interval: tuple
  guidance_rescale: float
  negative_prompt: str
  image: str | None


@dataclasses.dataclass
class Canvas:
  """What the sampler fills. Latents are normalised; `frames` and `size` are what to cut from the decoded video."""
  latents_THWC: np.ndarray         # float32; values count only where given
  given_THW: np.ndarray            # bool: latents that are kept
  prompt_T: np.ndarray             # int: which of `texts` a latent frame reads, from 1
  texts: list
  frames: int
  size: tuple
  start_sigma: float = 1.0
  cond_THWC: np.ndarray | None = None      # channels joined to the latents, for a model that takes conditions so (Wan I2V)


def parse_request(fields, defaults, samplers):
  """A dict of a request's fields and the model's defaults -> Request. BadInput says which field is wrong, and what is allowed."""
  for name, value in fields.items():
    if name in LATER:
      raise BadInput(f"{name} is for a task that this version does not have yet; its tasks are {', '.join(TASKS)}")
    if name not in FIELDS:
      raise BadInput(f"unknown field {name!r}; a request has {', '.join(FIELDS)}")
    wanted = FIELDS[name]
    fits = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
    if not fits:
      raise BadInput(f"{name} is {value!r}; it must be a {wanted.__name__}")
    if isinstance(value, str) and (value != value.encode("utf-8", "ignore").decode() or "\0" in value):
      raise BadInput(f"{name} is {value!r}, which holds something that is no character")
  full = {"task": "text_to_video", "negative_prompt": "", "image": None, "guidance_low": None, "guidance_interval": [0.0, 1.0],
          "guidance_rescale": 0.0, "seed": 0, **defaults, **fields}
  if full["task"] not in TASKS:
    raise BadInput(f"task is {full['task']!r}; this version has {', '.join(TASKS)}")
  if full["sampler"] not in samplers:
    raise BadInput(f"sampler is {full['sampler']!r}; there are {', '.join(samplers)}")
  if not full["prompt"].strip():
    raise BadInput("the prompt is empty; say in words what the video should show")
  for name in ("prompt", "negative_prompt"):
    if len(full[name]) > MAX_PROMPT:
      raise BadInput(f"the {name} has {len(full[name])} characters; at most {MAX_PROMPT} are taken: shorten it")
  size = full["size"]
  if len(size) != 2 or not all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in size):
    raise BadInput(f"size is {size!r}; it must be [height, width] in pixels, at most {MAX_SIDE}")
  _check_limits(full)
  if full["task"] == "text_to_image":
    full["frames"] = 1
  elif "seconds" in fields and "frames" not in fields:
    full["frames"] = max(1, round(fields["seconds"] * full["fps"]))
    _check_limits(full)
  interval = full["guidance_interval"]
  if len(interval) != 2 or not all(isinstance(end, (int, float)) for end in interval) or not 0 <= interval[0] <= interval[1] <= 1:
    raise BadInput(f"guidance_interval is {interval!r}; it must be [from, to], noise levels between 0 and 1")
  if full["task"] == "image_to_video" and not full["image"]:
    raise BadInput("image_to_video needs an image: give the path of one in the field image")
  if not full.get("id"):
    raise BadInput("the request has no id; give it a short name for its output file")
  if "/" in full["id"] or full["id"].startswith(".") or len(full["id"].encode()) > 240:
    raise BadInput(f"id is {full['id']!r}; it names a file, so it must not hold a / nor begin with a dot, and has at most 240 bytes")
  values = {f.name: full[f.name] for f in dataclasses.fields(Request)}
  return Request(**values | {"size": tuple(size), "guidance_interval": tuple(interval), "fps": float(full["fps"])})


def _check_limits(fields):
  """BadInput names the first number that is out of its range, or not a number."""
  for name, (least, most) in LIMITS.items():
    if fields.get(name) is not None and not least <= fields[name] <= most:
      raise BadInput(f"{name} is {fields[name]}; it must be from {least} to {most}")


def latent_size(frames, size, stride, patch):
  """Latent (T, H, W) that covers `frames` frames of `size` pixels: rounded up to whole strides and patches.

  stride: (4, s, s) of the VAE. BadInput below one stride.
  """
  if min(size) < min(stride[1:]):
    raise BadInput(f"size is {list(size)}; at least {list(stride[1:])} pixels are needed, one stride of the VAE: ask for more")
  t = 1 + math.ceil((frames - 1) / stride[0])
  h, w = (math.ceil(n / (s * p)) * p for n, s, p in zip(size, stride[1:], patch[1:], strict=True))
  return math.ceil(t / patch[0]) * patch[0], h, w


def _empty(request, stride, patch, channels):
  thw = latent_size(request.frames, request.size, stride, patch)
  return Canvas(np.zeros((*thw, channels), np.float32), np.zeros(thw, bool), np.ones(thw[0], int), [request.prompt],
                request.frames, request.size)


def text_to_video(request, *, stride, patch, channels, encode):
  """Nothing is given."""
  del encode
  return _empty(request, stride, patch, channels)


def image_to_video(request, *, stride, patch, channels, encode):
  """The first frame is given: the image, scaled to cover the size and cropped to it. Its tokens have sigma 0."""
  canvas = _empty(request, stride, patch, channels)
  pixels = tuple(n * s for n, s in zip(canvas.latents_THWC.shape[1:3], stride[1:], strict=True))
  canvas.latents_THWC[:1] = encode(request.image, request.size, pixels)
  canvas.given_THW[0] = True
  return canvas


# Each: (request, stride, patch, channels, encode) -> Canvas. encode(path, size, padded size) -> latents [1, H, W, C] of an image.
TASKS = {"text_to_video": text_to_video, "text_to_image": text_to_video, "image_to_video": image_to_video}
