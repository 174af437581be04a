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
  guidance: float
  interval: tuple                  # noise levels between which guidance acts
  rescale: float


def prepare(request, canvas, tokenize, patch, base_fps=None):
  """Request and Canvas -> Work. tokenize: str -> ids or embeddings. base_fps: as in training, None for the plain index."""
  size = canvas.latents_THWC.shape[:3]
  grid = patches.grid(size, patch)
  rate = base_fps / request.fps if base_fps else 1.0
  coords = patches.coords(grid, rate)
  given = patches.patchify(canvas.given_THW[..., None], patch).all(-1)
  prompt = np.repeat(canvas.prompt_T[::patch[0]], grid[1] * grid[2])
  clip = batches.Clip(patches.patchify(canvas.latents_THWC, patch), coords, [tokenize(text) for text in canvas.texts],
                      uid=request.seed, size=size, fps=request.fps, given_L=given, prompt_L=prompt)
  sigmas = flow.shifted(np.linspace(canvas.start_sigma, 0.0, request.steps + 1), request.shift)
  return Work(clip, tokenize(request.negative_prompt), sigmas, request.guidance, request.guidance_interval, request.guidance_rescale)


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

  sampler: a key of SAMPLERS. on_step is called after each step.
  """
  batch, guided, settings, sigmas = _assemble(rows, shape)
  keys_BG = flow.clip_keys(jax.random.key(NOISE_KEY), batch.uid_BG2, batch.epoch_BG)
  keys_BG = keys_BG[:len(rows)]
  x, text_BSE = _start(model, params, batch, keys_BG, sigmas[..., 0], guided=guided)
  carry = SAMPLERS[sampler][0](x, None)
  steps = sigmas.shape[-1] - 1
  for i in range(steps):
    if stop():
      return None
    x, carry = _step(model, params, batch, text_BSE, x, carry, sigmas[..., i], sigmas[..., i + 1], settings, sampler=sampler, guided=guided)
    x.block_until_ready()
    on_step(i + 1, steps)
  x = np.asarray(x)
  out = []
  for b, row in enumerate(rows):
    ends = np.cumsum([len(work.clip.tokens_LP) for work in row])
    out.append(np.split(x[b], ends)[:len(row)])
  return out


def _assemble(rows, shape):
  """-> (PackedBatch: B rows, or 2 B with the negative prompts below; is it guided; settings [B, G] by name; sigmas [B, G, steps + 1])."""
  works = [(b, g, work) for b, row in enumerate(rows) for g, work in enumerate(row)]
  guided = any(work.guidance != 1.0 for _, _, work in works)
  batch = batches.pack([[work.clip for work in row] for row in rows], shape)
  if guided:
    negative = [[dataclasses.replace(work.clip, texts=[work.negative], prompt_L=None) for work in row] for row in rows]
    batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, batches.pack(negative, shape))
  settings = {name: np.zeros((len(rows), shape.clips), np.float32) for name in ("scale", "low", "high", "rescale")}
  sigmas = np.zeros((len(rows), shape.clips, max(len(work.sigmas) for _, _, work in works)), np.float32)
  for b, g, work in works:
    sigmas[b, g, :len(work.sigmas)] = work.sigmas
    for name, value in zip(settings, (work.guidance, *work.interval, work.rescale), strict=True):
      settings[name][b, g] = value
  return batch, guided, settings, sigmas


def _half(batch):
  rows = batch.segment_BL.shape[0] // 2
  return jax.tree.map(lambda a: a[:rows], batch)


@functools.partial(jax.jit, static_argnames=("model", "guided"))
def _start(model, params, batch, keys_BG, sigma_BG, *, guided):
  """The noised canvas [B, L, P] and the text embeddings, which no step changes."""
  text_BSE = model.embed_text(params, batch)
  rows = _half(batch) if guided else batch
  noise_BLP = flow.token_noise(keys_BG, rows.segment_BL, rows.coords_BL3, rows.tokens_BLP.shape[-1])
  sigma_BL1 = flow.gather_sigma(*flow.token_sigma(sigma_BG, rows.segment_BL, rows.given_BL))
  return flow.interpolate(rows.tokens_BLP, noise_BLP, sigma_BL1), text_BSE


@functools.partial(jax.jit, static_argnames=("model", "sampler", "guided"), donate_argnames=("carry",))
def _step(model, params, batch, text_BSE, x_BLP, carry, sigma_BG, sigma_next_BG, settings, *, sampler, guided):
  """One step of the sampler for all rows."""
  rows = _half(batch) if guided else batch
  place = lambda value_BG: flow.gather_sigma(*flow.token_sigma(value_BG, rows.segment_BL, rows.given_BL))  # noqa: E731

  def velocity(x_BLP, sigma_BL1, aux):
    # The model takes sigma by clip: any token of the clip that is not given tells it. Heun asks at sigma_next.
    sigma_now_BG = _by_clip(sigma_BL1[..., 0], rows, sigma_BG.shape[1])
    sigma_BU, index_BL = flow.token_sigma(sigma_now_BG, rows.segment_BL, rows.given_BL)
    twice = (lambda a: jnp.concatenate([a, a])) if guided else (lambda a: a)
    v = model.velocity(params, twice(x_BLP), batch, twice(sigma_BU), twice(index_BL), text_BSE)
    if guided:
      v_prompt, v_null = jnp.split(v, 2)
      acts_BG = (sigma_now_BG >= settings["low"]) & (sigma_now_BG <= settings["high"])
      scale_BG = jnp.where(acts_BG, settings["scale"], 1.0)
      v = guidance.classifier_free(v_prompt, v_null, place(scale_BG), place(settings["rescale"]), rows.segment_BL, sigma_BG.shape[1])
    return v, aux

  return SAMPLERS[sampler][1](velocity, x_BLP, carry, place(sigma_BG), place(sigma_next_BG), None)


def _by_clip(value_BL, batch, clips):
  """[B, L] -> [B, G]: the largest value among a clip's tokens; 0 where there is no clip."""
  hot_BLG = batch.segment_BL[..., None] == jnp.arange(1, clips + 1)
  return jnp.max(jnp.where(hot_BLG, value_BL[..., None], 0.0), axis=1)
