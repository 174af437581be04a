"""Names of the original Wan releases (golden/wan_original.json, from their own classes) become those that our converters read."""

import json
import pathlib

import pytest

from sora_jax.errors import BadInput
from sora_jax.models import dit, vae
from sora_jax.weights import wan_dit, wan_original, wan_vae

ORIGINAL = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "wan_original.json").read_text())


def shapes(name):
  return {key.format(i): tuple(shape) for key, (shape, times) in ORIGINAL[name]["weights"].items() for i in range(times)}


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_every_weight_of_a_vae(name):
  """Renamed, names and shapes are those of our table, no more and no less; and back. Of another VAE, a name is left over."""
  original, cfg = shapes(name), vae.SIZES[name]
  new = wan_original.rename(original, "vae", cfg)
  assert {here: original[there] for here, there in new.items()} == {row[2]: tuple(row[3]) for row in wan_vae.weight_table(cfg)}
  assert wan_original.rename(new, "vae", cfg, "diffusers") == {there: here for here, there in new.items()}
  with pytest.raises(BadInput, match="no original name"):
    wan_original.rename(shapes({"wan2.1": "wan2.2", "wan2.2": "wan2.1"}[name]), "vae", cfg)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "wan-14b-i2v", "wan-5b"])
def test_the_config_of_a_dit(name):
  """config.json of the releases -> our sizes."""
  theirs = wan_original.config_to_diffusers({"_class_name": "WanModel", "text_len": 512} | ORIGINAL[name]["size"], shapes(name))
  ours, size = wan_dit.config_to_ours(theirs, expand_timesteps=name == "wan-5b"), dit.SIZES[name]
  for field in ("depth", "heads", "head_size", "mlp", "channels", "patch", "text_width", "cond_channels", "conditioning", "text_pad", "cross_norm"):
    assert getattr(ours, field) == getattr(size, field), field


def test_what_is_no_such_model_is_named():
  with pytest.raises(BadInput, match="model_type='s2v'"):
    wan_original.config_to_diffusers({"_class_name": "WanModel", "model_type": "s2v"})
  with pytest.raises(BadInput, match="image_dim=1280"):      # Wan 2.1's image-to-video, told by its weights
    wan_dit.config_to_ours(wan_original.config_to_diffusers({"model_type": "i2v", "in_dim": 36}, ["img_emb.proj.0.weight"]))
  with pytest.raises(BadInput, match="no original name"):
    wan_original.rename(["blocks.0.self_attn.q.weight", "blocks.x.self_attn.q.weight"], "dit")
  for names in ([], ["a"], ["head.modulation", "token_embedding.weight"]):
    with pytest.raises(BadInput, match="one part"):
      wan_original.recognise(names)
