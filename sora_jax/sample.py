"""The sampling loop: canvases in, latents out. Requests of any size, length, steps and guidance share rows,
as clips do in training.

Noise depends on (seed of the request; t, y, x of the token) alone, so a request gives the same video alone or
packed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import batch as batches, masks, multihost, patches
from sora_jax.diffusion import flow, guidance
from sora_jax.diffusion.samplers import SAMPLERS, STOCHASTIC

NOISE_KEY = 0  # of every sampling job: what differs between requests is their seed
# Rows have multiples of ROW_STEP tokens, long ones of more, so that there are at most ROW_LENGTHS lengths
# between a number and its double, each of which compiles; their text has multiples of TEXT_STEP.
ROW_STEP, ROW_LENGTHS, TEXT_STEP = 64, 32, 16


@dataclasses.dataclass
class Denoising:
  """One canvas, ready to be denoised.

  `negative` is the text it is guided away from: ids [s] or embeddings [s, E], like its texts.
  """

  clip: batches.Clip
  negative: np.ndarray
  sigmas: np.ndarray  # [steps + 1], from the start sigma down to 0
  times: np.ndarray  # [steps], the model's time input at each of them (flow.SCHEDULES)
  guidance: float
  guidance_low: float  # below the boundary of a model of two experts
  interval: tuple  # noise levels between which guidance acts
  rescale: float
  held_LP: np.ndarray | None = None  # bool: values that are given of tokens that are not; None: no such


def prepare(request, canvas, tokenize, patch, base_fps=None, schedule="uniform", number=0):
  """Request and Canvas -> Denoising.

  tokenize: str -> ids or embeddings. base_fps: as in training, None for the plain index. schedule: a key of
  flow.SCHEDULES. number: of the canvas, of a video that is made in several; each has other noise.
  """
  size = canvas.latents_THWC.shape[:3]
  grid = patches.grid(size, patch)
  given_L = masks.tokens(canvas.given_THW, patch)
  given_LP = patches.patchify(np.broadcast_to(canvas.given_THW[..., None], canvas.latents_THWC.shape), patch)
  held_LP = given_LP & ~given_L[:, None]
  clip = batches.Clip(
    tokens_LP=patches.patchify(canvas.latents_THWC, patch),
    coords_L3=patches.coords(grid, patches.time_scale(base_fps, request.fps)),
    texts=[tokenize(text) for text in canvas.texts],
    uid=request.seed,
    epoch=number,
    size=size,
    fps=request.fps,
    given_L=given_L,
    prompt_L=np.repeat(canvas.prompt_T[:: patch[0]], grid[1] * grid[2]),
    cond_LQ=None if canvas.cond_THWC is None else patches.patchify(canvas.cond_THWC, patch),
  )
  if request.times:
    sigmas, times = flow.listed_schedule(request.times, canvas.start)
  else:
    start = 1.0 if canvas.start >= 1 else float(flow.shifted(canvas.start, 1 / request.shift))
    sigmas, times = flow.schedule(schedule, request.sampler, request.steps, request.shift, start)
  return Denoising(
    clip=clip,
    negative=tokenize(request.negative_prompt),
    sigmas=sigmas,
    times=times,
    guidance=request.guidance,
    guidance_low=request.guidance if request.guidance_low is None else request.guidance_low,
    interval=request.guidance_interval,
    rescale=request.guidance_rescale,
    held_LP=held_LP if held_LP.any() else None,
  )


def share_rows(tokens, text_tokens, row_tokens, row_clips=64, devices=1):
  """Which canvases share a row: first-fit decreasing, from their sizes alone.

  tokens, text_tokens: of each canvas [N]; its text counts its prompts or its negative prompt, whichever are
  more. -> (list of rows, each a list of positions in 0..N-1; RowShape). A row has `row_tokens` tokens, or
  more where one canvas needs it, or fewer where all fit in less. devices: those that may cut
  a row, whose tokens are a multiple of them.
  """
  tokens, text_tokens = np.asarray(tokens), np.asarray(text_tokens)
  least = int(max(tokens.max(), min(row_tokens, tokens.sum())))
  step = math.lcm(max(ROW_STEP, (1 << (least.bit_length() - 1)) // ROW_LENGTHS), devices)
  length = math.ceil(least / step) * step
  rows, room = [], np.zeros(len(tokens), np.int64)
  for i in np.argsort(-tokens, kind="stable").tolist():
    fits = room[: len(rows)] >= tokens[i]
    row = int(fits.argmax()) if fits.any() else len(rows)
    if row == len(rows):
      rows.append([])
      room[row] = length
    rows[row].append(i)
    room[row] = room[row] - tokens[i] if len(rows[row]) < row_clips else -1
  text = max(int(text_tokens[row].sum()) for row in rows)
  clips = max(map(len, rows))
  return rows, batches.RowShape(
    length, 1 << (clips - 1).bit_length(), math.ceil(text / TEXT_STEP) * TEXT_STEP
  )


def noise(seed, coords_L3, width):
  """The noise that a request of this seed begins with, [L, width], at tokens of these coordinates."""
  uid_112 = np.array([[[seed >> 32, seed & 0xFFFFFFFF]]], np.uint32)
  keys_11 = flow.clip_keys(jax.random.key(NOISE_KEY), uid_112, np.zeros((1, 1), np.int32))
  segment_1L = np.ones((1, len(coords_L3)), np.int32)
  return np.asarray(flow.token_noise(keys_11, segment_1L, coords_L3[None], width))[0]


def computed_steps(steps, cache):
  """At which of the steps the blocks are computed, bool [steps], if that is to be at one of `cache` of them.

  At the first two, from which the next are extrapolated, at the last, and evenly between.
  """
  computed = np.zeros(steps, bool)
  count = max(3, math.floor(steps / cache))
  computed[np.rint(np.linspace(1, steps - 1, min(count, steps) - 1)).astype(int)] = True
  computed[0] = True
  return computed


def denoise(
  model, params, rows, shape, sampler, on_step=lambda done, of: None, stop=lambda: False, cache=1.0
):
  """Rows of Denoising (lists of lists) -> for each the list of denoised tokens [n, P] (numpy); None where
  `stop()` became true.

  sampler: a key of SAMPLERS. on_step(done, of) is called after each step. A model of two experts changes over
  at `model.boundary`; what is given to it together must share its noise levels. cache > 1: the blocks are
  computed at one of so many steps alone; between, what they add to their input is extrapolated from the last
  two, linearly in sigma (TaylorSeer, arXiv:2503.06923, of first order, for all blocks together).

  What is given of a token that is not given as a whole is put into it at each step, with its noise (RePaint,
  arXiv:2201.09865, eq. 8a).
  """
  batch, guided, settings, sigmas, times = _assemble(rows, shape)
  x, noise_BLP, text_BSE = _start(model, params, batch, sigmas[..., 0], guided=guided)
  held_BLP = _held(rows, x.shape)
  steps, text_kv, of_expert = sigmas.shape[-1] - 1, None, None
  computed = computed_steps(steps, cache)
  carry = SAMPLERS[sampler][0](x, None if cache == 1 else _no_changes(model, batch, x))
  for i in range(steps):
    if stop():
      return None
    weights, low = model.expert(params, times[..., i].max())
    if low is not of_expert:
      computed[i : i + 2] = True
      text_kv, of_expert = _text_kv(model, weights, text_BSE, batch.prompt_BS), low
    now = {name: settings[name] for name in ("low", "high", "rescale")} | {
      "scale": settings["scale_low" if low else "scale"]
    }
    levels = (sigmas[..., i], sigmas[..., i + 1], times[..., i])
    x, carry = _step(
      model,
      weights,
      batch,
      text_BSE,
      text_kv,
      noise_BLP,
      x,
      carry,
      *levels,
      now,
      held_BLP,
      np.int32(i),
      sampler=sampler,
      guided=guided,
      reuse=not computed[i],
    )
    x.block_until_ready()
    on_step(i + 1, steps)
  x = multihost.to_host(x)
  tokens = []
  for b, row in enumerate(rows):
    ends = np.cumsum([len(one.clip.tokens_LP) for one in row])
    tokens.append(np.split(x[b], ends)[: len(row)])
  return tokens


def _assemble(rows, shape):
  """-> (PackedBatch, guided, settings, sigmas, times).

  guided: is any canvas? Then the batch has 2 B rows, those with the negative prompts below. settings: [B, G]
  by name.
  sigmas: [B, G, steps + 1]; times: [B, G, steps].
  """
  placed = [(b, g, one) for b, row in enumerate(rows) for g, one in enumerate(row)]
  guided = any(one.guidance != 1.0 or one.guidance_low != 1.0 for _, _, one in placed)
  batch = batches.pack([[one.clip for one in row] for row in rows], shape)
  if guided:
    negative = [
      [dataclasses.replace(one.clip, texts=[one.negative], prompt_L=None) for one in row] for row in rows
    ]
    batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, batches.pack(negative, shape))
  names = ("scale", "scale_low", "low", "high", "rescale")
  settings = {name: np.zeros((len(rows), shape.clips), np.float32) for name in names}
  sigmas = np.zeros((len(rows), shape.clips, max(len(one.sigmas) for _, _, one in placed)), np.float32)
  times = np.zeros_like(sigmas[..., 1:])
  for b, g, one in placed:
    sigmas[b, g, : len(one.sigmas)], times[b, g, : len(one.times)] = one.sigmas, one.times
    for name, value in zip(names, (one.guidance, one.guidance_low, *one.interval, one.rescale), strict=True):
      settings[name][b, g] = value
  return batch, guided, settings, sigmas, times


def _held(rows, shape_BLP):
  """bool [B, L, P] of all rows: values given of tokens that are not; None where there are none."""
  if all(one.held_LP is None for row in rows for one in row):
    return None
  held_BLP = np.zeros(shape_BLP, bool)
  for b, row in enumerate(rows):
    at = 0
    for one in row:
      count = len(one.clip.tokens_LP)
      if one.held_LP is not None:
        held_BLP[b, at : at + count] = one.held_LP
      at += count
  return held_BLP


def _first_half(batch):
  rows = batch.segment_BL.shape[0] // 2
  return jax.tree.map(lambda a: a[:rows], batch)


@functools.partial(jax.jit, static_argnames=("model", "guided"))
def _start(model, params, batch, sigma_BG, *, guided):
  """The noised canvas [B, L, P], and what no step changes: its noise, the text embeddings."""
  text_BSE = model.embed_text(params, batch)
  rows = _first_half(batch) if guided else batch
  keys_BG = flow.clip_keys(jax.random.key(NOISE_KEY), rows.uid_BG2, rows.epoch_BG)
  noise_BLP = flow.token_noise(keys_BG, rows.segment_BL, rows.coords_BL3, rows.tokens_BLP.shape[-1])
  sigma_BL1 = flow.gather_sigma(*flow.token_sigma(sigma_BG, rows.segment_BL, _clean(model, rows)))
  return flow.interpolate(rows.tokens_BLP, noise_BLP, sigma_BL1), noise_BLP, text_BSE


@functools.partial(jax.jit, static_argnames=("model",))
def _text_kv(model, params, text_BSE, prompt_BS):
  return model.text_kv(params, text_BSE, prompt_BS)


def _clean(model, rows):
  """[B, L] bool: given tokens that the model takes at sigma 0.

  Other models get them noised like their clip, at each step.
  """
  return rows.given_BL & (model.dit.conditioning == "token_sigma")


def _no_changes(model, batch, x_BLP):
  """What is kept of the last two steps that computed the blocks: what these added, and the sigmas."""
  change_BLD = jnp.zeros((*batch.segment_BL.shape, model.dit.width), model.dit.dtype)
  sigma_BL1 = jnp.zeros((*x_BLP.shape[:2], 1))
  return {"last": change_BLD, "before": change_BLD + 0, "sigma": sigma_BL1, "sigma_before": sigma_BL1 + 0}


@functools.partial(
  jax.jit, static_argnames=("model", "sampler", "guided", "reuse"), donate_argnames=("carry",)
)
def _step(
  model, params, batch, text_BSE, text_kv, noise_BLP, x_BLP, carry, sigma_BG, sigma_next_BG, time_BG,
  settings, held_BLP, number, *, sampler, guided, reuse=False,
):  # fmt: skip
  """One step of the sampler for all rows. number: of the step. reuse: the blocks are not computed."""
  rows = _first_half(batch) if guided else batch
  clips, clean_BL = sigma_BG.shape[1], _clean(model, rows)

  def to_tokens(value_BG):
    """A value of each clip -> of each token, [B, L, 1]; 0 where the token is clean."""
    return flow.gather_sigma(*flow.token_sigma(value_BG, rows.segment_BL, clean_BL))

  def replaced(x_BLP, sigma_BL1):
    """x with what is given and not clean at this noise level (RePaint, arXiv:2201.09865, eq. 8a)."""
    given_BLP = rows.given_BL[..., None] if model.dit.conditioning == "replacement" else None
    if held_BLP is not None:
      given_BLP = held_BLP if given_BLP is None else held_BLP | given_BLP
    if given_BLP is None:
      return x_BLP
    return jnp.where(given_BLP, flow.interpolate(rows.tokens_BLP, noise_BLP, sigma_BL1), x_BLP)

  def repeated(x):
    """The rows once more, below, for the negative prompts."""
    return jnp.concatenate([x, x]) if guided else x

  def velocity(x_BLP, sigma_BL1, aux):
    # The model takes a time of each clip. Any of its tokens that is not clean has its sigma; Heun asks at
    # sigma_next, too.
    sigma_BL1 = sigma_BL1[..., :1]  # a sampler may have broadcast it
    x_BLP = replaced(x_BLP, sigma_BL1)
    sigma_now_BG = _largest_of_clip(sigma_BL1[..., 0], rows.segment_BL, clips)
    time_now_BG = jnp.where(sigma_now_BG == sigma_BG, time_BG, sigma_now_BG)
    time_BU, index_BL = flow.token_sigma(time_now_BG, rows.segment_BL, clean_BL)
    inputs = (params, repeated(x_BLP), batch, repeated(time_BU), repeated(index_BL), text_BSE, text_kv)
    if aux is None:
      v_BLP = model.velocity(*inputs)
    elif reuse:
      apart = aux["sigma"] - aux["sigma_before"]
      slope = jnp.where(apart == 0, 0.0, (sigma_BL1 - aux["sigma"]) / jnp.where(apart == 0, 1.0, apart))
      v_BLP = model.velocity(*inputs, change=aux["last"] + repeated(slope) * (aux["last"] - aux["before"]))
    else:
      v_BLP, change = model.velocity(*inputs, keep=True)
      aux = {"last": change, "before": aux["last"], "sigma": sigma_BL1, "sigma_before": aux["sigma"]}
    if guided:
      v_prompt, v_null = jnp.split(v_BLP, 2)
      acts_BG = (sigma_now_BG >= settings["low"]) & (sigma_now_BG <= settings["high"])
      scale_BL1 = to_tokens(jnp.where(acts_BG, settings["scale"], 1.0))
      rescale_BL1 = to_tokens(settings["rescale"])
      v_BLP = guidance.classifier_free(v_prompt, v_null, scale_BL1, rescale_BL1, rows.segment_BL, clips)
    return v_BLP, aux

  new_BLP = None
  if sampler in STOCHASTIC:  # another key than that of the noise which requests begin with, for each step
    keys_BG = flow.clip_keys(jax.random.key(NOISE_KEY + 1 + number), rows.uid_BG2, rows.epoch_BG)
    new_BLP = flow.token_noise(keys_BG, rows.segment_BL, rows.coords_BL3, x_BLP.shape[-1])
  sigma_next_BL1 = to_tokens(sigma_next_BG)
  x_BLP, carry = SAMPLERS[sampler][1](velocity, x_BLP, carry, to_tokens(sigma_BG), sigma_next_BL1, new_BLP)
  return replaced(x_BLP, sigma_next_BL1), carry


def _largest_of_clip(value_BL, segment_BL, clips):
  """[B, L] -> [B, G]: the largest value among a clip's tokens; 0 where there is no clip."""
  of_clip_BLG = segment_BL[..., None] == jnp.arange(1, clips + 1)
  return jnp.max(jnp.where(of_clip_BLG, value_BL[..., None], 0.0), axis=1)
