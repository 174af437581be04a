"""Layout: names to devices, by one table."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sora_jax import layout


def test_a_misspelt_axis_is_an_error():
  where = layout.single_device()
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
