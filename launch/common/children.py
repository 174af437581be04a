"""Programs of launch/ that another program starts: one after the other (a story), or several at once (one
job).
"""

import collections
import ctypes
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

from launch.common import program
from launch.common.progress import say

GRACE = 20  # seconds that the others have to end by themselves when one has failed


def root():
  """The folder of the repository."""
  return pathlib.Path(__file__).resolve().parent.parent.parent


def run_stage(number, count, what, name, arguments):
  """Says and runs one program as a user would, its output passed on -> exit code.

  A request to stop is passed on, too.
  """
  say(f"\n[{number}/{count}] {what}\n    python -m launch.{name} {shlex.join(arguments)}")
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root()), os.environ.get("PYTHONPATH", "")])}
  environment.setdefault("JAX_PLATFORMS", "cpu")
  # half the compile time, the same run time
  environment["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {environment['XLA_FLAGS']}"
  # large pages; else a fifth of the time goes to page faults
  environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
  environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(root() / ".cache" / "jax"))
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  command = [sys.executable, "-m", f"launch.{name}", *arguments]
  code = _wait(subprocess.Popen(command, env=environment, preexec_fn=end_with_parent))
  if code < 0:  # ended by a signal: ours, or one that it could not handle
    code = program.STOPPED if program.stop_requested() else program.FAILED
  if code:
    say(f"it ended with exit code {code}; run the same command again to go on")
  return code


def _wait(child):
  while True:
    try:
      return child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
      if program.stop_requested():
        child.terminate()
        return child.wait()


def end_with_parent():
  """Run in a child: where its parent is killed, it is too, so that the next run finds nobody at work (Linux
  alone can do that).
  """
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def watch(processes, lines):
  """Waits for all -> the exit code of the first that failed, else 75 if one was stopped, else 0.

  Ends the others where one fails.
  """
  failed, since = None, None
  while any(process.poll() is None for process in processes):
    time.sleep(0.05)
    if failed is None:
      failed = _first_failed([process.poll() for process in processes])
      if failed is not None:
        time.sleep(1.0)  # one that is killed may need longer to end than another that misses it
        failed = _first_failed([process.poll() for process in processes])
    lines.show(failed)
    if failed is not None:
      since = since or time.monotonic()
      for process in processes:
        if process.poll() is None:
          (process.terminate if time.monotonic() < since + GRACE else process.kill)()
      time.sleep(0.5)
  codes = [process.returncode for process in processes]
  if failed is None:
    failed = _first_failed(codes)
  lines.show(failed, wait=0.0)
  if failed is None:
    return program.STOPPED if program.STOPPED in codes else program.OK
  if codes[failed] < 0:
    program.warn(
      f"process {failed} was ended by signal {-codes[failed]}; run the same command again to go on"
    )
  return codes[failed] if codes[failed] > 0 else program.FAILED


def _first_failed(codes):
  """The number of the process to blame, or None.

  One that was killed (its code is negative) is the cause, even if another that missed it ended as quickly.
  """
  failed = [n for n, code in enumerate(codes) if code not in (None, program.OK, program.STOPPED)]
  return min(failed, key=codes.__getitem__, default=None)


class Lines:
  """What processes of one job write to stderr, each line once: what is wrong with a job is wrong in all its
  processes.

  When one has failed, the lines of the others are left out: they say at length that it is gone.
  """

  def __init__(self):
    self._waiting, self._readers, self._shown_by = collections.deque(), [], {}

  def follow(self, number, stream):
    """Reads the stream of process `number` in a thread."""

    def read():
      for line in stream:
        self._waiting.append((time.monotonic(), number, line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    self._readers.append(reader)

  def show(self, failed, wait=0.5):
    """Prints the lines older than `wait` seconds; by then it is known which process has `failed` (None:
    none).
    """
    if not wait:
      for reader in self._readers:
        reader.join(5)
    while self._waiting and self._waiting[0][0] <= time.monotonic() - wait:
      _, number, line = self._waiting.popleft()
      first = self._shown_by.setdefault(line, number) == number if failed in (None, number) else False
      if first and not line.startswith("[Gloo]"):
        sys.stderr.write(line)
        sys.stderr.flush()
