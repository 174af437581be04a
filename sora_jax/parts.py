"""A part of a work directory: W/vae, W/text or W/model, each a config.json and weights.safetensors.

Weights are nested dicts; in the file a name is the path, as "encoder/conv_in/kernel".
"""

import json
import os
import shutil
import zlib

import jax
import numpy as np
from etils import epath

from sora_jax import files
from sora_jax.errors import BadInput
from sora_jax.models import vae

FORMAT_VERSION = 1
WEIGHTS = "weights.safetensors"
SUFFIXES = (".json", ".safetensors", ".model")  # of files that a checksum covers


def save_part(directory, config, params, dtype=None):
  """Writes one part: its config (a dict) and its weights (a nested dict of arrays), cast to `dtype` where
  given.
  """
  flat = files.flatten(params)
  specs = {name: (leaf.shape, np.dtype(dtype or leaf.dtype)) for name, leaf in flat.items()}
  write_part(directory, config, specs, ((name, np.asarray(leaf)) for name, leaf in flat.items()))


def write_part(directory, config, specs, pieces):
  """Writes one part, of whose weights only a piece is in memory at a time: see `files.write_safetensors`."""
  directory = epath.Path(directory)
  files.write_safetensors(directory / WEIGHTS, specs, pieces)
  files.write_json(directory / "config.json", {"format_version": FORMAT_VERSION, **config})


def load_part(directory, dtype=np.float32):
  """-> (config, weights as a nested dict of numpy arrays in `dtype`; None: as they are stored).

  Weights that have this dtype already are memory-mapped, not read. BadInput where a file is missing or cut
  short.
  """
  directory = epath.Path(directory)
  config = files.read_json(directory / "config.json")
  flat = files.read_safetensors(directory / WEIGHTS)
  if dtype is not None:
    flat = {name: leaf.astype(dtype, copy=False) for name, leaf in flat.items()}
  return config, files.unflatten(flat)


def put(tree, target):
  """Arrays (mapped ones too) -> jax arrays like `target`, a tree of ShapeDtypeStructs.

  Each device reads its shard alone.
  """

  def put_leaf(leaf, like):
    def shard(index):
      # a copy: jax may keep it, and a mapped file may be written over
      return np.array(leaf[index], like.dtype)

    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, shard)

  return jax.tree.map(put_leaf, tree, target)


def checksum(directory, only=()):
  """A short checksum of a part: its config, its weights and its other files, but not its README.

  only: of the weights those under these names. The config of an imported part holds the checksum of its
  weights, which is taken instead of reading them.
  """
  directory, crc = epath.Path(directory), 0
  config = files.read_json_if_exists(directory / "config.json")
  known = config.get("weights_crc32")
  for path in sorted(directory.iterdir(), key=lambda path: path.name):
    if not path.is_file() or path.suffix not in SUFFIXES or (known and path.name == WEIGHTS):
      continue
    crc = zlib.crc32(path.name.encode(), crc)
    if known and path.name == "config.json":
      fields = {name: value for name, value in config.items() if name != "made_from"}
      pieces = [json.dumps(fields, sort_keys=True).encode()]
    elif only and path.name == WEIGHTS:
      pieces = _tensors_under(path, only)
    else:
      pieces = files.pieces_of(path)
    for piece in pieces:
      crc = zlib.crc32(piece, crc)
  return f"{crc:08x}"


def fingerprint(directory):
  """The checksum of what data made with a part depend on: of W/vae the encoder, so that its decoder may be
  trained further.
  """
  return checksum(directory, vae.ENCODER if epath.Path(directory).name == "vae" else ())


def _tensors_under(path, names):
  """Yields name and bytes of the tensors of a file under these names, in order; of a damaged file all its
  bytes.
  """
  try:
    tensors = files.read_safetensors(path)
  except BadInput:
    yield from files.pieces_of(path)
    return
  for name in sorted(tensors):
    if name.split("/")[0] in names:
      tensor = tensors[name]
      yield f"{name} {files.DTYPES[tensor.dtype.name]} {list(tensor.shape)}".encode()
      yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def copy_part(source, target, link=False):
  """Copies W/vae or W/text into another directory, unless it is there; BadInput where another one is there.

  link: hard-link its weights, where they are large (11 GB of a text encoder) and nobody writes to them.
  """
  source, target = epath.Path(source), epath.Path(target)
  if not source.exists():
    raise BadInput(f"there is no {source}; run launch.encode first, which puts it beside its records")
  if not files.is_local(target):  # no rename there: what a kill left out is copied now
    for path in source.iterdir():
      if not (target / path.name).exists():
        files.copy(path, target / path.name)
  if target.exists() and any(target.iterdir()):
    if fingerprint(source) != fingerprint(target):
      raise BadInput(
        f"{target} and {source} differ: this work directory was made with another one; give another --workdir"
      )
    return
  partial = target.parent / (target.name + ".partial")
  if partial.exists():
    partial.rmtree()
  partial.mkdir(parents=True)
  for path in source.iterdir():
    if not (link and path.name == WEIGHTS and _hard_link(path, partial / path.name)):
      files.copy(path, partial / path.name)
  if target.exists():
    target.rmtree()
  partial.rename(target)


def _hard_link(path, target):
  """True where the file system could link the file."""
  try:
    os.link(path, target)
  except OSError:
    return False
  return True


def copy_source(source, target):
  """Copies W/source, what an import keeps for the export, into another work directory, where there is one."""
  source, target = epath.Path(source) / "source", epath.Path(target) / "source"
  if source.exists() and not files.is_local(target):
    files.copy_tree(source, target)
  elif source.exists() and not target.exists():
    partial = target.parent / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    files.copy_tree(source, partial)
    partial.rename(target)
