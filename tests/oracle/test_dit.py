"""models.dit against diffusers' WanTransformer3DModel: equal outputs for equal weights and inputs."""

import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from sora_jax.models import dit
from sora_jax.weights import files, wan_dit
from tests.golden.calls import dit_velocities

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
SIZES = st.fixed_dictionaries(
  {
    "patch_size": st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
    "num_attention_heads": st.integers(1, 4),
    # Most head sizes are not multiples of 6, so that t, y and x have odd shares.
    "attention_head_dim": st.integers(3, 17).map(lambda half: 2 * half),
    "in_channels": st.sampled_from((4, 5, 7, 11)),  # the first four are latents, the others conditions
    "out_channels": st.just(4),
    "text_dim": st.integers(3, 20),
    "freq_dim": st.integers(2, 24).map(lambda half: 2 * half),
    "ffn_dim": st.integers(5, 70),
    "num_layers": st.integers(1, 3),
    "cross_attn_norm": st.booleans(),
  }
)
CLIPS = st.lists(
  st.fixed_dictionaries(
    {
      "grid": st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
      "time": st.floats(0, 1000, width=32),
      "given": st.booleans(),  # its first frame at time 0, as TI2V-5B is called
      "text": st.integers(1, 12),
    }
  ),
  min_size=2,
  max_size=3,
)


def peer(changes, folder=None):
  """A random Wan model with perturbed weights, and ours with the same weights.

  They are converted by way of a folder where one is given.
  """
  torch.manual_seed(0)
  model = WanTransformer3DModel(**(TINY | changes)).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.1 * torch.randn_like(weight))
  if folder is None:
    cfg = wan_dit.config_from_diffusers(dict(model.config))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    return model, cfg, wan_dit.from_diffusers(tensors, cfg)
  model.save_pretrained(folder, max_shard_size="20KB")
  cfg = wan_dit.config_from_diffusers(files.read_config(folder))
  return model, cfg, wan_dit.from_diffusers(files.Tensors(folder), cfg)


def their_velocity(model, latents_THWC, timestep, text_SE):
  """Velocity [T, H, W, C] of one clip by diffusers. timestep: a scalar, or one for each token."""
  x = torch.from_numpy(latents_THWC.transpose(3, 0, 1, 2)[None].copy())
  with torch.no_grad():
    y = model(x, torch.as_tensor(timestep)[None], torch.from_numpy(text_SE[None]), return_dict=False)[0]
  return y.numpy()[0].transpose(1, 2, 3, 0)


@hypothesis.settings(max_examples=14, deadline=None, derandomize=True, database=None)
@hypothesis.given(size=SIZES, clips=CLIPS)
def test_clips_in_one_row_are_calls_of_diffusers(size, clips, close):
  """For any shape of model, with clips of any size packed in one row.

  Prompts have their own lengths. There is a time for each clip, or for each token.
  """
  model, cfg, params = peer(size)
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  calls = []
  for clip in clips:
    thw = tuple(n * p for n, p in zip(clip["grid"], size["patch_size"], strict=True))
    time = np.float32(clip["time"])
    if clip["given"]:
      in_first_frame = np.arange(math.prod(clip["grid"])) < math.prod(clip["grid"][1:])
      time = np.where(in_first_frame, 0, time).astype(np.float32)
    calls.append((draw(*thw, size["in_channels"]), time, draw(clip["text"], size["text_dim"])))
  for velocity, call in zip(dit_velocities(cfg, params, calls), calls, strict=True):
    close("DiT", velocity, their_velocity(model, *call))


def test_a_time_for_each_token_matters():
  """Given tokens at time 0 and others at t differ from all at t, so the test above can tell them apart."""
  model, cfg, _ = peer({})
  latents = np.random.default_rng(3).normal(size=(3, 6, 8, 6)).astype(np.float32)
  text = np.ones((7, 10), np.float32)
  times = np.where(np.arange(36) < 12, 0, 625).astype(np.float32)
  of_tokens = their_velocity(model, latents, times, text)
  of_clip = their_velocity(model, latents, np.float32(625), text)
  assert np.abs(of_tokens - of_clip).max() > 1e-2


def test_our_weights_load_in_diffusers(tmp_path):
  """Read from the shards of a folder, written and loaded by name: equal tensors and a valid config."""
  model, cfg, params = peer({"in_channels": 15}, tmp_path)
  twin = WanTransformer3DModel.from_config(json.loads(json.dumps(wan_dit.config_to_diffusers(cfg))))
  state = {name: torch.from_numpy(value) for name, value in wan_dit.to_diffusers(params, cfg)}
  twin.load_state_dict(state, strict=True)
  for name, value in model.state_dict().items():
    assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("size", ["wan-1.3b", "wan-5b", "wan-14b", "wan-14b-i2v"])
def test_public_sizes_have_their_number_of_weights(size):
  cfg = dit.SIZES[size]
  with torch.device("meta"):
    model = WanTransformer3DModel.from_config(wan_dit.config_to_diffusers(cfg))
  assert sum(weight.numel() for weight in model.parameters()) == dit.count_params(cfg)
