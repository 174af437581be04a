"""Two layouts of the same weights as one table, read in either direction.

A row says of one of our arrays which tensors of theirs it is made of, and how the axes lie. Axes are words of single letters:
"(Nkp) D" is a matrix whose first axis is N, k, p merged, "D N (pk)" the same numbers as three axes, the last one merged the other
way round; the letter o is an axis of length 1. `{}` in a name stands for the number of the layer: our weights of all layers are one
array, layers first. `parts` (a slice) takes some entries of their second axis, for a tensor that we keep as two.
"""

import dataclasses
import math

import numpy as np

from sora_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our arrays, `path` in nested dicts, and their tensors: one, or `depth` of them where `name` has a {}."""

  path: tuple
  name: str
  theirs: str  # axes
  ours: str
  sizes: dict  # length of each letter
  depth: int = 0
  parts: slice | None = None  # of their second axis; the letter there has the length of this part

  @property
  def names(self):
    return [self.name.format(i) for i in range(self.depth)] if "{}" in self.name else [self.name]

  @property
  def our_shape(self):
    one = _shape(self.ours, self.sizes)
    return (self.depth, *one) if "{}" in self.name else one

  def of(self, params):
    """Our array in a nested dict."""
    for key in self.path:
      params = params[key]
    return params

  def from_diffusers(self, tensor):
    """One tensor of theirs -> our array, or one layer of it."""
    return rearrange(tensor if self.parts is None else tensor[:, self.parts], self.theirs, self.ours, self.sizes)

  def to_diffusers(self, array):
    """The inverse of `from_diffusers`; of a part, that part."""
    return rearrange(array, self.ours, self.theirs, self.sizes)


def _letters(axes):
  return [c for c in axes if c.isalpha() and c != "o"]


def _shape(axes, sizes):
  return tuple(math.prod(sizes[c] for c in _letters(word)) for word in axes.split())


def rearrange(x, source, target, sizes):
  """x with axes `source` -> axes `target`; `sizes` gives the length of each letter. Raises ValueError where x has another shape."""
  if tuple(x.shape) != _shape(source, sizes):
    raise ValueError(f"shape {tuple(x.shape)} where {_shape(source, sizes)} was expected ({source})")
  order = [_letters(source).index(c) for c in _letters(target)]
  return x.reshape([sizes[c] for c in _letters(source)]).transpose(order).reshape(_shape(target, sizes))


def their_shapes(rows):
  """rows -> {their name: shape}."""
  shapes = {}
  for row in rows:
    for name in row.names:
      shape = list(_shape(row.theirs, row.sizes))
      if row.parts is not None and name in shapes:
        shape[1] += shapes[name][1]
      shapes[name] = tuple(shape)
  return shapes


def check(tensors, rows):
  """BadInput names what is missing, left over, or of another shape; nothing is read of `tensors` that can tell its shapes (files.Tensors)."""
  shapes = their_shapes(rows)
  missing, extra = sorted(shapes.keys() - set(tensors)), sorted(set(tensors) - shapes.keys())
  if missing or extra:
    wanted = f" (shape {shapes[missing[0]]})" if missing else ""
    raise BadInput(
      f"weights: {len(missing)} tensors missing {missing[:3]}{wanted}, {len(extra)} not known {extra[:3]}; is config.json of this model?"
    )
  tell = getattr(tensors, "shape", lambda name: tuple(np.shape(tensors[name])))
  for name, shape in shapes.items():
    if tell(name) != shape:
      raise BadInput(f"weights: {name} has shape {tell(name)} where {shape} was expected; is config.json of this model?")


def stream(tensors, rows):
  """Mapping name -> array in their layout -> iterator of (row, our array or a layer of it), in the order of rows, one tensor in memory at a time."""
  for row in rows:
    for name in row.names:
      yield row, row.from_diffusers(np.asarray(tensors[name]))


def from_diffusers(tensors, rows, dtype=np.float32):
  """Mapping name -> array in their layout -> nested dict of ours. Raises BadInput that names what is missing, left over or of another shape."""
  check(tensors, rows)
  params = {}
  for row in rows:
    *parents, last = row.path
    node = params
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = np.empty(row.our_shape, dtype)
    layers = node[last] if "{}" in row.name else node[last][None]
    for layer, (_, value) in zip(layers, stream(tensors, [row]), strict=True):
      layer[...] = value
  return params


def to_diffusers(params, rows):
  """Nested dict of ours -> iterator of (name, numpy array) in their layout, one at a time."""
  held = []
  for at, row in enumerate(rows):
    value = row.of(params)
    for i, name in enumerate(row.names):
      one = row.to_diffusers(np.asarray(value[i] if "{}" in row.name else value))
      if row.parts is not None:
        held.append(one)
        if at + 1 < len(rows) and rows[at + 1].name == row.name:
          continue
        one, held = np.concatenate(held, 1), []
      yield name, np.ascontiguousarray(one)
