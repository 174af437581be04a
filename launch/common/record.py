"""What a training run keeps account of: its steps under way and done, W/metrics.jsonl, W/goodput.json."""

import collections
import concurrent.futures
import dataclasses
import time

import jax
import numpy as np

from launch.common import program
from launch.common.goodput import Goodput
from launch.common.log import MetricsLog
from launch.common.progress import say
from sora_jax import chips

NO_MEANS = {"tokens", "slots", "flops", "bad", "not_finite", "spike", "data_checksum"}
QUIET = ("data_checksum", "time_", "step_seconds_", "not_finite", "spikes", "rollbacks")  # not beside the bar


@dataclasses.dataclass
class Step:
  """One update. Times are of time.monotonic()."""

  number: int
  fetched: float  # when the host began to wait for its batch
  started: float  # when it was given to the devices
  metrics: dict
  end: concurrent.futures.Future  # when they had made it
  compiled: bool  # the first step of a program
  seconds: float = 0.0  # from `fetched`, or from the end of the step before, to its end

  @property
  def skipped(self):
    return bool(self.metrics["not_finite"] or self.metrics["spike"])


class Record:
  """The account of one program. Use with `with`.

  bad: metrics["bad"] of the last step that has ended. worst: the largest since the weights last went back.
  """

  def __init__(self, workdir, step):
    self.workdir, self.silent, self.bad, self.worst = workdir, jax.process_index() > 0, 0, 0
    self.log = MetricsLog(workdir, step, self.silent)
    self.goodput = Goodput(workdir, step, program.BEGAN, self.silent)
    self.under_way, self.window, self.fetched, self.ended = collections.deque(), [], 0.0, None
    self.waiter = concurrent.futures.ThreadPoolExecutor(1)

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    self.waiter.shutdown(wait=False)
    self.goodput.spend(time.monotonic())
    self.goodput.write()
    self.log.close()
    if kind is None:
      say(self.goodput.summary())

  def doing(self, part):
    """What the host does in this block, a part of goodput.PARTS."""
    return self.goodput.doing(part)

  def fetch(self, batches):
    """The next of an iterator."""
    self.fetched = time.monotonic()
    with self.doing("data"):
      return next(batches)

  def start(self, number, update, state, batch):
    """Gives a step to the devices -> (new state, metrics)."""
    started, first = time.monotonic(), self.ended is None and not self.under_way
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      state, metrics = update(state, batch)
    end = self.waiter.submit(_when_ready, metrics["bad"])
    self.under_way.append(Step(number, self.fetched, started, metrics, end, compiled=first))
    return state, metrics

  def finish(self, all_but=0):
    """Waits until no more steps than that are under way, and takes account of those that have ended."""
    while len(self.under_way) > all_but:
      step = self.under_way.popleft()
      end, step.metrics = step.end.result(), jax.device_get(step.metrics)
      self.bad = int(step.metrics["bad"])
      self.worst = max(self.worst, self.bad)
      self.goodput.step(step.started, end, "compile" if step.compiled else "lost" if step.skipped else "step")
      step.seconds = end - max(step.fetched, self.ended or step.fetched)
      self.ended = end
      self.window.append(step)
      if step.skipped:
        loss, norm = (float(step.metrics[name]) for name in ("loss", "grad_norm"))
        what = "is not finite" if step.metrics["not_finite"] else "is a spike"
        say(
          f"step {step.number}: the update {what} (loss {loss:.4g}, gradient norm {norm:.4g}) and was "
          "skipped; the weights are as they were"
        )

  def write(self, step):
    """Logs the steps since the last call -> a note of them."""
    values = summary(self.window) | self.goodput.values()
    self.window = []
    self.log.write(step, values)
    self.goodput.write()
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.startswith(QUIET))

  def saved(self, step):
    """A checkpoint holds all up to this step."""
    self.goodput.checkpointed(step)
    self.goodput.write()

  def go_back(self, restore):
    """restore() -> (state, step), once the devices are done; what was made after that step is lost."""
    self.finish()
    with self.doing("lost"):
      state, step = restore()
    self.window, self.bad, self.worst = [], 0, 0
    self.goodput.lose(step)
    self.goodput.rollbacks += 1
    self.goodput.write()
    self.log.close()
    self.log = MetricsLog(self.workdir, step, self.silent)
    return state, step


def _when_ready(array):
  jax.block_until_ready(array)
  return time.monotonic()


def summary(window):
  """Steps -> numbers to log.

  Means are over the updates that were taken, if any was. Rates and percentiles are over the steps that did
  not compile, if there are any. "tflops" is of one device, of the model FLOPs in metrics["flops"]; "mfu" is
  its share of the device's peak, where that is known. "data_checksum" is that of the last step.
  """
  taken = [step.metrics for step in window if not step.skipped] or [step.metrics for step in window]
  names = taken[0].keys() - NO_MEANS
  values = {name: float(np.mean([m[name] for m in taken])) for name in ["loss", *sorted(names - {"loss"})]}
  timed = [step for step in window if not step.compiled] or window
  times = [step.seconds for step in timed]

  def total(name, steps=timed):
    return float(sum(np.float64(step.metrics[name]) for step in steps))

  if "tokens" in taken[0]:
    values["tokens_per_second"] = total("tokens") / sum(times)
    values["fill"] = total("tokens", window) / total("slots", window)
  values["steps_per_second"] = len(times) / sum(times)
  if "flops" in taken[0]:
    values["tflops"] = total("flops") / sum(times) / jax.device_count() / 1e12
    chip = chips.chip_of(jax.devices()[0].device_kind)
    if chip:
      values["mfu"] = 1e12 * values["tflops"] / chip.peak_flops
  values |= {f"step_seconds_p{p}": float(np.percentile(times, p)) for p in (50, 90, 99)}
  values |= {"not_finite": int(total("not_finite", window)), "spikes": int(total("spike", window))}
  if "data_checksum" in taken[0]:
    values["data_checksum"] = int(window[-1].metrics["data_checksum"])
  return values
