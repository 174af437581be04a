"""What a work directory W keeps: checkpoints that can be trusted, and parts (VAE, text, weights) as plain files.

  W/config.json                 the experiment, with its format_version
  W/checkpoints/STEP/           Orbax, one item each: params, ema, opt, and meta (JSON: step, data cursor, ...)
  W/manifests/STEP.json         size and checksum of every file of the step, written once the step is whole
  W/vae/ W/text/ W/model/       a part: config.json and weights.safetensors, names like "encoder/conv_in/kernel"

Orbax renames a step into place when it is whole, but does not notice a flipped bit or a file cut short: so a step counts only
with its manifest, and is checked against it before it is restored; a damaged one is set aside and the one before is taken.
"""

import itertools
import json
import math
import pathlib
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sora_jax.errors import BadInput

FORMAT_VERSION = 1
WEIGHTS = "weights.safetensors"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"}      # names in safetensors


def flatten(tree, prefix=""):
  """Nested dict -> {"a/b/c": leaf}, sorted by name."""
  flat = {}
  for name in sorted(tree):
    leaf = tree[name]
    flat.update(flatten(leaf, f"{prefix}{name}/") if isinstance(leaf, dict) else {prefix + name: leaf})
  return flat


def unflatten(flat):
  """{"a/b/c": leaf} -> nested dict."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def write_json(path, value):
  """Writes JSON so that a reader never sees half of it."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f"{path.name}.partial"
  partial.write_text(json.dumps(value, indent=1) + "\n")
  partial.replace(path)


def read_json(path):
  """Reads JSON; BadInput where it is missing or broken."""
  path = epath.Path(path)
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise BadInput(f"there is no {path}; give a directory that a sora_jax program wrote") from None
  except ValueError as error:
    raise BadInput(f"{path} is not valid JSON ({error}); restore it or start in a new directory") from None


def save_part(directory, config, params, dtype=None):
  """Writes one part: its config (a dict) and its weights (a nested dict of arrays), cast to `dtype` where given."""
  flat = flatten(params)
  specs = {name: (leaf.shape, np.dtype(dtype or leaf.dtype)) for name, leaf in flat.items()}
  write_part(directory, config, specs, ((name, np.asarray(leaf)) for name, leaf in flat.items()))


def write_part(directory, config, specs, pieces):
  """Writes one part of which only a piece is in memory at a time: see `write_safetensors`."""
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  partial = directory / (WEIGHTS + ".partial")
  write_safetensors(partial, specs, pieces)
  partial.replace(directory / WEIGHTS)
  write_json(directory / "config.json", {"format_version": FORMAT_VERSION, **config})


def write_safetensors(path, specs, pieces, metadata=None):
  """A safetensors file, written front to back; safetensors' own writer wants all of it in memory.

  specs: {name: (shape, dtype)} of all tensors. pieces: iterator of (name, array): a tensor whole, or its slices along the first axis,
  one after the other; cast to its dtype. In the order of specs, whatever the dtypes. ValueError where they do not add up.
  """
  header, at = {"__metadata__": metadata} if metadata else {}, 0
  for name, (shape, dtype) in specs.items():
    size = math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {"dtype": DTYPES[np.dtype(dtype).name], "shape": list(shape), "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with epath.Path(path).open("wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    at = 0
    for name, array in pieces:
      begin, end = header[name]["data_offsets"]
      data = np.ascontiguousarray(array.astype(specs[name][1], copy=False))
      if not begin <= at <= at + data.nbytes <= end:
        raise ValueError(f"{name} does not come in its turn, or has {data.nbytes} bytes that do not fit {begin} to {end}, being at {at}")
      f.write(data.view(np.uint8).data)
      at += data.nbytes
  if at != max((end for _, end in (header[name]["data_offsets"] for name in specs)), default=0):
    raise ValueError(f"{path}: {at} bytes came; the tensors that were announced have more")


def read_safetensors(path):
  """{name: numpy array} of a file; of a local one, mapped: what is not looked at is not read. BadInput where it is damaged or cut short."""
  path = epath.Path(path)
  try:
    data = np.memmap(path, np.uint8, "r") if isinstance(path, pathlib.Path) else np.frombuffer(path.read_bytes(), np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    if max((entry["data_offsets"][1] for entry in header.values()), default=0) != len(data) - start:
      raise ValueError(f"it has {len(data) - start} bytes of weights, and announces others")
    numpy_of = {theirs: np.dtype(ours) for ours, theirs in DTYPES.items()}
    return {name: data[start + entry["data_offsets"][0]:start + entry["data_offsets"][1]].view(numpy_of[entry["dtype"]]).reshape(
        entry["shape"]) for name, entry in header.items()}
  except FileNotFoundError:
    raise BadInput(f"there is no {path}; its config.json is there, so the copy is not whole: copy it again") from None
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise BadInput(f"{path} cannot be read ({error}); copy it again") from None


def load_part(directory, dtype=np.float32):
  """-> (config, weights as a nested dict of numpy arrays; mapped, not read, where they have this dtype; None: as they are stored).

  BadInput where a file is missing or cut short.
  """
  directory = epath.Path(directory)
  config = read_json(directory / "config.json")
  flat = read_safetensors(directory / WEIGHTS)
  return config, unflatten({name: leaf if dtype is None else leaf.astype(dtype, copy=False) for name, leaf in flat.items()})


def place(tree, target):
  """Arrays (mapped ones too) -> jax arrays like `target`, a tree of ShapeDtypeStructs; each device is given its part, and no more is read."""
  def one(leaf, like):
    part = lambda index: np.ascontiguousarray(leaf[index].astype(like.dtype, copy=False))  # noqa: E731
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(leaf.shape, sharding, part)
  return jax.tree.map(one, tree, target)


def fingerprint(directory, only=()):
  """A short checksum of a part: of its config and every other file but README; of its weights, where `only` is given, those that lie
  under these names. A part that was imported says the checksum of its weights in its config, beside where they were from."""
  directory, crc = epath.Path(directory), 0
  config = read_json(directory / "config.json") if (directory / "config.json").exists() else {}
  known = config.get("weights_crc32")
  for path in sorted(directory.iterdir(), key=lambda p: p.name):
    if not path.is_file() or path.suffix not in (".json", ".safetensors", ".model") or known and path.name == WEIGHTS:
      continue
    crc = zlib.crc32(path.name.encode(), crc)
    if known and path.name == "config.json":
      data = [json.dumps({name: value for name, value in config.items() if name != "made_from"}, sort_keys=True).encode()]
    else:
      data = _chosen(path, only) if only and path.name == WEIGHTS else pieces_of(path)
    for piece in data:
      crc = zlib.crc32(piece, crc)
  return f"{crc:08x}"


def pieces_of(path, size=1 << 26):
  """The bytes of a file, a piece at a time."""
  with path.open("rb") as f:
    while data := f.read(size):
      yield data


def _chosen(path, only):
  """A safetensors file -> names and bytes of the tensors under these names, in order; of a damaged file all bytes."""
  try:
    tensors = read_safetensors(path)
  except BadInput:
    yield from pieces_of(path)
    return
  for name in sorted(tensors):
    if name.split("/")[0] in only:
      yield f"{name} {DTYPES[tensors[name].dtype.name]} {list(tensors[name].shape)}".encode()
      yield np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data


def shipped():
  """The work directory of the small model that ships with the package."""
  return epath.Path(pathlib.Path(__file__).parent / "assets" / "world")


class Checkpoints:
  """The checkpoints of one work directory. `say` takes the lines a user should read.

  read_only: for whoever only takes weights from it; what a trainer is writing there at this moment is left alone.
  """

  def __init__(self, workdir, *, keep=3, say=print, read_only=False):
    self.root, self.say, self.read_only = epath.Path(workdir), say, read_only
    self.pending = None
    if jax.process_index() == 0 and (self.root / "checkpoints").exists() and not read_only:
      self._set_aside_unfinished()
    options = ocp.CheckpointManagerOptions(max_to_keep=None if read_only else keep, step_prefix=None, cleanup_tmp_directories=not read_only,
                                           create=not read_only, read_only=read_only)
    self.manager = ocp.CheckpointManager(self.root.resolve() / "checkpoints", options=options)

  def save(self, step, items, meta):
    """Starts saving: items (name -> pytree of arrays) and meta (JSON). Raises OSError where the disk is full, the step before being intact."""
    self.settle()
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    self.manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))
    self.pending = step

  def settle(self):
    """Waits for a save under way, and writes its manifest."""
    if self.pending is None:
      return
    step, self.pending = self.pending, None
    try:
      self.manager.wait_until_finished()
    except Exception as error:
      raise OSError(f"step {step} could not be saved ({str(error).splitlines()[0][:200]}); the checkpoint before it is intact") from None
    if jax.process_index() == 0:
      write_json(self._manifest(step), self._checksums(step))
      for path in (self.root / "manifests").iterdir():
        if path.suffix == ".json" and not (self.root / "checkpoints" / path.stem).exists():
          path.unlink()

  def poll(self):
    """Writes the manifest of a save that has ended meanwhile: call it often, so that a kill costs little."""
    if self.pending is not None and not self.manager.is_saving_in_progress():
      self.settle()

  def latest(self):
    """The newest step that is whole, or None. Damaged ones are named and, unless `read_only`, set aside. Of several processes the first looks."""
    if jax.process_count() == 1 or self.read_only:
      return self._newest_whole()
    step = self._newest_whole() if jax.process_index() == 0 else None
    ocp.multihost.get_barrier_sync_fn()(key=f"looked for checkpoints in {self.root}", timeout_ms=24 * 3600 * 1000)
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    self.manager.reload()
    return None if step < 0 else step

  def _newest_whole(self):
    steps = sorted(self.manager.all_steps(), reverse=True)
    for step, before in itertools.zip_longest(steps, steps[1:]):
      damage = self._damage(step)
      if damage is None:
        return step
      self.say(f"checkpoint {step} is damaged ({damage}); " + ("no other is left" if before is None else "going back to the one before"))
      if not self.read_only:
        self._set_aside(step)
        self.manager.reload()
    return None

  def meta(self, step):
    """What `save` was given as meta."""
    return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def shapes(self, step, name):
    """An item as a tree of what has a `.shape`, without reading its arrays."""
    with ocp.StandardCheckpointer() as reader:
      return reader.metadata(self.root.resolve() / "checkpoints" / str(step) / name).item_metadata.tree

  def restore(self, step, targets):
    """Items by name, each a tree like its target: jax.ShapeDtypeStructs, with shardings where they matter."""
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    restored = self.manager.restore(step, args=ocp.args.Composite(**args))
    return {name: restored[name] for name in targets}

  def close(self):
    self.settle()
    self.manager.close()

  def _manifest(self, step):
    return self.root / "manifests" / f"{step}.json"

  def _files(self, step):
    root = self.root / "checkpoints" / str(step)
    return {str(path.relative_to(root)): path for path in sorted(_walk(root))}

  def _checksums(self, step):
    return {name: [len(data := path.read_bytes()), zlib.crc32(data)] for name, path in self._files(step).items()}

  def _damage(self, step):
    """What is wrong with a step, or None."""
    if not self._manifest(step).exists():
      return "it was not finished"
    try:
      wanted = read_json(self._manifest(step))
    except BadInput:
      return "its manifest cannot be read"
    found = self._files(step)
    for name, (size, crc) in wanted.items():
      if name not in found:
        return f"{name} is missing"
      data = found[name].read_bytes()
      if len(data) != size:
        return f"{name} has {len(data)} bytes of {size}"
      if zlib.crc32(data) != crc:
        return f"{name} has a wrong checksum"
    return None

  def _set_aside(self, step):
    target = self.root / "damaged" / str(step)
    if jax.process_index() == 0:
      target.parent.mkdir(exist_ok=True)
      if target.exists():
        target.rmtree()
      (self.root / "checkpoints" / str(step)).rename(target)
      self._manifest(step).unlink(missing_ok=True)

  def _set_aside_unfinished(self):
    """What a kill in the middle of a save left: temporary folders, which nothing reads again."""
    for path in (self.root / "checkpoints").iterdir():
      if "orbax-checkpoint-tmp" in path.name:
        path.rmtree()


def _walk(directory):
  """All files below a directory, local or in a bucket."""
  for path in directory.iterdir():
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path


def load_weights(workdir, which="ema", target=None, say=print, *, mapped=False, only=False):
  """Weights of a work directory, keyed as they were trained ("dit", "text"): -> (tree, step).

  From its newest whole checkpoint, `which` being "ema" or "params"; or, where there is none, from W/model/ (an exported or
  shipped model). `target`: a tree of ShapeDtypeStructs with shardings; None gives arrays on the first device, or, `mapped`, those of W/model as
  they are stored, read when they are looked at. `only`: of W/model what `target` names at the top, and no more.
  """
  workdir = epath.Path(workdir)
  if (workdir / "checkpoints").exists():
    checkpoints = Checkpoints(workdir, say=say, read_only=True)
    step = checkpoints.latest()
    if step is not None:
      if target is not None:
        _check_shapes(workdir, checkpoints.shapes(step, which), target)
      tree = checkpoints.restore(step, {which: target})[which]
      checkpoints.close()
      return tree, step
    checkpoints.close()
  if (workdir / "model").exists():
    config, tree = load_part(workdir / "model", None)
    if only:
      tree = {name: tree.get(name, {}) for name in target}
    if target is not None:
      _check_shapes(workdir, tree, target)
      return place(tree, target), config.get("step", 0)
    return tree if mapped else jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree), config.get("step", 0)
  raise BadInput(f"{workdir} holds no checkpoint and no model; train one there (python -m launch.train) or name another --workdir")


def _check_shapes(workdir, found, target):
  """BadInput names the first weight that is missing, too many, or of another shape than the model's."""
  found, target = ({name: tuple(leaf.shape) for name, leaf in flatten(tree).items()} for tree in (found, target))
  for name in sorted(found.keys() | target.keys()):
    if found.get(name) != target.get(name):
      raise BadInput(f"{workdir} holds the weights of another model: {name} is {found.get(name, 'missing')} there, and "
                     f"{target.get(name, 'not a weight')} here; give the model that it was trained as, with its tokenizer")


def identity(workdir, which="ema"):
  """A short checksum of what a work directory would sample with: its newest checkpoint, or its model, and its VAE."""
  workdir, crc = epath.Path(workdir), zlib.crc32(which.encode())
  steps = sorted((workdir / "manifests").glob("*.json"), key=lambda path: int(path.stem))
  if steps:
    crc = zlib.crc32(steps[-1].read_bytes(), crc)
  for part in ("model", "vae", "text"):
    if (workdir / part).exists():
      crc = zlib.crc32(fingerprint(workdir / part).encode(), crc)
  return f"{crc:08x}"
