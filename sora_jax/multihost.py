"""Arrays and values of a job of several processes, or of one. All of them call these functions at the same
point.
"""

import itertools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

DAY = 24 * 3600 * 1000  # milliseconds
_gathers = itertools.count()  # all processes gather in the same order; a barrier has a name of its own


def place_rows(rows, sharding, part=0, parts=1):
  """The part-th of `parts` equal shares of an array's rows -> the global array.

  sharding: function of its shape.
  """
  share = len(rows)
  shape = (share * parts, *rows.shape[1:])

  def piece(index):
    start, stop, _ = index[0].indices(shape[0])
    return rows[(slice(start - part * share, stop - part * share), *index[1:])]

  return jax.make_array_from_callback(shape, sharding(shape), piece)


def to_host(x):
  """An array on the devices of any processes -> numpy array, whole, in each."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def to_own_device(tree):
  """Arrays on the devices of several processes -> whole, on the first device of each; of one process as they
  are.
  """
  return tree if jax.process_count() == 1 else jax.device_put(jax.tree.map(to_host, tree))


def from_all(value):
  """A JSON value of each process -> the list of all, in every process."""
  if jax.process_count() == 1:
    return [value]
  # a collective does not wait as long as what came before may take
  ocp.multihost.get_barrier_sync_fn()(key=f"values gathered {next(_gathers)}", timeout_ms=DAY)
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
