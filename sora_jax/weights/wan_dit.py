"""Weights of `WanTransformer3DModel` (diffusers 0.42.1) <-> `models.dit`.

They are in the folders `transformer` and `transformer_2` of the Wan models. Their input patches are (C, pt,
ph, pw) and their output patches (pt, ph, pw, C); ours are (pt, ph, pw, C) on both sides. The entries of their
rotary pairs are neighbours, ours are half a head apart. So queries and keys of self-attention, and their
norms, are permuted.
"""

import dataclasses

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.dit import SIZES, DiTConfig
from sora_jax.weights import table

# N heads, k rotary pairs, p the 2 entries of a pair, K head size; D and e width; s and r parts of a
# modulation; t h w patch; C and Q channels; F mlp width; E text width; f sinusoids
_HEADS = {"self": ("attn1", "(Nkp)", "N (pk)"), "cross": ("attn2", "(NK)", "N K")}


def _linear(ours, their, their_in, their_out, our_in=None, our_out=None):
  """A torch Linear, [out, in] and [out], as two rows of the table."""
  *path, name = ours
  return [
    (
      (*path, name),
      f"{their}.weight",
      f"{their_out} {their_in}",
      f"{our_in or their_in} {our_out or their_out}",
    ),
    ((*path, f"{name}_bias"), f"{their}.bias", their_out, our_out or their_out),
  ]


def _attention(ours):
  name, pairs, our_pairs = _HEADS[ours]
  path, their = ("blocks", ours), f"blocks.{{}}.{name}"
  return [
    *_linear((*path, "query"), f"{their}.to_q", "D", pairs, our_out=our_pairs),
    *_linear((*path, "key"), f"{their}.to_k", "D", pairs, our_out=our_pairs),
    *_linear((*path, "value"), f"{their}.to_v", "D", "(NK)", our_out="N K"),
    *_linear((*path, "out"), f"{their}.to_out.0", "(NK)", "D", our_in="N K"),
    ((*path, "query_norm"), f"{their}.norm_q.weight", pairs, our_pairs),
    ((*path, "key_norm"), f"{their}.norm_k.weight", pairs, our_pairs),
  ]


TABLE = [
  (("patch",), "patch_embedding.weight", "D C t h w", "(thwC) D"),
  (("patch_bias",), "patch_embedding.bias", "D", "D"),
  *_linear(("time", "in"), "condition_embedder.time_embedder.linear_1", "f", "D"),
  *_linear(("time", "out"), "condition_embedder.time_embedder.linear_2", "D", "e"),
  *_linear(("time", "change"), "condition_embedder.time_proj", "D", "(se)", our_out="s e"),
  *_linear(("text", "in"), "condition_embedder.text_embedder.linear_1", "E", "D"),
  *_linear(("text", "out"), "condition_embedder.text_embedder.linear_2", "D", "e"),
  (("blocks", "table"), "blocks.{}.scale_shift_table", "o s D", "s D"),
  *_attention("self"),
  *_attention("cross"),
  *_linear(("blocks", "mlp", "in"), "blocks.{}.ffn.net.0.proj", "D", "F"),
  *_linear(("blocks", "mlp", "out"), "blocks.{}.ffn.net.2", "F", "D"),
  (("table",), "scale_shift_table", "o r D", "r D"),
  *_linear(("velocity",), "proj_out", "D", "(thwC)"),
]
CROSS_NORM = [
  (("blocks", "cross_scale"), "blocks.{}.norm2.weight", "D", "D"),
  (("blocks", "cross_shift"), "blocks.{}.norm2.bias", "D", "D"),
]


def rows(cfg):
  """The table of a DiT of this shape.

  In their patch embedding the condition channels follow the latents' in one tensor; ours are two arrays.
  """
  t, h, w = cfg.patch
  sizes = {
    "D": cfg.width,
    "e": cfg.width,
    "N": cfg.heads,
    "K": cfg.head_size,
    "k": cfg.head_size // 2,
    "p": 2,
    "F": cfg.mlp,
    "s": 6,
    "r": 2,
    "E": cfg.text_width,
    "f": cfg.time_freqs,
    "C": cfg.channels,
    "Q": cfg.cond_channels,
    "t": t,
    "h": h,
    "w": w,
    "o": 1,
  }
  entries = TABLE + CROSS_NORM if cfg.cross_norm else TABLE
  out = [table.Row(*entry, sizes, cfg.depth) for entry in entries]
  if cfg.cond_channels:
    parts = slice(cfg.channels, None)
    cond = table.Row(("patch_cond",), out[0].name, "D Q t h w", "(thwQ) D", sizes, parts=parts)
    out[:1] = [dataclasses.replace(out[0], parts=slice(cfg.channels)), cond]
  return out


def from_diffusers(tensors, cfg, dtype=np.float32):
  """Mapping of their names to arrays -> params of a DiT. Raises BadInput, which names a misfit."""
  return table.from_diffusers(tensors, rows(cfg), dtype)


def to_diffusers(params, cfg):
  """Params of a DiT -> iterator of (their name, numpy array)."""
  return table.to_diffusers(params, rows(cfg))


def config_from_diffusers(theirs, expand_timesteps=False):
  """Their config.json -> DiTConfig.

  expand_timesteps: as in model_index.json; true for TI2V-5B, which takes a sigma for each token. Raises
  BadInput for a Wan 2.1 image-to-video model: it reads CLIP features of the image, which we do not compute.
  """
  for name in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
    if theirs.get(name) is not None:
      raise BadInput(
        f"weights: {name}={theirs[name]!r} (image features by cross-attention, Wan 2.1 I2V); it must be "
        "null; use the Wan 2.2 models"
      )
  if theirs.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
    raise BadInput(f"weights: qk_norm={theirs['qk_norm']!r}; only rms_norm_across_heads is known")
  out = theirs.get("out_channels") or theirs["in_channels"]
  cond = theirs["in_channels"] - out
  conditioning = "replacement"
  if cond:
    conditioning = "channels"
  elif expand_timesteps:
    conditioning = "token_sigma"
  return DiTConfig(
    depth=theirs["num_layers"],
    heads=theirs["num_attention_heads"],
    head_size=theirs["attention_head_dim"],
    mlp=theirs["ffn_dim"],
    channels=out,
    patch=tuple(theirs["patch_size"]),
    text_width=theirs["text_dim"],
    cond_channels=cond,
    time_freqs=theirs["freq_dim"],
    cross_norm=theirs["cross_attn_norm"],
    eps=theirs["eps"],
    text_pad=512,
    conditioning=conditioning,
  )


def config_of(tensors):
  """The config of a transformer without a config.json, which is one of dit.SIZES: that of these shapes.

  tensors: with a method `shape`, as files.Tensors. Raises BadInput, which names the nearest and what differs.
  """
  known = {name: cfg for name, cfg in SIZES.items() if cfg.text_pad}  # those of Wan
  misfits = {}
  for name, cfg in known.items():
    shapes = table.their_shapes(rows(cfg))
    wrong = [one for one in shapes if one not in tensors or tensors.shape(one) != shapes[one]]
    if not wrong and len(tensors) == len(shapes):
      return cfg
    extra = sorted(set(tensors) - shapes.keys())
    misfits[name] = (len(wrong) + len(extra), (wrong + extra)[0], shapes)
  nearest, (count, first, shapes) = min(misfits.items(), key=lambda item: item[1][0])
  there = tensors.shape(first) if first in tensors else "missing"
  raise BadInput(
    f"weights: a transformer without config.json, and of no known size ({', '.join(known)}); the nearest is "
    f"{nearest}, of which {count} tensors differ, the first {first}: {there} in the file, "
    f"{shapes.get(first, 'not there')} in {nearest}; give the folder with its config.json"
  )


def config_to_diffusers(cfg):
  """DiTConfig -> their config.json. Raises BadInput where their class has no such model."""
  if cfg.predicts != "velocity" or cfg.rope_theta != 10_000 or cfg.place_waves:
    raise BadInput(
      "WanTransformer3DModel predicts velocity, with rope_theta 10000 and place_waves 0; this model has "
      f"predicts={cfg.predicts!r}, rope_theta {cfg.rope_theta:g}, place_waves {cfg.place_waves}"
    )
  return {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.42.1",
    "added_kv_proj_dim": None,
    "attention_head_dim": cfg.head_size,
    "cross_attn_norm": cfg.cross_norm,
    "eps": cfg.eps,
    "ffn_dim": cfg.mlp,
    "freq_dim": cfg.time_freqs,
    "image_dim": None,
    "in_channels": cfg.channels + cfg.cond_channels,
    "num_attention_heads": cfg.heads,
    "num_layers": cfg.depth,
    "out_channels": cfg.channels,
    "patch_size": list(cfg.patch),
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": cfg.text_width,
  }
