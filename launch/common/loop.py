"""The training loop of launch.train and launch.train_vae: steps, log, checkpoints, stopping, resuming."""

import time

import jax
import numpy as np

from launch.common import processes, program
from launch.common.log import MetricsLog
from launch.common.progress import Bar, say
from sora_jax.errors import BadInput, Failure


def check(config):
  """Raises BadInput, before anything compiles, if a setting of the loop is out of range."""
  for name in ("steps", "log_every", "checkpoint_every", "max_bad_steps"):
    if config[name] < 1:
      raise BadInput(f"config.{name} is {config[name]}; it must be 1 or more")


def run_steps(
  config, workdir, state, batches, update, *, first_step, checkpoints, items, hooks=(), label="training"
):
  """Runs config.steps - first_step updates -> (state, exit code).

  batches: iterator of (batch, cursor as JSON).
  update: (state, batch) -> (state, metrics), scalars that include "loss" and "bad".
  items: state -> {name: tree} to save.
  hooks: pairs (every, function of (step, state) -> dict of numbers to log, or None).
  config: has steps, log_every, checkpoint_every, max_bad_steps.
  """
  log = MetricsLog(workdir, first_step, silent=jax.process_index() > 0)
  window, began, cursor = [], time.monotonic(), None
  bad, unchecked = int(np.asarray(state.bad)), None
  code, stop = program.OK, processes.Stop(program.stop_requested)
  with Bar(label, config.steps, start=first_step) as bar:
    for step in range(first_step + 1, config.steps + 1):
      batch, cursor = next(batches)
      state, metrics = update(state, batch)
      checkpoints.poll()
      if unchecked is not None:  # checked one step late, so that the device never waits for the host
        bad = check_finite(unchecked, bad, config.max_bad_steps, step - 1)
      unchecked = metrics
      window.append(metrics)
      last = step == config.steps
      stopping = stop()  # after the check, which waits for the device: a signal during the wait is seen
      saving = step % config.checkpoint_every == 0 or last or stopping
      if saving:
        bad, unchecked = check_finite(metrics, bad, config.max_bad_steps, step), None
      note = ""
      if step % config.log_every == 0 or last:
        values = summary(window, time.monotonic() - began)
        log.write(step, values)
        note = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "data_checksum")
        window, began = [], time.monotonic()
      bar.advance(1, note)
      if saving:
        log.flush()
        checkpoints.save(step, items(state), {"step": step, "cursor": cursor})
      for every, hook in hooks:
        if every and (step % every == 0 or last):
          checkpoints.settle()  # a hook may take minutes; if it is killed, only the hook's work is lost
          values = hook(step, state)
          if values:
            log.write(step, values)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            say(f"step {step}: {numbers}")
          began = time.monotonic()
      if stopping and not last:
        code = program.STOPPED
        break
  checkpoints.settle()
  log.close()
  if code == program.STOPPED:
    say(f"stopped on request after saving step {step}; run the same command again to go on")
  return state, code


def check_finite(metrics, bad, max_bad_steps, step):
  """Counts updates that were skipped because they were not finite -> the new count.

  Raises Failure, which ends the run, once there are `max_bad_steps` of them.
  """
  if not int(np.asarray(metrics["bad"])):
    return bad
  bad += 1
  loss, norm = (float(np.asarray(metrics[name])) for name in ("loss", "grad_norm"))
  say(
    f"step {step}: the update is not finite (loss {loss}, gradient norm {norm}); "
    f"the weights were left as they were ({bad} so far)"
  )
  if bad >= max_bad_steps:
    raise Failure(
      f"stopped at step {step}: {bad} updates were not finite (max_bad_steps={max_bad_steps}); the last "
      "checkpoint is intact; lower the learning rate, or raise --config.max_bad_steps to skip such steps"
    )
  return bad


def summary(window, seconds):
  """Means of the metrics over the steps of a window -> numbers to log.

  "tokens" and "slots" (the tokens for which there is room) become tokens_per_second and fill. "data_checksum"
  is that of the last step.
  """
  host = jax.device_get(window)
  names = host[0].keys() - {"tokens", "slots", "bad", "data_checksum"}
  values = {name: float(np.mean([m[name] for m in host])) for name in ["loss", *sorted(names - {"loss"})]}
  if "tokens" in host[0]:
    tokens = sum(int(m["tokens"]) for m in host)
    values |= {"tokens_per_second": tokens / seconds, "fill": tokens / sum(int(m["slots"]) for m in host)}
  values["steps_per_second"] = len(host) / seconds
  if "data_checksum" in host[0]:
    values["data_checksum"] = int(host[-1]["data_checksum"])
  return values
