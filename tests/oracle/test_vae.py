"""Our VAE against `AutoencoderKLWan` of diffusers: both kinds, random weights, several lengths."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from sora_jax.models import vae
from sora_jax.weights import table, wan_vae

KINDS = {
  "plain": dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 4], num_res_blocks=2, temperal_downsample=[False, True, True],
    latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
  ),
  "residual": dict(
    base_dim=8, decoder_base_dim=16, z_dim=6, dim_mult=[1, 2, 4, 4], num_res_blocks=2, is_residual=True,
    patch_size=2, temperal_downsample=[False, True, True], in_channels=12, out_channels=12,
    scale_factor_spatial=16, latents_mean=[0.0] * 6, latents_std=[1.0] * 6,
  ),
}  # fmt: skip


PLAIN = st.fixed_dictionaries(
  {
    "base_dim": st.sampled_from((4, 6, 8)),
    "z_dim": st.integers(2, 5),
    "num_res_blocks": st.integers(1, 2),
    "is_residual": st.just(False),
    "dim_mult": st.sampled_from(([1, 2], [2, 1], [1, 1, 3], [1, 2, 2], [2, 3, 1])),
    "patch_size": st.none(),
  }
)
# Widths are divisible by the groups of the averages and copies in the shortcuts.
RESIDUAL = st.fixed_dictionaries(
  {
    "base_dim": st.sampled_from((4, 8)),
    "decoder_base_dim": st.sampled_from((4, 8)),
    "z_dim": st.integers(2, 5),
    "num_res_blocks": st.integers(1, 2),
    "is_residual": st.just(True),
    "dim_mult": st.sampled_from(([1, 1], [2, 1], [1, 1, 1], [1, 2, 2], [2, 4, 4])),
    "patch_size": st.sampled_from((1, 2, 3)),
  }
)


def peer(fields):
  """Their VAE with random weights, and ours with the same weights."""
  torch.manual_seed(0)
  theirs = AutoencoderKLWan(**fields).eval()
  with torch.no_grad():  # initial gains and biases are 1 and 0, which would hide an error in their order
    for name, value in theirs.named_parameters():
      if name.endswith(("gamma", "bias")):
        value.add_(0.3 * torch.randn_like(value))
  cfg = wan_vae.config_from_diffusers(dict(theirs.config))
  tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
  return theirs, cfg, wan_vae.from_diffusers(tensors, cfg)


def calls(theirs, clip):
  """Encodes a clip, and decodes the mean -> mean, log variance, video."""
  with torch.no_grad():
    posterior = theirs.encode(torch.from_numpy(np.moveaxis(clip, -1, 1).copy())).latent_dist
    out = posterior.mean, posterior.logvar, theirs.decode(posterior.mean).sample
  return [np.moveaxis(value.numpy(), 1, -1) for value in out]


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_as_diffusers_do(kind, close):
  """1, 5 and 17 frames, not square, streamed; 17 frames also in one pass.

  Compilation takes most of the time, so only the last is encoded in one pass; the test below has the others.
  """
  theirs, cfg, params = peer(KINDS[kind])
  rng = np.random.default_rng(0)
  for frames in (1, 5, 17):
    clip = rng.uniform(-1, 1, (2, frames, 2 * cfg.stride[1], 3 * cfg.stride[2], 3)).astype(np.float32)
    latents, logvar, again = calls(theirs, clip)
    if frames == 17:
      close("VAE encoder", vae.encode(params, clip, cfg), (latents, logvar))
      close("VAE decoder", vae.decode(params, latents, cfg), again)
    close("VAE encoder, streamed", np.concatenate(list(vae.encode_stream(params, [clip], cfg)), 1), latents)
    close("VAE decoder, streamed", np.concatenate(list(vae.decode_stream(params, [latents], cfg)), 1), again)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_canvas_as_diffusers_at_the_native_size(kind, close):
  """Two clips of different sizes on a larger canvas, streamed, with noise around them."""
  theirs, cfg, params = peer(KINDS[kind])
  rng, stride = np.random.default_rng(0), cfg.stride
  video_BTHWC = rng.uniform(-1, 1, (2, 9, 4 * stride[1], 4 * stride[2], 3)).astype(np.float32)
  valid = np.array([[2, 3], [3, 1]], np.int32)
  latents_BTHWC = np.concatenate(list(vae.encode_stream(params, [video_BTHWC], cfg, valid=valid)), 1)
  for video_THWC, latents, (h, w) in zip(video_BTHWC, latents_BTHWC, valid, strict=True):
    wanted, _, _ = calls(theirs, video_THWC[None, :, : h * stride[1], : w * stride[2]])
    close("VAE encoder, on a canvas", latents[None, :, :h, :w], wanted)


@pytest.mark.parametrize("sizes", [PLAIN, RESIDUAL], ids=["plain", "residual"])
@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(
  data=st.data(),
  times=st.lists(st.booleans(), min_size=2, max_size=2),
  frames=st.sampled_from((5, 17, 1)),
  grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_any_shape_of_vae(sizes, data, times, frames, grid, close):
  """Any widths, levels, blocks, temporal strides 1, 2 and 4, patches; clips are not square."""
  fields = data.draw(sizes)
  levels, channels = len(fields["dim_mult"]), 3 * (fields["patch_size"] or 1) ** 2
  theirs, cfg, params = peer(
    fields
    | {
      "temperal_downsample": times[: levels - 1],
      "latents_mean": [0.0] * fields["z_dim"],
      "latents_std": [1.0] * fields["z_dim"],
      "in_channels": channels,
      "out_channels": channels,
    }
  )
  shape = (1, frames, grid[0] * cfg.stride[1], grid[1] * cfg.stride[2], 3)
  clip = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  latents, logvar, again = calls(theirs, clip)
  close("VAE encoder", vae.encode(params, clip, cfg), (latents, logvar))
  close("VAE decoder", vae.decode(params, latents, cfg), again)


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_the_public_sizes_have_their_names_and_shapes(name):
  """Every weight of their class at the public size, by name and shape; no weight is allocated."""
  cfg = vae.SIZES[name]
  fields = wan_vae.config_to_diffusers(cfg)
  with torch.device("meta"):
    theirs = AutoencoderKLWan(**{key: value for key, value in fields.items() if not key.startswith("_")})
  rows = table.their_shapes(wan_vae.rows(cfg))
  assert rows == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
  if name == "wan2.1":  # the default of the class
    defaults = {}
    for key, value in AutoencoderKLWan().config.items():
      if not key.startswith("_"):
        defaults[key] = list(value) if isinstance(value, tuple) else value
    ours = {key: value for key, value in fields.items() if not key.startswith("_")}
    assert defaults == ours | {"decoder_base_dim": None}
