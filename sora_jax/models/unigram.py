"""Prompts into ids as T5's family does it (UMT5, arXiv:2304.09151), by the library `tokenizers`.

It is set up as `T5Tokenizer` of transformers 5.23.0 does. sentencepiece's own processor gives other ids for
134 of the 266 golden prompts: it reads special tokens as text and falls back to bytes. With special tokens
user-defined and no bytes it still does for 87: no word begins after a special token, one begins before it,
and "▁" in the text is doubled.
"""

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import models, normalizers, pre_tokenizers

UNKNOWN = 2  # whatever the model says: the public vocabulary has `<s>` there and `<unk>` at 3
PIECE = ModelProto.SentencePiece
ORDINARY = (PIECE.NORMAL, PIECE.BYTE)  # a piece of any other type is a special token


def add_tokens(proto, config):
  """Makes special what tokenizer_config.json (a dict) names of a spiece.model, and appends what it lacks.

  The order: `extra_ids` of <extra_id_N>, the highest N first, then `added_tokens_decoder`, then lists.
  Where the config has a list, user-defined and control pieces are special only if named.
  """
  listed = []
  for name in ("additional_special_tokens", "extra_special_tokens"):
    listed += [str(token) for token in config.get(name) or ()]
  decoder = {int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()}
  texts = ["<pad>", "</s>", "<unk>"]
  texts += [f"<extra_id_{n}>" for n in reversed(range(config.get("extra_ids", 100)))]
  texts += [decoder[i] for i in sorted(decoder)]
  texts += listed
  if listed:
    for piece in proto.pieces:
      if piece.type in (PIECE.CONTROL, PIECE.USER_DEFINED):
        piece.type = PIECE.NORMAL
  known = {piece.piece: piece for piece in proto.pieces}
  for text in texts:
    if text not in known:
      known[text] = proto.pieces.add(piece=text, score=0.0)
    if known[text].type in ORDINARY:
      known[text].type = PIECE.CONTROL


class Unigram:
  """A ModelProto -> `encode`."""

  def __init__(self, proto):
    model = models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=UNKNOWN)
    self._tokenizer = tokenizers.Tokenizer(model)
    table = proto.normalizer_spec.precompiled_charsmap
    if table:
      self._tokenizer.normalizer = normalizers.Precompiled(table)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    special = [piece.piece for piece in proto.pieces if piece.type not in ORDINARY]
    self._tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])

  def encode(self, text):
    """Text that `text.clean` has been over -> list of ids, without an end."""
    return self._tokenizer.encode(text).ids
