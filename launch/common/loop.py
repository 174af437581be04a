"""The training loop of launch.train and launch.train_vae: steps, log, checkpoints, stopping, resuming.

An update that is not finite, or a spike, is skipped inside the compiled step. Where too many are, the
weights go back to the last good checkpoint while the data go on, past the batches of that stretch. So was
PaLM trained (arXiv:2204.02311, sec. 5.1): its spikes came from a batch and a state of the weights together,
and did not come again with other batches.
"""

import jax

from launch.common import processes, profile, program
from launch.common.progress import Bar, say
from launch.common.record import Record
from sora_jax import optim
from sora_jax.errors import BadInput, Failure


def check(config):
  """Raises BadInput, before anything compiles, if a setting of the loop is out of range."""
  for name in ("steps", "log_every", "checkpoint_every", "max_bad_steps"):
    if config[name] < 1:
      raise BadInput(f"config.{name} is {config[name]}; it must be 1 or more")
  if config.max_rollbacks < 0:
    raise BadInput(f"config.max_rollbacks is {config.max_rollbacks}; it must be 0 or more")
  if config.spike != 0 and not config.spike > 1:
    raise BadInput(
      f"config.spike is {config.spike}; it must be more than 1 (times the usual loss and gradient norm), "
      "or 0, to skip no update as a spike"
    )


def run_steps(
  config,
  workdir,
  state,
  batches,
  update,
  *,
  first_step,
  checkpoints,
  items,
  restore,
  hooks=(),
  label="training",
  traced=None,
):
  """Runs updates up to step config.steps -> (state, exit code).

  batches: iterator of (batch, cursor as JSON).
  update: (state, batch) -> (state, metrics), with "loss", "grad_norm", "bad", "not_finite" and "spike".
  items: state -> {name: tree} to save.
  restore: () -> (state, step) of the newest checkpoint, or of the beginning.
  hooks: pairs (every, function of (step, state) -> dict of numbers to log, or None).
  config: has what `check` looks at.
  traced: first and last step of a trace, or None.
  """
  step, code, rollbacks, due, note = first_step, program.OK, 0, False, ""
  stop, trace = processes.Stop(program.stop_requested), profile.Trace(workdir, traced)
  with Record(workdir, first_step) as record, Bar(label, config.steps, start=first_step) as bar:
    while step < config.steps:
      step += 1
      batch, cursor = record.fetch(batches)
      trace.before(step)
      state, metrics = record.start(step, update, state, batch)
      trace.after(step, metrics)
      with record.doing("checkpoint"):
        checkpoints.poll()
      record.finish(all_but=1)  # one step late, so that the devices never wait for the host
      last = step == config.steps
      stopping = stop()  # after waiting for the devices: a signal during the wait is seen
      logging, due = last or step % config.log_every == 0, due or step % config.checkpoint_every == 0
      if logging or due or stopping:
        record.finish()
      if record.worst >= config.max_bad_steps:
        rollbacks, due, state = rollbacks + 1, False, None  # devices may have no room for two states
        tell_or_fail(config, step, rollbacks)
        checkpoints.settle()
        state, step = record.go_back(restore)
        continue
      if logging:
        note = record.write(step)
      bar.update(step, note)
      if last or stopping or (due and not record.bad):  # a good checkpoint: amid bad steps none is made
        with record.doing("checkpoint"):
          record.log.flush()
          checkpoints.save(step, items(state), {"step": step, "cursor": cursor})
        record.saved(step)
        rollbacks, due = 0, False
      run_hooks(hooks, step, last, state, record, checkpoints)
      if stopping and not last:
        code = program.STOPPED
        break
    with record.doing("checkpoint"):
      checkpoints.settle()
  trace.close()
  if code == program.STOPPED:
    say(f"stopped on request after saving step {step}; run the same command again to go on")
  return state, code


def tell_or_fail(config, step, rollbacks):
  """Says that the weights go back to the last checkpoint; raises Failure where that did not help so far."""
  if rollbacks > config.max_rollbacks:
    again = f", also after going back to the last checkpoint {rollbacks - 1} times" if rollbacks > 1 else ""
    raise Failure(
      f"stopped at step {step}: too many updates were skipped (max_bad_steps={config.max_bad_steps}){again}; "
      "the last checkpoint is intact; lower the learning rate, look at the data, or raise "
      "--config.max_bad_steps"
    )
  say(
    f"step {step}: too many updates were skipped (max_bad_steps={config.max_bad_steps}); the weights go back "
    f"to the last checkpoint, the data go on ({rollbacks} of at most {config.max_rollbacks} times without a "
    "new checkpoint)"
  )


def run_hooks(hooks, step, last, state, record, checkpoints):
  """Those that are due after this step; what they return is logged and said."""
  for every, hook in hooks:
    if every and (step % every == 0 or last):
      with record.doing("checkpoint"):
        checkpoints.settle()  # a hook may take minutes; if it is killed, only the hook's work is lost
      with record.doing("hooks"):
        values = hook(step, state)
      if values:
        record.log.write(step, values)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        say(f"step {step}: {numbers}")


def restore_items(checkpoints, step, targets, name):
  """Items of a checkpoint, `name` being that of what is neither weights nor their mean.

  One of an earlier version has no history of losses there; it gets an empty one.
  """
  targets = {**targets, name: dict(targets[name])}
  new = None if "history" in checkpoints.shapes(step, name) else targets[name].pop("history")
  restored = checkpoints.restore(step, targets)
  if new is not None:
    restored[name]["history"] = jax.jit(optim.no_history, out_shardings=new.sharding)()
  return restored
