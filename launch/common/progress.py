"""What a user reads while a program runs: lines, and a progress bar, or plain lines without a terminal."""

import time

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  SpinnerColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)


def say(line):
  """One line for the user, above any progress bar."""
  console.print(line, markup=False)


def mute():
  """Nothing is said from here on: of several processes the first speaks."""
  console.quiet = True


class Bar:
  """Progress: a bar with time left on a terminal, a plain line every `every` seconds elsewhere.

  Use with `with`.
  """

  def __init__(self, label, total, *, start=0, every=15.0):
    self.label, self.total, self.done, self.every, self.note = label, total, start, every, ""
    self.first, self.began, self.last_line = None, None, time.monotonic()
    self.rich = None
    if console.is_terminal:
      left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
      columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *left,
      )
      self.rich = Progress(SpinnerColumn(), *columns, console=console)

  def __enter__(self):
    if self.rich:
      self.rich.start()
      self.task = self.rich.add_task(self.label, total=self.total, completed=self.done, note="")
    return self

  def __exit__(self, *_):
    if self.rich:
      self.rich.stop()

  def advance(self, n=1, note=""):
    """n more are done; `note` is shown beside them, until the next one."""
    self.update(self.done + n, note)

  def update(self, done, note="", total=None):
    """So many are done; of `total`, where that was not known before."""
    self.done, self.total = done, total or self.total
    self.note = note or self.note
    if self.first is None:  # time left is estimated from the second on: the first compiles
      self.first, self.began = self.done, time.monotonic()
    if self.rich:
      self.rich.update(self.task, completed=self.done, total=self.total, note=self.note)
      return
    now = time.monotonic()
    if now - self.last_line >= self.every or self.done == self.total:
      self.last_line = now
      line = f"{self.label}: {self.done}"
      if self.total:
        line += f" of {self.total}"
      if self.total and self.done > self.first:
        rate = (now - self.began) / (self.done - self.first)
        line += f", {rate * (self.total - self.done):.0f} s left"
      say(f"{line}, {self.note}" if self.note else line)
