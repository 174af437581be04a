"""The programs that are compiled for a topology: the very functions that run on the pod, with shapes in place
of arrays.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from launch.common import settings
from sora_jax import batch as batches, embedder, flops, layout as layouts, sample, train, workdir as workdirs
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.errors import BadInput, pick
from sora_jax.models import splash, text as texts, vae

ENVIRONMENT = {  # libtpu looks for a TPU otherwise, and lets one process in
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Program:
  """What one call of a compiled program does.

  lower() traces it -> jax.stages.Lowered. model_flops: of all devices together, 0 where they are not known.
  tiles_run(queries, keys): the share of the tiles of an attention kernel of these padded lengths that run.
  """

  name: str
  layout: layouts.Layout
  lower: Callable
  model_flops: float = 0.0
  tokens: int = 0  # of one call, all devices together
  tiles_run: Callable = lambda queries, keys: 1.0
  facts: dict = dataclasses.field(default_factory=dict)


def devices_of(topology):
  """A topology such as v5p:4x4x4 -> its devices, for compiling alone; BadInput where there is none such, or
  no TPU compiler here.
  """
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update("jax_platforms", "cpu")
  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise BadInput(
      "the compiler of TPUs is not installed here; pip install '.[tpu]' (no TPU is needed for it)"
    ) from None
  try:
    found = topologies.get_topology_desc(topology, "tpu").devices
  except Exception as error:
    raise BadInput(
      f"--topology={topology} is none that the compiler knows ({str(error).splitlines()[0][:150]}); name one "
      "like v5e:16x16, v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4"
    ) from None
  return sorted(found, key=lambda device: (device.process_index, device.id))


@dataclasses.dataclass(frozen=True)
class Row:
  """The clips of one row, as they are packed: tokens and text tokens of each."""

  tokens: np.ndarray
  text: np.ndarray

  def tiles_run(self, length, text_length):
    """-> the function of that name of a Program, for rows like this one."""

    def ids(counts, size):
      return np.pad(np.repeat(np.arange(1, len(counts) + 1), counts), (0, size - counts.sum()))

    lengths = {True: ids(self.tokens, length), False: ids(self.text, text_length)}

    def run(queries, keys):
      own = keys >= length
      tile_q, tile_k = splash.tile_size(queries), splash.tile_size(keys)
      segment_q, segment_k = (
        np.pad(x, (0, -len(x) % tile)).reshape(-1, tile)
        for x, tile in ((lengths[True], tile_q), (lengths[own], tile_k))
      )
      return float(np.asarray(splash.tiles_meet(segment_q, segment_k)).mean())

    return run


def full_row(config, model):
  """A row that one clip fills, with the text that one prompt has at most."""
  text = min(config.data.row_text, model.dit.text_pad or 512)
  return Row(np.array([config.data.row_tokens]), np.array([text]))


def median_row(plan):
  """Of the first step of a plan, the row whose attention costs the median."""
  _, step = next(iter(plan.steps()))
  row = sorted(range(len(step.rows)), key=lambda i: step.costs[i])[len(step.rows) // 2]
  tokens, text, _ = plan.sizes(np.array([position for position, _ in step.rows[row]]))
  return Row(tokens, text)


def training(config, model, layout, row):
  """The step that launch.train runs, with its State, batch and settings. row: what its rows hold (a Row)."""
  part = workdirs.trained_part(config, model)
  tx = settings.make_optimizer(config, train.boxed_weights(part))
  shape = batches.RowShape(config.data.row_tokens, config.data.row_clips, config.data.row_text)
  rows, ema = config.data.rows, config.ema_decay > 0
  settings.check_rows(config, layout)

  def lower():
    step = train.jit_step(
      part,
      tx,
      ema_decay=config.ema_decay,
      sigma=settings.make_sigma(config),
      spike=config.spike,
      micro_steps=config.micro_steps,
    )
    state = train.abstract_state(part, tx, ema)
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = {"dit": workdirs.targets(model, model.dit.dtype)["dit"]} if part.lora else None
    return step.lower(state, train.batch_shapes(part, rows, shape), key, frozen)

  weights = sum(leaf.size for leaf in jax.tree.leaves(layouts.unbox(train.boxed_weights(model))))
  facts = {
    "parameters": weights,
    "rows": rows,
    "row_tokens": shape.length,
    "row_clips": len(row.tokens),
    "head_size": model.dit.head_size,
  }
  return Program(
    "train",
    layout,
    lower,
    rows * float(flops.step(model.dit, row.tokens, row.text, frozen=part.lora is not None)),
    rows * int(row.tokens.sum()),
    row.tiles_run(shape.length, shape.text),
    facts,
  )


def sampling(config, model, rows=1, guided=True):
  """One step of the sampler over `rows` rows, with guidance: twice as many rows through the model."""
  tokens, text, clips = config.sample.row_tokens, min(config.data.row_text, model.dit.text_pad or 512), 1
  _, row = sample.share_rows([tokens], [text], tokens, devices=model.layout.ways(("fsdp", "context")))
  twice = 2 if guided else 1
  shape, cfg = dataclasses.replace(row, clips=clips), model.dit

  def lower():
    params = workdirs.targets(model, "bfloat16" if cfg.dtype == "bfloat16" else None)
    batch = train.batch_shapes(model, twice * rows, shape)
    x = jax.ShapeDtypeStruct((rows, shape.length, cfg.values_in), jnp.float32)
    text_BSE = jax.eval_shape(model.embed_text, params, batch)
    text_kv = jax.eval_shape(lambda *args: sample._text_kv(model, *args), params, text_BSE, batch.prompt_BS)
    carry = jax.eval_shape(lambda x: SAMPLERS[config.sample.sampler][0](x, None), x)
    value_BG = jax.ShapeDtypeStruct((rows, clips), jnp.float32)
    settings_BG = {name: value_BG for name in ("scale", "low", "high", "rescale")}
    levels = (value_BG,) * 3
    return sample._step.lower(
      model, params, batch, text_BSE, text_kv, x, x, carry, *levels, settings_BG, None,
      jax.ShapeDtypeStruct((), jnp.int32), sampler=config.sample.sampler, guided=guided,
    )  # fmt: skip

  work = float(flops.forward(cfg, np.array([tokens]), np.array([text])))
  facts = {"rows": rows, "row_tokens": tokens, "guided": guided, "head_size": cfg.head_size}
  return Program("sample", model.layout, lower, twice * rows * work, rows * tokens, facts=facts)


def coding(name, vae_size, devices, size, frames):
  """The VAE over one clip: "decode" a latent frame, or "encode" the frames of one, after the first.

  vae_size: a key of vae.SIZES. size: height and width in pixels. A video is a sequence of these calls.
  """
  cfg = pick(vae.SIZES, vae_size, "--vae")
  time_stride, stride, _ = cfg.stride
  height, width = size
  layout = vae.frame_layout(devices, (height // stride, width // stride))
  boxed = jax.eval_shape(
    vae.VAE(cfg).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1, *cfg.stride[1:], 3), jnp.float32)
  )["params"]

  def struct(frames, height, width, channels):
    shape = (1, frames, height, width, channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def lower():
    params = layouts.targets(boxed, layout)
    if name == "decode":
      chunk, later = vae.decode_chunk, struct(1, height // stride, width // stride, cfg.z_dim)
      first = later
    else:
      chunk, first, later = (
        vae.encode_chunk,
        struct(1, height, width, 3),
        struct(time_stride, height, width, 3),
      )
    stream = jax.eval_shape(
      lambda params, x: chunk(params, None, x, cfg=cfg, layout=layout, first=True)[0], params, first
    )
    return chunk.lower(params, stream, later, cfg=cfg, layout=layout, first=False)

  facts = {"size": f"{height} x {width}", "calls": -(-(frames - 1) // time_stride)}
  return Program(name, layout, lower, facts=facts)


def embedding(config, devices, size, length=512):
  """A frozen text encoder over a batch of prompts of `length` tokens, on the mesh of a sampling job.

  size: a key of text.SIZES.
  """
  cfg, layout = texts.SIZES[size], workdirs.sampling_layout(config, devices=devices)
  struct = jax.ShapeDtypeStruct((embedder.BATCH, length), jnp.int32)
  params = embedder.targets(cfg, layout)

  def lower():
    return embedder.embed.lower(params, struct, struct, cfg=cfg, layout=layout)

  facts = {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "rows": embedder.BATCH,
    "row_tokens": length,
  }
  return Program("text", layout, lower, tokens=embedder.BATCH * length, facts=facts)
