"""Records in a bucket: a shard goes up when it is finished, and comes down when one of its records is read.

What came down stays in a cache on this machine, $SORA_JAX_CACHE (default ~/.cache/sora_jax), so that the
index can be memory-mapped and a shard is fetched once. It needs room for the shards that a host reads.
"""

import hashlib
import os
import pathlib

from etils import epath

from sora_jax import files


def path_of(directory):
  """A directory of records -> pathlib.Path, or of a bucket epath.Path."""
  return (pathlib if files.is_local(directory) else epath).Path(directory)


def cache_of(directory, what):
  """A folder on this machine for a directory in a bucket. what: another one for other contents."""
  root = os.environ.get("SORA_JAX_CACHE") or pathlib.Path.home() / ".cache" / "sora_jax"
  name = hashlib.blake2b(f"{directory}\0{what}".encode(), digest_size=12).hexdigest()
  folder = pathlib.Path(root) / "records" / name
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def fetch(source, target):
  """Has a file of a bucket at `target`, whole. Several processes and threads may ask at once."""
  if not target.exists():
    partial = target.with_name(f"{target.name}.{os.getpid()}.{id(source)}.partial")
    files.copy(source, partial)
    partial.replace(target)
  return target
