"""Checkpoints: what comes back is what was saved, on any mesh; what is damaged is noticed, named and passed over."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from sora_jax import checkpoint, layout
from sora_jax.errors import BadInput


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
  found = checkpoints.restore(step, targets(state(0)))
  assert step == 2 and checkpoints.meta(2)["cursor"] == {"window": 2} and not lines
  chex_equal(found, state(2))
  assert type(found["opt"]["opt"]) is type(state(2)["opt"]["opt"])


def chex_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_restores_onto_another_mesh(tmp_path):
  """Saved on one device, restored onto eight."""
  saved(tmp_path)
  where = layout.Layout(layout.make_mesh(fsdp=4, tensor=2))
  checkpoints, step, _ = reopened(tmp_path)
  target = {"params": {"dit": {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=where.sharding("embed", "mlp"))}}}
  found = checkpoints.restore(step, target)["params"]["dit"]["w"]
  assert found.addressable_shards[0].data.shape == (2, 8)
  np.testing.assert_array_equal(found, state(2)["params"]["dit"]["w"])


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
  checkpoints.save(2, state(2), {"step": 2, "cursor": None})        # and the run goes on
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


def test_a_reader_leaves_the_writer_alone(tmp_path):
  """While a trainer is saving, whoever takes weights gets the step before, and the save goes on as if nobody had looked."""
  writer = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    writer.save(step, {"ema": {"a": np.full(3, float(step), np.float32)}}, {})
    writer.manager.wait_until_finished()            # written, its manifest not yet
    if step == 1:
      writer.settle()
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
  said = []
  tree, step = checkpoint.load_weights(tmp_path, say=said.append)
  assert step == 1 and tree["a"][0] == 1 and "checkpoint 2" in said[0]
  assert (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").exists()
  writer.close()
  assert checkpoint.load_weights(tmp_path)[1] == 2
  (tmp_path / "manifests" / "2.json").write_text('{"ema/')
  assert checkpoint.load_weights(tmp_path, say=said.append)[1] == 1 and "its manifest cannot be read" in said[-1]
  (tmp_path / "manifests" / "1.json").unlink()
  again = checkpoint.Checkpoints(tmp_path, say=said.append)
  assert again.latest() is None and "no other is left" in said[-1]


@pytest.mark.parametrize("made", ["checkpoint", "model"])
def test_weights_of_another_model(tmp_path, made):
  """The first weight that does not fit is named with both shapes."""
  weights = {"dit": {"a": np.zeros((2, 3), np.float32)}}
  if made == "model":
    checkpoint.save_part(tmp_path / "model", {"step": 1}, weights)
  else:
    writer = checkpoint.Checkpoints(tmp_path)
    writer.save(1, {"ema": weights}, {})
    writer.close()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = lambda name, *shape: {"dit": {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=here)}}  # noqa: E731
  for target, says in ((like("a", 2, 4), r"dit/a is \(2, 3\) there, and \(2, 4\) here"), (like("b", 2, 3), "dit/a is .* not a weight here")):
    with pytest.raises(BadInput, match=says):
      checkpoint.load_weights(tmp_path, target=target)
  np.testing.assert_array_equal(checkpoint.load_weights(tmp_path, target=like("a", 2, 3))[0]["dit"]["a"], 0)


def test_a_part_round_trips(tmp_path):
  params = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.float32([1 / 3])}
  checkpoint.save_part(tmp_path / "vae", {"size": "tiny"}, params)
  config, found = checkpoint.load_part(tmp_path / "vae")
  assert config == {"format_version": 1, "size": "tiny"}
  chex_equal(found, params)
  before = checkpoint.fingerprint(tmp_path / "vae")
  checkpoint.save_part(tmp_path / "vae", {"size": "tiny"}, params, ml_dtypes.bfloat16)
  assert checkpoint.fingerprint(tmp_path / "vae") != before
  np.testing.assert_allclose(checkpoint.load_part(tmp_path / "vae")[1]["c"], params["c"], rtol=4e-3)


def test_a_fingerprint_of_some_weights(tmp_path):
  """It changes with those, and the config, and nothing else."""
  def made(config, **changes):
    weights = {"encoder": {"b": np.zeros(3, np.float32)}, "decoder": {"b": np.zeros(3, np.float32)}}
    checkpoint.save_part(tmp_path, config, weights | changes)
    return checkpoint.fingerprint(tmp_path, ("encoder", "quant"))
  ones = {"b": np.ones(3, np.float32)}
  assert made({"size": "tiny"}) == made({"size": "tiny"}, decoder=ones)
  assert len({made({"size": "tiny"}), made({"size": "wan"}), made({"size": "tiny"}, encoder=ones), made({"size": "tiny"}, quant=ones)}) == 4


@pytest.mark.parametrize("break_it, message", [
    (lambda d: (d / "config.json").unlink(), "there is no"), (lambda d: (d / "weights.safetensors").unlink(), "not whole"),
    (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    (lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-3]), "cannot be read")])
def test_a_broken_part_is_told_in_one_line(tmp_path, break_it, message):
  checkpoint.save_part(tmp_path, {}, {"a": np.ones(3, np.float32)})
  break_it(tmp_path)
  with pytest.raises(BadInput, match=message):
    checkpoint.load_part(tmp_path)


def test_no_weights_at_all(tmp_path):
  with pytest.raises(BadInput, match="holds no checkpoint and no model"):
    checkpoint.load_weights(tmp_path)
