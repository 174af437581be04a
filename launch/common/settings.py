"""Pages of configs/ -> what training takes: optimiser, noise levels, the plan of the rows.

Fails before anything compiles.
"""

import os

from etils import epath

from data import plan
from sora_jax import optim, parts
from sora_jax.batch import RowShape
from sora_jax.diffusion import flow
from sora_jax.errors import BadInput, checked

MISFITS = "misfits.txt"  # in a work directory: clips of its data that fit in no row


def make_optimizer(config, boxed):
  """config.optim and the weights with their axes -> optax transformation, over config.steps."""
  return checked(
    lambda: optim.optimizer(optim.OptimConfig(steps=config.steps, **config.optim), boxed), "config.optim"
  )


def make_sigma(config):
  """config.sigma -> SigmaConfig."""
  return checked(lambda: flow.SigmaConfig(**config.sigma), "config.sigma")


def check_rows(config, layout):
  """BadInput where a step's rows and tokens cannot be shared by the devices of the mesh: some would compute
  what others compute, too.
  """
  data, mesh, micro = config.data, layout.mesh.shape, config.micro_steps
  if micro < 1 or data.rows % micro:
    raise BadInput(f"config.data.rows is {data.rows}; it must be a multiple of config.micro_steps={micro}")
  rows, ways, of = (
    data.rows // micro,
    layout.ways(("data", "fsdp")),
    f"data={mesh['data']} x fsdp={mesh['fsdp']}",
  )
  together = f"config.data.rows={data.rows}" + (f" / micro_steps={micro}" if micro > 1 else "")
  if rows % mesh["data"]:
    raise BadInput(f"{together}: a multiple of {mesh['data']}, as data={mesh['data']} devices share the rows")
  tokens = layout.ways(("fsdp", "context") if rows % ways else ("context",))
  if rows % ways and rows // mesh["data"] > 1:
    raise BadInput(
      f"{together}: a multiple of {ways} ({of} share the rows), or {mesh['data']}: one row for all fsdp"
    )
  if data.row_tokens % tokens:
    axes = f"fsdp={mesh['fsdp']} x context={mesh['context']}" if rows % ways else f"context={mesh['context']}"
    raise BadInput(f"config.data.row_tokens is {data.row_tokens}; a multiple of {tokens}: {axes} share a row")


def plan_rows(config, index, model, weights=None):
  """The plan of the rows, whether or not all clips fit. weights: instead of config.data.weights."""
  data = config.data
  shape = checked(lambda: RowShape(data.row_tokens, data.row_clips, data.row_text), "config.data")
  null_ids, null_embedding = index.null_text
  if model.text is None and null_embedding is None:
    raise BadInput(
      "the records hold no text embeddings, and config.model.text names no encoder to train; name one, or "
      "encode with a --workdir that has a frozen text encoder"
    )
  return plan.Plan(
    index.rows,
    rows_per_step=data.rows,
    shape=shape,
    patch=model.dit.patch,
    seed=config.seed,
    null_text_tokens=len(null_ids) if model.text is not None else len(null_embedding),
    text_pad=model.dit.text_pad or None,
    weights=tuple(data.weights if weights is None else weights) or None,
  )


def name_misfits(index, rows, directory):
  """Writes DIR/misfits.txt, a line for each clip that fits in no row: its name, a tab, and why."""
  with (epath.Path(directory) / MISFITS).open("wb") as f:
    for misfit in rows.misfits:
      f.write(f"{index.describe(misfit.position)}\t{misfit.reason}\n".encode("utf-8", "backslashreplace"))


def check_index(index, model, directory):
  """Records must be of the VAE beside them, with as many channels as the model takes."""
  channels, wanted = index.header["latent_channels"], model.dit.channels
  if channels != wanted:
    raise BadInput(
      f"the records have {channels} latent channels, the model takes {wanted}; encode with the VAE that it "
      "is for, or change --config.model.size"
    )
  beside = parts.fingerprint(os.path.join(directory, "vae"))
  if index.header.get("vae_fingerprint") not in (None, beside):
    raise BadInput(
      f"the records were made with another VAE ({index.header['vae_fingerprint']}) than {directory}/vae "
      f"({beside}); encode again"
    )
