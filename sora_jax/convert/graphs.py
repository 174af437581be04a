"""Computations as files: StableHLO by jax.export, and ONNX. Used by launch.export.

Weights stay beside a computation as a safetensors file; a computation takes them as its first argument, a flat dict of arrays.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import jaxpr_as_fun

from sora_jax import files, patches, tasks, workdir
from sora_jax.errors import BadInput
from sora_jax.models import vae
from sora_jax.models.dit import DiT

PLATFORMS = ("cpu", "cuda", "tpu")
ONNX = "jax2onnx==0.17.1 onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 equinox==0.13.8 jaxtyping==0.3.11 wadler_lindig==0.1.8 dm_pix==0.4.5"
ONNX_BYTES = 1_900_000_000       # of one file of ONNX; a protocol buffer holds 2 GB
DIT_INPUTS = """
| input of the DiT | shape | is |
| --- | --- | --- |
| `tokens` | [b, l, {P}] float32 | noised latent patches, values in the order (t, y, x, channel) |
| `coords` | [b, l, 3] float32 | t, y, x of each in the patch grid |
| `segment` | [b, l] int32 | which clip a token is of, from 1; 0 padding |
| `sigma` | [b, u] float32 | noise levels 0 to 1 (timestep / 1000) |
| `sigma_index` | [b, l] int32 | which of them is a token's |
| `text` | [b, s, {E}] float32 | text embeddings{pad} |
| `prompt` | [b, l] int32 | which prompt a token reads, from 1 |
| `prompt_text` | [b, s] int32 | which prompt a text token is of, from 1; 0 padding |
{cond}
It gives the velocity, [b, l, {P}] float32; patches of [t, h, w] latents are cut by {patch}.
"""
LOADING = """`b`, `l`, `s`, `u`, and height and width of the VAE may have any size; the same files run on CPU, CUDA and TPU.

```python
import jax, safetensors.numpy
from jax import export
weights = safetensors.numpy.load_file('THIS/{dit}.safetensors')      # of bfloat16: safetensors.flax
dit = export.deserialize(open('THIS/dit.stablehlo', 'rb').read())
velocity = jax.jit(dit.call)(weights, tokens, coords, segment, sigma, sigma_index, text, prompt, prompt_text{cond})

vae = safetensors.numpy.load_file('THIS/vae.safetensors')
first, later = (export.deserialize(open(f'THIS/vae-decode-{{name}}.stablehlo', 'rb').read()) for name in ('first', 'next'))
memory, frames = first.call(vae, latents[:, :1])                     # 1 frame; raw latents: normalised ones times their std, plus their mean
memory, frames = later.call(vae, memory, latents[:, 1:2])            # 4 frames for each latent that follows
```

`vae-encode-first` takes 1 frame in [-1, 1], `vae-encode-next` 4; they give the memory and the latents.
{inputs}"""


def export_stablehlo(job, out):
  """The DiT's velocity, and the VAE a chunk at a time, for any batch, number of tokens, height and width."""
  model = workdir.make_model(job.settings(), job.workdir / "text", None)
  cfg = dataclasses.replace(model.dit, remat="none")
  b, l, s, u, h, w = export.symbolic_shape("b, l, s, u, h, w")
  keys = [key for key in job.weights if key.startswith("dit")]
  for key in keys:
    _write_weights(job, out / f"{key}.safetensors", job.weights[key])
  flat = _shapes(job, job.weights[keys[0]])
  run = lambda weights, *row: DiT(cfg).apply({"params": files.unflatten(weights)}, *row)  # noqa: E731
  _save(out / "dit.stablehlo", run, flat, *_row(cfg, b, l, s, u))

  vae_cfg, params = workdir.load_vae(job.workdir / "vae")[0], job.part("vae")[1]
  _write_weights(job, out / "vae.safetensors", params)
  flat, space = _shapes(job, params), vae_cfg.stride[1]
  sides = {"encode": (vae.encode_chunk, vae_cfg.stride[0], (space * h, space * w, 3)), "decode": (vae.decode_chunk, 1, (h, w, vae_cfg.z_dim))}
  for side, (chunk, later, size) in sides.items():
    def run(weights, stream, x, chunk=chunk):
      stream, out, *_ = chunk(files.unflatten(weights), stream, x, vae_cfg, first=stream is None)
      return stream, out
    first = lambda weights, x, run=run: run(weights, None, x)  # noqa: E731
    frame = jax.ShapeDtypeStruct((b, 1, *size), jnp.float32)
    _save(out / f"vae-{side}-first.stablehlo", first, flat, frame)
    stream = jax.eval_shape(first, flat, frame)[0]
    _save(out / f"vae-{side}-next.stablehlo", run, flat, stream, jax.ShapeDtypeStruct((b, later, *size), jnp.float32))
  files.write_json(out / "config.json", {"model": job.config["model"], "vae": job.part("vae")[0]})
  return _experts(model, keys, "safetensors") + LOADING.format(dit=keys[0], cond=", cond" * bool(cfg.cond_channels), inputs=_inputs(cfg))


def _experts(model, keys, suffix):
  """What to say of two experts."""
  if len(keys) < 2:
    return ""
  return f"`{keys[0]}.{suffix}` is for noise levels from {model.boundary:g} on, `{keys[1]}.{suffix}` for those below.\n\n"


def _inputs(cfg):
  """The table of what a DiT takes, in Markdown."""
  pad = f"; after each prompt one zero, that stands for its padding to {cfg.text_pad} and is of the prompt" if cfg.text_pad else ""
  cond = f"| `cond` | [b, l, {cfg.values_cond}] float32 | condition channels |\n" if cfg.cond_channels else ""
  return DIT_INPUTS.format(P=cfg.values_in, E=cfg.text_width, pad=pad, cond=cond, patch=cfg.patch)


def _row(cfg, b, l, s, u):  # noqa: E741
  """Shapes of the inputs of a DiT."""
  floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
  row = (floats(b, l, cfg.values_in), floats(b, l, 3), ids(b, l), floats(b, u), ids(b, l), floats(b, s, cfg.text_width), ids(b, l), ids(b, s))
  return row + ((floats(b, l, cfg.values_cond),) if cfg.cond_channels else ())


def _shapes(job, params):
  return {name: jax.ShapeDtypeStruct(leaf.shape, job.cast(leaf.dtype)) for name, leaf in files.flatten(params).items()}


def _write_weights(job, path, params):
  flat = files.flatten(params)
  specs = {name: (leaf.shape, job.cast(leaf.dtype)) for name, leaf in flat.items()}
  files.write_safetensors(path, specs, ((name, np.asarray(leaf)) for name, leaf in flat.items()))


def _save(path, run, *shapes):
  path.write_bytes(export.export(jax.jit(run), platforms=PLATFORMS)(*shapes).serialize())


def export_onnx(job, out):
  """The DiT's velocity for one clip of the size and length that the config samples, weights inside."""
  if importlib.util.find_spec("jax2onnx") is None or importlib.util.find_spec("onnx") is None:
    raise BadInput(f"jax2onnx is not installed; pip install --no-deps {ONNX} (its own pins are of an older Orbax)")
  import onnx
  from jax2onnx import to_onnx
  model = workdir.make_model(job.settings(), job.workdir / "text", None)
  cfg, settings = dataclasses.replace(model.dit, dtype="float32", remat="none"), job.config["sample"]      # onnxruntime has no bfloat16
  stride = workdir.load_vae(job.workdir / "vae")[0].stride
  thw = tasks.latent_size(settings["frames"], settings["size"], stride, cfg.patch)
  row = _row(cfg, 1, patches.token_count(thw, cfg.patch), cfg.text_pad or 512, 2)
  for key in [key for key in job.weights if key.startswith("dit")]:
    known = lambda kind: jnp.float32 if kind == jnp.bfloat16 else kind  # noqa: E731
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, known(job.cast(leaf.dtype))), job.weights[key])
    run = functools.partial(DiT(cfg).apply, {"params": weights})
    graph = to_onnx(jaxpr_as_fun(jax.make_jaxpr(run)(*row)), list(row))      # flax's scan does not trace under its converter, a jaxpr does
    large = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) > ONNX_BYTES
    onnx.save(graph, out / f"{key}.onnx", save_as_external_data=large, location=f"{key}.onnx.data" if large else None)
  files.write_json(out / "config.json", {"model": job.config["model"]})
  keys = [key for key in job.weights if key.startswith("dit")]
  return (_experts(model, keys, "onnx") +
          f"For one clip of {thw} latents, {row[0].shape[1]} tokens, and {row[7].shape[1]} text tokens; inputs are `in_0`, `in_1`, ..., in this "
          "order. Prompts shorter than that are padded with zeros, which are theirs.\n\n"
          "```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession('THIS/" + keys[0] + ".onnx')\n"
          "velocity, = session.run(None, {f'in_{i}': x for i, x in enumerate(inputs)})\n```\n" + _inputs(cfg))
