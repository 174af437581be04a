"""The rows of launch.benchmark as we compute them. Each function reads the weights that the other side left in `folder`, compiles, and
returns (step, seconds of compilation): step() runs once and returns its outputs."""

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
  """Starts the backend; XLA takes a thread for each core that it may use."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  jax.block_until_ready(jnp.zeros(8) + 1)


def _weights(folder, from_diffusers, cfg):
  return jax.device_put(from_diffusers(load_file(os.path.join(folder, "weights.safetensors")), cfg))


def _compiled(f, *args, **kwargs):
  """f, jitted and compiled for these arguments, and how long that took."""
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
  convolve = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
  run, seconds = _compiled(convolve, x, kernel)
  return lambda: {"out": np.asarray(run(x, kernel))}, seconds


def _dit_cfg(shape, **kwargs):
  return dits.DiTConfig(
      depth=shape["depth"], heads=shape["heads"], head_size=shape["head_size"], mlp=shape["mlp"], channels=16, patch=(1, 2, 2),
      text_width=shape["text_width"], text_pad=512, conditioning="replacement", **kwargs)


def _row(clips, cfg):
  """All clips in one row: the arguments of DiT after its weights. One zero at the end of a prompt stands for all (dit.log_count)."""
  parts = {name: [] for name in ("tokens", "coords", "segment", "index", "text", "prompt")}
  for i, (latents, _, text) in enumerate(clips):
    text = text[:np.flatnonzero(text.any(-1))[-1] + 2]
    tokens = patches.patchify(latents, cfg.patch)
    for name, part in {"tokens": tokens, "coords": patches.coords(patches.grid(latents.shape[:3], cfg.patch)).astype(np.float32),
                       "segment": np.full(len(tokens), i + 1, np.int32), "index": np.full(len(tokens), i, np.int32),
                       "text": text, "prompt": np.full(len(text), i + 1, np.int32)}.items():
      parts[name].append(part)
  row = {name: jnp.asarray(np.concatenate(part)[None]) for name, part in parts.items()}
  sigma_BU = jnp.asarray([[timestep / 1000 for _, timestep, _ in clips]], jnp.float32)
  return row["tokens"], row["coords"], row["segment"], sigma_BU, row["index"], row["text"], row["segment"], row["prompt"]


def dit(shape, folder):
  """All clips packed in one row."""
  cfg, clips = _dit_cfg(shape), worker.clips(shape)
  params, row = _weights(folder, wan_dit.from_diffusers, cfg), _row(clips, cfg)
  run, seconds = _compiled(lambda params, *row: dits.DiT(cfg).apply({"params": params}, *row), params, *row)
  ends = np.cumsum([patches.token_count(clip[0].shape[:3], cfg.patch) for clip in clips])[:-1]

  def step():
    velocity_LP = np.asarray(run(params, *row))[0]
    return {str(i): patches.unpatchify(part, clip[0].shape[:3], cfg.patch)
            for i, (part, clip) in enumerate(zip(np.split(velocity_LP, ends), clips))}
  return step, seconds


def dit_padded(shape, folder):
  """As `dit`; of the outputs, the clips of the first's size."""
  step, seconds = dit(shape, folder)

  def largest():
    outs = step()
    return {name: out for name, out in outs.items() if out.shape == outs["0"].shape}
  return largest, seconds


def train(shape, folder):
  """All clips packed in one row."""
  cfg, clips = _dit_cfg(shape, remat="dots"), worker.clips(shape)
  row = _row(clips, cfg)
  wanted = worker.wanted([np.moveaxis(latents, -1, 0).shape for latents, *_ in clips])
  wanted_BLP = jnp.asarray(np.concatenate([patches.patchify(np.moveaxis(value, 0, -1), cfg.patch) for value in wanted])[None])
  tx = optax.adamw(1e-4, weight_decay=0.01)

  def loss(params, row, wanted_BLP):
    squares_L = jnp.square(dits.DiT(cfg).apply({"params": params}, *row) - wanted_BLP)[0].mean(-1)
    one_hot_LG = jax.nn.one_hot(row[4][0], len(clips))
    return squares_L.mean(), squares_L @ one_hot_LG / one_hot_LG.sum(0)

  def update(state, row, wanted_BLP):
    params, opt = state
    grads, losses_G = jax.grad(loss, has_aux=True)(params, row, wanted_BLP)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), losses_G

  params = _weights(folder, wan_dit.from_diffusers, cfg)
  kept = [(params, jax.jit(tx.init)(params))]
  run, seconds = _compiled(update, kept[0], row, wanted_BLP, donate_argnums=0)
  del params

  def step():
    kept[0], losses_G = run(kept[0], row, wanted_BLP)
    return np.asarray(losses_G)
  return worker.three_steps(step), seconds


def train_padded(shape, folder):
  """As `train`; of the losses, that of the first clip in the first step."""
  step, seconds = train(shape, folder)
  return lambda: {"loss": step()["loss"][:1, :1]}, seconds


def _vae_cfg(shape):
  return vae.VAEConfig(base_dim=shape["base_dim"])


def _streamed(run, chunks):
  """The whole stream once, to compile, and how long that took beyond the second time."""
  times = []
  for _ in range(2):
    began = time.perf_counter()
    for out in run(iter(chunks)):
      jax.block_until_ready(out)
    times.append(time.perf_counter() - began)
  return max(times[0] - times[1], 0)


def vae_encode(shape, folder):
  cfg = _vae_cfg(shape)
  params, video = _weights(folder, wan_vae.from_diffusers, cfg), worker.uniform(0, 1, shape["frames"], *shape["size"], 3)
  run = lambda chunks: vae.encode_stream(params, chunks, cfg)  # noqa: E731
  seconds = _streamed(run, [video[:, :5]])
  return lambda: {"mean": np.concatenate([np.asarray(mean) for mean in run([video])], 1)}, seconds


def vae_decode(shape, folder):
  cfg = _vae_cfg(shape)
  params = _weights(folder, wan_vae.from_diffusers, cfg)
  latents = worker.uniform(0, 1, 1 + shape["frames"] // 4, *(n // 8 for n in shape["size"]), 16)
  run = lambda chunks: vae.decode_stream(params, chunks, cfg)  # noqa: E731
  seconds = _streamed(run, [latents[:, :2]])
  return lambda: {"video": np.concatenate([np.asarray(part) for part in run([latents])], 1)}, seconds


def text(shape, folder):
  """All prompts in one row, which is as long as they are together."""
  cfg = texts.TextConfig(vocab=shape["vocab"], width=shape["width"], depth=shape["depth"], heads=shape["heads"], head_size=shape["head_size"],
                         mlp=shape["mlp"])
  params, prompts = _weights(folder, umt5.from_diffusers, cfg), worker.prompts(shape)
  ids = jnp.asarray(np.concatenate(prompts)[None], jnp.int32)
  numbers = jnp.asarray(np.repeat(np.arange(len(prompts)) + 1, [len(p) for p in prompts])[None], jnp.int32)
  run, seconds = _compiled(lambda params, *row: texts.TextEncoder(cfg).apply({"params": params}, *row), params, ids, numbers)
  ends = np.cumsum([len(p) for p in prompts])[:-1]
  return lambda: {str(i): out for i, out in enumerate(np.split(np.asarray(run(params, ids, numbers))[0], ends))}, seconds


def job(shape, folder):
  """Prompt to frames, by the way of launch.sample. Leaves the noise that it begins with for the other side."""
  importing.plan(os.path.join(folder, "pipeline"), os.path.join(folder, "w")).run()
  pipe = Pipeline.open(os.path.join(folder, "w"), keep_text_encoder=True)
  fields = {name: shape[name] for name in ("frames", "size", "steps")} | {"id": "a", "prompt": worker.PROMPT, "negative_prompt": worker.NEGATIVE}
  request = pipe.parse(fields | {"guidance": worker.GUIDANCE})

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
