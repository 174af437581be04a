"""--profile=FIRST:LAST: a trace of these steps in W/profile/, for xprof or Perfetto."""

import os

import jax
from absl import flags

from launch.common.progress import say
from sora_jax.errors import BadInput


def define_flag():
  flags.DEFINE_string("profile", "", "steps to trace into W/profile, as FIRST:LAST")


def steps_of(flag, config):
  """The value of --profile -> (first, last) or None. BadInput where config.steps has no such steps."""
  if not flag:
    return None
  first, colon, last = flag.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= config.steps):
    raise BadInput(
      f"--profile={flag}: give the first and the last step to trace, such as --profile=20:24, "
      f"from 1 to {config.steps} (config.steps)"
    )
  return int(first), int(last)


class Trace:
  """The trace of steps first to last, of the first process; steps: (first, last), or None for no trace."""

  def __init__(self, workdir, steps):
    self.directory = os.path.join(workdir, "profile")
    self.steps = None if jax.process_index() else steps
    self.running = False

  def before(self, step):
    """To be called before each step."""
    if self.steps and not self.running and self.steps[0] <= step <= self.steps[1]:
      jax.profiler.start_trace(self.directory)
      self.running = True

  def after(self, step, result):
    """To be called after each step, with arrays that it computes."""
    if self.running and step >= self.steps[1]:
      jax.block_until_ready(result)
      self.close()

  def close(self):
    if self.running:
      jax.profiler.stop_trace()
      self.running, self.steps = False, None
      say(f"a trace of the steps is in {self.directory}; xprof --logdir={self.directory} shows it")
