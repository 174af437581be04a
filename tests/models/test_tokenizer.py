"""Tokenizers of T5's family give the ids of transformers (tests/golden/make.py).

They come from spiece.model with its config, and from tokenizer.json.
"""

import json
import pathlib
import shutil

import pytest
import sentencepiece

from sora_jax.errors import BadInput
from sora_jax.models import text
from sora_jax.weights import spiece

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokenizer"


@pytest.mark.parametrize("name", ["public", "table"])
def test_golden_prompts(name, tmp_path):
  """Prompts have many scripts, special tokens as text, odd spaces, marks, unknown characters, truncated ends.

  sentencepiece alone gives other ids.
  """
  (tmp_path / "tokenizer.model").write_bytes(spiece.from_folder(GOLDEN / name))
  tokenizer = text.Tokenizer(tmp_path / "tokenizer.model")
  rows = json.loads((GOLDEN / name / "golden.json").read_text())
  assert len(rows) > 100 and tokenizer.null == [text.EOS]
  for prompt, ids in rows:
    assert tokenizer.encode(prompt, 48) == ids, repr(prompt)
    assert max(ids) < tokenizer.vocab and text.clean(tokenizer.decode(ids)) is not None
  plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
  different = [plain.encode(text.clean(prompt))[:47] + [text.EOS] != ids for prompt, ids in rows]
  assert sum(different) > 30


def test_the_config_beside_a_model_names_its_special_tokens(tmp_path):
  """spiece.model with its config is the same tokenizer. Without the config, <extra_id_N> is text."""
  beside = text.Tokenizer(GOLDEN / "public" / "spiece.model")
  for prompt, ids in json.loads((GOLDEN / "public" / "golden.json").read_text()):
    assert beside.encode(prompt, 48) == ids, repr(prompt)
  assert beside.encode("<extra_id_0>") == [beside.vocab - 1, text.EOS]
  shutil.copy(GOLDEN / "public" / "spiece.model", tmp_path)
  alone = text.Tokenizer(tmp_path / "spiece.model")
  assert alone.vocab == beside.vocab - 300 and len(alone.encode("<extra_id_0>")) > 3


def test_folders_without_such_a_tokenizer_are_named(tmp_path):
  with pytest.raises(BadInput, match="neither"):
    spiece.from_folder(tmp_path)
  (tmp_path / "spiece.model").write_bytes(b"no model")
  with pytest.raises(BadInput, match="spiece.model is not a sentencepiece model"):
    spiece.from_folder(tmp_path)
  for written in ("{", json.dumps({"model": {"type": "BPE"}, "added_tokens": []}), "[]"):
    (tmp_path / "tokenizer.json").write_text(written)
    with pytest.raises(BadInput, match="Unigram"):
      spiece.from_folder(tmp_path)
