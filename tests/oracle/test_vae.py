"""Our VAE against the real `AutoencoderKLWan` of diffusers: both kinds, random weights, encode and decode, several lengths."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from sora_jax.models import vae
from sora_jax.weights import table, wan_vae

KINDS = {
    "plain": dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 4], num_res_blocks=2, temperal_downsample=[False, True, True],
                  latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
    "residual": dict(base_dim=8, decoder_base_dim=16, z_dim=6, dim_mult=[1, 2, 4, 4], num_res_blocks=2, is_residual=True, patch_size=2,
                     temperal_downsample=[False, True, True], in_channels=12, out_channels=12, scale_factor_spatial=16,
                     latents_mean=[0.0] * 6, latents_std=[1.0] * 6),
    "three levels": dict(base_dim=8, z_dim=6, dim_mult=[1, 2, 2], num_res_blocks=1, is_residual=True, patch_size=4,
                             temperal_downsample=[True, True], in_channels=48, out_channels=48, scale_factor_spatial=16,
                             latents_mean=[0.0] * 6, latents_std=[1.0] * 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_as_diffusers_do(kind):
  """1, 5 and 17 frames, not square, whole and streamed: within 1e-5 of the largest value."""
  torch.manual_seed(0)
  theirs = AutoencoderKLWan(**KINDS[kind]).eval()
  with torch.no_grad():                      # gains and biases start at 1 and 0: an error in their order would hide
    for name, value in theirs.named_parameters():
      if name.endswith(("gamma", "bias")):
        value.add_(0.3 * torch.randn_like(value))
  cfg = wan_vae.config_to_ours(dict(theirs.config))
  params = wan_vae.to_ours({name: value.numpy() for name, value in theirs.state_dict().items()}, cfg)
  rng = np.random.default_rng(0)
  for frames in (1, 5, 17):
    clip = rng.uniform(-1, 1, (2, frames, 2 * cfg.stride[1], 3 * cfg.stride[2], 3)).astype(np.float32)
    with torch.no_grad():
      posterior = theirs.encode(torch.from_numpy(np.moveaxis(clip, -1, 1).copy())).latent_dist
      latents = np.moveaxis(posterior.mean.numpy(), 1, -1)
      logvar = np.moveaxis(posterior.logvar.numpy(), 1, -1)
      again = np.moveaxis(theirs.decode(posterior.mean).sample.numpy(), 1, -1)
    close(vae.encode(params, clip, cfg), (latents, logvar))
    close(vae.decode(params, latents, cfg), again)
    close(np.concatenate(list(vae.encode_stream(params, [clip], cfg)), 1), latents)
    close(np.concatenate(list(vae.decode_stream(params, [latents], cfg)), 1), again)


def close(ours, theirs, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1), np.abs(a - b).max()


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_the_public_sizes_have_their_names_and_shapes(name):
  """Every weight of the real class at its real size, by name and shape, without making one."""
  cfg = vae.SIZES[name]
  fields = wan_vae.config_to_theirs(cfg)
  with torch.device("meta"):
    theirs = AutoencoderKLWan(**{key: value for key, value in fields.items() if not key.startswith("_")})
  rows = table.their_shapes(wan_vae.rows(cfg))
  assert rows == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
  if name == "wan2.1":                       # which is the class's default
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in AutoencoderKLWan().config.items()
            if not key.startswith("_")} == {key: value for key, value in fields.items() if not key.startswith("_")} | {
                "decoder_base_dim": None}
