"""Layout: names to devices, by one table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sora_jax import layout
from sora_jax.errors import BadInput


def test_a_misspelt_axis_is_an_error():
  where = layout.Layout(layout.make_mesh())
  assert where.spec("act_batch", None, "embed") == PartitionSpec(("data", "fsdp"), None, "fsdp")
  with pytest.raises(KeyError, match="act_bach"):
    where.spec("act_bach")


def test_constrain_places_and_leaves_what_does_not_divide():
  where = layout.Layout(layout.make_mesh(data=2, fsdp=2, tensor=2))
  place = jax.jit(lambda x: where.constrain(x, "act_batch", "act_length", "act_mlp"))
  assert place(jnp.zeros((8, 3, 6))).addressable_shards[0].data.shape == (2, 3, 3)
  assert place(jnp.zeros((6, 3, 5))).addressable_shards[0].data.shape == (6, 3, 5)


def test_a_mesh_must_fit_the_devices():
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    layout.make_mesh(fsdp=3)


def test_layouts_are_part_of_a_cache_key():
  a, b = (layout.Layout(layout.make_mesh(fsdp=n)) for n in (1, 2))
  assert hash(a) != hash(b) and a != b and a == layout.Layout(layout.make_mesh(fsdp=1))


def box(shape, *axes, dtype=jnp.float32):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), axes)


def test_a_small_weight_that_stays_whole_is_named():
  """A line for each axis that its devices do not divide. None where they do, or cut another of its axes."""
  where = layout.Layout(layout.make_mesh(fsdp=2, tensor=4))
  weights = {
    "query": box((2, 32, 6, 8), "layers", "embed", "heads", "head_dim"),
    "query_bias": box((2, 6, 8), "layers", "heads", "head_dim"),
    "in": box((32, 64), "embed", "mlp"),
    "twice": box((32, 33), "embed", "embed"),
    "late": box((6, 64), "heads", "mlp"),
    "plain": jax.ShapeDtypeStruct((3,), jnp.int32),
  }
  line = "blocks/query and 1 more: axis heads of 6 is not a multiple of tensor=4 and stays whole"
  assert layout.uncut_weights({"blocks": weights}, where) == [line]
  places = layout.shardings(weights, where)
  assert places["query"].spec == PartitionSpec(None, "fsdp", None, None)
  assert places["late"].spec == PartitionSpec(None, "tensor")
  for fits in (
    layout.Layout(layout.make_mesh(fsdp=4, tensor=2)),
    layout.Layout(layout.make_mesh(devices=jax.devices()[:1])),
  ):
    assert layout.uncut_weights(weights, fits) == []


def test_uncut_axes_of_an_activation():
  """Asked for by shape: an axis that its devices do not divide, with their numbers."""
  where = layout.Layout(layout.make_mesh(data=2, fsdp=4))
  assert where.uncut((6, 5, 3), "act_batch", "act_length", "act_mlp") == [("act_batch", 6, "data=2 x fsdp=4")]
  assert where.uncut((8, 5, 3), "act_batch", "act_length", "act_mlp") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_weight_that_stays_whole_is_an_error(dtype):
  """Above 64 MB in its dtype: it names the weight, the axis and the sizes. Not below, not where divided."""
  where, rows = layout.Layout(layout.make_mesh(tensor=8)), 64_000_000 // jnp.dtype(dtype).itemsize // 13_823
  shapes = (rows + 1, 13_823), (rows, 13_823), (rows + 1, 13_824)
  large, small, fits = ({"mlp": {"in": box(shape, "embed", "mlp", dtype=dtype)}} for shape in shapes)
  message = "mlp/in: axis mlp of 13823 is not a multiple of tensor=8, and the weight has 64 MB; choose"
  for place in (layout.shardings, layout.targets, layout.uncut_weights):
    with pytest.raises(BadInput, match=message):
      place(large, where)
    place(small, where)
    place(fits, where)
  assert len(layout.uncut_weights(small, where)) == 1 and not layout.uncut_weights(fits, where)
  half = "bfloat16" if dtype == "float32" else "int8"
  assert layout.targets(large, where, half)["mlp"]["in"].dtype == half
  activation = where.fitted(shapes[0], "act_batch", "act_mlp")
  assert activation.spec == PartitionSpec(("data", "fsdp"), None)
