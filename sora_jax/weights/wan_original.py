"""Names of weights in the original Wan releases <-> those of diffusers.

The releases are Wan-AI/Wan2.1-..., Wan2.2-... (github.com/Wan-Video, wan/modules). There is one table for
each part, used in both directions. Only names differ: shapes, layouts and numbers are the same. A row names
modules or single weights; `{}` is a number that both names have. The original folders hold the DiT as
safetensors with `config.json`. The VAE (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`) and the text encoder
(`models_t5_umt5-xxl-enc-bf16.pth`) are pickles without a config.
"""

import re

from sora_jax.errors import BadInput

_ATTENTION = (
  ("q", "to_q"),
  ("k", "to_k"),
  ("v", "to_v"),
  ("o", "to_out.0"),
  ("norm_q", "norm_q"),
  ("norm_k", "norm_k"),
)
DIT = [
  ("patch_embedding", "patch_embedding"),
  ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
  ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
  ("time_projection.1", "condition_embedder.time_proj"),
  ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
  ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
  ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
  *[(f"blocks.{{}}.self_attn.{a}", f"blocks.{{}}.attn1.{b}") for a, b in _ATTENTION],
  *[(f"blocks.{{}}.cross_attn.{a}", f"blocks.{{}}.attn2.{b}") for a, b in _ATTENTION],
  ("blocks.{}.norm3", "blocks.{}.norm2"),  # before cross-attention; other norms have no weights
  ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
  ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
  ("head.modulation", "scale_shift_table"),
  ("head.head", "proj_out"),
]
_LAYER = "encoder.block.{}.layer"
TEXT = [
  ("token_embedding", "shared"),
  *[(f"blocks.{{}}.attn.{name}", f"{_LAYER}.0.SelfAttention.{name}") for name in "qkvo"],
  ("blocks.{}.pos_embedding.embedding", f"{_LAYER}.0.SelfAttention.relative_attention_bias"),
  ("blocks.{}.norm1", f"{_LAYER}.0.layer_norm"),
  ("blocks.{}.ffn.gate.0", f"{_LAYER}.1.DenseReluDense.wi_0"),
  ("blocks.{}.ffn.fc1", f"{_LAYER}.1.DenseReluDense.wi_1"),
  ("blocks.{}.ffn.fc2", f"{_LAYER}.1.DenseReluDense.wo"),
  ("blocks.{}.norm2", f"{_LAYER}.1.layer_norm"),
  ("norm", "encoder.final_layer_norm"),
]


def vae_table(cfg):
  """Rows for a VAEConfig.

  In Wan 2.1 all blocks of the decoder are in one list; in Wan 2.2 (residual) each level has its own list.
  """
  down, up = cfg.num_res_blocks, cfg.num_res_blocks + 1  # blocks in a level
  blocks, resamplers = [], []
  for side in ("encoder", "decoder"):
    blocks += [(f"{side}.middle.0", f"{side}.mid_block.resnets.0")]
    blocks += [(f"{side}.middle.2", f"{side}.mid_block.resnets.1")]
  if cfg.is_residual:
    blocks += [("encoder.downsamples.{}.downsamples.{}", "encoder.down_blocks.{}.resnets.{}")]
    blocks += [("decoder.upsamples.{}.upsamples.{}", "decoder.up_blocks.{}.resnets.{}")]
    resamplers += [(f"encoder.downsamples.{{}}.downsamples.{down}", "encoder.down_blocks.{}.downsampler")]
    resamplers += [(f"decoder.upsamples.{{}}.upsamples.{up}", "decoder.up_blocks.{}.upsampler")]
  else:
    blocks += [("encoder.downsamples.{}", "encoder.down_blocks.{}")]
    resamplers += [("encoder.downsamples.{}", "encoder.down_blocks.{}")]
    for level in range(len(cfg.dim_mult)):
      first = level * (up + 1)
      for i in range(up):
        blocks += [(f"decoder.upsamples.{first + i}", f"decoder.up_blocks.{level}.resnets.{i}")]
      resamplers += [(f"decoder.upsamples.{first + up}", f"decoder.up_blocks.{level}.upsamplers.0")]
  in_block = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
  )
  in_side = (
    ("conv1", "conv_in"),
    ("head.0", "norm_out"),
    ("head.2", "conv_out"),
    *((f"middle.1.{name}", f"mid_block.attentions.0.{name}") for name in ("norm", "to_qkv", "proj")),
  )
  return [
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    *((f"{side}.{a}", f"{side}.{b}") for side in ("encoder", "decoder") for a, b in in_side),
    *((f"{a}.{c}", f"{b}.{d}") for a, b in blocks for c, d in in_block),
    *((f"{a}.{name}", f"{b}.{name}") for a, b in resamplers for name in ("resample.1", "time_conv")),
  ]


TABLES = {"dit": lambda cfg: DIT, "vae": vae_table, "text": lambda cfg: TEXT}
MARKS = {  # a name that only this part has, in this layout
  "head.modulation": ("dit", "original"),
  "condition_embedder.time_proj.weight": ("dit", "diffusers"),
  "decoder.head.2.weight": ("vae", "original"),
  "decoder.conv_out.weight": ("vae", "diffusers"),
  "token_embedding.weight": ("text", "original"),
  "encoder.final_layer_norm.weight": ("text", "diffusers"),
}


def recognise(names):
  """Names of weights -> (part, layout): dit | vae | text, original | diffusers. BadInput for others."""
  matches = [MARKS[name] for name in names if name in MARKS]
  if len(matches) != 1:
    raise BadInput(
      f"weights: {sorted(names)[:3]} ... are not those of one part of a Wan model; give the DiT, VAE or text "
      "encoder, one in a file"
    )
  return matches[0]


def rename(names, part, cfg=None, layout="original"):
  """Names of all weights of a part, in `layout` -> {name in the other layout: name}.

  part: dit | vae | text, as from `recognise`. cfg: VAEConfig; only the VAE needs it. Raises BadInput for an
  unknown name.
  """
  rows = TABLES[part](cfg)
  if layout != "original":
    rows = [row[::-1] for row in rows]
  rules = []
  for source, target in rows:
    pattern = re.escape(source).replace(r"\{\}", r"(\d+)") + r"(|\.weight|\.bias|\.gamma)"
    rules.append((re.compile(pattern), target))
  out = {}
  for name in names:
    new = set()
    for rule, target in rules:
      match = rule.fullmatch(name)
      if match:
        new.add(target.format(*match.groups()) + match[match.lastindex])
    if len(new) != 1:
      raise BadInput(
        f"weights: {name} is no {layout} name of a Wan {part}; give the weights of one part, unchanged"
      )
    out[new.pop()] = name
  return out


def config_to_diffusers(theirs, names=()):
  """config.json of an original DiT -> that of diffusers' WanTransformer3DModel.

  Fields that it leaves out have the defaults of `WanModel`. names: of the weights. Names `img_emb...`
  distinguish the image-to-video model of Wan 2.1 from that of Wan 2.2, whose configs are alike. A "ti2v"
  model takes a timestep for each token, which diffusers writes into model_index.json (`expand_timesteps`).
  Raises BadInput for other kinds.
  """
  known = {
    "_class_name": ("WanModel",),
    "model_type": ("t2v", "i2v", "ti2v"),
    "text_len": (512,),
    "qk_norm": (True,),
  }
  for name, allowed in known.items():
    if theirs.get(name, allowed[0]) not in allowed:
      raise BadInput(
        f"weights: {name}={theirs[name]!r} in config.json; known: {', '.join(map(str, allowed))}; "
        "give a Wan 2.1 or 2.2 DiT"
      )
  width, heads = theirs.get("dim", 2048), theirs.get("num_heads", 16)
  image = any(name.startswith("img_emb.") for name in names)
  return {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": width if image else None,
    "attention_head_dim": width // heads,
    "cross_attn_norm": theirs.get("cross_attn_norm", True),
    "eps": theirs.get("eps", 1e-6),
    "ffn_dim": theirs.get("ffn_dim", 8192),
    "freq_dim": theirs.get("freq_dim", 256),
    "image_dim": 1280 if image else None,
    "in_channels": theirs.get("in_dim", 16),
    "num_attention_heads": heads,
    "num_layers": theirs.get("num_layers", 32),
    "out_channels": theirs.get("out_dim", 16),
    "patch_size": list(theirs.get("patch_size", (1, 2, 2))),
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": theirs.get("text_dim", 4096),
  }
