"""Where arrays live: mesh axes, logical axes, and the one table between them.

Models name the axes of their arrays ("embed", "act_length"); only this file knows devices. The mesh always
has four axes:
  data     rows of the batch, weights whole            fsdp    rows of the batch, weights cut (ZeRO-3)
  context  the tokens of a row, weights cut            tensor  heads and mlp width (Megatron)
Where there are fewer rows than devices of fsdp, it cuts the tokens of a row, too, as context does.
A `Layout` is passed by hand, so it is part of every jit cache key; no context managers, no globals.

An axis that is to be cut over several mesh axes is cut over the first of them that divide it. What is left
whole is silent for activations: a short row is as it is. For weights `uncut_weights` lists it, and a large
weight is an error, as every device would hold all of it.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sora_jax.errors import BadInput

AXES = ("data", "fsdp", "context", "tensor")

RULES = (
  # weights
  ("embed", ("fsdp", "context")),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("head_dim", None),
  ("patch", None),
  ("layers", None),
  ("vocab", "tensor"),
  ("text_embed", ("fsdp", "context")),
  ("time", None),
  ("conv_in", ("fsdp", "context")),
  # over "tensor" XLA's partitioner gives wrong gradients of the VAE (tests/test_train_vae.py tells)
  ("conv_out", None),
  # activations
  ("act_batch", ("data", "fsdp")),
  ("act_length", ("fsdp", "context")),  # fsdp where the rows leave it
  ("act_text", None),
  # products with the text add up over the devices that cut its weights
  ("act_text_embed", ("fsdp", "context")),
  ("act_embed", None),
  ("act_heads", "tensor"),
  ("act_head_dim", None),
  ("act_mlp", "tensor"),
  # frames of the VAE; not over "tensor", as conv_out
  ("act_height", ("fsdp", "context")),
  ("act_width", ("fsdp", "context")),
)

LARGE = 64_000_000  # bytes; a weight above it must be cut along every axis that the rules cut


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that place named axes on it."""

  mesh: Mesh
  rules: tuple = RULES

  def spec(self, *axes):
    """PartitionSpec of logical axes (None: not cut). A misspelt axis is an error, not a replica."""
    table = dict(self.rules)
    unknown = [a for a in axes if a is not None and a not in table]
    if unknown:
      raise KeyError(f"no sharding rule for axes {unknown}; known: {sorted(table)}")
    return PartitionSpec(*(None if a is None else table[a] for a in axes))

  def sharding(self, *axes):
    """NamedSharding of logical axes on this mesh."""
    return NamedSharding(self.mesh, self.spec(*axes))

  def constrain(self, x, *axes):
    """x, kept where its axes say inside jit. An axis that the devices do not divide stays whole."""
    return jax.lax.with_sharding_constraint(x, self.fitted(x.shape, *axes))

  def fitted(self, shape, *axes):
    """NamedSharding of an array of this shape, axis after axis.

    As `sharding`, but each axis is cut only over the first of its mesh axes that divide it together, without
    those that cut an axis before it, and those of one device. `uncut` tells what that leaves whole.
    """
    placed, used = [], set()
    for size, cut in zip(shape, (*self.spec(*axes), *[None] * (len(shape) - len(axes))), strict=True):
      names = [name for name in names_in(cut) if name not in used and self.mesh.shape[name] > 1]
      while size % self.ways(names):
        names.pop()
      placed.append(tuple(names) if len(names) > 1 else names[0] if names else None)
      used.update(names)
    return NamedSharding(self.mesh, PartitionSpec(*placed))

  def gathered(self, x, *axes):
    """A weight, whole but for its axes over tensor, for products with activations that are cut over the same
    devices. Its gradient is scattered again. Said by hand, it is gathered once, forward and backward.
    """
    if self.mesh.shape["fsdp"] * self.mesh.shape["context"] == 1:
      return x
    x, cut = self.as_stored(x, *axes), self.fitted(x.shape, *axes)
    whole = PartitionSpec(*(name if name == "tensor" else None for name in cut.spec))
    return _gathered(x, cut, NamedSharding(self.mesh, whole))

  def as_stored(self, x, *axes):
    """A weight of one layer, and its gradient, as they lie in the memory of a TPU by default.

    Of a weight [D, N, K], XLA would rather have a copy of all layers with N first for the forward pass, and
    one with D last for the gradient: 2.9 GiB of them for Wan 14B on 4 chips. It does not look through a
    kernel that copies a layer.
    """
    if x.ndim < 3 or self.mesh.devices.flat[0].platform != "tpu":
      return x
    return _as_stored(x, self.fitted(x.shape, *axes))

  def uncut(self, shape, *axes):
    """Axes of an array of this shape that are cut less than the rules say, and no other axis makes up for it.

    Returns [(axis, its size, "tensor=8"), ...].
    """
    placed = self.fitted(shape, *axes).spec
    used = {name for cut in placed for name in names_in(cut)}
    return [
      (axis, size, " x ".join(f"{name}={self.mesh.shape[name]}" for name in names_in(cut)))
      for axis, size, cut in zip(axes, shape, self.spec(*axes))
      if any(self.mesh.shape[name] > 1 for name in set(names_in(cut)) - used)
    ]

  def with_rules(self, **rules):
    """The same mesh, with other rules for these axes."""
    return dataclasses.replace(self, rules=tuple((dict(self.rules) | rules).items()))

  def ways(self, mesh_axes):
    """How many parts an axis is cut into that lies on these mesh axes (a name or a tuple of names)."""
    return int(np.prod([self.mesh.shape[name] for name in names_in(mesh_axes)]))


def _copied(x, cut):
  """The identity, a kernel of a TPU."""

  def kernel(x_ref, y_ref):
    pltpu.sync_copy(x_ref, y_ref)

  def copy(x):
    anywhere, shape = pl.BlockSpec(memory_space=pl.ANY), jax.ShapeDtypeStruct(x.shape, x.dtype)
    cost = pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * x.nbytes)
    run = pl.pallas_call(kernel, in_specs=[anywhere], out_specs=anywhere, out_shape=shape, cost_estimate=cost)
    return run(x)

  return jax.shard_map(copy, mesh=cut.mesh, in_specs=cut.spec, out_specs=cut.spec, check_vma=False)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _as_stored(x, cut):
  return _copied(x, cut)


def _as_stored_forward(x, cut):
  return _copied(x, cut), None


def _as_stored_backward(cut, _, gradient):
  return (_copied(jax.lax.with_sharding_constraint(gradient, cut), cut),)


_as_stored.defvjp(_as_stored_forward, _as_stored_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, cut, whole):
  return jax.lax.with_sharding_constraint(x, whole)


def _gathered_forward(x, cut, whole):
  return _gathered(x, cut, whole), None


def _gathered_backward(cut, whole, _, gradient):
  return (jax.lax.with_sharding_constraint(gradient, cut),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def names_in(mesh_axes):
  """An entry of a PartitionSpec (None, a name, a tuple of names) -> tuple of names."""
  return () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def make_mesh(data=None, fsdp=1, context=1, tensor=1, devices=None):
  """A mesh over `devices` (default: all, those of a process together, so that it has rows of its own to
  load). `data=None` takes what the other axes leave. ValueError when they do not fit."""
  devices = (
    sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if devices is None
    else devices
  )
  inner = fsdp * context * tensor
  if inner < 1 or len(devices) % inner or (data is not None and data * inner != len(devices)):
    raise ValueError(
      f"a mesh of data={data} fsdp={fsdp} context={context} tensor={tensor} does not fit {len(devices)} "
      "devices: their product must be the number of devices"
    )
  shape = (len(devices) // inner, fsdp, context, tensor)
  return Mesh(np.asarray(devices).reshape(shape), AXES)


def param(module, name, init, shape, axes):
  """A weight of a linen module that says its logical axes. Returns the plain array."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape)


def unbox(variables):
  """Variables as `init` returns them -> plain arrays."""
  return nn.meta.unbox(variables)


def is_box(leaf):
  """Is this a weight with its logical axes, as `param` makes it?"""
  return isinstance(leaf, nn.LogicallyPartitioned)


def uncut_weights(boxed, layout, dtype=None):
  """Tree of boxed weights -> list of lines to show, one for each axis that its devices do not divide, so that
  it is not cut over all of them.

  BadInput where such a weight has more than `LARGE` bytes (in `dtype`, or its own).
  """
  names_by_line = {}
  for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=is_box):
    if not is_box(leaf):
      continue
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    num_bytes = leaf.value.size * np.dtype(dtype or leaf.value.dtype).itemsize
    for axis, size, devices in layout.uncut(leaf.value.shape, *leaf.names):
      if num_bytes > LARGE:
        raise BadInput(
          f"{name}: axis {axis} of {size} is not a multiple of {devices}, and the weight has "
          f"{num_bytes / 1e6:.0f} MB; choose another mesh"
        )
      line = f"axis {axis} of {size} is not a multiple of {devices} and is not cut over all of them"
      names_by_line.setdefault(line, []).append(name)
  lines = []
  for line, names in names_by_line.items():
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    lines.append(f"{names[0]}{more}: {line}")
  return lines


def shardings(boxed, layout, dtype=None):
  """Tree of boxed weights (arrays or shapes, as `init` or `eval_shape(init)` return them) -> tree of
  NamedSharding.

  BadInput where a large weight does not fit the mesh (`uncut_weights`, in `dtype` or their own).
  """
  uncut_weights(boxed, layout, dtype)

  def sharding(leaf):
    return layout.fitted(leaf.value.shape, *leaf.names) if is_box(leaf) else layout.fitted(leaf.shape)

  return jax.tree.map(sharding, boxed, is_leaf=is_box)


def targets(boxed, layout=None, dtype=None):
  """Tree of boxed weights -> ShapeDtypeStructs to restore into, in `dtype` or their own; with shardings if
  there is a layout.

  BadInput as in `shardings`.
  """
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), unbox(boxed))
  if layout is None:
    return shapes

  def placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(placed, shapes, shardings(boxed, layout, dtype))
