"""Parts of a work directory: what comes back is what was saved; what is damaged is named in one line."""

import jax
import ml_dtypes
import numpy as np
import pytest

from sora_jax import parts
from sora_jax.errors import BadInput


def test_a_part_round_trips(tmp_path):
  params = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.float32([1 / 3])}
  parts.save_part(tmp_path / "vae", {"size": "tiny"}, params)
  config, loaded = parts.load_part(tmp_path / "vae")
  assert config == {"format_version": 1, "size": "tiny"}
  for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(x, y)
  before = parts.checksum(tmp_path / "vae")
  parts.save_part(tmp_path / "vae", {"size": "tiny"}, params, ml_dtypes.bfloat16)
  assert parts.checksum(tmp_path / "vae") != before
  np.testing.assert_allclose(parts.load_part(tmp_path / "vae")[1]["c"], params["c"], rtol=4e-3)


def test_a_fingerprint_of_some_weights(tmp_path):
  """It changes with those, and the config, and nothing else."""

  def made(config, **changes):
    weights = {"encoder": {"b": np.zeros(3, np.float32)}, "decoder": {"b": np.zeros(3, np.float32)}}
    parts.save_part(tmp_path, config, weights | changes)
    return parts.checksum(tmp_path, ("encoder", "quant"))

  ones = {"b": np.ones(3, np.float32)}
  assert made({"size": "tiny"}) == made({"size": "tiny"}, decoder=ones)
  assert (
    len(
      {
        made({"size": "tiny"}),
        made({"size": "wan"}),
        made({"size": "tiny"}, encoder=ones),
        made({"size": "tiny"}, quant=ones),
      }
    )
    == 4
  )


@pytest.mark.parametrize(
  "break_it, message",
  [
    (lambda d: (d / "config.json").unlink(), "there is no"),
    (lambda d: (d / "weights.safetensors").unlink(), "not whole"),
    (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    (
      lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-3]),
      "cannot be read",
    ),
  ],
)
def test_a_broken_part_is_told_in_one_line(tmp_path, break_it, message):
  parts.save_part(tmp_path, {}, {"a": np.ones(3, np.float32)})
  break_it(tmp_path)
  with pytest.raises(BadInput, match=message):
    parts.load_part(tmp_path)
