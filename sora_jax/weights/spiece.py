"""The tokenizer of a public model (folder `tokenizer`) -> one sentencepiece model, special tokens included, for `models.text.Tokenizer`.

transformers 5 saves `tokenizer.json` alone, and reads it before `spiece.model` where both are there. It holds pieces, scores and the
table of replacements, so the model follows from it: the same ids for every text, though not the same bytes as the first spiece.model
(how it was trained is not in there). Scores come out as float32, which they were in spiece.model.
"""

import base64
import json
import pathlib

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from sora_jax.errors import BadInput
from sora_jax.models import unigram


def from_folder(path):
  """Folder with tokenizer.json, or with spiece.model (and tokenizer_config.json) -> bytes of a sentencepiece model. Raises BadInput."""
  path = pathlib.Path(path)
  if (path / "tokenizer.json").exists():
    return from_tokenizer_json(path / "tokenizer.json")
  if not (path / "spiece.model").exists():
    raise BadInput(f"tokenizer: {path} holds neither tokenizer.json nor spiece.model; give the folder `tokenizer` of a Wan model")
  data = (path / "spiece.model").read_bytes()
  try:
    sentencepiece.SentencePieceProcessor(model_proto=data)
  except RuntimeError as error:
    raise BadInput(f"tokenizer: {path / 'spiece.model'} is no sentencepiece model ({error}); download it again") from error
  proto = ModelProto.FromString(data)
  if (path / "tokenizer_config.json").exists():
    try:
      unigram.add_tokens(proto, json.loads((path / "tokenizer_config.json").read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise BadInput(f"tokenizer: {path / 'tokenizer_config.json'} cannot be read ({error!r}); download it again") from error
  return proto.SerializeToString()


def from_tokenizer_json(path):
  """tokenizer.json of T5's family -> bytes of a sentencepiece model. Raises BadInput where it is of another kind."""
  try:
    theirs = json.loads(pathlib.Path(path).read_text())
    model, added = theirs["model"], {token["content"]: token for token in theirs["added_tokens"]}
    if model["type"] != "Unigram" or "<unk>" not in added:
      raise ValueError(f"model {model['type']}, special tokens {sorted(added)[:3]}")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise BadInput(f"tokenizer: {path} is no tokenizer of T5's kind, Unigram with <unk> ({error}); give that of a Wan model") from error
  vocab = [*model["vocab"], *([text, 0.0] for text, token in added.items() if token["id"] >= len(model["vocab"]))]
  proto = ModelProto()
  for text, score in vocab:
    kind = "NORMAL" if text not in added else "UNKNOWN" if text == "<unk>" else "CONTROL" if added[text]["special"] else "USER_DEFINED"
    proto.pieces.add(piece=text, score=score, type=kind)
  at = {text: i for i, (text, _) in enumerate(vocab)}
  proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
  proto.trainer_spec.vocab_size = len(vocab)
  for name, text in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
    setattr(proto.trainer_spec, f"{name}_id", at.get(text, -1))
  for part in [theirs.get("normalizer") or {}, *(theirs.get("normalizer") or {}).get("normalizers", [])]:
    if part.get("type") == "Precompiled":
      proto.normalizer_spec.precompiled_charsmap = base64.b64decode(part["precompiled_charsmap"])
  return proto.SerializeToString()
