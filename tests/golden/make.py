"""Golden files, from the real classes with random weights:  python -m tests.golden.make [tokenizer ...]   (needs the extra `oracle`)

tokenizer/public    a small UMT5-like vocabulary in the layout of the public ones (spiece.model, tokenizer_config.json), no replacements
tokenizer/table     another, with replacements of characters, as transformers 5 saves it (tokenizer.json alone)
  golden.json       rows [prompt, ids]: `T5Tokenizer` of transformers 5.23.0 on diffusers' `prompt_clean` of the prompt, cut to 48
"""

import io
import json
import pathlib
import random
import sys

import sentencepiece
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import T5Tokenizer

HERE = pathlib.Path(__file__).parent
CORPUS = """
A red fox walks across the snow at dawn, realistic style, 4k.
the quick brown fox jumps over the lazy dog
Ein kleiner Hund läuft über die Straße
El niño come una manzana mañana
Съешь же ещё этих мягких французских булок, да выпей чаю
一只红狐狸走过雪地。猫在草地上行走
夕焼けの海と猫、カタカナとひらがな
한국어 문장을 하나 씁니다
مرحبا بالعالم كيف حالك
שלום עולם מה שלומך
नमस्ते दुनिया आप कैसे हैं
สวัสดีชาวโลก วันนี้อากาศดี
Γειά σου Κόσμε, τι κάνεις
Tiếng Việt có nhiều dấu thanh điệu
camera pans left, slow motion, 24 fps, f/1.8 & bokeh <b>bold</b> "quoted" 'single' (parens) [web] {x}
""".strip().splitlines()
WORDS = (
  "a red fox walks camera pans 猫 夕焼け 한국어 мир мира κόσμε שלום नमस्ते สวัสดี naïve café 🙂 👩\u200d👩\u200d👧 🇩🇪 🤖🫠 "
  "4k, --ar f/1.8 (slow-motion) ﬁne ＡＢＣ ｶﾞ ﾊﾞ ｱﾞ ① ½ ™ ŉ ǆ "
  "e\u0301 o\u0302\u0323 a\u0308\u0304 q\u0307\u0323 가 각 ᄒ ᅡ ᆫ \u200b \u200d \ufeff \u00ad \u2060 \u202e \x00 \x07 \x1f \x85 \x7f "
  "&amp; &lt;b&gt; &amp;amp;quot; &#x1F600; &nbsp; Ã© â€œhiâ€\x9d cafÃ© “x” ‘y’ … — ▁ ▁▁ a▁b ▁c <0x41> <0xF0> </s> <pad> <unk> <s> "
  "<extra_id_0> <extra_id_1> <extra_id_299> <extra_id_300> <extra_id_1 >< [web] page 𝒳 𠀋 الله ﷲ ﻼ क्ष ක්\u200dෂ z̴̢̛ ％ ～ ｡ Ⅷ ㎞ ㍿ ª ß ẞ İ ı ſ"
).split(" ")
GAPS = [" "] * 8 + ["  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2003", "\u2028", "\x0b", "", "", ""]
BLOCKS = (
  *((0x20, 0x17F), (0x300, 0x370), (0x600, 0x6FF), (0x900, 0xDFF), (0x1100, 0x11FF), (0x1E00, 0x20CF), (0x2100, 0x2BFF)),
  *((0x3000, 0x33FF), (0xAC00, 0xD7A3), (0xFB00, 0xFFFF), (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF)),
)
FIXED = [
  *("", " ", "\n\t ", "</s>", " </s> ", "a </s> b", "a</s>b", "<extra_id_0>", "x<extra_id_299>y", "aaa" * 20, "ab" * 70),
  *("x" * 10_000, "a red fox walks " * 400, "ab" * 700, "aaa" * 999, "🙂" * 600, "🙂 x" * 600, "</s>" * 600),
]


def prompts(count, seed=0):
  """`count` prompts: the fixed ones, words of many scripts and kinds with odd gaps, letters, characters of a block of Unicode."""
  rng = random.Random(seed)
  out = list(FIXED)
  while len(out) < count:
    kind = rng.random()
    if kind < 0.6:
      text = "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(rng.randint(1, 14)))
    elif kind < 0.8:
      text = "".join(rng.choice("abcde aeiou mnt红猫の") for _ in range(rng.randint(1, 60)))
    else:
      block = rng.choice(BLOCKS)
      text = "".join(chr(rng.randint(*block)) if rng.random() < 0.8 else rng.choice("ae ") for _ in range(rng.randint(1, 20)))
    out.append(text)
  return out


def sentencepiece_model(**options):
  """A unigram model of the corpus in T5's layout -> bytes."""
  out = io.BytesIO()
  layout = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 1000, "hard_vocab_limit": False, "character_coverage": 1.0}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20), model_writer=out, model_type="unigram", minloglevel=2, num_threads=1, **(layout | options)
  )
  return out.getvalue()


def tokenizer_folder(path, model, config):
  """spiece.model and tokenizer_config.json in a folder, and what transformers reads there."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "spiece.model").write_bytes(model)
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return T5Tokenizer.from_pretrained(str(path))


PUBLIC = {"normalization_rule_name": "identity", "byte_fallback": True, "bos_id": 2, "unk_id": 3, "user_defined_symbols": ["[web]"]}


def public_config():
  """As in the folders of Wan: 300 more ids, flags of the special tokens all false."""
  token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
  return {
    "added_tokens_decoder": {str(i): {"content": text} | token for i, text in enumerate(("<pad>", "</s>", "<s>", "<unk>"))},
    "additional_special_tokens": [f"<extra_id_{n}>" for n in range(300)],
    "eos_token": "</s>", "extra_ids": 300, "model_max_length": 512, "pad_token": "<pad>", "sp_model_kwargs": {},
    "tokenizer_class": "T5Tokenizer", "unk_token": "<unk>",
  }


# A few rules of NFKC with which nmt_nfkc does what it is known for: pairs and their beginnings, more characters, fewer, none.
REPLACED = {
  "①": "1", "½": "1/2", "™": "TM", "Ⅷ": "VIII", "㎞": "km", "㍿": "株式会社",
  "ﷲ": "الله", "𝒳": "X", "\u200b": " ", "\u00ad": "", "\u2060": "",
  "e\u0301": "é", "q": "k", "q\u0307": "Q", "ā": "a", "ガ": "が", "…": "...", "—": "-", "ß": "ss", "İ": "i",
  "ｱ": "ア", "ｱﾞ": "ア゛", "ක": "k", "🙂": ":)",
}


def make_tokenizer():
  folder = HERE / "tokenizer"
  theirs = {"public": tokenizer_folder(folder / "public", sentencepiece_model(**PUBLIC), public_config())}
  rules = folder / "rules.tsv"
  rules.write_text("".join(f"{' '.join(f'{ord(c):X}' for c in a)}\t{' '.join(f'{ord(c):X}' for c in b)}\n" for a, b in REPLACED.items()))
  model = sentencepiece_model(normalization_rule_tsv=str(rules))
  rules.unlink()
  tokenizer_folder(folder / "table", model, {"tokenizer_class": "T5Tokenizer", "extra_ids": 5}).save_pretrained(str(folder / "table"))
  (folder / "table" / "spiece.model").unlink()
  theirs["table"] = T5Tokenizer.from_pretrained(str(folder / "table"))
  for name, tokenizer in theirs.items():
    texts = [text for text in prompts(140, seed=1) if len(text) < 200]
    rows = [[text, tokenizer(prompt_clean(text), truncation=True, max_length=48)["input_ids"]] for text in texts]
    (folder / name / "golden.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
  makers = {name.removeprefix("make_"): maker for name, maker in list(globals().items()) if name.startswith("make_")}
  for wanted in sys.argv[1:] or makers:
    makers[wanted]()
