"""A model that makes videos: open it, ask for one video, or run many requests.

  pipe = sora_jax.Pipeline.open("out/wan")                    # or Pipeline.shipped()
  video = pipe("a red ball moves left", seed=3)               # uint8 [T, H, W, 3]
  for result in pipe.run(requests):                           # dicts with the fields of tasks.FIELDS
    print(result.request.id, result.error or result.video().shape)

What a sampling job does, once, in `Pipeline.run`:

  parse      a dict -> Request, with the defaults of the model; a bad one becomes a Result with its error
  plan       from sizes alone: which requests share a row of tokens, which rows are denoised together
  embed      the prompts of the next rows, where the text encoder is frozen
  canvas     Request -> Timeline (tasks.py) -> Canvas: a latent video, partly given (timeline.py)
  denoise    rows of canvases -> latents, step by step (sample.py)
  decode     latents -> frames (codec.py), when they are asked for

A video that is longer than the model's window has a canvas for each of its windows; they are made in rounds,
with those of other requests. Only the rows at work, and the latents of such long videos, are in memory,
whatever the number of requests. Nothing is printed; no globals, no
flags.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath

from sora_jax import (
  adapters,
  batch as batches,
  codec,
  patches,
  sample,
  tasks,
  timeline,
  video,
  workdir as workdirs,
)
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.embedder import Embedder
from sora_jax.errors import BadInput, pick
from sora_jax.models import t2v, text, vae

# of a request, from the config
DEFAULTS = ("size", "frames", "fps", "steps", "times", "sampler", "shift", "guidance", "guidance_low")
PROMPT_BYTES = 256 << 20  # embeddings of prompts that are held at a time


@dataclasses.dataclass(eq=False)
class Result:
  """What became of one request: `error`, one line; or latents and, decoded as they are taken, frames uint8
  [H, W, 3].
  """

  position: int  # of the request in the list
  request: tasks.Request | None  # None where it could not be parsed
  error: str | None = None
  latents_THWC: np.ndarray | None = None  # normalised
  frames: Iterator | None = None
  size: tuple | None = None  # height, width of the frames
  count: int = 0  # of the frames; `connect` and `loop` may make a few more than asked
  seconds: float = 0.0  # its share of the time that its rows took to denoise

  def video(self):
    """All frames, uint8 [T, H, W, 3]. It uses up `frames`: call it once. BadInput if the request failed."""
    if self.error:
      raise BadInput(self.error)
    frames = list(self.frames)
    if not frames:
      raise ValueError(
        f"the frames of request {self.request.id} were taken already; decode its latents again"
      )
    return np.stack(frames)


@dataclasses.dataclass(frozen=True)
class _Planned:
  """A request, and the size in a row of its next canvas. work: None before its first one."""

  position: int
  request: tasks.Request
  tokens: int
  text_tokens: int
  windows: int = 1  # canvases that are left
  number: int = 0  # of the next canvas
  work: timeline.Work | None = None
  media: object = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """A model with its weights, VAE, tokenizer, and what its config says where a request does not."""

  model: t2v.Model
  params: dict
  vae_cfg: vae.VAEConfig
  vae_params: dict
  tokenizer: text.Tokenizer
  embedder: Embedder | None  # the text encoder, where it is frozen
  defaults: dict
  schedule: str  # a key of flow.SCHEDULES
  row_tokens: int
  rows: int  # denoised together
  base_fps: float | None
  window: int | None  # frames that are made at a time; None: all
  step: int  # of training
  identity: str  # changes with anything that decides what a request becomes
  keep_text_encoder: bool = False  # in memory between calls, where it is frozen

  @classmethod
  def open(
    cls,
    workdir,
    weights="ema",
    say: Callable = lambda line: None,
    keep_text_encoder=False,
    mesh=None,
    devices=None,
    lora=(),
    lora_ignore=False,
    eight_bits="",
  ):
    """From a work directory of launch.train or launch.import_weights, or an export of it.

    weights: "ema", the running mean, or "params", the last ones. say: takes lines for the user, as of damaged
    checkpoints.
    keep_text_encoder: a frozen text encoder stays in memory while videos are denoised, so that the next call
    need not load it again; it may be larger than the transformer.
    mesh: how many devices cut what, as {"fsdp": 2, "context": 2}; None: see `workdir.sampling_layout`.
    devices: those that hold the model; None: all, also of other processes.
    lora: files of adapters to add, as ["style.safetensors:0.8", "high=steps.safetensors"]: an expert where
    there are two, and a strength. lora_ignore: leave out names in them that fit no layer.
    eight_bits: "int8" or "fp8", what the weights of blocks are kept in; "": as the config says.
    BadInput where `workdir` holds no such model.
    """
    config = workdirs.read_config(workdir)
    layout = workdirs.sampling_layout(config, mesh, devices)
    if eight_bits:
      with config.unlocked():
        config.model.weights = eight_bits
    model = workdirs.make_model(config, epath.Path(workdir) / "text", layout)
    loras, kind = adapters.open_all(lora), model.weights
    model = dataclasses.replace(model, weights="" if loras else kind)
    # imported weights stay in what they are computed in
    half = "dit" in config.model and model.dit.dtype == "bfloat16"
    params, step = workdirs.load_model_weights(
      workdir, config, model, weights, "bfloat16" if half else None, say
    )
    if loras:
      params = adapters.merged(params, model, loras, lora_ignore, say)
      params = workdirs.in_eight_bits(params, params, kind)
    identity = workdirs.identity(workdir, weights) + adapters.identity(loras) + kind
    pipe = cls.of(workdir, config, model, params, step, identity)
    return dataclasses.replace(pipe, keep_text_encoder=keep_text_encoder)

  @classmethod
  def shipped(cls):
    """The small model that ships with the package: a generated world of coloured shapes."""
    return cls.open(workdirs.shipped())

  @classmethod
  def of(cls, workdir, config, model, params, step=0, identity=""):
    """From a config (a ConfigDict) and weights; VAE and text encoder are those in W."""
    workdir = epath.Path(workdir)
    vae_cfg, vae_params = workdirs.load_vae(workdir / "vae")
    if vae_cfg.z_dim != model.dit.channels:
      raise BadInput(
        f"{workdir}: its VAE has {vae_cfg.z_dim} latent channels, its transformer takes "
        f"{model.dit.channels}; they are not for each other"
      )
    settings = config.sample
    pipe = cls(
      model=model,
      params=params,
      vae_cfg=vae_cfg,
      vae_params=vae_params,
      tokenizer=text.Tokenizer(workdir / "text" / "tokenizer.model"),
      embedder=Embedder(workdir / "text", model.layout) if model.text is None else None,
      defaults={name: settings[name] for name in DEFAULTS if name in settings},
      schedule=settings.get("schedule", "uniform"),
      row_tokens=settings.row_tokens,
      rows=settings.rows,
      base_fps=config.data.base_fps or None,
      window=settings.get("window") or None,
      step=step,
      identity=identity,
    )
    if pipe._vae_devices():
      pipe = dataclasses.replace(pipe, vae_params=jax.device_put(vae_params, model.layout.fitted(())))
    return pipe

  def __call__(self, prompt, **fields):
    """One video, uint8 [T, H, W, 3].

    fields: those of tasks.FIELDS, such as size=(64, 96), frames=17, seed=3. Raises BadInput.
    """
    request = self.parse({"id": "video", **fields, "prompt": prompt})
    (result,) = self.run([request])
    if result.error:
      raise BadInput(result.error)
    return result.video()

  def run(self, requests, *, stop: Callable = lambda: False, progress: Callable = lambda done, total: None):
    """Requests (dicts of fields, or Request) -> yields a Result for each, as they are ready.

    A bad request costs itself alone. Images are read when their rows are at work. stop: asked before each
    step of the sampler; once it is true no more results come, and the requests without one were not made.
    progress(done, total): called after each step, in steps of the sampler over all requests.
    """
    planned = []
    for position, fields in enumerate(requests):
      request = None
      try:
        request = self._request(position, fields)
        planned.append(self._planned(position, request))
      except BadInput as error:
        yield Result(position, request, str(error))
    total, finished = sum(one.request.steps * one.windows for one in planned), 0
    while planned:
      later = []
      for groups, tokenize in self._with_texts(self._groups(planned)):
        for rows, shape in groups:
          steps = sum(one.request.steps for row in rows for one in row)
          rows, failed = self._with_canvases(rows, tokenize)
          yield from (result for result, _ in failed)
          finished += sum(one.request.steps * one.windows for _, one in failed)
          steps -= sum(one.request.steps for _, one in failed)
          if rows:

            def on_step(done, of):
              progress(finished + steps * done // of, total)

            filled = self._denoise(rows, shape, on_step, stop)
            if filled is None:
              return
            for one, seconds in filled:
              if one.work.done:
                result = self._result(one, seconds)
                if isinstance(result, _Planned):
                  later.append(result)
                else:
                  yield result
              else:
                later.append(one)
          elif failed:
            progress(finished, total)
          finished += steps
      planned = later

  # --- parse and plan

  def _request(self, position, fields):
    """An item of `run` -> Request. A dict without an id gets its position."""
    if isinstance(fields, tasks.Request):
      self.check(fields)
      return fields
    if not isinstance(fields, Mapping):
      raise BadInput(f"request {position} is {fields!r}; it must be a dict of fields, or a Request")
    return self.parse({"id": f"{position:05d}", **fields})

  def parse(self, fields):
    """A dict of fields -> Request with this model's defaults; BadInput says which field is wrong, or not for
    this model.
    """
    request = tasks.parse_request(fields, self.defaults, SAMPLERS, _probe)
    self.check(request)
    return request

  def check(self, request):
    """BadInput where this model cannot make a request."""
    pick(tasks.TASKS, request.task, "task")
    pick(SAMPLERS, request.sampler, "sampler")
    if request.guidance_low is not None and not self.model.boundary:
      raise BadInput("guidance_low is for models of two experts, and this one has one; leave it out")
    if self.model.dit.conditioning == "channels" and request.task != "image_to_video":
      raise BadInput("this model begins with an image: ask for the task image_to_video, and give an image")
    for name in tasks.FILES:
      path = getattr(request, name)
      if path and not os.path.exists(path):
        raise BadInput(f"{name} {path!r} does not exist; give the path of a file")
    self.latent_size(request)

  def latent_size(self, request):
    """(T, H, W) of a request's latents; BadInput where it is too small."""
    return tasks.latent_size(request.frames, request.size, self.vae_cfg.stride, self.model.dit.patch)

  def ids(self, prompt):
    """A prompt -> token ids, int32 [s]; cut to text_pad, where the model has it."""
    return np.asarray(self.tokenizer.encode(prompt, self.model.dit.text_pad or None), np.int32)

  def embed(self, prompts):
    """Prompts -> what the model takes of each: ids, or where the text encoder is frozen embeddings [s, E]."""
    ids = [self.ids(prompt) for prompt in prompts]
    if self.embedder is None:
      return ids
    return [text.padded(text_SE, self.model.dit.text_pad) for text_SE in self.embedder(ids)]

  def _planned(self, position, request):
    """The sizes of a request: what planning needs of it. Videos are read, and forgotten again."""
    work = self._work(request, _Sizes(self, request))
    windows = work.windows
    if _is_made_first(request):  # then comes the loop
      frame = np.broadcast_to(np.uint8(0), (work.timeline.frames, *request.size, 3))
      windows += self._work(request, _Sizes(self, request, frame)).windows
    return self._next(_Planned(position, request, 0, 0, windows), work)

  def _next(self, one, work):
    """`one` with the sizes of the next canvas of its work."""
    begin, end = work.span(work.known)
    tokens = patches.token_count((end - begin, *work.codec.shape[:2]), self.model.dit.patch)
    texts = sum(map(self._text_tokens, one.request.prompts))
    text_tokens = max(texts, self._text_tokens(one.request.negative_prompt))
    return dataclasses.replace(one, tokens=tokens, text_tokens=text_tokens)

  def _work(self, request, media):
    """A request -> Work, of which nothing is encoded yet. BadInput where its files cannot be read."""
    task = request.task
    if _is_made_first(request) and media.frames is None:
      # what is looped: half the frames, a whole number of latents
      stride = self.vae_cfg.stride[0]
      half = 1 + stride * max(1, (request.frames - 1) // (2 * stride))
      line = tasks.text_to_video(dataclasses.replace(request, frames=half), media)
    elif self.model.dit.conditioning == "channels":
      line = tasks.text_to_video(request, media)
    else:
      line = tasks.TASKS[task].timeline(request, media)
    stride = self.vae_cfg.stride[0]
    return timeline.Work(line, self._codec(request), self.window and 1 + (self.window - 1) // stride)

  def _codec(self, request):
    """The VAE at the size of a request."""
    _, *grid = self.latent_size(request)
    cell = self.vae_cfg.stride[1:]
    edges = [(0, n * c - s) for n, c, s in zip(grid, cell, request.size)]

    def encode(frames_THWC):
      padded = np.pad(frames_THWC, [(0, 0), *edges, (0, 0)], mode="edge")
      (raw,) = codec.encode_clips(self.vae_cfg, self.vae_params, [padded])
      return np.asarray(vae.normalise(raw, self.vae_cfg))

    def decode(latents_THWC):
      return self.decode(latents_THWC, None, request.size)

    shape = (*grid, self.model.dit.channels)
    return timeline.Codec(encode, decode, self.vae_cfg.stride[0], shape, cell, self.model.dit.patch[0])

  def _text_tokens(self, prompt):
    """How many text tokens a prompt has in a row; one more after a frozen encoder, for all its padding."""
    count = len(self.ids(prompt))
    return count + (self.embedder is not None and count < self.model.dit.text_pad)

  def _groups(self, planned):
    """Yields (rows of _Planned that are denoised together, their RowShape).

    Those too long for a row go alone.
    """
    layout = self.model.layout
    devices = 1 if layout is None else layout.ways(("fsdp", "context"))
    alike = {}
    for one in planned:
      request = one.request
      # experts change over, and blocks are computed, for all at once
      few = self.model.boundary or request.cache > 1
      levels = (request.steps, request.shift, request.times) if few else ()
      alike.setdefault((request.sampler, request.cache, *levels), []).append(one)
    for entries in alike.values():
      together = [one for one in entries if one.tokens <= self.row_tokens]
      alone = [[one] for one in entries if one.tokens > self.row_tokens]
      for part in [*alone, together] if together else alone:
        tokens, text_tokens = ([getattr(one, name) for one in part] for name in ("tokens", "text_tokens"))
        rows, shape = sample.share_rows(tokens, text_tokens, self.row_tokens, devices=devices)
        for start in range(0, len(rows), self.rows):
          yield [[part[i] for i in row] for row in rows[start : start + self.rows]], shape

  def _with_texts(self, groups):
    """Yields (some groups, function from a prompt to its ids or embedding).

    A frozen encoder embeds the prompts of as many groups as PROMPT_BYTES allow; its weights are freed before
    they are denoised, unless they are to be kept.
    """
    if self.embedder is None:
      yield groups, self.ids
      return
    groups = iter(groups)
    while wave := list(self._wave(groups)):
      requests = [one.request for rows, _ in wave for row in rows for one in row]
      prompts = sorted({prompt for request in requests for prompt in _prompts(request)})
      texts = dict(zip(prompts, self.embed(prompts), strict=True))
      if not self.keep_text_encoder:
        self.embedder.free()
      yield wave, texts.__getitem__

  def _wave(self, groups):
    """Yields groups until the embeddings of their prompts fill PROMPT_BYTES."""
    size = 0
    for rows, shape in groups:
      yield rows, shape
      size += sum(2 * one.text_tokens * self.embedder.width * 4 for row in rows for one in row)
      if size > PROMPT_BYTES:
        return

  # --- canvases

  def canvas(self, request):
    """Request -> its first Canvas; BadInput where a file cannot be read."""
    media = Media(self, request)
    return self._canvas(request, self._work(request, media), media)

  def _canvas(self, request, work, media):
    canvas = work.canvas()
    if self.model.dit.conditioning != "channels":
      return canvas
    # What is given enters as channels, and no token is given (WanImageToVideoPipeline).
    stride, (frames, *_) = self.vae_cfg.stride[0], canvas.latents_THWC.shape
    given_F = np.zeros(1 + stride * (frames - 1), bool)
    _, *grid = canvas.given_THW.shape
    edges = [(0, n * c - s) for n, c, s in zip(grid, self.vae_cfg.stride[1:], request.size)]
    images = {}
    for at, path in ((0, request.image), (len(given_F) - 1, request.last_image)):
      if path:
        images[at] = codec.to_float(np.pad(media.image(path), [*edges, (0, 0)], mode="edge"))
        given_F[at] = True
    latents = codec.encode_images_video(self.vae_cfg, self.vae_params, images, frames)
    normalised = vae.normalise(latents, self.vae_cfg)
    cond_THWC = batches.image_channels(normalised, self.model.dit.cond_channels, given_F)
    return dataclasses.replace(canvas, cond_THWC=cond_THWC)

  def noise(self, request):
    """The noise that a request begins with, [T, H, W, C], for another implementation to begin with."""
    size, patch = self.latent_size(request), self.model.dit.patch
    coords = patches.coords(patches.grid(size, patch), patches.time_scale(self.base_fps, request.fps))
    return patches.unpatchify(sample.noise(request.seed, coords, self.model.dit.values_in), size, patch)

  # --- denoise and decode

  def _with_canvases(self, rows, tokenize):
    """Rows of _Planned -> (rows of (_Planned, Canvas, Denoising) that do not fail, (Result, _Planned) of
    those that do).
    """
    ready, failed = [], []
    for row in rows:
      ready.append([])
      for one in row:
        try:
          if one.work is None:
            media = one.media or Media(self, one.request)
            one = dataclasses.replace(one, work=self._work(one.request, media), media=media)
          canvas = self._canvas(one.request, one.work, one.media)
        except BadInput as error:
          failed.append((Result(one.position, one.request, str(error)), one))
          continue
        patch = self.model.dit.patch
        denoising = sample.prepare(
          one.request, canvas, tokenize, patch, self.base_fps, self.schedule, one.number
        )
        ready[-1].append((one, canvas, denoising))
    return [row for row in ready if row], failed

  def _denoise(self, rows, shape, on_step, stop):
    """Rows of (_Planned, Canvas, Denoising) -> iterator of (_Planned of the next canvas, seconds of this
    one); None where stop() became true.
    """
    began, (first, *_) = time.monotonic(), rows[0]
    inputs = [[denoising for _, _, denoising in row] for row in rows]
    request = first[0].request
    tokens = sample.denoise(
      self.model, self.params, inputs, shape, request.sampler, on_step, stop, request.cache
    )
    if tokens is None:
      return None
    seconds = (time.monotonic() - began) / sum(map(len, rows))
    flat = zip(itertools.chain(*rows), itertools.chain(*tokens), strict=True)
    return ((self._taken(one, canvas, tokens_LP), seconds) for (one, canvas, _), tokens_LP in flat)

  def _taken(self, one, canvas, tokens_LP):
    """The tokens of one canvas go into its work -> _Planned of the next canvas."""
    size = canvas.latents_THWC.shape[:3]
    one.work.take(patches.unpatchify(tokens_LP, size, self.model.dit.patch))
    one = dataclasses.replace(one, number=one.number + 1, windows=one.windows - 1)
    return one if one.work.done else self._next(one, one.work)

  def _result(self, one, seconds):
    """A work that is done -> Result; or, of a video to loop that was made, _Planned of the loop."""
    request, work = one.request, one.work
    if _is_made_first(request) and one.media.frames is None:
      media = Media(self, request, np.stack(list(work.result())))
      loop = self._work(request, media)
      return self._next(dataclasses.replace(one, work=None, media=media, windows=loop.windows), loop)
    line = work.timeline
    return Result(
      one.position,
      request,
      None,
      work.latents_THWC,
      work.result(),
      request.size,
      line.frames if line.out is None else line.out,
      seconds,
    )

  def pixels(self, latents_THWC):
    """Normalised latents -> iterator of frames [H, W, 3] in [-1, 1], before they are cut and rounded."""
    raw = vae.denormalise(np.asarray(latents_THWC, np.float32), self.vae_cfg)
    layout, params = self._frame_layout(raw.shape[1:3]), self.vae_params
    if layout:
      # They are on these devices already, under another mesh: nothing is copied.
      params = jax.device_put(params, layout.fitted(()))
    return codec.decode_frames(self.vae_cfg, params, raw, layout)

  def _frame_layout(self, grid_HW):
    """Of the devices that share the frames of a video; None where one decodes alone."""
    devices = self._vae_devices()
    return vae.frame_layout(devices, grid_HW) if devices else None

  @property
  def is_of_this_process(self):
    """Whether no other process has a part of the model."""
    layout = self.model.layout
    return layout is None or set(layout.mesh.devices.flat) <= set(jax.local_devices())

  def _vae_devices(self):
    layout = self.model.layout
    several = layout is not None and layout.mesh.size > 1 and self.is_of_this_process
    return list(layout.mesh.devices.flat) if several else []

  def decode(self, latents_THWC, frames, size):
    """Normalised latents -> iterator of `frames` frames (None: all), uint8 [H, W, 3], cut to `size`; memory
    does not grow with length.
    """
    for image in itertools.islice(self.pixels(latents_THWC), frames):
      yield codec.to_uint8(image[: size[0], : size[1]])


class Media:
  """What a request names, read at its size and rate: for tasks.py. frames: stands in for its video."""

  def __init__(self, pipe, request, frames=None):
    self.stride, self.frames, self._request = pipe.vae_cfg.stride[0], frames, request

  def image(self, path):
    """uint8 [H, W, 3]: scaled to cover the size of the request, its middle kept. BadInput names the file."""
    return cover(read_image(path), self._request.size)

  def video(self, path):
    """uint8 [T, H, W, 3], as `image`, at the rate of the request."""
    return self.frames if self.frames is not None and path is None else self._load(path)

  def mask(self, path):
    """uint8 [T, H, W]: the brightness of a video or image."""
    return self._load(path).max(-1)

  def _load(self, path):
    try:
      reader = video.Reader(path)
      images = video.resample(reader, self._request.fps, reader.fps) if reader.fps else map(_image, reader)
      return np.stack([cover(image, self._request.size) for image in images])
    except video.BadClip as error:
      raise BadInput(f"video {path!r} cannot be read: {error}") from None


class _Sizes(Media):
  """As Media, of images that are not read yet: any has the size of the request."""

  def image(self, path):
    del path
    return np.broadcast_to(np.uint8(0), (*self._request.size, 3))


def _image(frame):
  return frame.image_HWC


def _probe(path):
  """A video -> (number of its frames, frames a second or None, (height, width)); BadInput names it."""
  if not os.path.exists(path):
    raise BadInput(f"video {path!r} does not exist; give the path of a file")
  try:
    reader = video.Reader(path)
    return reader.count, reader.fps, next(iter(reader)).image_HWC.shape[:2]
  except (video.BadClip, StopIteration) as error:
    raise BadInput(f"video {path!r} cannot be read: {error}") from None


def _is_made_first(request):
  """Whether the video that is looped is made, too."""
  return request.task == "loop" and not request.video


def _prompts(request):
  """The texts that a request is denoised with."""
  return (*request.prompts, request.negative_prompt)


def read_image(path):
  """An image file -> uint8 [H, W, 3]; BadInput where it cannot be read."""
  try:
    return next(video.read(path)).image_HWC
  except (video.BadClip, StopIteration) as error:
    raise BadInput(f"image {path!r} cannot be read: {error}") from None


def cover(image_HWC, size):
  """uint8 image scaled to cover `size` (keeping its shape), its middle cropped to it."""
  if image_HWC.shape[:2] == tuple(size):
    return image_HWC
  scale = max(size[0] / image_HWC.shape[0], size[1] / image_HWC.shape[1])
  height, width = (max(n, round(m * scale)) for n, m in zip(size, image_HWC.shape[:2], strict=True))
  scaled = np.asarray(
    jax.image.resize(image_HWC.astype(np.float32), (height, width, 3), "cubic", antialias=True)
  )
  top, left = (height - size[0]) // 2, (width - size[1]) // 2
  return np.clip(scaled[top : top + size[0], left : left + size[1]] + 0.5, 0, 255).astype(np.uint8)
