"""A story of several programs of launch/, each run as a user would run it, one after the other. Used by launch.quickstart and launch.framing."""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys

from launch import cli


def root():
  """The folder of the repository."""
  return pathlib.Path(__file__).resolve().parent.parent


def run(number, count, what, program, arguments):
  """Says and runs one stage, its output passed on; a stop asked of us is asked of it. -> exit code"""
  cli.say(f"\n[{number}/{count}] {what}\n    python -m launch.{program} {' '.join(map(quoted, arguments))}")
  environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root()), os.environ.get("PYTHONPATH", "")])}
  environment.setdefault("JAX_PLATFORMS", "cpu")
  environment["XLA_FLAGS"] = f"--xla_backend_optimization_level=1 {environment['XLA_FLAGS']}"       # half the compile time, the same run time
  environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")               # large pages; else a fifth of the time goes to page faults
  environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(root() / ".cache" / "jax"))
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  child = subprocess.Popen([sys.executable, "-m", f"launch.{program}", *arguments], env=environment, preexec_fn=end_with_parent)
  code = wait(child)
  if code < 0:              # ended by a signal: ours, or one that it could not handle
    code = cli.STOPPED if cli.stop_requested() else cli.FAILED
  if code:
    cli.say(f"it ended with exit code {code}; run the same command again to go on")
  return code


def wait(child):
  while True:
    try:
      return child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
      if cli.stop_requested():
        child.terminate()
        return child.wait()


def end_with_parent():
  """Run in a child: where we are killed, it is too, so that the next run finds nobody at work (Linux alone can do that)."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG


def quoted(argument):
  return f"'{argument}'" if " " in argument else argument
