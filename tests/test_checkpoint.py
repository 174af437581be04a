"""Checkpoints: what comes back is what was saved, on any mesh; what is damaged is noticed, named and passed
over.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax import checkpoint, layout as layouts


def state(seed):
  params = {"dit": {"w": jax.random.normal(jax.random.key(seed), (8, 16))}}
  return {"params": params, "opt": {"opt": optax.adamw(1e-3).init(params), "step": jnp.asarray(seed)}}


def targets(like):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)


def saved(tmp_path, steps=(1, 2)):
  lines = []
  checkpoints = checkpoint.Checkpoints(tmp_path, say=lines.append)
  for step in steps:
    checkpoints.save(step, state(step), {"step": step, "cursor": {"window": step}})
  checkpoints.close()
  return lines


def reopened(tmp_path):
  lines = []
  checkpoints = checkpoint.Checkpoints(tmp_path, say=lines.append)
  return checkpoints, checkpoints.latest(), lines


def test_round_trip_with_the_optimiser(tmp_path):
  saved(tmp_path)
  checkpoints, step, lines = reopened(tmp_path)
  restored = checkpoints.restore(step, targets(state(0)))
  assert step == 2 and checkpoints.meta(2)["cursor"] == {"window": 2} and not lines
  chex_equal(restored, state(2))
  assert type(restored["opt"]["opt"]) is type(state(2)["opt"]["opt"])


def chex_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_restores_onto_another_mesh(tmp_path):
  """Saved on one device, restored onto eight."""
  saved(tmp_path)
  layout = layouts.Layout(layouts.make_mesh(fsdp=4, tensor=2))
  checkpoints, step, _ = reopened(tmp_path)
  target = {
    "params": {
      "dit": {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=layout.sharding("embed", "mlp"))}
    }
  }
  restored = checkpoints.restore(step, target)["params"]["dit"]["w"]
  assert restored.addressable_shards[0].data.shape == (2, 8)
  np.testing.assert_array_equal(restored, state(2)["params"]["dit"]["w"])


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "no manifest"])
def test_a_damaged_step_is_named_and_the_one_before_taken(tmp_path, damage):
  saved(tmp_path)
  files = [p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  data = largest.read_bytes()
  if damage == "cut":
    largest.write_bytes(data[:-10])
  elif damage == "flip":
    largest.write_bytes(data[:50] + bytes([data[50] ^ 4]) + data[51:])
  elif damage == "missing":
    largest.unlink()
  else:
    (tmp_path / "manifests" / "2.json").unlink()
  checkpoints, step, lines = reopened(tmp_path)
  assert step == 1 and len(lines) == 1 and "checkpoint 2 is damaged" in lines[0]
  chex_equal(checkpoints.restore(1, targets(state(0))), state(1))
  checkpoints.save(2, state(2), {"step": 2, "cursor": None})  # and the run goes on
  checkpoints.close()
  assert reopened(tmp_path)[1] == 2


def test_an_interrupted_save_leaves_nothing(tmp_path):
  """What a kill in the middle of a save leaves is a temporary folder: it is cleared and never read."""
  saved(tmp_path)
  left = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
  left.mkdir()
  (left / "half").write_bytes(b"x")
  _, step, _ = reopened(tmp_path)
  assert step == 2 and not left.exists()
