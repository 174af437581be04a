"""Weights of `AutoencoderKLWan` (diffusers 0.42.1; folder `vae` of the Wan models) <-> `models.vae`.

One table gives their name for each of our weights. The axes follow from the kind of weight. The conversion
only transposes, so a round trip is bit-exact.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.errors import BadInput
from sora_jax.layout import unbox
from sora_jax.models.vae import SIZES, VAE, VAEConfig
from sora_jax.weights import table

# Part of our path -> part of their name.
NAMES = (
  (r"^quant\.", "quant_conv."),
  (r"^post_quant\.", "post_quant_conv."),
  (r"middle\.block_(\d)", r"mid_block.resnets.\1"),
  (r"middle\.attention", "mid_block.attentions.0"),
  (r"\.qkv\.", ".to_qkv."),
  (r"\.out\.", ".proj."),
  (r"\.norm_0\.", ".norm1."),
  (r"\.conv_0\.", ".conv1."),
  (r"\.norm_1\.", ".norm2."),
  (r"\.conv_1\.", ".conv2."),
  (r"\.shortcut\.", ".conv_shortcut."),
  (r"kernel$", "weight"),
  (r"scale$", "gamma"),
  (r"\.resample\.", ".resample.1."),
  (r"\.time\.", ".time_conv."),
  (r"up_(\d+)\.block_(\d)", r"up_blocks.\1.resnets.\2"),
)
RESIDUAL = (
  (r"down_(\d+)\.block_(\d)", r"down_blocks.\1.resnets.\2"),
  (r"down_(\d+)\.(?=resample|time)", r"down_blocks.\1.downsampler."),
  (r"up_(\d+)\.(?=resample|time)", r"up_blocks.\1.upsampler."),
)
FIELDS = (
  "base_dim",
  "decoder_base_dim",
  "z_dim",
  "dim_mult",
  "num_res_blocks",
  "is_residual",
  "patch_size",
  "latents_mean",
  "latents_std",
)


def _plain(blocks):
  """Names of Wan 2.1, whose encoder is one list of `blocks` blocks and a resampling for each level."""

  def block_name(match):
    return f"down_blocks.{int(match[1]) * (blocks + 1) + int(match[2])}"

  def resample_name(match):
    return f"down_blocks.{int(match[1]) * (blocks + 1) + blocks}."

  return (
    (r"down_(\d+)\.block_(\d)", block_name),
    (r"down_(\d+)\.(?=resample|time)", resample_name),
    (r"up_(\d+)\.(?=resample|time)", r"up_blocks.\1.upsamplers.0."),
  )


KINDS = {
  ("kernel", 5): ("O I t h w", "t h w I O"),
  ("kernel", 4): ("O I h w", "h w I O"),
  ("bias", 1): ("O", "O"),
}


def rows(cfg):
  """The table of a VAE of this config."""
  video = jax.ShapeDtypeStruct((1, 1, *cfg.stride[1:], 3), jnp.float32)
  shapes = unbox(jax.eval_shape(VAE(cfg).init, jax.random.key(0), video))["params"]
  names = NAMES + (RESIDUAL if cfg.is_residual else _plain(cfg.num_res_blocks))
  out = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path = tuple(key.key for key in path)
    name = ".".join(path)
    for pattern, new in names:
      name = re.sub(pattern, new, name)
    if path[-1] == "scale":
      theirs, ours = "O o o" if "attention" in path else "O o o o", "O"
    else:
      theirs, ours = KINDS[path[-1], leaf.ndim]
    sizes = dict(zip(ours.split(), leaf.shape, strict=True))
    out.append(table.Row(path, name, theirs, ours, sizes))
  return out


def from_diffusers(tensors, cfg, dtype=np.float32):
  """Mapping of their names to arrays -> params of a VAE. Raises BadInput, which names a misfit."""
  return table.from_diffusers(tensors, rows(cfg), dtype)


def to_diffusers(params, cfg):
  """Params of a VAE -> iterator of (their name, numpy array)."""
  return table.to_diffusers(params, rows(cfg))


def config_from_diffusers(theirs):
  """Their config.json -> VAEConfig.

  Fields that it leaves out have their defaults, which are Wan 2.1's. Raises BadInput for unknown kinds.
  """
  if theirs.get("attn_scales"):
    raise BadInput(
      f"weights: attn_scales={theirs['attn_scales']!r}; it must be [], since no public Wan VAE has attention "
      "between levels"
    )
  fields = {name: theirs[name] for name in FIELDS if name in theirs}
  fields["patch_size"] = fields.get("patch_size") or 1
  fields["temporal_downsample"] = theirs.get("temperal_downsample", (False, True, True))  # their spelling
  if fields.get("z_dim", 16) == 16:
    wan21 = SIZES["wan2.1"]
    fields = {"latents_mean": wan21.latents_mean, "latents_std": wan21.latents_std} | fields
  channels = 3 * fields["patch_size"] ** 2
  for name in ("in_channels", "out_channels"):
    if theirs.get(name, 3) != channels:
      raise BadInput(
        f"weights: {name}={theirs[name]}; it must be {channels}: 3 colours times patch_size "
        f"{fields['patch_size']} squared"
      )
  return VAEConfig(**fields)


def config_of(tensors):
  """The config of a VAE without a config.json: that of the public kind of its weights, at their width.

  tensors: with a method `shape`, as files.Tensors.
  """
  residual = "decoder.up_blocks.0.upsampler.resample.1.weight" in tensors
  size = SIZES["wan2.2" if residual else "wan2.1"]
  base = tensors.shape("encoder.conv_in.weight")[0]
  z_dim = tensors.shape("post_quant_conv.weight")[0]
  if z_dim != size.z_dim:
    raise BadInput(
      f"weights: a VAE of {z_dim} latent channels without a config.json; it needs one unless it "
      f"has {size.z_dim}"
    )
  decoder_base = tensors.shape("decoder.conv_out.weight")[1]
  if decoder_base == base:
    decoder_base = None
  return dataclasses.replace(size, base_dim=base, decoder_base_dim=decoder_base)


def config_to_diffusers(cfg):
  """VAEConfig -> their config.json. Raises BadInput for a VAE with parts that theirs does not have."""
  if cfg.linear or not all(cfg.spatial_downsample):
    raise BadInput(
      "this VAE is of our own kind (a linear codec, or levels that keep the size); AutoencoderKLWan "
      "has no such parts"
    )
  fields = {name: getattr(cfg, name) for name in FIELDS}
  fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
  channels = 3 * cfg.patch_size**2
  return fields | {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.42.1",
    "attn_scales": [],
    "dropout": 0.0,
    "in_channels": channels,
    "out_channels": channels,
    "patch_size": None if cfg.patch_size == 1 else cfg.patch_size,
    "temperal_downsample": list(cfg.temporal_downsample),
    "scale_factor_temporal": cfg.stride[0],
    "scale_factor_spatial": cfg.stride[1],
  }
