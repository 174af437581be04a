"""A model that makes videos: open it, ask for one video, or run many requests.

  pipe = sora_jax.Pipeline.open("out/wan")                    # or Pipeline.shipped()
  video = pipe("a red ball moves left", seed=3)               # uint8 [T, H, W, 3]
  for result in pipe.run(requests):                           # dicts with the fields of tasks.FIELDS
    print(result.request.id, result.error or result.video().shape)

What a sampling job does, once, in `Pipeline.run`:

  parse      a dict -> Request, with the defaults of the model; a bad one becomes a Result with its error
  plan       from sizes alone: which requests share a row of tokens, which rows are denoised together
  embed      the prompts of the next rows, where the text encoder is frozen
  canvas     Request -> Canvas: a latent video, partly given (tasks.py)
  denoise    rows of canvases -> latents, step by step (sample.py)
  decode     latents -> frames (codec.py), when they are asked for

Only the rows at work are in memory, whatever the number of requests. Nothing is printed; no globals, no
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

from sora_jax import batch as batches, codec, patches, sample, tasks, video, workdir as workdirs
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.embedder import Embedder
from sora_jax.errors import BadInput, pick
from sora_jax.models import t2v, text, vae

# of a request, from the config
DEFAULTS = ("size", "frames", "fps", "steps", "sampler", "shift", "guidance", "guidance_low")
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
  """A request and its size in a row."""

  position: int
  request: tasks.Request
  tokens: int
  text_tokens: int


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
  step: int  # of training
  identity: str  # changes with anything that decides what a request becomes
  keep_text_encoder: bool = False  # in memory between calls, where it is frozen

  @classmethod
  def open(
    cls, workdir, weights="ema", say: Callable = lambda line: None, keep_text_encoder=False, mesh=None
  ):
    """From a work directory of launch.train or launch.import_weights, or an export of it.

    weights: "ema", the running mean, or "params", the last ones. say: takes lines for the user, as of damaged
    checkpoints.
    keep_text_encoder: a frozen text encoder stays in memory while videos are denoised, so that the next call
    need not load it again; it may be larger than the transformer.
    mesh: how many devices cut what, as {"fsdp": 2, "context": 2}; None: see `workdir.sampling_layout`.
    BadInput where `workdir` holds no such model.
    """
    config = workdirs.read_config(workdir)
    layout = workdirs.sampling_layout(config, mesh)
    model = workdirs.make_model(config, epath.Path(workdir) / "text", layout)
    # imported weights stay in what they are computed in
    half = "dit" in config.model and model.dit.dtype == "bfloat16"
    params, step = workdirs.load_model_weights(
      workdir, config, model, weights, "bfloat16" if half else None, say
    )
    pipe = cls.of(workdir, config, model, params, step, workdirs.identity(workdir, weights))
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
      try:
        planned.append(self._planned(position, self._request(position, fields)))
      except BadInput as error:
        yield Result(position, None, str(error))
    total, finished = sum(one.request.steps for one in planned), 0
    for groups, tokenize in self._with_texts(self._groups(planned)):
      for rows, shape in groups:
        steps = sum(one.request.steps for row in rows for one in row)
        rows, failed = self._with_canvases(rows, tokenize)
        yield from failed
        if rows:

          def on_step(done, of):
            progress(finished + steps * done // of, total)

          results = self._denoise(rows, shape, on_step, stop)
          if results is None:
            return
          yield from results
        elif failed:
          progress(finished + steps, total)
        finished += steps

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
    request = tasks.parse_request(fields, self.defaults, SAMPLERS)
    self.check(request)
    return request

  def check(self, request):
    """BadInput where this model cannot make a request."""
    pick(tasks.TASKS, request.task, "task")
    pick(SAMPLERS, request.sampler, "sampler")
    if request.guidance_low is not None and not self.model.boundary:
      raise BadInput("guidance_low is for models of two experts, and this one has one; leave it out")
    if self.model.dit.conditioning == "channels" and not request.image:
      raise BadInput("this model begins with an image: ask for the task image_to_video, and give an image")
    reads_image = request.task == "image_to_video" or self.model.dit.conditioning == "channels"
    if reads_image and not os.path.exists(request.image):
      raise BadInput(f"image {request.image!r} does not exist; give the path of an image file")
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
    """The sizes of a request: what planning needs of it."""
    tokens = patches.token_count(self.latent_size(request), self.model.dit.patch)
    return _Planned(position, request, tokens, max(map(self._text_tokens, _prompts(request))))

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
      # experts change over for all at once
      levels = (request.steps, request.shift) if self.model.boundary else ()
      alike.setdefault((request.sampler, *levels), []).append(one)
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
    """Request -> Canvas; BadInput where its image cannot be read."""
    task, patch = tasks.TASKS[request.task], self.model.dit.patch
    parts = {
      "stride": self.vae_cfg.stride,
      "patch": patch,
      "channels": self.model.dit.channels,
      "encode": self._encode_image,
    }
    if self.model.dit.conditioning != "channels":
      return task(request, **parts)
    # The image enters as channels, and no token is given (WanImageToVideoPipeline).
    canvas = tasks.text_to_video(request, **parts)
    frames, height, width, _ = canvas.latents_THWC.shape
    pixels = self._read_image(
      request.image, request.size, (height * self.vae_cfg.stride[1], width * self.vae_cfg.stride[2])
    )
    latents = codec.encode_image_video(self.vae_cfg, self.vae_params, pixels[None], frames)
    cond_THWC = batches.image_channels(vae.normalise(latents, self.vae_cfg), self.model.dit.cond_channels)
    return dataclasses.replace(canvas, cond_THWC=cond_THWC)

  def _encode_image(self, path, size, padded):
    """An image file -> normalised latents [1, h, w, C]: as `_read_image` gives it."""
    mean, _ = vae.encode(self.vae_params, self._read_image(path, size, padded)[None, None], self.vae_cfg)
    return np.asarray(vae.normalise(np.asarray(mean), self.vae_cfg))[0]

  def _read_image(self, path, size, padded):
    """An image file -> pixels [H, W, 3] in [-1, 1]: scaled to cover `size`, its middle kept, edges repeated
    up to `padded`.
    """
    edges = [(0, padded[0] - size[0]), (0, padded[1] - size[1]), (0, 0)]
    return codec.to_float(np.pad(cover(read_image(path), size), edges, mode="edge"))

  def noise(self, request):
    """The noise that a request begins with, [T, H, W, C], for another implementation to begin with."""
    size, patch = self.latent_size(request), self.model.dit.patch
    coords = patches.coords(patches.grid(size, patch), patches.time_scale(self.base_fps, request.fps))
    return patches.unpatchify(sample.noise(request.seed, coords, self.model.dit.values_in), size, patch)

  # --- denoise and decode

  def _with_canvases(self, rows, tokenize):
    """Rows of _Planned -> (rows of (_Planned, Canvas, Denoising) without those that fail, Results of those
    that fail).
    """
    ready, failed = [], []
    for row in rows:
      ready.append([])
      for one in row:
        try:
          canvas = self.canvas(one.request)
        except BadInput as error:
          failed.append(Result(one.position, one.request, str(error)))
          continue
        patch = self.model.dit.patch
        denoising = sample.prepare(one.request, canvas, tokenize, patch, self.base_fps, self.schedule)
        ready[-1].append((one, canvas, denoising))
    return [row for row in ready if row], failed

  def _denoise(self, rows, shape, on_step, stop):
    """Rows of (_Planned, Canvas, Denoising) -> iterator of their Results; None where stop() became true."""
    began, (first, *_) = time.monotonic(), rows[0]
    inputs = [[denoising for _, _, denoising in row] for row in rows]
    tokens = sample.denoise(self.model, self.params, inputs, shape, first[0].request.sampler, on_step, stop)
    if tokens is None:
      return None
    seconds = (time.monotonic() - began) / sum(map(len, rows))
    flat = zip(itertools.chain(*rows), itertools.chain(*tokens), strict=True)
    return (self._result(one, canvas, tokens_LP, seconds) for (one, canvas, _), tokens_LP in flat)

  def _result(self, one, canvas, tokens_LP, seconds):
    """The tokens of one canvas -> Result."""
    latents = patches.unpatchify(tokens_LP, canvas.latents_THWC.shape[:3], self.model.dit.patch)
    frames = self.decode(latents, canvas.frames, canvas.size)
    return Result(one.position, one.request, None, latents, frames, canvas.size, seconds)

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

  def _vae_devices(self):
    layout = self.model.layout
    several = layout is not None and layout.mesh.size > 1 and jax.process_count() == 1
    return list(layout.mesh.devices.flat) if several else []

  def decode(self, latents_THWC, frames, size):
    """Normalised latents -> iterator of `frames` frames, uint8 [H, W, 3], cut to `size`; memory does not grow
    with length.
    """
    for image in itertools.islice(self.pixels(latents_THWC), frames):
      yield codec.to_uint8(image[: size[0], : size[1]])


def _prompts(request):
  """The texts that a request is denoised with."""
  return request.prompt, request.negative_prompt


def read_image(path):
  """An image file -> uint8 [H, W, 3]; BadInput where it cannot be read."""
  try:
    return next(video.read(path)).image_HWC
  except (video.BadClip, StopIteration) as error:
    raise BadInput(f"image {path!r} cannot be read: {error}") from None


def cover(image_HWC, size):
  """uint8 image scaled to cover `size` (keeping its shape), its middle cropped to it."""
  scale = max(size[0] / image_HWC.shape[0], size[1] / image_HWC.shape[1])
  height, width = (max(n, round(m * scale)) for n, m in zip(size, image_HWC.shape[:2], strict=True))
  scaled = np.asarray(
    jax.image.resize(image_HWC.astype(np.float32), (height, width, 3), "cubic", antialias=True)
  )
  top, left = (height - size[0]) // 2, (width - size[1]) // 2
  return np.clip(scaled[top : top + size[0], left : left + size[1]] + 0.5, 0, 255).astype(np.uint8)
