"""Weights of the public video VAEs (diffusers 0.42.1 `AutoencoderKLWan`; folder `vae` of the Wan models) <-> `models.vae`.

One table gives their name of each of our weights; the axes follow from the kind of weight. Nothing is computed but transposes: a round
trip is bit-exact.
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

# Part of our path -> part of their name. Of Wan 2.1 the encoder's blocks and resamplings stand in one list: {n} blocks, then one of these.
NAMES = (
    (r"^quant\.", "quant_conv."), (r"^post_quant\.", "post_quant_conv."),
    (r"middle\.block_(\d)", r"mid_block.resnets.\1"), (r"middle\.attention", "mid_block.attentions.0"),
    (r"\.qkv\.", ".to_qkv."), (r"\.out\.", ".proj."),
    (r"\.norm_0\.", ".norm1."), (r"\.conv_0\.", ".conv1."), (r"\.norm_1\.", ".norm2."), (r"\.conv_1\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."), (r"kernel$", "weight"), (r"scale$", "gamma"),
    (r"\.resample\.", ".resample.1."), (r"\.time\.", ".time_conv."), (r"up_(\d+)\.block_(\d)", r"up_blocks.\1.resnets.\2"),
)
RESIDUAL = (
    (r"down_(\d+)\.block_(\d)", r"down_blocks.\1.resnets.\2"),
    (r"down_(\d+)\.(?=resample|time)", r"down_blocks.\1.downsampler."), (r"up_(\d+)\.(?=resample|time)", r"up_blocks.\1.upsampler."),
)
FIELDS = ("base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "is_residual", "patch_size", "latents_mean", "latents_std")


def _plain(blocks):
  at = lambda match, block: f"down_blocks.{int(match[1]) * (blocks + 1) + block}"  # noqa: E731
  return (
      (r"down_(\d+)\.block_(\d)", lambda match: at(match, int(match[2]))),
      (r"down_(\d+)\.(?=resample|time)", lambda match: at(match, blocks) + "."),
      (r"up_(\d+)\.(?=resample|time)", r"up_blocks.\1.upsamplers.0."),
  )


KINDS = {("kernel", 5): ("O I t h w", "t h w I O"), ("kernel", 4): ("O I h w", "h w I O"), ("bias", 1): ("O", "O")}


def rows(cfg):
  """The table of a VAE of this config."""
  video = jax.ShapeDtypeStruct((1, 1, *cfg.stride[1:], 3), jnp.float32)
  shapes = unbox(jax.eval_shape(VAE(cfg).init, jax.random.key(0), video))["params"]
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path = tuple(key.key for key in path)
    name = ".".join(path)
    for pattern, new in NAMES + (RESIDUAL if cfg.is_residual else _plain(cfg.num_res_blocks)):
      name = re.sub(pattern, new, name)
    if path[-1] == "scale":
      theirs, ours = "O o o" if "attention" in path else "O o o o", "O"
    else:
      theirs, ours = KINDS[path[-1], leaf.ndim]
    found.append(table.Row(path, name, theirs, ours, dict(zip(ours.split(), leaf.shape, strict=True))))
  return found


def from_diffusers(tensors, cfg, dtype=np.float32):
  """Mapping of their names to arrays -> params of a VAE. Raises BadInput that names what does not fit."""
  return table.from_diffusers(tensors, rows(cfg), dtype)


def to_diffusers(params, cfg):
  """Params of a VAE -> iterator of (their name, numpy array)."""
  return table.to_diffusers(params, rows(cfg))


def config_from_diffusers(theirs):
  """Their config.json -> VAEConfig. What it leaves out has their defaults, which are Wan 2.1's. Raises BadInput for a kind not known."""
  if theirs.get("attn_scales"):
    raise BadInput(f"weights: attn_scales={theirs['attn_scales']!r}; attention between levels is in no public Wan VAE; it must be []")
  fields = {name: theirs[name] for name in FIELDS if name in theirs}
  fields["patch_size"] = fields.get("patch_size") or 1
  fields["temporal_downsample"] = theirs.get("temperal_downsample", (False, True, True))      # their spelling
  if fields.get("z_dim", 16) == 16:
    fields = {"latents_mean": SIZES["wan2.1"].latents_mean, "latents_std": SIZES["wan2.1"].latents_std} | fields
  channels = 3 * fields["patch_size"] ** 2
  for name in ("in_channels", "out_channels"):
    if theirs.get(name, 3) != channels:
      raise BadInput(f"weights: {name}={theirs[name]}; {channels} is 3 colours times patch_size {fields['patch_size']} squared")
  return VAEConfig(**fields)


def config_of(tensors):
  """The config of a VAE that comes without one: the public kind that its weights are of, at their width. `tensors` tell shapes."""
  size = SIZES["wan2.2" if "decoder.up_blocks.0.upsampler.resample.1.weight" in tensors else "wan2.1"]
  base, z_dim = tensors.shape("encoder.conv_in.weight")[0], tensors.shape("post_quant_conv.weight")[0]
  if z_dim != size.z_dim:
    raise BadInput(f"weights: a VAE of {z_dim} latent channels without a config.json; only those with {size.z_dim} are known so")
  wide = tensors.shape("decoder.conv_out.weight")[1]
  return dataclasses.replace(size, base_dim=base, decoder_base_dim=None if wide == base else wide)


def config_to_diffusers(cfg):
  """VAEConfig -> their config.json. BadInput for a VAE that has parts which theirs has not."""
  if cfg.linear or not all(cfg.spatial_downsample):
    raise BadInput("this VAE is of our own kind (a linear codec, or levels that keep the size); AutoencoderKLWan has no such parts")
  fields = {name: getattr(cfg, name) for name in FIELDS}
  fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
  channels = 3 * cfg.patch_size ** 2
  return fields | {
      "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.42.1", "attn_scales": [], "dropout": 0.0,
      "in_channels": channels, "out_channels": channels, "patch_size": None if cfg.patch_size == 1 else cfg.patch_size,
      "temperal_downsample": list(cfg.temporal_downsample), "scale_factor_temporal": cfg.stride[0], "scale_factor_spatial": cfg.stride[1]}
