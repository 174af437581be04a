"""Checkpoints that can be trusted: Orbax, with a manifest of checksums for each step.

  W/checkpoints/STEP/           Orbax, one item each: params, ema, opt, and meta (JSON: step, data cursor,
                                ...)
  W/manifests/STEP.json         size and checksum of every file of the step, written once the step is whole

Orbax renames a step into place when it is whole, but does not notice a flipped bit or a file cut short: so a
step counts only with its manifest (manifests.py), and is checked against it before it is restored; a damaged
one is set aside and the one before is taken. Of several processes all call the methods below together.
"""

import concurrent.futures
import itertools

import jax
import orbax.checkpoint as ocp
from etils import epath

from sora_jax.files import copy_tree, is_local
from sora_jax.manifests import Manifests
from sora_jax.multihost import from_all


class Checkpoints:
  """The checkpoints of one work directory. `say` takes the lines a user should read.

  read_only: for whoever only takes weights from it; what a trainer is writing there at this moment is left
  alone.
  """

  def __init__(self, workdir, *, keep=3, say=lambda line: None, read_only=False):
    self.root, self.say, self.read_only = epath.Path(workdir), say, read_only
    if is_local(workdir):
      self.root = self.root.resolve()
    self.manifests, self.first = Manifests(workdir), jax.process_index() == 0
    self.pending, self._checksums = None, None  # the step being saved; the future of its checksums
    self._hasher = concurrent.futures.ThreadPoolExecutor(1)
    if self.first and not read_only:
      self._remove_unfinished()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      step_prefix=None,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
    )
    self.manager = ocp.CheckpointManager(self.root / "checkpoints", options=options)

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
    self._hash()
    own, step = self._checksums.result(), self.pending
    self.pending, self._checksums = None, None
    if self.first:
      self.manifests.write(step, own)

  def poll(self):
    """Moves the manifest of a save on, without waiting for anything: call it often, so that a kill costs
    little.
    """
    if self.pending is None or self.manager.is_saving_in_progress():
      return
    self._hash()
    if self._checksums.done() and (not self.first or self.manifests.has_parts(self.pending)):
      self.settle()

  def _hash(self):
    """Begins to hash the step being saved, in a thread, once it is whole."""
    if self._checksums is not None:
      return
    try:
      self.manager.wait_until_finished()
    except Exception as error:
      step, self.pending = self.pending, None
      raise OSError(
        f"step {step} could not be saved ({str(error).splitlines()[0][:2000]}); the checkpoint before it is "
        "intact"
      ) from None
    self._checksums = self._hasher.submit(self.manifests.hash_own, self.pending)

  def latest(self):
    """The newest step that is whole, or None. Damaged ones are named and, unless `read_only`, set aside."""
    steps = from_all(sorted(self.manager.all_steps(), reverse=True))[0]
    for step, before in itertools.zip_longest(steps, steps[1:]):
      damage = self.manifests.damage(step)
      if damage is None:
        return step
      self.say(
        f"checkpoint {step} is damaged ({damage}); "
        + ("no other is left" if before is None else "going back to the one before")
      )
      if not self.read_only:
        if self.first:
          self._set_aside(step)
        from_all(None)  # all see it gone
        self.manager.reload()
    return None

  def meta(self, step):
    """What `save` was given as meta."""
    return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def shapes(self, step, name):
    """An item as a tree of what has a `.shape`, without reading its arrays."""
    with ocp.StandardCheckpointer() as reader:
      return reader.metadata(self.root / "checkpoints" / str(step) / name).item_metadata.tree

  def restore(self, step, targets):
    """Items by name, each a tree like its target: jax.ShapeDtypeStructs, with shardings where they matter."""
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    restored = self.manager.restore(step, args=ocp.args.Composite(**args))
    return {name: restored[name] for name in targets}

  def close(self):
    self.settle()
    self._hasher.shutdown()
    self.manager.close()

  def _set_aside(self, step):
    """Into W/damaged; its manifest goes first, so that it never stands beside another save of that step."""
    source, target = self.root / "checkpoints" / str(step), self.root / "damaged" / str(step)
    self.manifests.path(step).unlink(missing_ok=True)
    if target.exists():
      target.rmtree()
    if is_local(source):
      target.parent.mkdir(exist_ok=True)
      source.rename(target)
    else:
      copy_tree(source, target)
      source.rmtree()

  def _remove_unfinished(self):
    """What a kill in the middle of a save left: temporary folders and parts, which nothing reads again."""
    self.manifests.clear_parts()
    if (self.root / "checkpoints").exists():
      for path in (self.root / "checkpoints").iterdir():
        if "orbax-checkpoint-tmp" in path.name:
          path.rmtree()
