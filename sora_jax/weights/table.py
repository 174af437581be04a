"""Tables that convert weights between our layout and that of another framework, in both directions.

A row describes one of our arrays: the tensors of the other framework ("theirs") that it is made of, and the
axes of both. Axes are words of single letters. "(Nkp) D" is a matrix whose first axis is N, k and p merged;
"D N (pk)" has the same numbers as three axes, the last of which merges p and k; the letter o is an axis of
length 1. `{}` in a name stands for the number of the layer: our weights of all layers are one array with a
leading layer axis. `parts` (a slice) selects entries of their second axis, for a tensor that we keep as two.
"""

import dataclasses
import math

import numpy as np

from sora_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Row:
  """One of our arrays, at `path` in nested dicts, and their tensors.

  There is one tensor, or `depth` of them where `name` has a {}.
  """

  path: tuple
  name: str
  theirs: str  # their axes
  ours: str  # our axes
  sizes: dict  # length of each letter
  depth: int = 0
  parts: slice | None = None  # of their second axis; its letter has the length of this part

  @property
  def stacked(self):
    """Whether our array has a leading layer axis."""
    return "{}" in self.name

  @property
  def names(self):
    return [self.name.format(i) for i in range(self.depth)] if self.stacked else [self.name]

  @property
  def our_shape(self):
    shape = _shape(self.ours, self.sizes)
    return (self.depth, *shape) if self.stacked else shape

  def of(self, params):
    """Our array in the nested dict `params`."""
    for key in self.path:
      params = params[key]
    return params

  def from_diffusers(self, tensor):
    """One tensor of theirs -> our array, or one layer of it."""
    if self.parts is not None:
      tensor = tensor[:, self.parts]
    return rearrange(tensor, self.theirs, self.ours, self.sizes)

  def to_diffusers(self, array):
    """The inverse of `from_diffusers`; with `parts`, that part of their tensor."""
    return rearrange(array, self.ours, self.theirs, self.sizes)


def _letters(axes):
  return [c for c in axes if c.isalpha() and c != "o"]


def _shape(axes, sizes):
  return tuple(math.prod(sizes[c] for c in _letters(word)) for word in axes.split())


def rearrange(x, source, target, sizes):
  """x with axes `source` -> axes `target`. sizes: the length of each letter.

  Raises ValueError where x has another shape.
  """
  if tuple(x.shape) != _shape(source, sizes):
    raise ValueError(f"shape {tuple(x.shape)} where {_shape(source, sizes)} was expected ({source})")
  order = [_letters(source).index(c) for c in _letters(target)]
  return x.reshape([sizes[c] for c in _letters(source)]).transpose(order).reshape(_shape(target, sizes))


def their_shapes(rows):
  """Rows -> {their name: shape}."""
  shapes = {}
  for row in rows:
    for name in row.names:
      shape = list(_shape(row.theirs, row.sizes))
      if row.parts is not None and name in shapes:
        shape[1] += shapes[name][1]
      shapes[name] = tuple(shape)
  return shapes


def check(tensors, rows):
  """Raises BadInput, which names tensors that are missing, unknown or of another shape.

  No tensor is read where `tensors` has a method `shape` (files.Tensors).
  """
  shapes = their_shapes(rows)
  missing, extra = sorted(shapes.keys() - set(tensors)), sorted(set(tensors) - shapes.keys())
  if missing or extra:
    wanted = f" (shape {shapes[missing[0]]})" if missing else ""
    raise BadInput(
      f"weights: {len(missing)} tensors missing {missing[:3]}{wanted}, {len(extra)} not known {extra[:3]}; "
      "is config.json of this model?"
    )
  shape_of = getattr(tensors, "shape", lambda name: tuple(np.shape(tensors[name])))
  for name, shape in shapes.items():
    if shape_of(name) != shape:
      raise BadInput(
        f"weights: {name} has shape {shape_of(name)} where {shape} was expected; "
        "is config.json of this model?"
      )


def stream(tensors, rows):
  """Mapping of names to arrays in their layout -> iterator of (row, our array or a layer of it).

  Items are in the order of rows. One tensor is in memory at a time.
  """
  for row in rows:
    for name in row.names:
      yield row, row.from_diffusers(np.asarray(tensors[name]))


def from_diffusers(tensors, rows, dtype=np.float32):
  """Mapping of names to arrays in their layout -> nested dict of our arrays.

  Raises BadInput, which names tensors that are missing, unknown or of another shape.
  """
  check(tensors, rows)
  params = {}
  for row in rows:
    *parents, last = row.path
    node = params
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = np.empty(row.our_shape, dtype)
    layers = node[last] if row.stacked else node[last][None]
    for layer, (_, value) in zip(layers, stream(tensors, [row]), strict=True):
      layer[...] = value
  return params


def to_diffusers(params, rows):
  """Nested dict of our arrays -> iterator of (name, numpy array) in their layout, one at a time."""
  parts = []
  for at, row in enumerate(rows):
    value = row.of(params)
    for i, name in enumerate(row.names):
      tensor = row.to_diffusers(np.asarray(value[i] if row.stacked else value))
      if row.parts is not None:
        parts.append(tensor)
        if at + 1 < len(rows) and rows[at + 1].name == row.name:
          continue
        tensor, parts = np.concatenate(parts, 1), []
      yield name, np.ascontiguousarray(tensor)
