"""Layout: names to devices, by one table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sora_jax import layout as layouts
from sora_jax.errors import BadInput


def test_a_misspelt_axis_is_an_error():
  layout = layouts.Layout(layouts.make_mesh())
  assert layout.spec("act_batch", None, "embed") == PartitionSpec(("data", "fsdp"), None, ("fsdp", "context"))
  with pytest.raises(KeyError, match="act_bach"):
    layout.spec("act_bach")


def test_constrain_places_and_leaves_what_does_not_divide():
  layout = layouts.Layout(layouts.make_mesh(data=2, fsdp=2, tensor=2))
  place = jax.jit(lambda x: layout.constrain(x, "act_batch", "act_length", "act_mlp"))
  assert place(jnp.zeros((8, 3, 6))).addressable_shards[0].data.shape == (2, 3, 3)
  assert place(jnp.zeros((5, 3, 5))).addressable_shards[0].data.shape == (5, 3, 5)


def test_tokens_take_the_devices_that_rows_leave():
  """Rows that fsdp does not divide lie on data alone; their tokens lie on fsdp and context."""
  layout = layouts.Layout(layouts.make_mesh(data=2, fsdp=2, context=2))
  place = jax.jit(lambda x: layout.constrain(x, "act_batch", "act_length"))
  assert place(jnp.zeros((4, 8))).addressable_shards[0].data.shape == (1, 4)
  assert place(jnp.zeros((2, 8))).addressable_shards[0].data.shape == (1, 2)
  assert place(jnp.zeros((2, 6))).addressable_shards[0].data.shape == (1, 3)


def test_a_mesh_must_fit_the_devices():
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    layouts.make_mesh(fsdp=3)


def test_layouts_are_part_of_a_cache_key():
  a, b = (layouts.Layout(layouts.make_mesh(fsdp=n)) for n in (1, 2))
  assert hash(a) != hash(b) and a != b and a == layouts.Layout(layouts.make_mesh(fsdp=1))


def box(shape, *axes, dtype=jnp.float32):
  return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), axes)


def test_a_small_weight_that_stays_whole_is_named():
  """A line for each axis that its devices do not divide. None where they do, or cut another of its axes."""
  layout = layouts.Layout(layouts.make_mesh(fsdp=2, tensor=4))
  weights = {
    "query": box((2, 32, 6, 8), "layers", "embed", "heads", "head_dim"),
    "query_bias": box((2, 6, 8), "layers", "heads", "head_dim"),
    "in": box((32, 64), "embed", "mlp"),
    "twice": box((32, 33), "embed", "embed"),
    "late": box((6, 64), "heads", "mlp"),
    "plain": jax.ShapeDtypeStruct((3,), jnp.int32),
  }
  line = (
    "blocks/query and 1 more: axis heads of 6 is not a multiple of tensor=4 and is not cut over all of them"
  )
  assert layouts.uncut_weights({"blocks": weights}, layout) == [line]
  places = layouts.shardings(weights, layout)
  assert places["query"].spec == PartitionSpec(None, "fsdp", None, None)
  assert places["late"].spec == PartitionSpec(None, "tensor")
  for fits in (
    layouts.Layout(layouts.make_mesh(fsdp=4, tensor=2)),
    layouts.Layout(layouts.make_mesh(devices=jax.devices()[:1])),
  ):
    assert layouts.uncut_weights(weights, fits) == []


def test_uncut_axes_of_an_activation():
  """Asked for by shape: an axis that its devices do not divide, with their numbers."""
  layout = layouts.Layout(layouts.make_mesh(data=2, fsdp=4))
  assert layout.uncut((6, 5, 3), "act_batch", "act_length", "act_mlp") == [
    ("act_batch", 6, "data=2 x fsdp=4"),
    ("act_length", 5, "fsdp=4 x context=1"),
  ]
  assert layout.uncut((6, 8, 3), "act_batch", "act_length", "act_mlp") == []
  assert layout.uncut((8, 5, 3), "act_batch", "act_length", "act_mlp") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_weight_that_stays_whole_is_an_error(dtype):
  """Above 64 MB in its dtype: it names the weight, the axis and the sizes. Not below, not where divided."""
  layout, rows = (
    layouts.Layout(layouts.make_mesh(tensor=8)),
    64_000_000 // jnp.dtype(dtype).itemsize // 13_823,
  )
  shapes = (rows + 1, 13_823), (rows, 13_823), (rows + 1, 13_824)
  large, small, fits = ({"mlp": {"in": box(shape, "embed", "mlp", dtype=dtype)}} for shape in shapes)
  message = "mlp/in: axis mlp of 13823 is not a multiple of tensor=8, and the weight has 64 MB; choose"
  for place in (layouts.shardings, layouts.targets, layouts.uncut_weights):
    with pytest.raises(BadInput, match=message):
      place(large, layout)
    place(small, layout)
    place(fits, layout)
  assert len(layouts.uncut_weights(small, layout)) == 1 and not layouts.uncut_weights(fits, layout)
  half = "bfloat16" if dtype == "float32" else "int8"
  assert layouts.targets(large, layout, half)["mlp"]["in"].dtype == half
  activation = layout.fitted(shapes[0], "act_batch", "act_mlp")
  assert activation.spec == PartitionSpec(None, None)
