"""Makes golden files from the reference classes with random weights. Needs the extra `oracle`.

  python -m tests.golden.make [tensors tokenizer ...]

dit, dit_image      WanTransformer3DModel of diffusers 0.42.1, in shards: clips of odd sizes, a time for each
                    clip and for each token
vae, vae_residual   AutoencoderKLWan of both kinds: clips of several lengths, not square
umt5                UMT5EncoderModel of transformers 5.23.0: prompts of several lengths
  golden.npz        inputs and outputs of call 0, 1, ...
schedulers.npz      noise levels, times and every x of UniPC and Euler in diffusers, for the velocity below
tokenizer/public    a small UMT5-like vocabulary in the layout of the public ones (spiece.model,
                    tokenizer_config.json), without replacements
tokenizer/table     another, with replacements of characters, as transformers 5 saves it (only tokenizer.json)
  golden.json       rows [prompt, ids]: `T5Tokenizer` of transformers 5.23.0 on diffusers' `prompt_clean` of
                    the prompt, cut to 48 ids
wan_original.json   made by wan_names.py
"""

import io
import json
import pathlib
import random
import sys

import numpy as np
import sentencepiece
import torch
from diffusers import (
  AutoencoderKLWan,
  FlowMatchEulerDiscreteScheduler,
  UniPCMultistepScheduler,
  WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

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
  "a red fox walks camera pans 猫 夕焼け 한국어 мир "
  "мира κόσμε שלום नमस्ते สวัสดี naïve "
  "café 🙂 👩\u200d👩\u200d👧 🇩🇪 🤖🫠 "
  "4k, --ar f/1.8 (slow-motion) ﬁne ＡＢＣ ｶﾞ ﾊﾞ ｱﾞ ① ½ ™ ŉ ǆ "
  "e\u0301 o\u0302\u0323 a\u0308\u0304 "
  "q\u0307\u0323 가 각 ᄒ ᅡ ᆫ \u200b \u200d "
  "\ufeff \u00ad \u2060 \u202e \x00 \x07 \x1f \x85 \x7f "
  "&amp; &lt;b&gt; &amp;amp;quot; &#x1F600; "
  "&nbsp; Ã© â€œhiâ€\x9d cafÃ© “x” ‘y’ "
  "… — ▁ ▁▁ a▁b ▁c <0x41> <0xF0> </s> <pad> <unk> <s> "
  "<extra_id_0> <extra_id_1> <extra_id_299> "
  "<extra_id_300> <extra_id_1 >< [web] "
  "page 𝒳 𠀋 الله ﷲ ﻼ क्ष ක්\u200dෂ z̴̢̛ ％ ～ ｡ Ⅷ ㎞ ㍿ ª ß ẞ İ ı ſ"
).split(" ")
GAPS = [" "] * 8 + ["  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2003", "\u2028", "\x0b", "", "", ""]
BLOCKS = (
  *(
    (0x20, 0x17F),
    (0x300, 0x370),
    (0x600, 0x6FF),
    (0x900, 0xDFF),
    (0x1100, 0x11FF),
    (0x1E00, 0x20CF),
    (0x2100, 0x2BFF),
  ),
  *((0x3000, 0x33FF), (0xAC00, 0xD7A3), (0xFB00, 0xFFFF), (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF)),
)
# fmt: off
FIXED = [
  *("", " ", "\n\t ", "</s>", " </s> ", "a </s> b", "a</s>b", "<extra_id_0>", "x<extra_id_299>y"),
  *("aaa" * 20, "ab" * 70),
  *("x" * 10_000, "a red fox walks " * 400, "ab" * 700, "aaa" * 999, "🙂" * 600, "🙂 x" * 600, "</s>" * 600),
]
# fmt: on


def prompts(count, seed=0):
  """Returns `count` prompts.

  They are the fixed ones, words of many scripts and kinds with odd gaps, letters, characters of a block of
  Unicode.
  """
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
      text = ""
      for _ in range(rng.randint(1, 20)):
        text += chr(rng.randint(*block)) if rng.random() < 0.8 else rng.choice("ae ")
    out.append(text)
  return out


def sentencepiece_model(**options):
  """Bytes of a unigram model of the corpus with T5's special ids."""
  out = io.BytesIO()
  defaults = {
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "vocab_size": 1000,
    "hard_vocab_limit": False,
    "character_coverage": 1.0,
  }
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS * 20),
    model_writer=out,
    model_type="unigram",
    minloglevel=2,
    num_threads=1,
    **(defaults | options),
  )
  return out.getvalue()


def tokenizer_folder(path, model, config):
  """Writes spiece.model and tokenizer_config.json to a folder; returns the tokenizer of transformers."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "spiece.model").write_bytes(model)
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return T5Tokenizer.from_pretrained(str(path))


PUBLIC = {
  "normalization_rule_name": "identity",
  "byte_fallback": True,
  "bos_id": 2,
  "unk_id": 3,
  "user_defined_symbols": ["[web]"],
}


def public_config():
  """tokenizer_config.json as in the folders of Wan: 300 more ids, all flags of the special tokens false."""
  token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
  special = ("<pad>", "</s>", "<s>", "<unk>")
  return {
    "added_tokens_decoder": {str(i): {"content": text} | token for i, text in enumerate(special)},
    "additional_special_tokens": [f"<extra_id_{n}>" for n in range(300)],
    "eos_token": "</s>",
    "extra_ids": 300,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "sp_model_kwargs": {},
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
  }


# A few rules of NFKC that cover the cases of nmt_nfkc: pairs and their beginnings; more characters, fewer,
# none.
REPLACED = {
  "①": "1", "½": "1/2", "™": "TM", "Ⅷ": "VIII", "㎞": "km", "㍿": "株式会社",
  "ﷲ": "الله", "𝒳": "X", "\u200b": " ", "\u00ad": "", "\u2060": "",
  "e\u0301": "é", "q": "k", "q\u0307": "Q", "ā": "a", "ガ": "が", "…": "...", "—": "-", "ß": "ss", "İ": "i",
  "ｱ": "ア", "ｱﾞ": "ア゛", "ක": "k", "🙂": ":)",
}  # fmt: skip


def codepoints(text):
  """Hexadecimal code points of a string, as sentencepiece's rules have them."""
  return " ".join(f"{ord(c):X}" for c in text)


def make_tokenizer():
  """Writes tokenizer/."""
  folder = HERE / "tokenizer"
  theirs = {"public": tokenizer_folder(folder / "public", sentencepiece_model(**PUBLIC), public_config())}
  rules = folder / "rules.tsv"
  rules.write_text("".join(f"{codepoints(a)}\t{codepoints(b)}\n" for a, b in REPLACED.items()))
  model = sentencepiece_model(normalization_rule_tsv=str(rules))
  rules.unlink()
  config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 5}
  tokenizer_folder(folder / "table", model, config).save_pretrained(str(folder / "table"))
  (folder / "table" / "spiece.model").unlink()
  theirs["table"] = T5Tokenizer.from_pretrained(str(folder / "table"))
  for name, tokenizer in theirs.items():
    texts = [text for text in prompts(140, seed=1) if len(text) < 200]
    rows = []
    for text in texts:
      rows.append([text, tokenizer(prompt_clean(text), truncation=True, max_length=48)["input_ids"]])
    (folder / name / "golden.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


# Arguments; calls: latents t, y, x; tokens of text; time of the clip, or of its first frame's tokens and of
# the others.
DITS = {
  "dit": (
    {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 16, "out_channels": 16,
     "text_dim": 32, "freq_dim": 64, "ffn_dim": 96},
    [((3, 8, 8), 7, 731.0), ((1, 6, 10), 3, 12.5), ((2, 4, 6), 5, (0.0, 400.0))],
  ),
  "dit_image": (
    {"patch_size": (2, 1, 3), "num_attention_heads": 1, "attention_head_dim": 14, "in_channels": 7,
     "out_channels": 4, "text_dim": 9, "freq_dim": 10, "ffn_dim": 21, "cross_attn_norm": False},
    [((4, 3, 9), 2, 999.0), ((2, 5, 3), 6, 250.0)],
  ),
}  # fmt: skip
VAES = {  # arguments; calls: frames, height, width
  "vae": (
    {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
     "temperal_downsample": [False, True, True], "latents_mean": [0.1, -0.2, 0.3, -0.4],
     "latents_std": [1.0, 2.0, 3.0, 4.0]},
    [(9, 24, 40), (1, 16, 8)],
  ),
  "vae_residual": (
    {"base_dim": 4, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
     "temperal_downsample": [True, True], "is_residual": True, "patch_size": 2, "in_channels": 12,
     "out_channels": 12, "scale_factor_spatial": 8, "latents_mean": [0.1, 0.2, 0.3, 0.4],
     "latents_std": [1.0, 2.0, 3.0, 4.0]},
    [(9, 16, 24), (1, 24, 8)],
  ),
}  # fmt: skip
STEPS, SHIFTS = (1, 2, 3, 10, 50), (1.0, 3.0, 5.0)


def velocity(x, time):
  """A smooth function of both, not linear in x. time: that of the model, in [0, 1]."""
  return (np.tanh(1.3 * x) * (1.5 - time) - 0.4 * np.cos(3 * x + 2 * time)).astype(np.float32)


def perturbed(kind, config, only=""):
  """A random model whose weights are perturbed, so that none is exactly 0 or 1.

  only: suffixes of the names of the weights that are perturbed; by default all are.
  """
  torch.manual_seed(0)
  model = kind(**config) if isinstance(config, dict) else kind(config)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if name.endswith(only):
        weight.add_(0.1 * torch.randn_like(weight))
  return model.eval()


def save(model, name, calls, **options):
  """Writes the model's folder and its calls: dicts of tensors with a leading axis of 1, which is dropped."""
  model.save_pretrained(str(HERE / name), **options)
  arrays = {}
  for i, call in enumerate(calls):
    arrays |= {f"{key}{i}": value[0].detach().numpy() for key, value in call.items()}
  np.savez_compressed(HERE / name / "golden.npz", **arrays)


def make_tensors():
  """Writes dit, dit_image, vae, vae_residual, umt5."""
  for name, (fields, shapes) in DITS.items():
    model, calls = perturbed(WanTransformer3DModel, {"num_layers": 2} | fields), []
    for thw, words, time in shapes:
      tokens = [n // p for n, p in zip(thw, model.config.patch_size, strict=True)]
      x, text = torch.randn(1, model.config.in_channels, *thw), torch.randn(1, words, model.config.text_dim)
      if isinstance(time, tuple):
        in_frame = tokens[1] * tokens[2]
        time = [time[0]] * in_frame + [time[1]] * ((tokens[0] - 1) * in_frame)
      time = torch.tensor([time])
      calls.append({"x": x, "time": time, "text": text, "y": model(x, time, text, return_dict=False)[0]})
    save(model, name, calls, max_shard_size="100KB")
  for name, (fields, shapes) in VAES.items():
    # Perturbed kernels of few channels would magnify rounding errors.
    model, calls = perturbed(AutoencoderKLWan, fields, only=("gamma", "bias")), []
    for shape in shapes:
      video = 2 * torch.rand(1, 3, *shape) - 1
      latents = model.encode(video).latent_dist.mean
      calls.append({"video": video, "latents": latents, "again": model.decode(latents).sample})
    save(model, name, calls)
  config = UMT5Config(
    vocab_size=128,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
  )
  model, calls = perturbed(UMT5EncoderModel, config), []
  for length in (7, 1, 140):
    ids = torch.randint(2, 128, (1, length))
    calls.append({"ids": ids, "h": model(ids).last_hidden_state})
  save(model, "umt5", calls)


def make_schedulers():
  """Writes schedulers.npz."""
  arrays = {"start": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)}
  for steps in STEPS:
    for shift in SHIFTS:
      unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2
      )
      for name, scheduler in (("unipc", unipc), ("euler", FlowMatchEulerDiscreteScheduler(shift=shift))):
        scheduler.set_timesteps(steps)
        x, path = torch.from_numpy(arrays["start"]), []
        for time in scheduler.timesteps:
          v = velocity(x.numpy(), np.float32(time) / 1000)
          x = scheduler.step(torch.from_numpy(v), time, x, return_dict=False)[0]
          path.append(x.numpy())
        key = f"{name}_{steps}_{shift:g}_"
        arrays[f"{key}sigmas"] = scheduler.sigmas.numpy()
        arrays[f"{key}times"] = scheduler.timesteps.numpy()
        arrays[f"{key}x"] = np.stack(path)
  np.savez_compressed(HERE / "schedulers.npz", **arrays)


if __name__ == "__main__":
  makers = {
    name.removeprefix("make_"): maker for name, maker in list(globals().items()) if name.startswith("make_")
  }
  for wanted in sys.argv[1:] or makers:
    makers[wanted]()
