"""models.dit against diffusers' WanTransformer3DModel, live: same weights, same inputs, same answer; and the other way round."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from sora_jax import patches
from sora_jax.models import dit
from sora_jax.weights import files, wan_dit

TINY = {
  "patch_size": (1, 2, 2),
  "num_attention_heads": 3,
  "attention_head_dim": 20,
  "in_channels": 6,
  "out_channels": 6,
  "text_dim": 10,
  "freq_dim": 32,
  "ffn_dim": 56,
  "num_layers": 2,
  "rope_max_seq_len": 64,
}


def peer(folder, **changes):
  """A random Wan model with every weight moved from its initial value, its folder as saved, and ours from that folder."""
  torch.manual_seed(0)
  model = WanTransformer3DModel(**(TINY | changes)).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.1 * torch.randn_like(weight))
  model.save_pretrained(folder, max_shard_size="20KB")
  cfg = wan_dit.config_to_ours(files.read_config(folder))
  return model, cfg, wan_dit.to_ours(files.Tensors(folder), cfg)


def theirs(model, latents_THWC, timestep, text_SE):
  """Velocity [T, H, W, C] of one clip by diffusers; `timestep` a scalar, or one for each token."""
  x = torch.from_numpy(latents_THWC.transpose(3, 0, 1, 2)[None].copy())
  with torch.no_grad():
    y = model(x, torch.as_tensor(timestep)[None], torch.from_numpy(text_SE[None]), return_dict=False)[0]
  return y.numpy()[0].transpose(1, 2, 3, 0)


def ours(cfg, params, clips):
  """The same by ours, all clips in one row: list of (latents_THWC, timestep, text_SE) -> list of velocities."""
  row = {"tokens": [], "coords": [], "segment": [], "sigma": [], "text": [], "prompt": [], "cond": []}
  for i, (latents, timestep, text) in enumerate(clips, start=1):
    tokens = patches.patchify(latents[..., : cfg.channels], cfg.patch)
    row["tokens"].append(tokens)
    row["cond"].append(patches.patchify(latents[..., cfg.channels :], cfg.patch))
    row["coords"].append(patches.coords(patches.grid(latents.shape[:3], cfg.patch)))
    row["segment"].append(np.full(len(tokens), i))
    row["sigma"].append(np.broadcast_to(np.float32(timestep) / 1000, len(tokens)))
    row["text"].append(text)
    row["prompt"].append(np.full(len(text), i))
  row = {name: np.concatenate(parts)[None] for name, parts in row.items()}
  sigma_U, index_L = np.unique(row["sigma"][0], return_inverse=True)
  velocity = jax.jit(dit.DiT(cfg).apply)(
    {"params": params},
    row["tokens"],
    row["coords"],
    row["segment"],
    sigma_U[None],
    index_L[None],
    row["text"],
    row["segment"],
    row["prompt"],
    row["cond"] if cfg.cond_channels else None,
  )[0]
  ends = np.cumsum([patches.token_count(c[0].shape[:3], cfg.patch) for c in clips])[:-1]
  return [patches.unpatchify(part, c[0].shape[:3], cfg.patch) for part, c in zip(np.split(np.asarray(velocity), ends), clips, strict=True)]


def clip(seed, thw, channels, timestep, text_tokens, text_width=10):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  return draw(*thw, channels), timestep, draw(text_tokens, text_width)


@pytest.mark.parametrize(
  "changes",
  [{}, {"patch_size": (2, 1, 3), "attention_head_dim": 26}, {"cross_attn_norm": False}, {"in_channels": 15}],
  ids=["plain", "odd-patch-and-head", "no-cross-norm", "image-channels"],
)
def test_two_clips_in_one_row_are_two_calls_of_diffusers(changes, tmp_path):
  """Odd sizes, batch timesteps, prompts of their own length; also with condition channels (I2V-A14B)."""
  model, cfg, params = peer(tmp_path, **changes)
  channels = cfg.channels + cfg.cond_channels
  clips = [clip(1, (2, 6, 12), channels, 731.0, 5), clip(2, (4, 10, 6), channels, 40.0, 9)]
  for mine, one in zip(ours(cfg, params, clips), clips, strict=True):
    expected = theirs(model, *one)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(mine, expected, atol=2e-5)


def test_a_timestep_for_each_token(tmp_path):
  """As TI2V-5B is called: given tokens at 0, the others at t."""
  model, cfg, params = peer(tmp_path)
  latents, _, text = clip(3, (3, 6, 8), 6, None, 7)
  timesteps = np.where(np.arange(36) < 12, 0, 625).astype(np.float32)
  expected = theirs(model, latents, timesteps, text)
  np.testing.assert_allclose(ours(cfg, params, [(latents, timesteps, text)])[0], expected, atol=2e-5)
  assert np.abs(expected - theirs(model, latents, np.float32(625), text)).max() > 1e-2


def test_our_weights_load_in_diffusers(tmp_path):
  """Exported weights, loaded by name: the same tensors, and a config that diffusers builds from."""
  model, cfg, params = peer(tmp_path, in_channels=15)
  twin = WanTransformer3DModel.from_config(json.loads(json.dumps(wan_dit.config_to_theirs(cfg))))
  state = {name: torch.from_numpy(value) for name, value in wan_dit.to_theirs(params, cfg)}
  twin.load_state_dict(state, strict=True)
  for name, value in model.state_dict().items():
    assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("size", ["wan-1.3b", "wan-5b", "wan-14b", "wan-14b-i2v"])
def test_public_sizes_have_their_number_of_weights(size):
  cfg = dit.SIZES[size]
  with torch.device("meta"):
    model = WanTransformer3DModel.from_config(wan_dit.config_to_theirs(cfg))
  assert sum(weight.numel() for weight in model.parameters()) == dit.count_params(cfg)
