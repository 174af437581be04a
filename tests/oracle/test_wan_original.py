"""Names of the original Wan releases, renamed, against the classes of diffusers and transformers.

Models are tiny, and of the public sizes.
"""

import json
import pathlib

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders import single_file_utils
from transformers import UMT5Config, UMT5EncoderModel

from sora_jax.errors import BadInput
from sora_jax.models import vae
from sora_jax.weights import files, wan_original, wan_vae

ORIGINAL = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "wan_original.json").read_text())
DITS = ["dit tiny", "wan-1.3b", "wan-14b", "wan-14b-i2v", "wan-5b"]
VAES = {"plain tiny": False, "wan2.1": False, "residual tiny": True, "wan2.2": True}


def shapes(name):
  """All weights of an original model: name -> shape."""
  return {
    key.format(i): tuple(shape)
    for key, (shape, times) in ORIGINAL[name]["weights"].items()
    for i in range(times)
  }


def renamed(name, part, cfg=None):
  original = shapes(name)
  assert wan_original.recognise(original) == (part, "original")
  new = wan_original.rename(original, part, cfg)
  assert wan_original.recognise(new) == (part, "diffusers")
  assert wan_original.rename(new, part, cfg, "diffusers") == {old: name for name, old in new.items()}
  return {name: original[old] for name, old in new.items()}


def shapes_of(model):
  return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", DITS)
def test_dit(name):
  """Its config.json builds diffusers' class, which has the renamed weights; diffusers' converter agrees."""
  size = ORIGINAL[name]["size"]
  with torch.device("meta"):
    config = wan_original.config_to_diffusers({"_class_name": "WanModel", "text_len": 512} | size)
    model = WanTransformer3DModel.from_config(config)
  assert renamed(name, "dit") == shapes_of(model)
  theirs = single_file_utils.convert_wan_transformer_to_diffusers({key: key for key in shapes(name)})
  assert theirs == wan_original.rename(shapes(name), "dit")


@pytest.mark.parametrize("name", VAES)
def test_vae(name):
  size, residual = dict(ORIGINAL[name]["size"]), VAES[name]
  cfg = vae.VAEConfig(
    base_dim=size["dim"],
    decoder_base_dim=size.get("dec_dim"),
    z_dim=size["z_dim"],
    dim_mult=size["dim_mult"],
    num_res_blocks=size["num_res_blocks"],
    temporal_downsample=size["temperal_downsample"],
    is_residual=residual,
    patch_size=2 if residual else 1,
  )
  with torch.device("meta"):
    config = wan_vae.config_to_diffusers(cfg)
    model = AutoencoderKLWan(**{key: value for key, value in config.items() if not key.startswith("_")})
  assert renamed(name, "vae", cfg) == shapes_of(model)
  if name == "wan2.1":
    theirs = single_file_utils.convert_wan_vae_to_diffusers({key: key for key in shapes(name)})
    assert theirs == wan_original.rename(shapes(name), "vae", cfg)


@pytest.mark.parametrize("name", ["text tiny", "umt5-xxl"])
def test_text_encoder(name):
  size = ORIGINAL[name]["size"]
  config = UMT5Config(
    vocab_size=size["vocab"],
    d_model=size["dim"],
    d_kv=size["dim_attn"] // size["num_heads"],
    d_ff=size["dim_ffn"],
    num_layers=size["num_layers"],
    num_heads=size["num_heads"],
    relative_attention_num_buckets=size["num_buckets"],
    feed_forward_proj="gated-gelu",
  )
  with torch.device("meta"):
    expected = shapes_of(UMT5EncoderModel(config))
  del expected["encoder.embed_tokens.weight"]  # the same memory as shared.weight
  assert renamed(name, "text") == expected


def test_pickles(tmp_path):
  """A .pth of PyTorch, of its three dtypes, is read as the tensors it holds; one with code is refused."""
  tensors = {kind: torch.randn(3, 4).to(getattr(torch, kind)) for kind in ("float32", "float16", "bfloat16")}
  torch.save(tensors, tmp_path / "a.pth")
  read = files.Pickle(tmp_path / "a.pth")
  for name, value in tensors.items():
    assert (read.shape(name), read.dtype(name), read[name].dtype.name) == ((3, 4), name, name)
    np.testing.assert_array_equal(read[name].astype(np.float32), value.float().numpy())
  torch.save({"a": pathlib.Path("x")}, tmp_path / "code.pth")
  with pytest.raises(BadInput, match="no file of tensors alone") as error:
    files.Pickle(tmp_path / "code.pth")
  assert "\n" not in str(error.value)
