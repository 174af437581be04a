"""What every test relies on: a CPU that shows 8 devices, the compilation cache, parsed flags, and how a
program is run.

All of it is set before jax is first imported. The flag for 8 virtual devices costs the other tests nothing
that could be told from noise (gradients of convolutions and matmuls, three runs with and without), so all
have it; a program that a test starts gets one device unless it asks for more.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = (
  "--xla_force_host_platform_device_count={} "
  # these two: much less time to compile
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = DEVICES.format(8)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracle's libraries look nothing up

import pytest  # noqa: E402
from absl import flags  # noqa: E402

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which pytest never parses


def pytest_ignore_collect(collection_path, config):
  """tests/oracle needs torch: only `bash tests/run.sh oracle` collects it."""
  if collection_path.name == "oracle" and collection_path.parent == ROOT / "tests":
    return True if not os.environ.get("SORA_JAX_ORACLE") else None
  return None


def pytest_collection_modifyitems(items):
  """Files of whole training steps first: of two processes that take file after file, neither is left with a
  long one at the end.
  """
  items.sort(key=lambda item: item.path.parent != ROOT / "tests")


def pytest_sessionfinish(session, exitstatus):
  """A session in which every test was skipped has shown nothing: pytest's exit status 5, as when none was
  collected.
  """
  # one of several processes (pytest-xdist): the first one judges
  if hasattr(session.config, "workerinput"):
    return
  reporter = session.config.pluginmanager.get_plugin("terminalreporter")
  ran = reporter and any(
    reporter.stats.get(outcome) for outcome in ("passed", "failed", "xfailed", "xpassed")
  )
  if exitstatus == pytest.ExitCode.OK and not ran and not session.config.option.collectonly:
    session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture
def run_program():
  """run(name, *arguments, devices=1, timeout=300, cwd=None, env={}) -> CompletedProcess of `python -m
  launch.name ...`.

  stdout and stderr are text; no terminal, no stdin. The exit code is the test's to judge.
  """

  def run(name, *arguments, devices=1, timeout=300, cwd=None, env=None):
    environment = {
      **os.environ,
      "XLA_FLAGS": DEVICES.format(devices),
      "PYTHONPATH": str(ROOT),
      "PYTHONSAFEPATH": "1",
      **(env or {}),
    }
    command = [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]
    return subprocess.run(
      command,
      cwd=cwd or ROOT,
      env=environment,
      timeout=timeout,
      text=True,
      capture_output=True,
      stdin=subprocess.DEVNULL,
      check=False,
    )

  return run
