"""Checkpoints: what comes back is what was saved, on any mesh; what is damaged is noticed, named and passed
over.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax import checkpoint, files, layout as layouts, manifests


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


def of_process(tmp_path, process, count):
  """The manifests of a work directory, as a process of several sees them."""
  one = manifests.Manifests(tmp_path)
  one.process, one.count = process, count
  return one


def test_three_processes_hash_what_they_wrote_and_check_a_share_each(tmp_path):
  """Their parts make the manifest of one process; a damaged file is seen by the process whose share it is."""
  root = tmp_path / "checkpoints" / "7"
  sizes = {"params/ocdbt.process_0/d/a": 900, "params/ocdbt.process_1/d/b": 700, "params/d/c": 50, "meta": 2}
  sizes |= {f"opt/ocdbt.process_2/{i}": 100 + i for i in range(5)}
  for name, size in sizes.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(bytes(size))
  three = [of_process(tmp_path, process, 3) for process in range(3)]
  (tmp_path / "manifests").mkdir()
  (tmp_path / "manifests" / "7.1.part").write_text("{}")
  three[0].clear_parts()  # what a kill left is of another save
  assert not three[0].has_parts(7)
  own = [one.hash_own(7) for one in three]
  assert [len(part) for part in own] == [3, 1, 5] and three[0].has_parts(7)
  three[0].write(7, own[0])
  written = files.read_json(tmp_path / "manifests" / "7.json")
  alone = of_process(tmp_path, 0, 1)
  assert written == dict(sorted(alone.hash_own(7).items())) and len(written) == len(sizes)
  assert [path.name for path in (tmp_path / "manifests").iterdir()] == ["7.json"]
  assert [one._damage_of_share(7) for one in three] == [None] * 3
  for name in sizes:
    whole = (root / name).read_bytes()
    (root / name).write_bytes(b"\1" + whole[1:])
    seen = [one._damage_of_share(7) for one in three]
    assert [line for line in seen if line] == [f"{name} has a wrong checksum"], seen
    (root / name).write_bytes(whole)
