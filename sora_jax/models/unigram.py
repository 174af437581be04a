"""Prompts into ids as T5's family does it (UMT5, arXiv:2304.09151; `T5Tokenizer` of transformers 5.23.0, tokenizers 0.23).

  text  -> special tokens that stand in it literally, and what lies between them
  part  -> characters replaced by the model's table, if it has one -> words, split at white space, each begins with one "▁"
  piece -> the pieces of the highest sum of log probabilities (unigram model, arXiv:1804.10959), found by dynamic programming

sentencepiece itself differs: it has no special tokens in text, sums in float32, where equal sums fall apart by rounding, falls back to
bytes, and replaces by the longest match. `UNKNOWN` stands for a run of characters without a piece. Its id is 2 whatever the model says
(the public vocabulary has `<s>` there and `<unk>` at 3), since that is what WanPipeline feeds to the encoder with transformers 5.
"""

import re

import numpy as np
import wcwidth

UNKNOWN = 2
PENALTY = 10.0  # of an unknown character, below the least likely piece
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # types of pieces; what is neither NORMAL nor BYTE is a special token


def is_unigram(proto):
  return proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM


def add_tokens(proto, config):
  """Makes special what tokenizer_config.json (a dict) says of a spiece.model, and appends what is new: `extra_ids` of <extra_id_N>, the
  highest N first, then `added_tokens_decoder`, then lists. Where it has a list, user-defined and control pieces are special only if named.
  """
  listed = [str(token) for name in ("additional_special_tokens", "extra_special_tokens") for token in config.get(name) or ()]
  texts = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in reversed(range(config.get("extra_ids", 100))))]
  texts += [token["content"] for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))]
  if listed:
    for piece in proto.pieces:
      piece.type = NORMAL if piece.type in (CONTROL, USER_DEFINED) else piece.type
  known = {piece.piece: piece for piece in proto.pieces}
  for text in texts + listed:
    if text not in known:
      known[text] = proto.pieces.add(piece=text, score=0.0)
    if known[text].type in (NORMAL, BYTE):
      known[text].type = CONTROL


class Unigram:
  """A ModelProto -> `encode`."""

  def __init__(self, proto):
    self._ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    self._scores = {piece.piece: piece.score for piece in proto.pieces}
    self._longest = max(map(len, self._ids))
    self._unknown = min(self._scores.values()) - PENALTY
    special = sorted((piece.piece for piece in proto.pieces if piece.type not in (NORMAL, BYTE)), key=len, reverse=True)
    self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
    table = proto.normalizer_spec.precompiled_charsmap
    self._table = CharacterTable(table) if table else None

  def encode(self, text):
    """Text that `text.clean` has been over -> list of ids, without an end."""
    ids = []
    for i, part in enumerate(self._special.split(text)):
      if i % 2:
        ids.append(self._ids[part])
        continue
      for word in (self._table.replace(part) if self._table else part).split():
        for piece in re.findall("▁[^▁]*", word if word.startswith("▁") else "▁" + word):
          ids += self._best(piece)
    return ids

  def _best(self, text):
    """ids of the most likely pieces; of equal ones, those whose last piece begins first."""
    best = [(0.0, 0, UNKNOWN)] + [None] * len(text)  # at each place: sum, where the last piece began, its id
    for start in range(len(text)):
      single = False
      for end in range(start + 1, min(start + self._longest, len(text)) + 1):
        piece = text[start:end]
        if piece in self._ids:
          single |= end == start + 1
          total = best[start][0] + self._scores[piece]
          if best[end] is None or total > best[end][0]:
            best[end] = total, start, self._ids[piece]
      if not single:
        total = best[start][0] + self._unknown
        if best[start + 1] is None or total > best[start + 1][0]:
          best[start + 1] = total, start, UNKNOWN
    ids, end = [], len(text)
    while end:
      _, end, token = best[end]
      if token != UNKNOWN or ids[-1:] != [UNKNOWN]:
        ids.append(token)
    return ids[::-1]


class CharacterTable:
  """sentencepiece's table of replacements (a double-array trie of UTF-8, and texts that end in 0) as the crate spm_precompiled reads it:
  a grapheme below 6 bytes by the replacement of its shortest prefix that has one, else each of its characters so."""

  def __init__(self, data):
    size = int.from_bytes(data[:4], "little")
    self._units, self._texts = np.frombuffer(data[4 : 4 + size], "<u4").tolist(), data[4 + size :]

  def replace(self, text):
    out = []
    for grapheme in wcwidth.iter_graphemes(text):
      whole = self._lookup(grapheme) if len(grapheme.encode()) < 6 else None
      if whole is not None:
        out.append(whole)
        continue
      for character in grapheme:
        one = self._lookup(character)
        out.append(character if one is None else one)
    return "".join(out)

  def _lookup(self, text):
    """Replacement of the shortest prefix that has one, or None. Layout of a unit: github.com/s-yata/darts-clone."""
    offset = lambda unit: (unit >> 10) << ((unit & 1 << 9) >> 6)  # noqa: E731
    at = offset(self._units[0])
    for byte in text.encode():
      at ^= byte
      if not byte or self._units[at] & (1 << 31 | 0xFF) != byte:
        return None
      unit = self._units[at]
      at ^= offset(unit)
      if unit >> 8 & 1:
        start = self._units[at] & (1 << 31) - 1
        return self._texts[start : self._texts.index(0, start)].decode()
    return None
