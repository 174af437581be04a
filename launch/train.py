"""Trains the text-to-video model on records of launch.encode. Run again, it goes on where it was.

  python -m launch.train --config=configs/t2v.py:tiny --config.data.path=RECORDS --workdir=W
  python -m launch.train --config=configs/t2v.py:tiny --config.data.path=A,B --config.data.weights="(3, 1)" --workdir=W
  python -m launch.train --config=configs/t2v.py:tiny --config.data.clips=DIR --workdir=W

The second mixes: of four clips drawn three are from A (without weights: each dataset once an epoch). The third is for few clips: they
become records in W/records first, by the VAE of config.init, or the one that ships, once.
On the hosts of a pod, or in several processes of one machine (launch.hosts), each loads its rows of a step; any number of them goes on from
a checkpoint with the very next batch (`data_checksum` in W/metrics.jsonl tells).
"""

import dataclasses
import functools
import os
import pathlib

import jax
import numpy as np
from absl import flags
from etils import epath

from data import curation, mixture, pipeline, plan, records
from launch import build, cli, encode_job, hosts, loop, sampling
from sora_jax import checkpoint, train
from sora_jax.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", "", "where checkpoints, logs and samples go")
# What a rerun in the same W may change without becoming another experiment.
FREE = ("steps", "log_every", "checkpoint_every", "max_bad_steps", "sample.", "data.threads", "data.path", "data.max_damaged", "mesh.",
        "model.remat", "init")
NAMED = 5               # clips that fit in no row that are named on the screen; W/misfits.txt names all


def main():
  config, workdir = cli.get_config(), WORKDIR.value
  if not workdir:
    raise BadInput("no --workdir; give a directory for the checkpoints")
  if not config.data.path and not config.data.clips:
    raise BadInput("no --config.data.path; give the directory that launch.encode wrote (or, of few clips, their folder as --config.data.clips)")
  if config.data.path and config.data.clips:
    raise BadInput("--config.data.path and --config.data.clips are both given; give one of them")
  loop.check(config)
  if config.data.max_damaged < 0:
    raise BadInput(f"config.data.max_damaged is {config.data.max_damaged}; it must be 0 or more")
  hosts.join()
  build.adopt(config)
  where, sigma = build.make_layout(config), build.make_sigma(config)
  if config.data.clips and not encode_clips(config, workdir):
    return cli.STOPPED
  index, first = mixture.open_all(config.data.path), epath.Path(config.data.path.split(",")[0].strip())
  whole = build.make_model(config, first / "text", where)
  model = build.trained_part(config, whole)
  check_init(config, model, first)
  tx = build.make_optimizer(config, train.boxed_weights(model))
  rows_plan = make_plan(config, index, model, workdir)
  build.check_index(index, model, first)
  ways = where.ways(("data", "fsdp"))
  if config.data.rows % ways:
    raise BadInput(f"config.data.rows is {config.data.rows}; a multiple of {ways}: so many devices (data x fsdp) share the rows of a step")
  part, parts = train.part_of_rows(where, config.data.rows)
  if jax.process_count() > 1 and config.sample.every:
    raise BadInput("samples during training are drawn by one process alone; set --config.sample.every=0, and sample from W with launch.sample")
  if not jax.process_index():
    prepare_workdir(config, workdir, first)
    if rows_plan.misfits:
      build.name_misfits(index, rows_plan, workdir)
  hosts.wait("W is prepared")

  target = train.abstract_state(model, tx)
  size = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
  cli.need_disk(workdir, 2.2 * size, "a checkpoint beside the one before it")
  checkpoints = checkpoint.Checkpoints(workdir, say=cli.say)
  state, cursor, step = resume(checkpoints, target) or begin(config, model, tx, target)
  if config.model.expert:
    boundary = config.model.boundary
    sigma = dataclasses.replace(sigma, **({"low": boundary} if config.model.expert == "high" else {"high": boundary}))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  if step >= config.steps:
    cli.say(f"{workdir} is already trained for {step} steps; nothing to do. "
            f"Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")
    return cli.OK
  frozen = None
  if model.lora:
    key = build.trained_key(config)
    frozen = {"dit": build.base_weights(config, whole, model.dit.dtype, only=(key,))[key]}      # in what they are computed in
  name = {"init": f"what {config.init} holds"}.get(config.model.size, config.model.size)
  cli.say(f"training {name} ({parameters / 1e6:.2f} M parameters) on {len(index)} clips, steps {step + 1} to {config.steps} of "
          f"{config.data.rows} rows x {config.data.row_tokens} tokens, on {jax.device_count()} {jax.devices()[0].platform} devices; {workdir}")

  stream = pipeline.batches(index, rows_plan, seed=config.seed, cursor=cursor, host=part, hosts=parts,
                            embedded=model.text is None, caption_dropout=config.data.caption_dropout,
                            image_to_video=config.data.image_to_video, base_fps=config.data.base_fps or None, cond_channels=model.dit.cond_channels,
                            max_damaged=config.data.max_damaged, on_damage=cli.warn, threads=config.data.threads)
  update = functools.partial(jax.jit(train.train_step, static_argnames=("model", "tx", "ema_decay", "sigma"), donate_argnums=0,
                                     out_shardings=(train.shardings(model, tx), None)),
                             key=jax.random.key(config.seed), frozen=frozen, model=model, tx=tx, ema_decay=config.ema_decay, sigma=sigma)
  slots = config.data.rows * config.data.row_tokens

  def counted(state, batch):
    state, metrics = update(state, batch)
    return state, metrics | {"slots": slots}

  placed = ((train.place_batch(batch, where, part, parts), after.to_json()) for batch, after in stream)
  hooks = ((config.sample.every, functools.partial(draw_samples, config, workdir, model, frozen)),) if config.sample.every else ()
  state, code = loop.run_steps(config, workdir, state, placed, counted, first_step=step, checkpoints=checkpoints, items=items, hooks=hooks)
  checkpoints.close()
  if code == cli.OK:
    cli.say(f"done: {config.steps} steps. Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")
  return code


def encode_clips(config, workdir):
  """Raw clips into W/records, as launch.encode does with a folder, unless they are there -> was it done? config.data.path is them then."""
  out, parts = records.local(workdir) / "records", pathlib.Path(config.init or checkpoint.shipped())
  rules = {**dataclasses.asdict(curation.Rules()), "max_seconds": config.data.max_seconds, "scene_threshold": 10.0, "drop_dull": True}
  found = encode_job.run(config.data.clips, out, parts, {**rules, "split": "train", "seed": 0, "square": False})
  config.data.path = str(out)
  return found is not None


def prepare_workdir(config, workdir, data):
  """Takes W for this run, and puts into it what goes with the model."""
  cli.lock_workdir(workdir)
  cli.claim_workdir(workdir, config, FREE)
  for part in ("vae", "text"):
    build.copy_part(data / part, epath.Path(workdir) / part, link=part == "text")
  if config.init:
    build.copy_source(config.init, workdir)


def items(state):
  """What a checkpoint holds, by name: the weights apart, so that a sampler reads no optimiser."""
  return {"params": state.params, "ema": state.ema, "opt": {"opt": state.opt, "step": state.step, "bad": state.bad}}


def resume(checkpoints, target):
  """-> (State, Cursor, step) of the newest whole checkpoint, or None."""
  step = checkpoints.latest()
  if step is None:
    return None
  found = checkpoints.restore(step, items(target))
  state = train.State(found["opt"]["step"], found["params"], found["ema"], found["opt"]["opt"], found["opt"]["bad"])
  cli.say(f"going on from the checkpoint of step {step}")
  return state, plan.Cursor.from_json(checkpoints.meta(step)["cursor"]), step


def begin(config, model, tx, target):
  """A new state, its weights drawn, or taken from another work directory (config.init)."""
  if not config.init:
    return train.init_state(model, tx, jax.random.key(config.seed)), None, 0
  if model.lora:
    cli.say(f"training adapters of rank {config.lora.rank} to the weights of {config.init}")
    return train.init_state(model, tx, jax.random.key(config.seed)), None, 0
  if config.model.expert:
    key = f"dit_{config.model.expert}"
    weights, step = checkpoint.load_weights(config.init, "ema", {key: target.params["dit"]}, only=True, say=cli.say)
    weights = {"dit": weights[key]}
  else:
    weights, step = checkpoint.load_weights(config.init, "ema", target.params, say=cli.say)
  cli.say(f"starting from the weights of {config.init}, step {step}")
  return train.state_of(weights, model, tx), None, 0


def make_plan(config, index, model, workdir):
  """The plan of the rows. Says which clips no row can hold, and what to raise; BadInput where that is all of them."""
  rows = build.plan_rows(config, index, model)
  if rows.misfits:
    told = f"{len(rows.misfits)} of {len(index)} clips fit in no row" + (" and are left out" if len(rows.misfits) < len(index) else "")
    names = [f"{index.describe(misfit.position)}: {misfit.reason}" for misfit in rows.misfits[:NAMED]]
    remedy = "raise --config.data.row_tokens (or row_text), or encode with a smaller --max_seconds"
    if len(rows.misfits) == len(index):
      raise BadInput(f"{told}; the first: {names[0]}; {remedy}")
    cli.say(f"{told}; {remedy}, to have them too. " + "; ".join(names) + ("" if len(rows.misfits) <= NAMED else
                                                                         f"; ... ({workdir}/{build.MISFITS} names all)"))
  if rows.trimmed:
    cli.say(f"{rows.trimmed} of {len(index)} clips lose the latents at an edge that fill no patch of {model.dit.patch}")
  return rows


def check_init(config, model, data):
  """BadInput where config.init is not of the parts that made the records, or tokens are given to weights that know no such."""
  for part in ("vae", "text") if config.init else ():
    there, here = epath.Path(config.init) / part, data / part
    if there.exists() and build.fingerprint(there) != build.fingerprint(here):
      raise BadInput(f"{part}/ of {config.init} is not that of the records; encode them with --workdir={config.init}")
  if config.model.expert and config.sample.every:
    raise BadInput("one expert alone makes no videos; set --config.sample.every=0, and sample from the work directory with launch.sample")
  if model.dit.conditioning != "token_sigma" and config.data.image_to_video:
    raise BadInput(f"config.data.image_to_video is {config.data.image_to_video}; these weights know no tokens that are given: set it to 0")


def draw_samples(config, workdir, model, frozen, step, state):
  """Videos of config.sample.prompts from the EMA weights, in W/samples/STEP/."""
  bundle = sampling.Bundle.of(workdir, config, model, {**(frozen or {}), **state.ema}, step, f"step {step}")
  out = os.path.join(workdir, "samples", str(step))
  requests = [{"id": f"{i:02d}", "prompt": prompt} for i, prompt in enumerate(config.sample.prompts)]
  sampling.run_job(bundle, requests, out, quiet=True)


if __name__ == "__main__":
  cli.define_config("configs/t2v.py:tiny")
  cli.run(main)
