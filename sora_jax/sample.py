"""The sampling loop: canvases in, latents out. Requests of any size, length, steps and guidance share rows, as clips do in training.

Noise depends on (seed of the request; t, y, x of the token) alone, so a request gives the same video alone or packed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import batch as batches, patches
from sora_jax.diffusion import flow, guidance
from sora_jax.diffusion.samplers import SAMPLERS

NOISE_KEY = 0          # of every sampling job: what differs between requests is their seed


@dataclasses.dataclass
class Work:
  """One canvas, ready to be denoised. `negative` is the text it is guided away from: ids [s] or embeddings [s, E], like its texts."""
  clip: batches.Clip
  negative: np.ndarray
  sigmas: np.ndarray               # [steps + 1], from the start sigma down to 0
  times: np.ndarray                # [steps], what the model is told of them (flow.SCHEDULES)
  guidance: float
  guidance_low: float              # below the boundary of a model of two experts
  interval: tuple                  # noise levels between which guidance acts
  rescale: float


def prepare(request, canvas, tokenize, patch, base_fps=None, schedule="uniform"):
  """Request and Canvas -> Work. tokenize: str -> ids or embeddings. base_fps: as in training, None for the plain index; schedule: a key of
  flow.SCHEDULES."""
  size = canvas.latents_THWC.shape[:3]
  grid = patches.grid(size, patch)
  rate = base_fps / request.fps if base_fps else 1.0
  coords = patches.coords(grid, rate)
  given = patches.patchify(canvas.given_THW[..., None], patch).all(-1)
  prompt = np.repeat(canvas.prompt_T[::patch[0]], grid[1] * grid[2])
  clip = batches.Clip(patches.patchify(canvas.latents_THWC, patch), coords, [tokenize(text) for text in canvas.texts],
                      uid=request.seed, size=size, fps=request.fps, given_L=given, prompt_L=prompt,
                      cond_LQ=None if canvas.cond_THWC is None else patches.patchify(canvas.cond_THWC, patch))
  sigmas, times = flow.schedule(schedule, request.sampler, request.steps, request.shift, canvas.start_sigma)
  low = request.guidance if request.guidance_low is None else request.guidance_low
  return Work(clip, tokenize(request.negative_prompt), sigmas, times, request.guidance, low, request.guidance_interval, request.guidance_rescale)


def share_rows(works, row_tokens, row_clips=64):
  """Which works share a row: first-fit decreasing. -> (list of rows, each a list of positions in `works`; RowShape).

  A row has `row_tokens` tokens, or more where one canvas needs it, or fewer (in steps of 64) where all fit in less.
  """
  tokens = [len(work.clip.tokens_LP) for work in works]
  length = max(max(tokens), min(row_tokens, sum(tokens)))
  length = math.ceil(length / 64) * 64
  rows, room = [], []
  for i in sorted(range(len(works)), key=lambda i: -tokens[i]):
    row = next((r for r, free in enumerate(room) if free >= tokens[i] and len(rows[r]) < row_clips), None)
    if row is None:
      row = len(rows)
      rows.append([])
      room.append(length)
    rows[row].append(i)
    room[row] -= tokens[i]
  text = max(sum(max(sum(map(len, works[i].clip.texts)), len(works[i].negative)) for i in row) for row in rows)
  clips = max(map(len, rows))
  return rows, batches.RowShape(length, 1 << (clips - 1).bit_length(), math.ceil(text / 16) * 16)


def denoise(model, params, rows, shape, sampler, on_step=lambda done, of: None, stop=lambda: False):
  """Rows of Work (lists of lists) -> for each the list of denoised tokens [n, P] (numpy); None where `stop()` became true.

  sampler: a key of SAMPLERS. on_step is called after each step. A model of two experts changes over at `model.boundary`; works given
  to it together must share their noise levels.
  """
  batch, guided, settings, sigmas, times = _assemble(rows, shape)
  keys_BG = flow.clip_keys(jax.random.key(NOISE_KEY), batch.uid_BG2, batch.epoch_BG)
  keys_BG = keys_BG[:len(rows)]
  x, noise_BLP, text_BSE = _start(model, params, batch, keys_BG, sigmas[..., 0], guided=guided)
  carry = SAMPLERS[sampler][0](x, None)
  steps, text_kv, of_expert = sigmas.shape[-1] - 1, None, None
  for i in range(steps):
    if stop():
      return None
    weights, low = model.expert(params, times[..., i].max())
    if low is not of_expert:
      text_kv, of_expert = _text_kv(model, weights, text_BSE, batch.prompt_BS), low
    scales = {"scale": settings["scale_low" if low else "scale"], **{name: settings[name] for name in ("low", "high", "rescale")}}
    x, carry = _step(model, weights, batch, text_BSE, text_kv, noise_BLP, x, carry, sigmas[..., i], sigmas[..., i + 1], times[..., i], scales,
                     sampler=sampler, guided=guided)
    x.block_until_ready()
    on_step(i + 1, steps)
  x = np.asarray(x)
  out = []
  for b, row in enumerate(rows):
    ends = np.cumsum([len(work.clip.tokens_LP) for work in row])
    out.append(np.split(x[b], ends)[:len(row)])
  return out


def _assemble(rows, shape):
  """-> (PackedBatch: B rows, or 2 B with the negative prompts below; is it guided; settings [B, G] by name; sigmas [B, G, steps + 1]; times)."""
  works = [(b, g, work) for b, row in enumerate(rows) for g, work in enumerate(row)]
  guided = any(work.guidance != 1.0 or work.guidance_low != 1.0 for _, _, work in works)
  batch = batches.pack([[work.clip for work in row] for row in rows], shape)
  if guided:
    negative = [[dataclasses.replace(work.clip, texts=[work.negative], prompt_L=None) for work in row] for row in rows]
    batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, batches.pack(negative, shape))
  settings = {name: np.zeros((len(rows), shape.clips), np.float32) for name in ("scale", "scale_low", "low", "high", "rescale")}
  sigmas = np.zeros((len(rows), shape.clips, max(len(work.sigmas) for _, _, work in works)), np.float32)
  times = np.zeros_like(sigmas[..., 1:])
  for b, g, work in works:
    sigmas[b, g, :len(work.sigmas)], times[b, g, :len(work.times)] = work.sigmas, work.times
    for name, value in zip(settings, (work.guidance, work.guidance_low, *work.interval, work.rescale), strict=True):
      settings[name][b, g] = value
  return batch, guided, settings, sigmas, times


def _half(batch):
  rows = batch.segment_BL.shape[0] // 2
  return jax.tree.map(lambda a: a[:rows], batch)


@functools.partial(jax.jit, static_argnames=("model", "guided"))
def _start(model, params, batch, keys_BG, sigma_BG, *, guided):
  """The noised canvas [B, L, P], and what no step changes: its noise, the text embeddings."""
  text_BSE = model.embed_text(params, batch)
  rows = _half(batch) if guided else batch
  noise_BLP = flow.token_noise(keys_BG, rows.segment_BL, rows.coords_BL3, rows.tokens_BLP.shape[-1])
  sigma_BL1 = flow.gather_sigma(*flow.token_sigma(sigma_BG, rows.segment_BL, _clean(model, rows)))
  return flow.interpolate(rows.tokens_BLP, noise_BLP, sigma_BL1), noise_BLP, text_BSE


@functools.partial(jax.jit, static_argnames=("model",))
def _text_kv(model, params, text_BSE, prompt_BS):
  return model.text_kv(params, text_BSE, prompt_BS)


def _clean(model, rows):
  """[B, L] bool: given tokens that the model takes at sigma 0. One that knows no such tokens gets them noised like their clip, at each step."""
  return rows.given_BL & (model.dit.conditioning == "token_sigma")


@functools.partial(jax.jit, static_argnames=("model", "sampler", "guided"), donate_argnames=("carry",))
def _step(model, params, batch, text_BSE, text_kv, noise_BLP, x_BLP, carry, sigma_BG, sigma_next_BG, time_BG, settings, *, sampler, guided):
  """One step of the sampler for all rows."""
  rows = _half(batch) if guided else batch
  clean_BL = _clean(model, rows)
  place = lambda value_BG: flow.gather_sigma(*flow.token_sigma(value_BG, rows.segment_BL, clean_BL))  # noqa: E731

  def renewed(x_BLP, sigma_BL1):
    """x with given tokens that are not clean as they are at this noise level (RePaint, arXiv:2201.09865, eq. 8a)."""
    if model.dit.conditioning != "replacement":
      return x_BLP
    return jnp.where(rows.given_BL[..., None], flow.interpolate(rows.tokens_BLP, noise_BLP, sigma_BL1), x_BLP)

  def velocity(x_BLP, sigma_BL1, aux):
    # The model takes sigma by clip: any token of the clip that is not given tells it. Heun asks at sigma_next.
    x_BLP = renewed(x_BLP, sigma_BL1)
    sigma_now_BG = _by_clip(sigma_BL1[..., 0], rows, sigma_BG.shape[1])
    told_BG = jnp.where(sigma_now_BG == sigma_BG, time_BG, sigma_now_BG)
    sigma_BU, index_BL = flow.token_sigma(told_BG, rows.segment_BL, clean_BL)
    twice = (lambda a: jnp.concatenate([a, a])) if guided else (lambda a: a)
    v = model.velocity(params, twice(x_BLP), batch, twice(sigma_BU), twice(index_BL), text_BSE, text_kv)
    if guided:
      v_prompt, v_null = jnp.split(v, 2)
      acts_BG = (sigma_now_BG >= settings["low"]) & (sigma_now_BG <= settings["high"])
      scale_BG = jnp.where(acts_BG, settings["scale"], 1.0)
      v = guidance.classifier_free(v_prompt, v_null, place(scale_BG), place(settings["rescale"]), rows.segment_BL, sigma_BG.shape[1])
    return v, aux

  x_BLP, carry = SAMPLERS[sampler][1](velocity, x_BLP, carry, place(sigma_BG), place(sigma_next_BG), None)
  return renewed(x_BLP, place(sigma_next_BG)), carry


def _by_clip(value_BL, batch, clips):
  """[B, L] -> [B, G]: the largest value among a clip's tokens; 0 where there is no clip."""
  hot_BLG = batch.segment_BL[..., None] == jnp.arange(1, clips + 1)
  return jnp.max(jnp.where(hot_BLG, value_BL[..., None], 0.0), axis=1)
