"""Several processes that do one job: the hosts of a TPU pod, or several processes of one machine.

  python -m launch.hosts --count=4 launch.encode --source=DIR --out=OUT

starts four of a program here. On a pod the program itself is started, on every host, and they find each other. Elsewhere each process is
told by its environment: JAX_COORDINATOR_ADDRESS=HOST:PORT (of the first), JAX_NUM_PROCESSES, JAX_PROCESS_ID. All must see the same files.
The first process speaks for all; when one fails, all end, and the same command goes on where they were.
"""

import argparse
import collections
import functools
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np

from sora_jax.errors import BadInput

PROGRAMS = ("launch.encode", "launch.train")
WEEK = 7 * 24 * 3600
GRACE = 20              # seconds that the others have to end by themselves when one has failed
MESSAGE = 4 << 20       # bytes that are told to all at a time


def join():
  """Joins the other processes of this job, if there are any. Before anything else asks jax for devices. BadInput where it is told half of it."""
  import jax

  from launch import cli
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  jax.config.update("jax_enable_preemption_service", False)          # it would take SIGTERM away from launch.cli; see `Stop`
  if address:
    number, count = (os.environ.get(name, "") for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
      raise BadInput(f"JAX_COORDINATOR_ADDRESS={address} with JAX_PROCESS_ID={number} of JAX_NUM_PROCESSES={count}; set all three, the id from 0 on")
    jax.distributed.initialize(address, int(count), int(number))
  elif importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS") != "cpu":
    try:
      jax.distributed.initialize()
    except ValueError as error:
      if "coordinator_address should be defined" not in str(error):
        raise
      return                        # no pod: there is no one to join
  cli.console.quiet = jax.process_index() > 0


class Stop:
  """Asked at every step by all processes that take the same steps -> are they to stop? At the same step in all, one after any was asked to.

  Each posts whether it was asked, to all, and looks at what was posted the step before, which is there by then.
  """

  def __init__(self, asked):
    self._asked, self._posted = asked, None

  def __call__(self):
    import jax
    if jax.process_count() == 1:
      return self._asked()
    everywhere = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    sharding = jax.sharding.NamedSharding(everywhere, jax.sharding.PartitionSpec("all"))
    before, asked = self._posted, np.array([self._asked()])
    self._posted = _any()(jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: asked))
    return before is not None and bool(before)


@functools.cache
def _any():
  import jax
  return jax.jit(jax.numpy.any)


def wait(name):
  """Returns when all processes have come here. name: another one each time. No one waits alone."""
  from orbax.checkpoint import multihost
  multihost.get_barrier_sync_fn()(key=name, timeout_ms=WEEK * 1000)


def from_first(name, make):
  """What `make()` gives in the first process, in all of them; so does the BadInput that it raises. name: another one each time."""
  import jax
  from jax.experimental import multihost_utils
  if jax.process_count() == 1:
    return make()
  told = b""
  if not jax.process_index():
    try:
      told = pickle.dumps((make(), None))
    except BadInput as error:
      told = pickle.dumps((None, str(error)))
  wait(name)                    # collectives would not wait as long as it may take
  size = multihost_utils.broadcast_one_to_all(np.array(divmod(len(told), MESSAGE), np.int32)) @ np.array([MESSAGE, 1], np.int64)
  told = told.ljust(-(-int(size) // MESSAGE) * MESSAGE, b"\0")
  parts = (multihost_utils.broadcast_one_to_all(np.frombuffer(told[at:at + MESSAGE], np.uint8)) for at in range(0, len(told), MESSAGE))
  found, wrong = pickle.loads(b"".join(part.tobytes() for part in parts))
  if wrong is not None:
    raise BadInput(wrong)
  return found


def leave():
  """Ends together: the first process must not go before the others."""
  if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    sys.modules["jax"].distributed.shutdown()


def main():
  from launch import stages
  parser = argparse.ArgumentParser(prog="python -m launch.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--count", type=int, default=2, help="how many processes")
  parser.add_argument("program", choices=PROGRAMS)
  parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
  asked = parser.parse_args()
  if asked.count < 1:
    parser.error(f"--count={asked.count}: at least 1")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  processes, lines = [], Lines()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: [process.terminate() for process in processes])
  for number in range(asked.count):
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(asked.count), "JAX_PROCESS_ID": str(number)}
    processes.append(subprocess.Popen([sys.executable, "-m", asked.program, *asked.arguments], env=environment, stderr=subprocess.PIPE,
                                      text=True, errors="replace", preexec_fn=stages.end_with_parent, start_new_session=True))
    lines.follow(number, processes[-1].stderr)
  sys.exit(watch(processes, lines))


def watch(processes, lines):
  """Waits for all -> the exit code of the first that failed, else 75 if one was stopped, else 0. Ends the others where one fails."""
  from launch import cli
  failed, since = None, None
  while any(process.poll() is None for process in processes):
    time.sleep(0.05)
    if failed is None:
      failed = next((n for n, p in enumerate(processes) if p.returncode not in (None, cli.OK, cli.STOPPED)), None)
    lines.tell(failed)
    if failed is not None:
      since = since or time.monotonic()
      for process in processes:
        if process.poll() is None:
          (process.terminate if time.monotonic() < since + GRACE else process.kill)()
      time.sleep(0.5)
  codes = [process.returncode for process in processes]
  if failed is None:
    failed = next((n for n, code in enumerate(codes) if code not in (cli.OK, cli.STOPPED)), None)
  lines.tell(failed, wait=0.0)
  if failed is None:
    return cli.STOPPED if cli.STOPPED in codes else cli.OK
  if codes[failed] < 0:
    print(f"launch.hosts: process {failed} was ended by signal {-codes[failed]}; run the same command again to go on", file=sys.stderr)
  return codes[failed] if codes[failed] > 0 else cli.FAILED


class Lines:
  """What the processes write to stderr, but what another has said already: what is wrong with a job is wrong in all its processes. When one
  has failed, the others' lines are left out: they tell at length that it is gone."""

  def __init__(self):
    self._waiting, self._readers, self._said = collections.deque(), [], {}

  def follow(self, number, stream):
    """Reads a process's stream in a thread."""
    reader = threading.Thread(target=lambda: [self._waiting.append((time.monotonic(), number, line)) for line in stream], daemon=True)
    reader.start()
    self._readers.append(reader)

  def tell(self, failed, wait=0.5):
    """Prints the lines older than `wait` seconds; by then it is known whether a process has `failed`, and which (None: none)."""
    if not wait:
      for reader in self._readers:
        reader.join(5)
    while self._waiting and self._waiting[0][0] <= time.monotonic() - wait:
      _, number, line = self._waiting.popleft()
      if failed in (None, number) and self._said.setdefault(line, number) == number and not line.startswith("[Gloo]"):
        sys.stderr.write(line)
        sys.stderr.flush()


if __name__ == "__main__":
  main()
