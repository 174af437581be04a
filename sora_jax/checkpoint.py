"""Checkpoints that can be trusted: Orbax, with a manifest of checksums for each step.

  W/checkpoints/STEP/           Orbax, one item each: params, ema, opt, and meta (JSON: step, data cursor,
                                ...)
  W/manifests/STEP.json         size and checksum of every file of the step, written once the step is whole

Orbax renames a step into place when it is whole, but does not notice a flipped bit or a file cut short: so a
step counts only with its manifest, and is checked against it before it is restored; a damaged one is set
aside and the one before is taken.
"""

import itertools
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from sora_jax.errors import BadInput
from sora_jax.files import read_json, write_json


class Checkpoints:
  """The checkpoints of one work directory. `say` takes the lines a user should read.

  read_only: for whoever only takes weights from it; what a trainer is writing there at this moment is left
  alone.
  """

  def __init__(self, workdir, *, keep=3, say=lambda line: None, read_only=False):
    self.root, self.say, self.read_only = epath.Path(workdir), say, read_only
    self.pending = None
    if jax.process_index() == 0 and (self.root / "checkpoints").exists() and not read_only:
      self._set_aside_unfinished()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      step_prefix=None,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
    )
    self.manager = ocp.CheckpointManager(self.root.resolve() / "checkpoints", options=options)

  def save(self, step, items, meta):
    """Starts saving: items (name -> pytree of arrays) and meta (JSON).

    Raises OSError where the disk is full, the step before being intact.
    """
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
      raise OSError(
        f"step {step} could not be saved ({str(error).splitlines()[0][:200]}); the checkpoint before it is "
        "intact"
      ) from None
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
    """The newest step that is whole, or None. Damaged ones are named and, unless `read_only`, set aside.

    Of several processes the first looks.
    """
    if jax.process_count() == 1 or self.read_only:
      return self._newest_whole()
    step = self._newest_whole() if jax.process_index() == 0 else None
    ocp.multihost.get_barrier_sync_fn()(
      key=f"looked for checkpoints in {self.root}", timeout_ms=24 * 3600 * 1000
    )
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    self.manager.reload()
    return None if step < 0 else step

  def _newest_whole(self):
    steps = sorted(self.manager.all_steps(), reverse=True)
    for step, before in itertools.zip_longest(steps, steps[1:]):
      damage = self._damage(step)
      if damage is None:
        return step
      self.say(
        f"checkpoint {step} is damaged ({damage}); "
        + ("no other is left" if before is None else "going back to the one before")
      )
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
    return {
      name: [len(data := path.read_bytes()), zlib.crc32(data)] for name, path in self._files(step).items()
    }

  def _damage(self, step):
    """What is wrong with a step, or None."""
    if not self._manifest(step).exists():
      return "it was not finished"
    try:
      wanted = read_json(self._manifest(step))
    except BadInput:
      return "its manifest cannot be read"
    present = self._files(step)
    for name, (size, crc) in wanted.items():
      if name not in present:
        return f"{name} is missing"
      data = present[name].read_bytes()
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
