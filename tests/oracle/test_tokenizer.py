"""models.text.Tokenizer against transformers' T5Tokenizer as WanPipeline calls it, on a thousand prompts."""

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import AutoTokenizer, T5Tokenizer

from sora_jax.models import text
from sora_jax.weights import spiece
from tests.golden import make

PROMPTS = make.prompts(1000)
PLAIN = {"tokenizer_class": "T5Tokenizer", "extra_ids": 300}
KINDS = {  # options of sentencepiece, and tokenizer_config.json
  "nmt_nfkc": ({}, PLAIN),
  "case-folded, bytes, symbols": (
    {"normalization_rule_name": "nmt_nfkc_cf", "byte_fallback": True, "user_defined_symbols": ["fox"]},
    PLAIN,
  ),
  "identity": ({"normalization_rule_name": "identity"}, {"tokenizer_class": "T5Tokenizer"}),
  "public": (make.PUBLIC, make.public_config()),
}


def assert_same(theirs, ours):
  """Asserts equal ids for every prompt: cleaned, cut to 512, ended and padded as theirs."""
  unknown = 0
  for prompt in PROMPTS:
    expected = theirs(
      [prompt_clean(prompt)],
      padding="max_length",
      max_length=512,
      truncation=True,
      add_special_tokens=True,
    )
    ids = ours.encode(prompt, 512)
    assert ids + [text.PAD] * (512 - len(ids)) == expected["input_ids"][0], repr(prompt)
    assert len(ids) == sum(expected["attention_mask"][0]) and max(ids) < ours.vocab
    unknown += text.UNK in ids
  assert 100 < unknown < 900
  assert len(theirs) == ours.vocab


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_prompts(kind, tmp_path):
  """From spiece.model with its config, from both converted to one file, and from what transformers saves."""
  options, config = KINDS[kind]
  theirs = make.tokenizer_folder(tmp_path / "first", make.sentencepiece_model(**options), config)
  assert_same(theirs, text.Tokenizer(tmp_path / "first" / "spiece.model"))
  theirs.save_pretrained(tmp_path / "saved")
  assert not (tmp_path / "saved" / "spiece.model").exists()
  for source, reader in (("first", AutoTokenizer), ("saved", T5Tokenizer)):
    (tmp_path / f"{source}.model").write_bytes(spiece.from_folder(tmp_path / source))
    theirs = reader.from_pretrained(str(tmp_path / source))
    assert_same(theirs, text.Tokenizer(tmp_path / f"{source}.model"))


def test_prompts_are_cleaned_as_the_pipeline_does():
  for prompt in PROMPTS:
    assert text.clean(prompt) == prompt_clean(prompt)
