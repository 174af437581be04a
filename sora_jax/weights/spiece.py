"""Converts the tokenizer of a public model (folder `tokenizer`) to the sentencepiece model in W/text.

transformers 5 saves only `tokenizer.json`, and prefers it to `spiece.model` where both exist. It holds
pieces, scores and the table of replacements, so the model follows from it, special tokens included. The
result gives the same ids for every text, but is not byte-equal to the first spiece.model, since training
settings are not stored. Scores are float32, as they were in spiece.model. The library `tokenizers` reads
tokenizer.json, but does not write sentencepiece models.
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

  Raises BadInput where the folder has neither, or a file cannot be read.
  """
  path = pathlib.Path(path)
  if (path / "tokenizer.json").exists():
    return from_tokenizer_json(path / "tokenizer.json")
  model = path / "spiece.model"
  if not model.exists():
    raise BadInput(
      f"tokenizer: {path} holds neither tokenizer.json nor spiece.model; give the folder `tokenizer` of "
      "a Wan model"
    )
  proto = ModelProto.FromString(checked(model.read_bytes(), model))
  config = path / "tokenizer_config.json"
  if config.exists():
    try:
      unigram.add_tokens(proto, json.loads(config.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise BadInput(f"tokenizer: {config} cannot be read ({error!r}); download it again") from error
  return proto.SerializeToString()


def checked(data, source):
  """The bytes of a sentencepiece model. Raises BadInput where they are none; source: where they are from."""
  try:
    sentencepiece.SentencePieceProcessor(model_proto=data)
  except RuntimeError as error:
    raise BadInput(
      f"tokenizer: {source} is not a sentencepiece model ({error}); download it again"
    ) from error
  return data


def from_tokenizer_json(path):
  """tokenizer.json of T5's family -> bytes of a sentencepiece model. Raises BadInput for other tokenizers."""
  try:
    theirs = json.loads(pathlib.Path(path).read_text())
    model, added = theirs["model"], {token["content"]: token for token in theirs["added_tokens"]}
    if model["type"] != "Unigram" or "<unk>" not in added:
      raise ValueError(f"model {model['type']}, special tokens {sorted(added)[:3]}")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise BadInput(
      f"tokenizer: {path} is not a tokenizer of T5's kind, Unigram with <unk> ({error}); give that of "
      "a Wan model"
    ) from error
  vocab = list(model["vocab"])
  vocab += [[text, 0.0] for text, token in added.items() if token["id"] >= len(model["vocab"])]
  proto = ModelProto()
  for text, score in vocab:
    proto.pieces.add(piece=text, score=score, type=type_of(text, added))
  ids = {text: i for i, (text, _) in enumerate(vocab)}
  proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
  proto.trainer_spec.vocab_size = len(vocab)
  for name, text in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
    setattr(proto.trainer_spec, f"{name}_id", ids.get(text, -1))
  normalizer = theirs.get("normalizer") or {}
  for part in [normalizer, *normalizer.get("normalizers", [])]:
    if part.get("type") == "Precompiled":
      proto.normalizer_spec.precompiled_charsmap = base64.b64decode(part["precompiled_charsmap"])
  return proto.SerializeToString()


def type_of(text, added):
  """Type of a piece in a sentencepiece model. added: {text: entry} of tokenizer.json's `added_tokens`."""
  if text not in added:
    return "NORMAL"
  if text == "<unk>":
    return "UNKNOWN"
  return "CONTROL" if added[text]["special"] else "USER_DEFINED"
