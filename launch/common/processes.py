"""Several processes that do one job: the hosts of a TPU pod, or several processes of one machine
(launch.hosts).

On a pod the same program is started on every host, and they find each other. Elsewhere the environment of
each process names them: JAX_COORDINATOR_ADDRESS=HOST:PORT (of the first), JAX_NUM_PROCESSES, JAX_PROCESS_ID.
All must see the same files. When one fails, all end, and the same command continues the work.
"""

import functools
import importlib.util
import os
import pickle
import sys

import numpy as np

from sora_jax.errors import BadInput

WEEK = 7 * 24 * 3600
MESSAGE = 4 << 20  # bytes that are broadcast at a time


def join():
  """Joins the other processes of this job, if there are any -> is this the first? Call it before jax is asked
  for devices.

  BadInput where the environment names them incompletely. The caller mutes all but the first.
  """
  import jax

  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  # it would take SIGTERM away from the program; see `Stop`
  jax.config.update("jax_enable_preemption_service", False)
  if address:
    number, count = (os.environ.get(name, "") for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
      raise BadInput(
        f"JAX_COORDINATOR_ADDRESS={address} with JAX_PROCESS_ID={number} of JAX_NUM_PROCESSES={count}; "
        "set all three, the id from 0 on"
      )
    jax.distributed.initialize(address, int(count), int(number))
  elif importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS") != "cpu":
    try:
      jax.distributed.initialize()
    except ValueError as error:
      if "coordinator_address should be defined" not in str(error):
        raise
      return True  # no pod: there is no one to join
  return jax.process_index() == 0


class Stop:
  """Agrees on stopping: True in every process at the same step, one step after any of them was signalled.

  To be called once a step by all processes. Each posts whether it was signalled, and reads what was posted
  the step before, which has arrived by then. signalled: () -> bool, of this process.
  """

  def __init__(self, signalled):
    self._signalled, self._posted = signalled, None

  def __call__(self):
    import jax

    if jax.process_count() == 1:
      return self._signalled()
    everywhere = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    sharding = jax.sharding.NamedSharding(everywhere, jax.sharding.PartitionSpec("all"))
    before, mine = self._posted, np.array([self._signalled()])
    self._posted = _any()(jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: mine))
    return before is not None and bool(before)


@functools.cache
def _any():
  import jax

  return jax.jit(jax.numpy.any)


def wait(name):
  """Returns when all processes have called it with this name, another one each time.

  No process waits alone.
  """
  import jax

  if jax.process_count() == 1:
    return
  from orbax.checkpoint import multihost

  multihost.get_barrier_sync_fn()(key=name, timeout_ms=WEEK * 1000)


def from_first(name, make):
  """make() of the first process, broadcast to all of them; so is the BadInput that it raises.

  name: another one each time.
  """
  import jax
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return make()
  message = b""
  if not jax.process_index():
    try:
      message = pickle.dumps((make(), None))
    except BadInput as error:
      message = pickle.dumps((None, str(error)))
  wait(name)  # collectives would not wait as long as it may take
  length = multihost_utils.broadcast_one_to_all(np.array(divmod(len(message), MESSAGE), np.int32))
  size = int(length @ np.array([MESSAGE, 1], np.int64))
  message = message.ljust(-(-size // MESSAGE) * MESSAGE, b"\0")
  pieces = []
  for at in range(0, len(message), MESSAGE):
    piece = np.frombuffer(message[at : at + MESSAGE], np.uint8)
    pieces.append(multihost_utils.broadcast_one_to_all(piece).tobytes())
  value, wrong = pickle.loads(b"".join(pieces))
  if wrong is not None:
    raise BadInput(wrong)
  return value


def leave():
  """Ends together: the first process must not go before the others."""
  if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    sys.modules["jax"].distributed.shutdown()
