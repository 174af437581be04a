"""Names of the original Wan releases (golden/wan_original.json) become those of our tables."""

import json
import pathlib

import pytest

from sora_jax.errors import BadInput
from sora_jax.models import dit, text, vae
from sora_jax.weights import table, umt5, wan_dit, wan_original, wan_vae

ORIGINAL = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "wan_original.json").read_text())


def shapes(name):
  return {
    key.format(i): tuple(shape)
    for key, (shape, times) in ORIGINAL[name]["weights"].items()
    for i in range(times)
  }


@pytest.mark.parametrize(
  ("name", "part", "ours"),
  [
    ("wan2.1", "vae", wan_vae.rows(vae.SIZES["wan2.1"])),
    ("wan2.2", "vae", wan_vae.rows(vae.SIZES["wan2.2"])),
    *(
      (name, "dit", wan_dit.rows(dit.SIZES[name]))
      for name in ("wan-1.3b", "wan-14b", "wan-14b-i2v", "wan-5b")
    ),
    ("umt5-xxl", "text", umt5.rows(text.SIZES["umt5-xxl"])),
  ],
)
def test_every_weight(name, part, ours):
  """Renamed, names and shapes are exactly those of our table. Renaming back gives the original names."""
  original, cfg = shapes(name), vae.SIZES.get(name)
  assert wan_original.recognise(original) == (part, "original")
  new = wan_original.rename(original, part, cfg)
  assert {here: original[there] for here, there in new.items()} == table.their_shapes(ours)
  assert wan_original.recognise(new) == (part, "diffusers")
  assert wan_original.rename(new, part, cfg, "diffusers") == {there: here for here, there in new.items()}


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "wan-14b-i2v", "wan-5b"])
def test_the_config_of_a_dit(name):
  """config.json of the releases -> our sizes."""
  config = {"_class_name": "WanModel", "text_len": 512} | ORIGINAL[name]["size"]
  theirs = wan_original.config_to_diffusers(config, shapes(name))
  ours, size = wan_dit.config_from_diffusers(theirs, expand_timesteps=name == "wan-5b"), dit.SIZES[name]
  fields = (
    "depth",
    "heads",
    "head_size",
    "mlp",
    "channels",
    "patch",
    "text_width",
    "cond_channels",
    "conditioning",
    "text_pad",
    "cross_norm",
  )
  for field in fields:
    assert getattr(ours, field) == getattr(size, field), field


def test_other_models_are_named():
  with pytest.raises(BadInput, match="model_type='s2v'"):
    wan_original.config_to_diffusers({"_class_name": "WanModel", "model_type": "s2v"})
  config = {"model_type": "i2v", "in_dim": 36}
  with pytest.raises(BadInput, match="image_dim=1280"):  # Wan 2.1's image-to-video, known by its weights
    wan_dit.config_from_diffusers(wan_original.config_to_diffusers(config, ["img_emb.proj.0.weight"]))
  with pytest.raises(BadInput, match="no original name"):
    wan_original.rename(shapes("wan2.2"), "vae", vae.SIZES["wan2.1"])
  with pytest.raises(BadInput, match="no original name"):
    wan_original.rename(["blocks.0.self_attn.q.weight", "blocks.x.self_attn.q.weight"], "dit")
  for names in ([], ["a"], ["head.modulation", "token_embedding.weight"]):
    with pytest.raises(BadInput, match="one part"):
      wan_original.recognise(names)
