"""Trains the text-to-video model on records of launch.encode. Run again, it goes on where it was.

  python -m launch.train --config=configs/t2v.py:tiny --workdir=W --config.data.path=RECORDS
  python -m launch.train --config=configs/t2v.py:tiny --workdir=W --config.data.path=A,B \\
    --config.data.weights="(3, 1)"
  python -m launch.train --config=configs/t2v.py:tiny --workdir=W --config.data.clips=DIR

The second mixes: of four clips drawn three are from A (without weights: each dataset once an epoch). The
third is for few clips: they become records in W/records first, by the VAE of config.init, or the one that
ships, once. On the hosts of a pod, or in several processes of one machine (launch.hosts), each loads its rows
of a step; any number of them goes on from a checkpoint with the very next batch (`data_checksum` in
W/metrics.jsonl tells).
"""

import dataclasses
import functools
import os

import jax
import numpy as np
import optax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from data import bucket, curation, loader, mixture, plan
from launch.common import claims, loop, processes, profile, program, progress, settings
from launch.common.progress import say
from launch.jobs import encode, held_out, sample
from sora_jax import checkpoint, layout as layouts, parts, train, workdir as workdirs
from sora_jax.diffusion import flow
from sora_jax.errors import BadInput
from sora_jax.models import t2v
from sora_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
# What a rerun in the same W may change without becoming another experiment.
FREE = (
  "steps",
  "log_every",
  "checkpoint_every",
  "max_bad_steps",
  "max_rollbacks",
  "spike",
  "eval.",
  "sample.",
  "data.held_out",
  "data.threads",
  "data.path",
  "data.max_damaged",
  "mesh.",
  "model.remat",
  "micro_steps",
  "init",
)
NAMED = 5  # clips that fit in no row that are named on the screen; W/misfits.txt names all


def define_flags():
  flags.DEFINE_string("workdir", "", "where checkpoints, logs and samples go")
  program.define_config("configs/t2v.py:tiny")
  profile.define_flag()


@dataclasses.dataclass
class Run:
  """A training run that `prepare` has checked: nothing of it was compiled or written yet."""

  config: ConfigDict
  workdir: str
  data: epath.Path  # the first directory of records, with vae/ and text/
  index: object  # RecordIndex or Mixture
  plan: plan.Plan
  layout: layouts.Layout
  whole: t2v.Model  # all weights
  model: t2v.Model  # those that are trained: all of them, one expert, or adapters
  tx: optax.GradientTransformation
  sigma: flow.SigmaConfig
  held_out: held_out.HeldOut | None


def main():
  config, workdir = program.get_config(), FLAGS.workdir
  check(config, workdir)
  traced = profile.steps_of(FLAGS.profile, config)
  if not processes.join():
    progress.mute()
  workdirs.adopt(config)
  if config.data.clips and not encode_clips(config, workdir):
    return program.STOPPED
  return train_on(prepare(config, workdir), traced)


def check(config, workdir):
  """BadInput where the flags do not say what to train on, or the loop's own settings cannot be."""
  if not workdir:
    raise BadInput("no --workdir; give a directory for the checkpoints")
  if not config.data.path and not config.data.clips:
    raise BadInput(
      "no --config.data.path; give the directory that launch.encode wrote "
      "(or, of few clips, their folder as --config.data.clips)"
    )
  if config.data.path and config.data.clips:
    raise BadInput("--config.data.path and --config.data.clips are both given; give one of them")
  loop.check(config)
  held_out.check(config)
  if config.sample.every and not config.sample.prompts:
    raise BadInput(
      f"config.sample.every is {config.sample.every} and config.sample.prompts is empty; give prompts, or "
      "set every to 0"
    )
  if config.data.max_damaged < 0:
    raise BadInput(f"config.data.max_damaged is {config.data.max_damaged}; it must be 0 or more")


def prepare(config, workdir):
  """A config, already filled in by `workdirs.adopt` -> Run.

  BadInput where something in it does not fit the data or the devices.
  """
  layout, sigma = workdirs.make_layout(config), settings.make_sigma(config)
  index = mixture.open_all(config.data.path)
  data = epath.Path(config.data.path.split(",")[0].strip())
  whole = workdirs.make_model(config, data / "text", layout)
  model = workdirs.trained_part(config, whole)
  check_init(config, model, data)
  tx = settings.make_optimizer(config, train.boxed_weights(model))
  rows_plan = make_plan(config, index, model, workdir)
  settings.check_index(index, model, data)
  settings.check_rows(config, layout)
  if config.model.expert == "high":
    sigma = dataclasses.replace(sigma, low=config.model.boundary)
  elif config.model.expert == "low":
    sigma = dataclasses.replace(sigma, high=config.model.boundary)
  measured = held_out.HeldOut.open(config, model, layout, sigma, index) if config.eval.every else None
  return Run(config, workdir, data, index, rows_plan, layout, whole, model, tx, sigma, measured)


def train_on(run, traced=None):
  """Takes W, resumes or begins, and trains -> exit code. traced: first and last step of a profile."""
  config, workdir, model = run.config, run.workdir, run.model
  if not jax.process_index():
    prepare_workdir(run)
  processes.wait("W is prepared")
  target = train.abstract_state(model, run.tx, config.ema_decay > 0)
  size = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
  claims.need_disk(workdir, 2.2 * size, "a checkpoint beside the one before it")
  checkpoints = checkpoint.Checkpoints(workdir, say=say)
  state, cursor, step = resume(checkpoints, target) or begin(run, target)
  following = f"Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT"
  if step >= config.steps:
    say(f"{workdir} is already trained for {step} steps; nothing to do. {following}")
    return program.OK
  for line in layouts.uncut_weights(train.boxed_weights(model), run.layout):
    say(line)
  frozen = frozen_weights(run)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  name = {"init": f"what {config.init} holds"}.get(config.model.size, config.model.size)
  say(
    f"training {name} ({parameters / 1e6:.2f} M parameters) on {len(run.index)} clips, steps {step + 1} to "
    f"{config.steps} of {config.data.rows} rows x {config.data.row_tokens} tokens, on {jax.device_count()} "
    f"{jax.devices()[0].platform} devices; {workdir}"
  )
  compiled = train.jit_step(
    model,
    run.tx,
    ema_decay=config.ema_decay,
    sigma=run.sigma,
    spike=config.spike,
    micro_steps=config.micro_steps,
  )
  key, slots = jax.random.key(config.seed), config.data.rows * config.data.row_tokens

  def update(state, batch):
    state, metrics = compiled(state, batch, key, frozen)
    return state, metrics | {"slots": slots}

  def restore():
    state, _, step = resume(checkpoints, target) or begin(run, target)
    return state, step

  hooks = []
  if config.eval.every:
    hooks.append((config.eval.every, functools.partial(run.held_out, frozen)))
  if config.sample.every:
    hooks.append((config.sample.every, functools.partial(draw_samples, run, frozen)))
  state, code = loop.run_steps(
    config,
    workdir,
    state,
    batches(run, cursor),
    update,
    first_step=step,
    checkpoints=checkpoints,
    items=items,
    restore=restore,
    hooks=hooks,
    traced=traced,
  )
  checkpoints.close()
  if code == program.OK:
    say(f"done: {config.steps} steps. {following}")
  return code


def batches(run, cursor):
  """Yields (PackedBatch on the devices, the cursor after it as JSON) from `cursor` on."""
  data, dit = run.config.data, run.model.dit
  part, parts_count = train.part_of_rows(run.layout, data.rows)
  stream = loader.batches(
    run.index,
    run.plan,
    seed=run.config.seed,
    cursor=cursor,
    host=part,
    hosts=parts_count,
    embedded=run.model.text is None,
    caption_dropout=data.caption_dropout,
    given=data.given.to_dict(),
    base_fps=data.base_fps or None,
    cond_channels=dit.cond_channels,
    max_damaged=data.max_damaged,
    on_damage=program.warn,
    threads=data.threads,
  )
  for batch, after in stream:
    yield train.place_batch(batch, run.layout, part, parts_count), after.to_json()


def encode_clips(config, workdir):
  """Raw clips into W/records, as launch.encode does with a folder, unless they are there -> was it done?
  config.data.path is them then.
  """
  out, model = bucket.path_of(workdir) / "records", bucket.path_of(config.init or workdirs.shipped())
  rules = curation.Rules(max_seconds=config.data.max_seconds, scene_threshold=10.0, drop_dull=True)
  index = encode.run(
    config.data.clips, out, model, {**dataclasses.asdict(rules), "split": "train", "seed": 0}
  )
  config.data.path = str(out)
  return index is not None


def prepare_workdir(run):
  """Takes W for this run, and puts into it what goes with the model."""
  claims.lock_workdir(run.workdir)
  claims.claim_workdir(run.workdir, run.config, FREE)
  for part in ("vae", "text"):
    parts.copy_part(run.data / part, epath.Path(run.workdir) / part, link=part == "text")
  if run.config.init:
    parts.copy_source(run.config.init, run.workdir)
  if run.plan.misfits:
    settings.name_misfits(run.index, run.plan, run.workdir)


def items(state):
  """What a checkpoint holds, by name: the weights apart, so that a sampler reads no optimiser."""
  return {
    "params": state.params,
    **({"ema": state.ema} if state.ema else {}),
    "opt": {name: getattr(state, name) for name in ("opt", "step", "bad", "history")},
  }


def resume(checkpoints, target):
  """-> (State, Cursor, step) of the newest whole checkpoint, or None."""
  step = checkpoints.latest()
  if step is None:
    return None
  saved = loop.restore_items(checkpoints, step, items(target), "opt")
  state = train.State(params=saved["params"], ema=saved.get("ema", {}), **saved["opt"])
  say(f"going on from the checkpoint of step {step}")
  return state, plan.Cursor.from_json(checkpoints.meta(step)["cursor"]), step


def begin(run, target):
  """-> (a new State, no cursor, step 0): its weights drawn, or taken from another work directory
  (config.init).
  """
  config, model = run.config, run.model
  if not config.init:
    return train.init_state(model, run.tx, jax.random.key(config.seed), config.ema_decay > 0), None, 0
  if model.lora:
    say(f"training adapters of rank {config.lora.rank} to the weights of {config.init}")
    return train.init_state(model, run.tx, jax.random.key(config.seed), config.ema_decay > 0), None, 0
  if config.model.expert:
    key = workdirs.trained_key(config)
    weights, step = workdirs.load_weights(config.init, "ema", {key: target.params["dit"]}, say, partial=True)
    weights = {"dit": weights[key]}
  elif model.text and workdirs.read_config(config.init).model.text != config.model.text:
    weights, step = other_text_encoder(config, model, target.params)
  else:
    weights, step = workdirs.load_weights(config.init, "ema", target.params, say)
  say(f"starting from the weights of {config.init}, step {step}")
  return train.state_of(weights, model, run.tx, config.ema_decay > 0), None, 0


def other_text_encoder(config, model, target):
  """The DiT of config.init, and a new text encoder, of another size -> (weights, step)."""
  theirs = workdirs.make_model(
    workdirs.read_config(config.init), epath.Path(config.init) / "text", model.layout
  )
  there = workdirs.targets(dataclasses.replace(model, text=theirs.text))
  weights, step = workdirs.load_weights(config.init, "ema", there, say)
  say(f"the text encoder of {config.init} is another: a new one is trained, {config.model.text}")
  make = jax.jit(
    lambda key: layouts.unbox(model.init(key))["text"],
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target["text"]),
  )
  return {**weights, "text": make(jax.random.key(config.seed))}, step


def frozen_weights(run):
  """The weights that adapters adapt, in what they are computed in; None where all are trained."""
  if not run.model.lora:
    return None
  key = workdirs.trained_key(run.config)
  return {"dit": workdirs.base_weights(run.config, run.whole, run.model.dit.dtype, only=(key,), say=say)[key]}


def make_plan(config, index, model, workdir):
  """The plan of the rows.

  Says which clips no row can hold, and what to raise; BadInput where that is all of them.
  """
  rows = settings.plan_rows(config, index, model)
  if rows.misfits:
    names = [f"{index.describe(misfit.position)}: {misfit.reason}" for misfit in rows.misfits[:NAMED]]
    remedy = "raise --config.data.row_tokens (or row_text), or encode with a smaller --max_seconds"
    count = f"{len(rows.misfits)} of {len(index)} clips fit in no row"
    if len(rows.misfits) == len(index):
      raise BadInput(f"{count}; the first: {names[0]}; {remedy}")
    more = f"; ... ({workdir}/{settings.MISFITS} names all)" if len(rows.misfits) > NAMED else ""
    say(f"{count} and are left out; {remedy}, to have them too. {'; '.join(names)}{more}")
  if rows.trimmed:
    say(
      f"{rows.trimmed} of {len(index)} clips lose the latents at an edge that fill no patch of "
      f"{model.dit.patch}"
    )
  return rows


def check_init(config, model, data):
  """BadInput where config.init is not of the parts that made the records, or tokens are given to weights that
  know no such.
  """
  for part in ("vae", "text") if config.init else ():
    there, here = epath.Path(config.init) / part, data / part
    if there.exists() and parts.fingerprint(there) != parts.fingerprint(here):
      raise BadInput(
        f"{part}/ of {config.init} is not that of the records; encode them with --workdir={config.init}"
      )
  if config.model.expert and config.sample.every:
    raise BadInput(
      "one expert alone makes no videos; set --config.sample.every=0, and sample from the work directory "
      "with launch.sample"
    )
  shares = config.data.given.to_dict()
  if min(shares.values()) < 0 or sum(shares.values()) > 1:
    raise BadInput(f"config.data.given is {shares}; shares of the clips, from 0 to 1 together")
  taken = [name for name, share in shares.items() if share]
  if model.dit.conditioning != "token_sigma" and taken:
    raise BadInput(
      f"config.data.given.{taken[0]} is {shares[taken[0]]}; these weights know no tokens that are given: set "
      "it to 0"
    )


def draw_samples(run, frozen, step, state):
  """Videos of config.sample.prompts from the EMA weights, in W/samples/STEP/. All processes denoise them."""
  params = {**(frozen or {}), **(state.ema or state.params)}
  pipe = Pipeline.of(run.workdir, run.config, run.model, params, step, f"step {step}")
  requests = [{"id": f"{i:02d}", "prompt": prompt} for i, prompt in enumerate(run.config.sample.prompts)]
  sample.run(pipe, requests, os.path.join(run.workdir, "samples", str(step)), quiet=True)


if __name__ == "__main__":
  program.run(main, define_flags)
