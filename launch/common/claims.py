"""What a program claims before it begins: a work directory, disk, memory.

BadInput where it cannot have it.
"""

import fcntl
import json
import os
import shutil

from etils import epath

from launch.common import program
from sora_jax import files, masks, parts
from sora_jax.errors import BadInput

# Keys of a config that earlier versions did not have, and what they did; and keys that had another name.
ADDED = {"optim.b1": 0.9, "optim.b2": 0.99, "model.kind": "wan", "model.scans": 1, "model.weights": ""}
ADDED |= {f"data.given.{kind}": 0.0 for kind in masks.KINDS}
RENAMED = {"data.image_to_video": "data.given.first"}
_locks = []  # open files, so that a lock lasts until its file is closed or the program ends


def lock_workdir(workdir):
  """One program at a time writes in W; BadInput where another is at work. In a bucket nothing keeps it away.

  Returns the open file. The lock is held until it is closed, or the program ends.
  """
  if not files.is_local(workdir):
    return None
  os.makedirs(workdir, exist_ok=True)
  lock = open(os.path.join(workdir, ".lock"), "w")
  _locks.append(lock)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    raise BadInput(
      f"{workdir}: another program is training here; wait for it, or give another --workdir"
    ) from None
  return lock


def has_model(workdir):
  """Does W hold a whole checkpoint, or a model? Until then it belongs to nobody."""
  workdir = epath.Path(workdir)
  return (workdir / "model").exists() or any((workdir / "manifests").glob("*.json"))


def claim_workdir(workdir, config, free_to_change):
  """Writes W/config.json, or checks that W belongs to this config.

  free_to_change: keys (dotted) that may differ between runs.
  """
  path = epath.Path(workdir) / "config.json"
  mine = {
    "format_version": parts.FORMAT_VERSION,
    "program": program.name(),
    **json.loads(config.to_json_best_effort()),
  }
  if path.exists() and has_model(workdir):
    here, there = flatten_config(mine), flatten_config(files.read_json(path))
    there = {RENAMED.get(key, key): value for key, value in there.items()}
    there = {key: value for key, value in ADDED.items() if key in here} | there
    keys = sorted(key for key in here.keys() | there.keys() if not key.startswith(free_to_change))
    differ = [key for key in keys if here.get(key) != there.get(key)]
    if differ:
      shown = ", ".join(f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in differ[:3])
      raise BadInput(
        f"{workdir} belongs to another config ({shown}{', ...' if len(differ) > 3 else ''}); "
        "give the same config to resume it, or another --workdir"
      )
  files.write_json(path, mine)


def flatten_config(tree, prefix=""):
  """Nested config -> {"a.b": value}."""
  flat = {}
  for name, value in tree.items():
    flat.update(
      flatten_config(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    )
  return flat


def need_disk(directory, num_bytes, what):
  """BadInput unless the disk of `directory` has that many bytes free. A bucket has."""
  if not files.is_local(directory):
    return
  os.makedirs(directory, exist_ok=True)
  free = shutil.disk_usage(directory).free
  if free < num_bytes:
    raise BadInput(
      f"{directory}: {what}: {format_size(num_bytes)} are needed, and {format_size(free)} are free; free "
      "some space"
    )


def need_memory(num_bytes, what):
  """BadInput unless this machine has that much memory available (where it can tell)."""
  try:
    lines = open("/proc/meminfo").read().splitlines()
  except OSError:
    return
  free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), num_bytes)
  if free < num_bytes:
    raise BadInput(
      f"{what}: {format_size(num_bytes)} of memory are needed, and {format_size(free)} are free; take a "
      "larger machine"
    )


def format_size(num_bytes):
  return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
