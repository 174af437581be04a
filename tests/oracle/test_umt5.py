"""models.text against transformers' UMT5EncoderModel: prompts in one row equal its prompts one by one."""

import tempfile

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import torch
from transformers import UMT5Config, UMT5EncoderModel

from sora_jax.models import text
from sora_jax.weights import files, umt5

TINY = {"vocab_size": 90, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4}
SIZES = st.fixed_dictionaries(
  {
    "vocab_size": st.integers(8, 200),
    "d_model": st.integers(5, 40),
    "d_kv": st.integers(2, 12),
    "d_ff": st.integers(5, 60),
    "num_layers": st.integers(1, 4),
    "num_heads": st.integers(1, 5),
    "relative_attention_num_buckets": st.integers(2, 10).map(lambda quarter: 4 * quarter),
    "relative_attention_max_distance": st.integers(12, 140),
  }
)


def peer(size, folder):
  torch.manual_seed(0)
  model = UMT5EncoderModel(UMT5Config(**size, feed_forward_proj="gated-gelu")).eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(0.1 * torch.randn_like(weight))
  model.save_pretrained(folder)
  cfg = umt5.config_from_diffusers(files.read_config(folder))
  return model, cfg, umt5.from_diffusers(files.Tensors(folder), cfg)


@hypothesis.settings(max_examples=14, deadline=None, derandomize=True, database=None)
@hypothesis.given(size=SIZES, lengths=st.lists(st.integers(1, 160), min_size=2, max_size=4))
@hypothesis.example(size=TINY, lengths=[7, 1, 150, 40])
def test_prompts_of_a_row_are_calls_of_transformers(size, lengths, close):
  """Ours are packed, theirs are alone and padded to 256 with a mask; some are longer than max_distance."""
  with tempfile.TemporaryDirectory() as folder:
    model, cfg, params = peer(size, folder)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, size["vocab_size"], n) for n in lengths]
  ids = np.concatenate([*prompts, [0, 0]])[None]
  numbers = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(lengths)), [0, 0]])[None]
  row = np.asarray(jax.jit(text.TextEncoder(cfg).apply)({"params": params}, ids, numbers))[0]
  for number, prompt in enumerate(prompts, start=1):
    padded, mask = np.zeros((1, 256), np.int64), np.zeros((1, 256), np.int64)
    padded[0, : len(prompt)], mask[0, : len(prompt)] = prompt, 1
    with torch.no_grad():
      hidden = model(torch.from_numpy(padded), torch.from_numpy(mask)).last_hidden_state
      expected = hidden[0, : len(prompt)].numpy()
    close("UMT5", row[numbers[0] == number], expected)


def test_our_weights_load_in_transformers(tmp_path):
  model, cfg, params = peer(TINY, tmp_path)
  twin = UMT5EncoderModel(UMT5Config(**umt5.config_to_diffusers(cfg)))
  state = {name: torch.from_numpy(value) for name, value in umt5.to_diffusers(params, cfg)}
  missing, extra = twin.load_state_dict(state, strict=False)
  assert not extra and set(missing) <= {"encoder.embed_tokens.weight"}  # the same memory as shared.weight
  ids = torch.arange(2, 20)[None]
  with torch.no_grad():
    assert torch.equal(model(ids).last_hidden_state, twin.eval()(ids).last_hidden_state)


def test_the_public_encoder_has_its_number_of_weights():
  cfg = text.SIZES["umt5-xxl"]
  with torch.device("meta"):
    model = UMT5EncoderModel(UMT5Config(**umt5.config_to_diffusers(cfg)))
  assert sum(weight.numel() for weight in model.parameters()) == text.count_params(cfg)
