"""The tokenizer of a public model (folder `tokenizer`) -> the one sentencepiece model that W/text holds.

transformers 5 saves `tokenizer.json` alone, and reads it before `spiece.model` where both are there. It
holds pieces, scores and the table of replacements, so the model follows from it, special tokens included:
the same ids for every text, though not the same bytes as the first spiece.model (how it was trained is not
in there). Scores come out as float32, which they were in spiece.model. The library `tokenizers` reads
tokenizer.json, but writes no sentencepiece model.
"""

import base64
import json
import pathlib

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from sora_jax.errors import BadInput
from sora_jax.models import unigram


def from_folder(path):
  """Folder with tokenizer.json or spiece.model (and tokenizer_config.json) -> bytes of a sentencepiece model.

  Raises BadInput.
  """
  path = pathlib.Path(path)
  if (path / "tokenizer.json").exists():
    return from_tokenizer_json(path / "tokenizer.json")
  model = path / "spiece.model"
  if not model.exists():
    lacking = "holds neither tokenizer.json nor spiece.model"
    raise BadInput(f"tokenizer: {path} {lacking}; give the folder `tokenizer` of a Wan model")
  data = model.read_bytes()
  try:
    sentencepiece.SentencePieceProcessor(model_proto=data)
  except RuntimeError as error:
    raise BadInput(f"tokenizer: {model} is no sentencepiece model ({error}); download it again") from error
  proto = ModelProto.FromString(data)
  config = path / "tokenizer_config.json"
  if config.exists():
    try:
      unigram.add_tokens(proto, json.loads(config.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise BadInput(f"tokenizer: {config} cannot be read ({error!r}); download it again") from error
  return proto.SerializeToString()


def from_tokenizer_json(path):
  """tokenizer.json of T5's family -> bytes of a sentencepiece model. Raises BadInput where it is another."""
  try:
    theirs = json.loads(pathlib.Path(path).read_text())
    model, added = theirs["model"], {token["content"]: token for token in theirs["added_tokens"]}
    if model["type"] != "Unigram" or "<unk>" not in added:
      raise ValueError(f"model {model['type']}, special tokens {sorted(added)[:3]}")
  except (OSError, ValueError, KeyError, TypeError) as error:
    kind = "no tokenizer of T5's kind, Unigram with <unk>"
    raise BadInput(f"tokenizer: {path} is {kind} ({error}); give that of a Wan model") from error
  vocab = list(model["vocab"])
  vocab += [[text, 0.0] for text, token in added.items() if token["id"] >= len(model["vocab"])]
  proto = ModelProto()
  for text, score in vocab:
    proto.pieces.add(piece=text, score=score, type=type_of(text, added))
  at = {text: i for i, (text, _) in enumerate(vocab)}
  proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
  proto.trainer_spec.vocab_size = len(vocab)
  for name, text in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
    setattr(proto.trainer_spec, f"{name}_id", at.get(text, -1))
  normalizer = theirs.get("normalizer") or {}
  for part in [normalizer, *normalizer.get("normalizers", [])]:
    if part.get("type") == "Precompiled":
      proto.normalizer_spec.precompiled_charsmap = base64.b64decode(part["precompiled_charsmap"])
  return proto.SerializeToString()


def type_of(text, added):
  """Type of a piece in a sentencepiece model; `added`: tokenizer.json's `added_tokens` by their text."""
  if text not in added:
    return "NORMAL"
  if text == "<unk>":
    return "UNKNOWN"
  return "CONTROL" if added[text]["special"] else "USER_DEFINED"
