"""Computations as files: StableHLO by jax.export, and ONNX. Used by launch.export.

The weights are in a safetensors file beside the computation, which takes them as its first argument, a flat
dict of arrays.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import jaxpr_as_fun

from sora_jax import files, patches, tasks, workdir as workdirs
from sora_jax.errors import BadInput
from sora_jax.models import vae
from sora_jax.models.dit import DiT

PLATFORMS = ("cpu", "cuda", "tpu")
ONNX = (
  "jax2onnx==0.17.1 onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 equinox==0.13.8 jaxtyping==0.3.11 "
  "wadler_lindig==0.1.8 dm_pix==0.4.5"
)
ONNX_BYTES = 1_900_000_000  # of one ONNX file; a protocol buffer holds 2 GB
DIT_INPUTS = """
| input of the DiT | shape | is |
| --- | --- | --- |
| `tokens` | [b, l, {P}] float32 | noised latent patches, values in the order (t, y, x, channel) |
| `coords` | [b, l, 3] float32 | t, y, x of each in the patch grid |
| `segment` | [b, l] int32 | the clip that a token belongs to, from 1; 0 padding |
| `sigma` | [b, u] float32 | noise levels 0 to 1 (timestep / 1000) |
| `sigma_index` | [b, l] int32 | index of the noise level of a token in `sigma` |
| `text` | [b, s, {E}] float32 | text embeddings{pad} |
| `prompt` | [b, l] int32 | the prompt that a token reads, from 1 |
| `prompt_text` | [b, s] int32 | the prompt that a text token belongs to, from 1; 0 padding |
{cond}
The output is the velocity, [b, l, {P}] float32. Latents [t, h, w] are divided into patches of {patch}.
"""
LOADING = """`b`, `l`, `s`, `u`, and the height and width of the VAE may have any size. The same files run on
CPU, CUDA and TPU.

```python
import jax, safetensors.numpy
from jax import export
weights = safetensors.numpy.load_file('THIS/{dit}.safetensors')  # for bfloat16: safetensors.flax
dit = export.deserialize(open('THIS/dit.stablehlo', 'rb').read())
row = (tokens, coords, segment, sigma, sigma_index, text, prompt, prompt_text{cond})
velocity = jax.jit(dit.call)(weights, *row)

vae = safetensors.numpy.load_file('THIS/vae.safetensors')
first = export.deserialize(open('THIS/vae-decode-first.stablehlo', 'rb').read())
later = export.deserialize(open('THIS/vae-decode-next.stablehlo', 'rb').read())
# Latents are raw: normalised ones times their std, plus their mean.
memory, frames = first.call(vae, latents[:, :1])  # 1 frame
memory, frames = later.call(vae, memory, latents[:, 1:2])  # 4 frames for each latent that follows
```

`vae-encode-first` takes 1 frame in [-1, 1], `vae-encode-next` 4; they return the memory and the latents.
{inputs}"""


def export_stablehlo(job, out):
  """Writes the DiT's velocity, and the VAE by chunks, for any batch, number of tokens, height and width."""
  model = workdirs.make_model(job.settings(), job.workdir / "text", None)
  cfg = dataclasses.replace(model.dit, remat="none")
  b, l, s, u, h, w = export.symbolic_shape("b, l, s, u, h, w")
  keys = [key for key in job.weights if key.startswith("dit")]
  for key in keys:
    _write_weights(job, out / f"{key}.safetensors", job.weights[key])
  flat = _shapes(job, job.weights[keys[0]])

  def velocity(weights, *row):
    return DiT(cfg).apply({"params": files.unflatten(weights)}, *row)

  _save(out / "dit.stablehlo", velocity, flat, *_row(cfg, b, l, s, u))

  vae_cfg, params = workdirs.load_vae(job.workdir / "vae")[0], job.part("vae")[1]
  _write_weights(job, out / "vae.safetensors", params)
  flat, space = _shapes(job, params), vae_cfg.stride[1]
  pixels, latents = (space * h, space * w, 3), (h, w, vae_cfg.z_dim)
  _save_vae(out, "encode", vae.encode_chunk, vae_cfg, flat, (b, 1, *pixels), (b, vae_cfg.stride[0], *pixels))
  _save_vae(out, "decode", vae.decode_chunk, vae_cfg, flat, (b, 1, *latents), (b, 1, *latents))
  files.write_json(out / "config.json", {"model": job.config["model"], "vae": job.part("vae")[0]})
  cond = ", cond" if cfg.cond_channels else ""
  return _experts(model, keys, "safetensors") + LOADING.format(dit=keys[0], cond=cond, inputs=_inputs(cfg))


def _save_vae(out, side, chunk, cfg, weights, first_shape, next_shape):
  """Writes one side of the VAE, as two computations: its first chunk, and each chunk that follows."""

  def following(weights, stream, x):
    stream, out, *_ = chunk(files.unflatten(weights), stream, x, cfg, first=stream is None)
    return stream, out

  def first(weights, x):
    return following(weights, None, x)

  frame = jax.ShapeDtypeStruct(first_shape, jnp.float32)
  _save(out / f"vae-{side}-first.stablehlo", first, weights, frame)
  stream, _ = jax.eval_shape(first, weights, frame)
  frames = jax.ShapeDtypeStruct(next_shape, jnp.float32)
  _save(out / f"vae-{side}-next.stablehlo", following, weights, stream, frames)


def _experts(model, keys, suffix):
  """A sentence for the README on which file is for which noise levels; "" for a model without experts."""
  if len(keys) < 2:
    return ""
  high, low = (f"`{key}.{suffix}`" for key in keys)
  return f"{high} is for noise levels from {model.boundary:g} on, {low} for those below.\n\n"


def _inputs(cfg):
  """The table of the inputs of a DiT, in Markdown."""
  pad = cond = ""
  if cfg.text_pad:
    pad = f"; one zero after each prompt, a part of it, stands for its padding to {cfg.text_pad}"
  if cfg.cond_channels:
    cond = f"| `cond` | [b, l, {cfg.values_cond}] float32 | condition channels |\n"
  return DIT_INPUTS.format(P=cfg.values_in, E=cfg.text_width, pad=pad, cond=cond, patch=cfg.patch)


def _row(cfg, b, l, s, u):
  """Shapes of the inputs of a DiT, in the order of DIT_INPUTS."""

  def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  row = (
    floats(b, l, cfg.values_in),
    floats(b, l, 3),
    ids(b, l),
    floats(b, u),
    ids(b, l),
    floats(b, s, cfg.text_width),
    ids(b, l),
    ids(b, s),
  )
  if cfg.cond_channels:
    row += (floats(b, l, cfg.values_cond),)
  return row


def _shapes(job, params):
  return {
    name: jax.ShapeDtypeStruct(leaf.shape, job.cast(leaf.dtype))
    for name, leaf in files.flatten(params).items()
  }


def _write_weights(job, path, params):
  flat = files.flatten(params)
  specs = {name: (leaf.shape, job.cast(leaf.dtype)) for name, leaf in flat.items()}
  files.write_safetensors(path, specs, ((name, np.asarray(leaf)) for name, leaf in flat.items()))


def _save(path, run, *shapes):
  path.write_bytes(export.export(jax.jit(run), platforms=PLATFORMS)(*shapes).serialize())


def export_onnx(job, out):
  """Writes the DiT's velocity, with weights, for one clip of the size and length of the config's samples."""
  if importlib.util.find_spec("jax2onnx") is None or importlib.util.find_spec("onnx") is None:
    raise BadInput(f"jax2onnx is not installed; pip install --no-deps {ONNX} (it pins an older Orbax)")
  import onnx
  from jax2onnx import to_onnx

  model = workdirs.make_model(job.settings(), job.workdir / "text", None)
  cfg = dataclasses.replace(model.dit, dtype="float32", remat="none")  # onnxruntime has no bfloat16
  settings = job.config["sample"]
  stride = workdirs.load_vae(job.workdir / "vae")[0].stride
  thw = tasks.latent_size(settings["frames"], settings["size"], stride, cfg.patch)
  row = _row(cfg, 1, patches.token_count(thw, cfg.patch), cfg.text_pad or 512, 2)

  def array(leaf):
    dtype = job.cast(leaf.dtype)
    return jnp.asarray(leaf, jnp.float32 if dtype == jnp.bfloat16 else dtype)

  keys = [key for key in job.weights if key.startswith("dit")]
  for key in keys:
    weights = jax.tree.map(array, job.weights[key])
    velocity = functools.partial(DiT(cfg).apply, {"params": weights})
    # The converter cannot trace flax's scan; it can trace a jaxpr.
    graph = to_onnx(jaxpr_as_fun(jax.make_jaxpr(velocity)(*row)), list(row))
    large = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > ONNX_BYTES
    location = f"{key}.onnx.data" if large else None
    onnx.save(graph, out / f"{key}.onnx", save_as_external_data=large, location=location)
  files.write_json(out / "config.json", {"model": job.config["model"]})
  tokens, text_tokens = row[0].shape[1], row[7].shape[1]
  loading = (
    f"The computation is for one clip of {thw} latents, {tokens} tokens, and {text_tokens} text tokens. "
    "Its inputs are `in_0`, `in_1`, ..., in the order of the table. "
    "Shorter prompts are padded with zeros, which belong to the prompt."
    f"\n\n```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession('THIS/{keys[0]}.onnx')\n"
    "velocity, = session.run(None, {f'in_{i}': x for i, x in enumerate(inputs)})\n```\n"
  )
  return _experts(model, keys, "onnx") + loading + _inputs(cfg)
