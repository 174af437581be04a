"""The rows of launch.benchmark as we compute them.

Each function reads the weights that the other side saved in `folder`, compiles, and returns (step, seconds of
compilation): step() runs once and returns its outputs.
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from launch.benchmark import worker
from sora_jax import patches
from sora_jax.convert import importing
from sora_jax.models import dit as dits, text as texts, vae
from sora_jax.pipeline import Pipeline
from sora_jax.weights import umt5, wan_dit, wan_vae


def load(threads):
  """Starts the backend on `threads` cores: XLA takes a thread for each core that it may use."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  jax.block_until_ready(jnp.zeros(8) + 1)


def _weights(folder, from_diffusers, cfg):
  return jax.device_put(from_diffusers(load_file(os.path.join(folder, "weights.safetensors")), cfg))


def _compiled(f, *args, **kwargs):
  """-> (f jitted and compiled for these arguments, seconds that it took)."""
  began = time.perf_counter()
  return jax.jit(f, **kwargs).lower(*args).compile(), time.perf_counter() - began


def matmul(shape, folder):
  del folder
  m, k, n = shape["size"]
  a, b = (jnp.asarray(worker.uniform(i, *s)) for i, s in enumerate(((m, k), (k, n))))
  run, seconds = _compiled(jnp.matmul, a, b)
  return lambda: {"out": np.asarray(run(a, b))}, seconds


def convolution(shape, folder):
  del folder
  n, c, h, w = shape["size"]
  x, kernel = jnp.asarray(worker.uniform(0, n, h, w, c)), jnp.asarray(worker.uniform(1, 3, 3, c, c))

  def convolve(x, kernel):
    layouts = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layouts)

  run, seconds = _compiled(convolve, x, kernel)
  return lambda: {"out": np.asarray(run(x, kernel))}, seconds


def _dit_cfg(shape, **kwargs):
  return dits.DiTConfig(
    depth=shape["depth"],
    heads=shape["heads"],
    head_size=shape["head_size"],
    mlp=shape["mlp"],
    channels=16,
    patch=(1, 2, 2),
    text_width=shape["text_width"],
    text_pad=512,
    conditioning="replacement",
    **kwargs,
  )


def _row(clips, cfg):
  """Packs all clips into one row -> the arguments of DiT after its weights.

  One zero at the end of a prompt stands for all of its padding (dit.log_count).
  """
  parts = {name: [] for name in ("tokens", "coords", "segment", "index", "text", "prompt")}
  for i, (latents, _, text) in enumerate(clips):
    text = text[: np.flatnonzero(text.any(-1))[-1] + 2]
    tokens = patches.patchify(latents, cfg.patch)
    parts["tokens"].append(tokens)
    parts["coords"].append(patches.coords(patches.grid(latents.shape[:3], cfg.patch)).astype(np.float32))
    parts["segment"].append(np.full(len(tokens), i + 1, np.int32))
    parts["index"].append(np.full(len(tokens), i, np.int32))
    parts["text"].append(text)
    parts["prompt"].append(np.full(len(text), i + 1, np.int32))
  tokens, coords, segment, index, text, prompt = (
    jnp.asarray(np.concatenate(part)[None]) for part in parts.values()
  )
  sigma_BU = jnp.asarray([[timestep / 1000 for _, timestep, _ in clips]], jnp.float32)
  return tokens, coords, segment, sigma_BU, index, text, segment, prompt


def dit(shape, folder):
  """All clips packed in one row."""
  cfg, clips = _dit_cfg(shape), worker.clips(shape)
  params, row = _weights(folder, wan_dit.from_diffusers, cfg), _row(clips, cfg)
  run, seconds = _compiled(lambda params, *row: dits.DiT(cfg).apply({"params": params}, *row), params, *row)
  ends = np.cumsum([patches.token_count(clip[0].shape[:3], cfg.patch) for clip in clips])[:-1]

  def step():
    velocities = np.split(np.asarray(run(params, *row))[0], ends)
    sizes = [latents.shape[:3] for latents, *_ in clips]
    pairs = enumerate(zip(velocities, sizes, strict=True))
    return {str(i): patches.unpatchify(velocity_LP, size, cfg.patch) for i, (velocity_LP, size) in pairs}

  return step, seconds


def dit_padded(shape, folder):
  """As `dit`; returns the outputs of the clips that have the size of the first one."""
  step, seconds = dit(shape, folder)

  def largest():
    outs = step()
    return {name: out for name, out in outs.items() if out.shape == outs["0"].shape}

  return largest, seconds


def train(shape, folder):
  """All clips packed in one row."""
  cfg, clips = _dit_cfg(shape, remat="dots"), worker.clips(shape)
  row = _row(clips, cfg)
  targets = worker.targets([np.moveaxis(latents, -1, 0).shape for latents, *_ in clips])
  targets_LP = [patches.patchify(np.moveaxis(target, 0, -1), cfg.patch) for target in targets]
  target_BLP = jnp.asarray(np.concatenate(targets_LP)[None])
  tx = optax.adamw(1e-4, weight_decay=0.01)

  def loss(params, row, target_BLP):
    squares_L = jnp.square(dits.DiT(cfg).apply({"params": params}, *row) - target_BLP)[0].mean(-1)
    one_hot_LG = jax.nn.one_hot(row[4][0], len(clips))
    return squares_L.mean(), squares_L @ one_hot_LG / one_hot_LG.sum(0)

  def update(state, row, target_BLP):
    params, opt = state
    grads, losses_G = jax.grad(loss, has_aux=True)(params, row, target_BLP)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), losses_G

  params = _weights(folder, wan_dit.from_diffusers, cfg)
  state = (params, jax.jit(tx.init)(params))
  run, seconds = _compiled(update, state, row, target_BLP, donate_argnums=0)
  del params

  def step():
    nonlocal state
    state, losses_G = run(state, row, target_BLP)
    return np.asarray(losses_G)

  return worker.three_steps(step), seconds


def train_padded(shape, folder):
  """As `train`; returns the loss of the first clip in the first step."""
  step, seconds = train(shape, folder)
  return lambda: {"loss": step()["loss"][:1, :1]}, seconds


def _vae_cfg(shape):
  return vae.VAEConfig(base_dim=shape["base_dim"])


def _streamed(run, chunks):
  """Runs the whole stream twice -> seconds of compilation: the first run's time less the second's."""
  times = []
  for _ in range(2):
    began = time.perf_counter()
    for out in run(iter(chunks)):
      jax.block_until_ready(out)
    times.append(time.perf_counter() - began)
  return max(times[0] - times[1], 0)


def vae_encode(shape, folder):
  cfg = _vae_cfg(shape)
  params = _weights(folder, wan_vae.from_diffusers, cfg)
  video = worker.uniform(0, 1, shape["frames"], *shape["size"], 3)

  def run(chunks):
    return vae.encode_stream(params, chunks, cfg)

  seconds = _streamed(run, [video[:, :5]])
  return lambda: {"mean": np.concatenate([np.asarray(mean) for mean in run([video])], 1)}, seconds


def vae_decode(shape, folder):
  cfg = _vae_cfg(shape)
  params = _weights(folder, wan_vae.from_diffusers, cfg)
  latents = worker.uniform(0, 1, 1 + shape["frames"] // 4, *(n // 8 for n in shape["size"]), 16)

  def run(chunks):
    return vae.decode_stream(params, chunks, cfg)

  seconds = _streamed(run, [latents[:, :2]])
  return lambda: {"video": np.concatenate([np.asarray(part) for part in run([latents])], 1)}, seconds


def text(shape, folder):
  """All prompts in one row, whose length is the sum of theirs."""
  fields = ("vocab", "width", "depth", "heads", "head_size", "mlp")
  cfg = texts.TextConfig(**{name: shape[name] for name in fields})
  params, prompts = _weights(folder, umt5.from_diffusers, cfg), worker.prompts(shape)
  ids = jnp.asarray(np.concatenate(prompts)[None], jnp.int32)
  numbers = jnp.asarray(np.repeat(np.arange(len(prompts)) + 1, [len(p) for p in prompts])[None], jnp.int32)

  def apply(params, *row):
    return texts.TextEncoder(cfg).apply({"params": params}, *row)

  run, seconds = _compiled(apply, params, ids, numbers)
  ends = np.cumsum([len(p) for p in prompts])[:-1]

  def step():
    outputs = np.split(np.asarray(run(params, ids, numbers))[0], ends)
    return {str(i): output for i, output in enumerate(outputs)}

  return step, seconds


def job(shape, folder):
  """Prompt to frames, as launch.sample does it. Saves the noise that it starts from for the other side."""
  importing.plan(os.path.join(folder, "pipeline"), os.path.join(folder, "w")).run()
  pipe = Pipeline.open(os.path.join(folder, "w"), keep_text_encoder=True)
  fields = {
    "id": "a",
    "prompt": worker.PROMPT,
    "negative_prompt": worker.NEGATIVE,
    "guidance": worker.GUIDANCE,
  }
  request = pipe.parse(fields | {name: shape[name] for name in ("frames", "size", "steps")})

  def step():
    (result,) = pipe.run([request])
    return {"frames": np.stack(list(pipe.pixels(result.latents_THWC))) / 2 + 0.5}

  times = []
  for _ in range(2):
    began = time.perf_counter()
    step()
    times.append(time.perf_counter() - began)
  np.save(os.path.join(folder, "noise.npy"), pipe.noise(request))
  return step, times[0] - times[1]
