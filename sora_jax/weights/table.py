"""Two layouts of the same weights as one table, read in either direction.

A table has rows `(our path, their name, their axes, our axes)`. Axes are words of single letters: "(Nkp) D" is a matrix whose
first axis is N, k, p merged, "D N (pk)" the same numbers as three axes, the last one merged the other way round. `{}` in a name
stands for the number of the layer, and the letter o for an axis of length 1; our weights of all layers are one array, layers
first, under "blocks" or "layers".
"""

import math

import numpy as np

from sora_jax.errors import BadInput


def rearrange(x, source, target, sizes):
  """x with axes `source` -> axes `target`; `sizes` gives the length of each letter. Raises ValueError where x has another shape."""
  letters = lambda axes: [c for c in axes if c.isalpha() and c != "o"]  # noqa: E731
  shape = lambda axes: tuple(math.prod(sizes[c] for c in letters(word)) for word in axes.split())  # noqa: E731
  if tuple(x.shape) != shape(source):
    raise ValueError(f"shape {tuple(x.shape)} where {shape(source)} was expected ({source})")
  order = [letters(source).index(c) for c in letters(target)]
  return x.reshape([sizes[c] for c in letters(source)]).transpose(order).reshape(shape(target))


def to_ours(tensors, table, sizes, depth, dtype=np.float32):
  """Mapping name -> array in their layout -> nested dict of ours, one tensor in memory beside the result.

  Raises BadInput that names what is missing, left over or of another shape.
  """
  expected = {name for _, their, _, _ in table for name in _names(their, depth)}
  missing, extra = expected - set(tensors), set(tensors) - expected
  if missing or extra:
    raise BadInput(
      f"weights: {len(missing)} tensors missing {sorted(missing)[:3]}, {len(extra)} not known {sorted(extra)[:3]}; "
      "is config.json of this model?"
    )
  params = {}
  for path, their, their_axes, our_axes in table:
    names = _names(their, depth)
    out = None
    for i, name in enumerate(names):
      try:
        value = rearrange(np.asarray(tensors[name]), their_axes, our_axes, sizes)
      except ValueError as error:
        raise BadInput(f"weights: {name} has {error}; is config.json of this model?") from error
      if "{}" not in their:
        out = np.ascontiguousarray(value, dtype)
      else:
        out = np.empty((depth, *value.shape), dtype) if out is None else out
        out[i] = value
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = out
  return params


def to_theirs(params, table, sizes, depth):
  """Nested dict of ours -> iterator of (name, numpy array) in their layout, one at a time."""
  for path, their, their_axes, our_axes in table:
    value = params
    for key in path:
      value = value[key]
    for i, name in enumerate(_names(their, depth)):
      one = np.asarray(value[i] if "{}" in their else value)
      yield name, np.ascontiguousarray(rearrange(one, our_axes, their_axes, sizes))


def _names(their, depth):
  return [their.format(i) for i in range(depth)] if "{}" in their else [their]
