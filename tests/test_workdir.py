"""Work directories: weights come from the newest whole checkpoint or from W/model, and only those of the
model that is asked for.
"""

import jax
import numpy as np
import pytest

from sora_jax import checkpoint, parts, workdir as workdirs
from sora_jax.errors import BadInput


def test_a_reader_leaves_the_writer_alone(tmp_path):
  """While a trainer is saving, whoever takes weights gets the step before, and the save goes on as if nobody
  had looked.
  """
  writer = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    writer.save(step, {"ema": {"a": np.full(3, float(step), np.float32)}}, {})
    writer.manager.wait_until_finished()  # written, its manifest not yet
    if step == 1:
      writer.settle()
  (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
  said = []
  tree, step = workdirs.load_weights(tmp_path, say=said.append)
  assert step == 1 and tree["a"][0] == 1 and "checkpoint 2" in said[0]
  assert (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").exists()
  writer.close()
  assert workdirs.load_weights(tmp_path)[1] == 2
  (tmp_path / "manifests" / "2.json").write_text('{"ema/')
  assert (
    workdirs.load_weights(tmp_path, say=said.append)[1] == 1 and "its manifest cannot be read" in said[-1]
  )
  (tmp_path / "manifests" / "1.json").unlink()
  again = checkpoint.Checkpoints(tmp_path, say=said.append)
  assert again.latest() is None and "no other is left" in said[-1]


@pytest.mark.parametrize("made", ["checkpoint", "model"])
def test_weights_of_another_model(tmp_path, made):
  """The first weight that does not fit is named with both shapes."""
  weights = {"dit": {"a": np.zeros((2, 3), np.float32)}}
  if made == "model":
    parts.save_part(tmp_path / "model", {"step": 1}, weights)
  else:
    writer = checkpoint.Checkpoints(tmp_path)
    writer.save(1, {"ema": weights}, {})
    writer.close()
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def like(name, *shape):
    return {"dit": {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=here)}}

  for target, says in (
    (like("a", 2, 4), r"dit/a is \(2, 3\) there, and \(2, 4\) here"),
    (like("b", 2, 3), "dit/a is .* not a weight here"),
  ):
    with pytest.raises(BadInput, match=says):
      workdirs.load_weights(tmp_path, target=target)
  np.testing.assert_array_equal(workdirs.load_weights(tmp_path, target=like("a", 2, 3))[0]["dit"]["a"], 0)


def test_no_weights_at_all(tmp_path):
  with pytest.raises(BadInput, match="holds no checkpoint and no model"):
    workdirs.load_weights(tmp_path)
