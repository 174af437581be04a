"""W/manifests/STEP.json: size and CRC-32 of every file of a checkpoint, {"params/d/0a1b": [size, crc], ...}.

Hashing and checking are divided over the processes of a job. Orbax gives each process a folder of its own,
`ITEM/ocdbt.process_N/`, which process N hashes; process 0 hashes the rest. Process N > 0 leaves its part in
W/manifests/STEP.N.part, and process 0 puts the manifest together. That needs the shared directory alone: no
process waits for another while it trains. Before a restore each process checks an equal share of the bytes,
and all agree on the result.
"""

import re
import time
import zlib

import jax
from etils import epath

from sora_jax.errors import BadInput
from sora_jax.files import pieces_of, read_json, write_json
from sora_jax.multihost import from_all

OWN = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")


class Manifests:
  """The manifests of one work directory, for this process of a job."""

  def __init__(self, workdir):
    self.root = epath.Path(workdir)
    self.process, self.count = jax.process_index(), jax.process_count()

  def path(self, step):
    return self.root / "manifests" / f"{step}.json"

  def clear_parts(self):
    """Removes the parts that a kill left; they may be of other bytes than the next save of that step."""
    if self.path(0).parent.exists():
      for path in self.path(0).parent.glob("*.part*"):
        path.unlink(missing_ok=True)

  def hash_own(self, step):
    """Hashes what this process wrote of a step; of several processes all but the first leave it as a part."""
    root = self.root / "checkpoints" / str(step)
    own = {name: checksum(root / name) for name in sorted(_names(root)) if self._owner(name) == self.process}
    if self.process:
      write_json(self._part(step, self.process), own, depth=1)
    return own

  def has_parts(self, step):
    """Did all other processes leave their part?"""
    return all(self._part(step, process).exists() for process in range(1, self.count))

  def write(self, step, own):
    """Process 0: the manifest, from its own checksums and the parts; waits for these. Drops old manifests."""
    while not self.has_parts(step):
      time.sleep(0.05)
    parts = [self._part(step, process) for process in range(1, self.count)]
    merged = own | {name: entry for part in parts for name, entry in read_json(part).items()}
    write_json(self.path(step), dict(sorted(merged.items())))
    for part in parts:
      part.unlink(missing_ok=True)
    for path in self.path(step).parent.glob("*.json"):
      if not (self.root / "checkpoints" / path.stem).exists():
        path.unlink(missing_ok=True)

  def damage(self, step):
    """What is wrong with a step, or None; the same in all processes, which call this together."""
    return next(filter(None, from_all(self._damage_of_share(step) or "")), None)

  def _damage_of_share(self, step):
    if not self.path(step).exists():
      return "it was not finished"
    try:
      wanted = read_json(self.path(step))
    except BadInput:
      return "its manifest cannot be read"
    largest_first = sorted(wanted, key=lambda name: (-wanted[name][0], name))
    for name in largest_first[self.process :: self.count]:
      try:
        size, crc = checksum(self.root / "checkpoints" / str(step) / name)
      except FileNotFoundError:
        return f"{name} is missing"
      except OSError as error:
        return f"{name} cannot be read: {error}"
      if size != wanted[name][0]:
        return f"{name} has {size} bytes of {wanted[name][0]}"
      if crc != wanted[name][1]:
        return f"{name} has a wrong checksum"
    return None

  def _part(self, step, process):
    return self.path(step).with_name(f"{step}.{process}.part")

  def _owner(self, name):
    """The process that hashes a file: the one that wrote it, or the first."""
    match = OWN.search(name)
    return int(match[1]) % self.count if match else 0


def checksum(path):
  """[size, CRC-32] of a file."""
  size, crc = 0, 0
  for piece in pieces_of(path):
    size, crc = size + len(piece), zlib.crc32(piece, crc)
  return [size, crc]


def _names(root):
  """The names of all files below a directory, local or in a bucket."""

  def walk(directory, prefix):
    for path in directory.iterdir():
      if path.is_dir():
        yield from walk(path, f"{prefix}{path.name}/")
      else:
        yield prefix + path.name

  return walk(root, "")
