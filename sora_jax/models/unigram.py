"""Tokenization of prompts as in T5's family (UMT5, arXiv:2304.09151), by the library `tokenizers`.

The library is set up as `T5Tokenizer` of transformers 5.23.0 does. sentencepiece's own processor gives
different ids for 134 of the 266 golden prompts, because it reads special tokens as text and falls back to
bytes. With user-defined special tokens and without bytes it still differs for 87: no word begins after a
special token, a word begins before it, and "▁" in the text is doubled.
"""

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import models, normalizers, pre_tokenizers

UNKNOWN = 2  # regardless of the model: the public vocabulary has `<s>` there and `<unk>` at 3
PIECE = ModelProto.SentencePiece
ORDINARY = (PIECE.NORMAL, PIECE.BYTE)  # a piece of any other type is a special token


def add_tokens(proto, config):
  """Marks the tokens of a spiece.model that tokenizer_config.json (a dict) names as special.

  Missing tokens are appended in the order: `extra_ids` tokens <extra_id_N>, the highest N first;
  `added_tokens_decoder`; the lists of special tokens. Where the config has such a list, user-defined and
  control pieces are special only if named.
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
  """The tokenizer of a ModelProto of a unigram model."""

  def __init__(self, proto):
    model = models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=UNKNOWN)
    self._tokenizer = tokenizers.Tokenizer(model)
    charsmap = proto.normalizer_spec.precompiled_charsmap
    if charsmap:
      self._tokenizer.normalizer = normalizers.Precompiled(charsmap)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    special = [piece.piece for piece in proto.pieces if piece.type not in ORDINARY]
    self._tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])

  def encode(self, text):
    """Text cleaned by `text.clean` -> list of ids, without EOS."""
    return self._tokenizer.encode(text).ids
