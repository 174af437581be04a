"""Goodput: the share of a run's time in which its devices made steps that count, and where the rest went.

  startup     from the start of the program to its first step: imports, data, restoring
  compile     the first step of a program
  step        steps that count, on the devices
  data        the devices waited for a batch
  checkpoint  they waited for a checkpoint: the part of saving that blocks, and its checksums
  hooks       they waited for samples or held-out quality
  lost        steps that were skipped, or made again after a kill or from a checkpoint, and going back
  down        from the last record of a program to the start of the next
  other       the rest

Every moment is in one of them, so they sum to the time since the run began. While the devices compute, time
is theirs, whatever the host does meanwhile. W/goodput.json keeps the sums from program to program.
"""

import contextlib
import itertools
import math
import os
import time

from sora_jax import files

GOODPUT = "goodput.json"
PARTS = ("startup", "compile", "step", "data", "checkpoint", "hooks", "lost", "down", "other")
KEPT = 8  # checkpoints of which it is known how much was done before them; more than are kept


class Goodput:
  """The account of one run. Times are of time.monotonic().

  began: the start of this program. step: where it goes on; what was done after that is lost. silent: nothing
  is read or written; of several processes one keeps the account.
  """

  def __init__(self, workdir, step, began, silent=False):
    self.path, self.silent = os.path.join(workdir, GOODPUT), silent
    before = {} if silent else files.read_json_if_exists(self.path)
    self.seconds = dict.fromkeys(PARTS, 0.0) | before.get("seconds", {})
    self.saved = {int(at): seconds for at, seconds in before.get("saved", {}).items()}
    self.rollbacks = before.get("rollbacks", 0)
    if "written" in before:
      start = time.time() - (time.monotonic() - began)
      self.seconds["down"] += max(0.0, start - before["written"])
    self.until = began  # the account is complete up to here
    self.acts = [(began, "startup")]  # since when the host does what
    self.lose(step)

  @contextlib.contextmanager
  def doing(self, part):
    """What the host does in this block."""
    self.acts.append((time.monotonic(), part))
    try:
      yield
    finally:
      self.acts.append((time.monotonic(), "other"))

  def step(self, start, end, part="step"):
    """The devices were given a step at `start`, and had made it at `end`; the one before ended earlier."""
    self.spend(start)
    self.seconds[part] += max(0.0, end - self.until)
    self.until = max(end, self.until)

  def spend(self, until):
    """Time up to `until` that no step took goes to what the host did in it."""
    for (start, part), (end, _) in itertools.pairwise([*self.acts, (math.inf, None)]):
      self.seconds[part] += max(0.0, min(end, until) - max(start, self.until))
    self.until = max(until, self.until)
    current = max(i for i, (start, _) in enumerate(self.acts) if start <= self.until)
    del self.acts[:current]

  def checkpointed(self, step):
    """What was done up to this step is not lost any more."""
    self.saved[step] = self.seconds["step"]
    self.saved = dict(sorted(self.saved.items())[-KEPT:])

  def lose(self, step):
    """The run goes on after this step: the steps that were made after it do not count."""
    self.saved = {at: seconds for at, seconds in self.saved.items() if at <= step}
    done = max(self.saved.values(), default=0.0)
    self.seconds["lost"] += self.seconds["step"] - done
    self.seconds["step"] = done

  def values(self):
    """To be logged: the share of steps that count, and the seconds of each part since the run began."""
    total = sum(self.seconds.values())
    values = {"goodput": self.seconds["step"] / total if total else 0.0, "rollbacks": self.rollbacks}
    return values | {f"time_{part}": round(seconds, 3) for part, seconds in self.seconds.items()}

  def summary(self):
    """One line for the user, the largest parts first."""
    total, seconds = sum(self.seconds.values()) or 1.0, dict(self.seconds)
    steps = seconds.pop("step")
    rest = sorted(seconds.items(), key=lambda item: -item[1])
    named = ", ".join(f"{part} {100 * spent / total:.1f} %" for part, spent in rest if spent > 0.001 * total)
    return f"goodput {100 * steps / total:.1f} % of {total:.0f} s{f'; the rest: {named}' if named else ''}"

  def write(self):
    """Writes W/goodput.json."""
    if not self.silent:
      state = {
        "written": time.time(),
        "seconds": self.seconds,
        "saved": self.saved,
        "rollbacks": self.rollbacks,
      }
      files.write_json(self.path, state)
