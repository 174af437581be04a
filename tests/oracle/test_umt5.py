"""models.text against transformers' UMT5EncoderModel, live: prompts packed in one row are its prompts one by one."""

import jax
import numpy as np
import torch
from transformers import UMT5Config, UMT5EncoderModel

from sora_jax.models import text
from sora_jax.weights import files, umt5

LENGTHS = (7, 1, 150, 40)  # one beyond max_distance


def peer(folder):
  torch.manual_seed(0)
  config = UMT5Config(vocab_size=90, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
  model = UMT5EncoderModel(config).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.1 * torch.randn_like(weight))
  model.save_pretrained(folder)
  cfg = umt5.config_to_ours(files.read_config(folder))
  return model, cfg, umt5.to_ours(files.Tensors(folder), cfg)


def test_prompts_of_a_row_are_calls_of_transformers(tmp_path):
  """Ours packed, theirs each alone and padded to 256 under a mask."""
  model, cfg, params = peer(tmp_path)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 90, n) for n in LENGTHS]
  ids = np.concatenate([*prompts, [0, 0]])[None]
  numbers = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(LENGTHS)), [0, 0]])[None]
  row = np.asarray(jax.jit(text.TextEncoder(cfg).apply)({"params": params}, ids, numbers))[0]
  for number, prompt in enumerate(prompts, start=1):
    padded, mask = np.zeros((1, 256), np.int64), np.zeros((1, 256), np.int64)
    padded[0, : len(prompt)], mask[0, : len(prompt)] = prompt, 1
    with torch.no_grad():
      expected = model(torch.from_numpy(padded), torch.from_numpy(mask)).last_hidden_state[0, : len(prompt)].numpy()
    np.testing.assert_allclose(row[numbers[0] == number], expected, atol=2e-5)


def test_our_weights_load_in_transformers(tmp_path):
  model, cfg, params = peer(tmp_path)
  twin = UMT5EncoderModel(UMT5Config(**umt5.config_to_theirs(cfg)))
  missing, extra = twin.load_state_dict({name: torch.from_numpy(value) for name, value in umt5.to_theirs(params, cfg)}, strict=False)
  assert not extra and set(missing) <= {"encoder.embed_tokens.weight"}  # the same memory as shared.weight
  ids = torch.arange(2, 20)[None]
  with torch.no_grad():
    assert torch.equal(model(ids).last_hidden_state, twin.eval()(ids).last_hidden_state)


def test_the_public_encoder_has_its_number_of_weights():
  cfg = text.SIZES["umt5-xxl"]
  with torch.device("meta"):
    model = UMT5EncoderModel(UMT5Config(**umt5.config_to_theirs(cfg)))
  assert sum(weight.numel() for weight in model.parameters()) == text.count_params(cfg)
