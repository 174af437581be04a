"""Where arrays live: mesh axes, logical axes, and the one table between them.

Models name the axes of their arrays ("embed", "act_length"); only this file knows devices. The mesh always has four axes:
  data     rows of the batch, weights whole            fsdp    rows of the batch, weights cut (ZeRO-3)
  context  the tokens of a row                         tensor  heads and mlp width (Megatron)
A `Layout` is passed by hand, so it is part of every jit cache key; no context managers, no globals.
"""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")

RULES = (
    # weights
    ("embed", "fsdp"), ("mlp", "tensor"), ("heads", "tensor"), ("head_dim", None), ("patch", None), ("layers", None),
    ("vocab", "tensor"), ("text_embed", "fsdp"), ("time", None), ("conv_in", "fsdp"),
    ("conv_out", None),      # over "tensor" XLA's partitioner gives wrong gradients of the VAE (tests/test_train_vae.py tells)
    # activations
    ("act_batch", ("data", "fsdp")), ("act_length", "context"), ("act_text", None), ("act_embed", None),
    ("act_heads", "tensor"), ("act_head_dim", None), ("act_mlp", "tensor"),
)


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
    """NamedSharding of an array of this shape: as `sharding`, but an axis that its devices do not divide stays whole, and so does one
    whose devices already cut an axis before it."""
    placed, used = [], set()
    for size, cut in zip(shape, (*self.spec(*axes), *[None] * (len(shape) - len(axes))), strict=True):
      names = {cut} if isinstance(cut, str) else set(cut or ())
      fits = names and not names & used and size % self.ways(cut) == 0
      placed.append(cut if fits else None)
      used |= names if fits else set()
    return NamedSharding(self.mesh, PartitionSpec(*placed))

  def ways(self, mesh_axes):
    """How many parts an axis is cut into that lies on these mesh axes (a name or a tuple of names)."""
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return int(np.prod([self.mesh.shape[name] for name in names]))


def make_mesh(data=None, fsdp=1, context=1, tensor=1, devices=None):
  """A mesh over `devices` (default: all, those of a process together, so that it has rows of its own to load). `data=None` takes what the other
  axes leave. ValueError when they do not fit."""
  devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id)) if devices is None else devices
  inner = fsdp * context * tensor
  if inner < 1 or len(devices) % inner or (data is not None and data * inner != len(devices)):
    raise ValueError(f"a mesh of data={data} fsdp={fsdp} context={context} tensor={tensor} does not fit {len(devices)} devices: "
                     "their product must be the number of devices")
  shape = (len(devices) // inner, fsdp, context, tensor)
  return Mesh(np.asarray(devices).reshape(shape), AXES)


def single_device():
  """A Layout on the first device alone."""
  return Layout(make_mesh(devices=jax.devices()[:1]))


def param(module, name, init, shape, axes):
  """A weight of a linen module that says its logical axes. Returns the plain array."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape)


def unbox(variables):
  """Variables as `init` returns them -> plain arrays."""
  return nn.meta.unbox(variables)


def shardings(boxed, layout):
  """Tree of boxed weights (arrays or shapes, as `init` or `eval_shape(init)` return them) -> tree of NamedSharding."""
  def place(leaf):
    if isinstance(leaf, nn.LogicallyPartitioned):
      return layout.fitted(leaf.value.shape, *leaf.names)
    return layout.fitted(leaf.shape)
  return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def targets(boxed, layout=None, dtype=None):
  """Tree of boxed weights -> ShapeDtypeStructs to restore into: where they live (without a layout: not said), in `dtype` instead of theirs."""
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), unbox(boxed))
  if layout is None:
    return shapes
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings(boxed, layout))
