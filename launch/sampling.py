"""The sampling job: requests in, files and a manifest out. Used by launch.sample, launch.evaluate and during training."""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
import zlib

import jax
import numpy as np
from etils import epath

from launch import build, cli, encoding
from sora_jax import batch as batches, checkpoint, patches, sample, tasks, video
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.errors import BadInput
from sora_jax.models import t2v, text, vae

DEFAULTS = ("size", "frames", "fps", "steps", "sampler", "shift", "guidance", "guidance_low")


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model that can sample: weights, VAE, tokenizer, and what its config says where a request does not."""
  model: t2v.Model
  params: dict
  vae_cfg: vae.VAEConfig
  vae_params: dict
  tokenize: object                 # str -> ids, or embeddings where the text encoder is frozen
  embedder: object                 # that encoder, an encoding.Embedder, or None
  defaults: dict
  schedule: str                    # a key of flow.SCHEDULES
  row_tokens: int
  rows: int
  base_fps: float | None
  step: int
  identity: str                    # of all that decides what a request becomes

  @classmethod
  def of(cls, workdir, settings, model, params, step=0, identity=""):
    """From a config (a ConfigDict, or the dict of W/config.json) and weights; VAE and tokenizer are those in W."""
    cfg, vae_params = build.load_vae(epath.Path(workdir) / "vae")
    if cfg.z_dim != model.dit.channels:
      raise BadInput(f"{workdir}: its VAE has {cfg.z_dim} latent channels, its transformer takes {model.dit.channels}; they are not for each other")
    defaults = {name: settings["sample"][name] for name in DEFAULTS if name in settings["sample"]}
    defaults["size"] = list(defaults["size"])
    directory, pad = epath.Path(workdir) / "text", model.dit.text_pad
    tokenizer = text.Tokenizer(directory / "tokenizer.model")
    ids = lambda prompt: np.asarray(tokenizer.encode(prompt, pad or None), np.int32)  # noqa: E731
    embed = encoding.Embedder(directory, model.layout) if model.text is None else None
    tokenize = functools.cache(lambda prompt: text.padded(embed([ids(prompt)])[0], pad)) if embed else ids
    schedule = settings["sample"].get("schedule", "uniform")
    return cls(model, params, cfg, vae_params, tokenize, embed, defaults, schedule, settings["sample"]["row_tokens"], settings["sample"]["rows"],
               settings["data"]["base_fps"] or None, step, identity)

  @classmethod
  def open(cls, workdir, which="ema"):
    """From a work directory of launch.train, or a model that was exported or ships."""
    config = checkpoint.read_json(epath.Path(workdir) / "config.json")
    if "sample" not in config:
      raise BadInput(f"{workdir} is no work directory of launch.train (its config.json is of {config.get('program', 'another program')}); "
                     "name another --workdir")
    settings = build.attributes(config)
    where = build.sampling_layout(settings)
    model = build.make_model(settings, epath.Path(workdir) / "text", where)
    half = "dit" in settings.model and model.dit.dtype == "bfloat16"      # weights that are computed with in half precision are kept so
    params, step = build.load_weights(workdir, settings, model, which, "bfloat16" if half else None)
    return cls.of(workdir, config, model, params, step, checkpoint.identity(workdir, which))

  def canvas(self, request):
    """Request -> Canvas."""
    if request.guidance_low is not None and not self.model.boundary:
      raise BadInput("guidance_low is for models of two experts, and this one has one; leave it out")
    canvas = tasks.TASKS[request.task](request, stride=self.vae_cfg.stride, patch=self.model.dit.patch, channels=self.model.dit.channels,
                                       encode=self.encode_image)
    return self.with_channels(request, canvas) if self.model.dit.conditioning == "channels" else canvas

  def with_channels(self, request, canvas):
    """The canvas of a model that takes its image as channels; no token is given."""
    if not request.image:
      raise BadInput("this model begins with an image: ask for the task image_to_video, and give an image")
    frames, height, width, _ = canvas.latents_THWC.shape
    pixels = self.read_image(request.image, request.size, (height * self.vae_cfg.stride[1], width * self.vae_cfg.stride[2]))[None]
    latents = vae.normalise(encoding.encode_image_video(self.vae_params, pixels, frames, self.vae_cfg), self.vae_cfg)
    cond_THWC = batches.image_channels(latents, self.model.dit.cond_channels)
    return dataclasses.replace(canvas, given_THW=np.zeros_like(canvas.given_THW), cond_THWC=cond_THWC)

  def encode_image(self, path, size, padded):
    """An image file -> normalised latents [1, h, w, C]: as `read_image` gives it."""
    mean, _ = vae.encode(self.vae_params, self.read_image(path, size, padded)[None, None], self.vae_cfg)
    return np.asarray(vae.normalise(np.asarray(mean), self.vae_cfg))[0]

  def read_image(self, path, size, padded):
    """An image file -> pixels [H, W, 3] in [-1, 1]: scaled to cover `size`, its middle kept, edges repeated up to `padded`."""
    if not os.path.exists(path):
      raise BadInput(f"image {path!r} does not exist; give the path of an image file")
    try:
      frame = next(video.read(path)).image_HWC
    except (video.BadClip, StopIteration) as error:
      raise BadInput(f"image {path!r} cannot be read: {error}") from None
    covered = cover(frame, size)
    edges = [(0, padded[0] - size[0]), (0, padded[1] - size[1]), (0, 0)]
    return np.pad(covered, edges, mode="edge").astype(np.float32) / 127.5 - 1

  def decode(self, latents_THWC, frames, size):
    """Normalised latents -> iterator of uint8 [H, W, 3], cut to what was asked; streamed, so that memory does not grow with length."""
    raw = vae.denormalise(np.asarray(latents_THWC, np.float32)[None], self.vae_cfg)
    chunks = (raw[:, t:t + 1] for t in range(raw.shape[1]))
    every = itertools.chain.from_iterable(np.asarray(chunk)[0] for chunk in vae.decode_stream(self.vae_params, chunks, self.vae_cfg))
    for image in itertools.islice(every, frames):
      yield np.clip((image[:size[0], :size[1]] + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def cover(image_HWC, size):
  """uint8 image scaled to cover `size` (keeping its shape), its middle cropped to it."""
  scale = max(size[0] / image_HWC.shape[0], size[1] / image_HWC.shape[1])
  height, width = (max(n, round(m * scale)) for n, m in zip(size, image_HWC.shape[:2], strict=True))
  scaled = np.asarray(jax.image.resize(image_HWC.astype(np.float32), (height, width, 3), "cubic", antialias=True))
  top, left = (height - size[0]) // 2, (width - size[1]) // 2
  return np.clip(scaled[top:top + size[0], left:left + size[1]] + 0.5, 0, 255).astype(np.uint8)


def read_requests(path):
  """A file of one JSON object a line -> (list of dicts with ids, list of (line number, what is wrong)). A request without an id gets the
  number of its line."""
  if not os.path.exists(path):
    raise BadInput(f"--requests={path} does not exist; give a file of one JSON object a line")
  good, broken = [], []
  with open(path, encoding="utf-8", errors="replace") as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
          raise ValueError("not an object in braces")
        good.append({"id": f"{number:05d}", **fields})
      except ValueError as error:
        broken.append((number, f"not valid JSON: {error}"))
  return good, broken


def read_manifest(out):
  """OUT/manifest.jsonl -> {id: its last line}."""
  path = os.path.join(out, "manifest.jsonl")
  lines = {}
  if os.path.exists(path):
    for line in open(path, encoding="utf-8", errors="replace"):
      try:
        fields = json.loads(line)
        lines[fields["id"]] = fields
      except (ValueError, KeyError, TypeError):
        continue          # a line cut short by a kill: its request is done again
  return lines


def run_job(bundle, requests, out, *, quiet=False, stop=cli.stop_requested):
  """Makes what is missing of `requests` (dicts) in `out`. -> counts {"ok", "kept", "failed", "stopped"}.

  A request that cannot be done gets a manifest line with its error; the others are done.
  """
  os.makedirs(out, exist_ok=True)
  done, counts = read_manifest(out), {"ok": 0, "kept": 0, "failed": 0, "stopped": 0}
  todo, seen = [], set()
  for fields in requests:
    name = str(fields.get("id", ""))
    try:
      if name in seen:
        name += " (again)"
        raise BadInput(f"two requests have the id {fields['id']!r}; each needs its own")
      seen.add(name)
      request = tasks.parse_request(fields, bundle.defaults, SAMPLERS)
      before = done.get(name, {})
      if before.get("request") == _digest(bundle, request) and os.path.exists(os.path.join(out, before["path"])):
        counts["kept"] += 1
        continue
      canvas = bundle.canvas(request)
      todo.append((request, canvas, sample.prepare(request, canvas, bundle.tokenize, bundle.model.dit.patch, bundle.base_fps, bundle.schedule)))
    except BadInput as error:
      counts["failed"] += 1
      note_failure(out, name, str(error), fields)
      cli.say(f"request {name}: {error}")
  if bundle.embedder:
    bundle.embedder.free()
  groups = {}
  for entry in todo:
    request, canvas, _ = entry
    alike = (request.steps, request.shift, canvas.start_sigma) if bundle.model.boundary else ()      # experts change over for all at once
    groups.setdefault((request.sampler, *alike), []).append(entry)
  with cli.Bar("sampling", sum(entry[0].steps for entry in todo) or 1, every=1e9 if quiet else 15.0) as bar:
    for (sampler, *_), entries in groups.items():
      _run_group(bundle, entries, sampler, out, counts, bar, stop)
  return counts


def _run_group(bundle, entries, sampler, out, counts, bar, stop):
  """All requests of one sampler: rows of them are denoised together, then decoded and written one by one."""
  longest = max(len(work.clip.tokens_LP) for _, _, work in entries)
  wide = [e for e in entries if len(e[2].clip.tokens_LP) > bundle.row_tokens] if longest > bundle.row_tokens else []
  for part in [[e] for e in wide] + [[e for e in entries if e not in wide]]:
    if not part:
      continue
    rows, shape = sample.share_rows([work for _, _, work in part], bundle.row_tokens)
    for start in range(0, len(rows), bundle.rows):
      began, chosen = time.monotonic(), rows[start:start + bundle.rows]
      steps = {i: part[i][0].steps for row in chosen for i in row}
      ticks = functools.partial(lambda done, of, total: bar.advance(total // of), total=sum(steps.values()))
      latents = sample.denoise(bundle.model, bundle.params, [[part[i][2] for i in row] for row in chosen], shape, sampler, ticks, stop)
      if latents is None:
        counts["stopped"] += sum(map(len, rows[start:]))
        return
      each = (time.monotonic() - began) / len(steps)
      for row, tokens in zip(chosen, latents, strict=True):
        for i, tokens_LP in zip(row, tokens, strict=True):
          _write(bundle, part[i], tokens_LP, out, counts, each)


def _write(bundle, entry, tokens_LP, out, counts, seconds):
  """Decodes one canvas and writes its file and its manifest line."""
  request, canvas, _ = entry
  began = time.monotonic()
  latents = patches.unpatchify(tokens_LP, canvas.latents_THWC.shape[:3], bundle.model.dit.patch)
  name = request.id + (".png" if canvas.frames == 1 else ".mp4")
  images = bundle.decode(latents, canvas.frames, canvas.size)
  if canvas.frames == 1:
    video.write_png(os.path.join(out, name), next(images))
    size = canvas.size
  else:
    size = video.write_mp4(os.path.join(out, name), images, request.fps)
  counts["ok"] += 1
  _note(out, {"id": request.id, "status": "ok", "path": name, "seed": request.seed, "size": list(size), "frames": canvas.frames,
              "fps": request.fps, "seconds_taken": round(seconds + time.monotonic() - began, 3), "error": None, "prompt": request.prompt,
              "task": request.task, "steps": request.steps, "sampler": request.sampler, "guidance": request.guidance, "step": bundle.step,
              "request": _digest(bundle, request)})


def _digest(bundle, request):
  """Of all that must be the same for a file to count as made: model, request, and the image that it names."""
  crc = zlib.crc32(json.dumps(dataclasses.asdict(request), sort_keys=True).encode(), zlib.crc32(bundle.identity.encode()))
  if request.image and os.path.isfile(request.image):
    with open(request.image, "rb") as f:
      crc = zlib.crc32(f.read(), crc)
  return f"{crc:08x}"


def note_failure(out, name, error, fields):
  """A line of the manifest for a request (or a line of the file) that cannot be done."""
  given = {field: fields.get(field) for field in ("seed", "size", "frames", "fps")}
  prompt = str(fields.get("prompt", ""))[:200].encode("utf-8", "backslashreplace").decode()
  _note(out, {"id": name, "status": "failed", "path": None, **given, "seconds_taken": None, "error": error, "prompt": prompt})


def _note(out, line):
  """Appends to the manifest; a line before it that a full disk cut short is ended first."""
  os.makedirs(out, exist_ok=True)
  with open(os.path.join(out, "manifest.jsonl"), "a+b") as f:
    f.seek(max(0, f.tell() - 1))
    torn = f.read(1) not in (b"", b"\n")
    f.write((b"\n" if torn else b"") + json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def contact_sheet(videos, columns=4, frames=5, scale=2):
  """uint8 videos -> one image: each a strip of `frames` frames, for logs and for looking."""
  strips = []
  for clip in videos:
    chosen = clip[np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)]
    strips.append(np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0))) for f in chosen], 1).repeat(scale, 0).repeat(scale, 1))
  height, width = (max(s.shape[a] for s in strips) for a in (0, 1))
  strips = [np.pad(s, ((0, height - s.shape[0]), (0, width - s.shape[1]), (0, 0))) for s in strips]
  strips += [np.zeros_like(strips[0])] * (-len(strips) % columns)
  rows = [np.concatenate(strips[i:i + columns], 1) for i in range(0, len(strips), columns)]
  return np.concatenate(rows[:max(1, math.ceil(len(videos) / columns))], 0)
