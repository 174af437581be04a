"""PackedBatch: clips of any size, packed into rows of a fixed number of tokens.

It is the only interface of data and model.

Axis letters, which are suffixes of array names (`query_BLNK`) and have the same meaning everywhere:

  B rows · L tokens in a row · G clips in a row · U distinct sigmas in a row · S text tokens in a row ·
  P values in a patch, in the order (pt, ph, pw, C) · Q condition channels · D model width · F mlp width ·
  N heads · K head size · E text width · M keys attended to · C channels · T H W frames, height, width

A row holds several clips one after another, with segments ascending from 1; segment 0 is padding. A token
attends only to its own clip, and only to the span of text that `prompt` names. Patch n' Pack,
arXiv:2307.06304, sec. 2.
"""

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PackedBatch:
  """B rows of packed clips: numpy on the host, jax arrays in a step; None where a model takes no such input.

  Arrays of clips (G) are 0 where there is no clip.
  """

  tokens_BLP: jax.Array  # float32; clean latent patches, normalised; zeros in padding
  coords_BL3: jax.Array  # float32; t, y, x in the patch grid, from 0 in each clip
  segment_BL: jax.Array  # int32; number of the clip, 1..G; 0 padding
  given_BL: jax.Array  # bool; True for a condition, which stays clean (sigma 0) and has no loss
  prompt_BL: jax.Array  # int32; number of the span of text that the token reads; 0 none
  prompt_BS: jax.Array  # int32; number of the span that a text token belongs to; 0 padding
  uid_BG2: jax.Array  # uint32; the 64 bits of each clip's uid, high word first
  epoch_BG: jax.Array  # int32; number of the pass over the data, for the clip
  fps_BG: jax.Array  # float32; frames a second
  size_BG3: jax.Array  # int32; latent t, h, w
  source_BG: jax.Array  # int32; number of the data source
  text_BS: jax.Array | None = None  # int32; token ids, where the text encoder is trained with the DiT
  text_BSE: jax.Array | None = None  # text embeddings otherwise
  cond_BLQ: jax.Array | None = None  # channels joined to the tokens (Wan I2V)


@dataclasses.dataclass
class Clip:
  """One clip before packing, of L tokens."""

  tokens_LP: np.ndarray
  coords_L3: np.ndarray
  texts: list  # one array for each prompt: int32 ids [s] or float embeddings [s, E]
  uid: int
  size: tuple  # latent t, h, w
  fps: float
  epoch: int = 0
  source: int = 0
  given_L: np.ndarray | None = None  # None: no token is given
  prompt_L: np.ndarray | None = None  # 1..len(texts), 0 none; None: all tokens read the first text
  cond_LQ: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Capacity of a row: L tokens, G clips, S text tokens. Raises ValueError where one is below 1."""

  length: int
  clips: int
  text: int

  def __post_init__(self):
    if min(self.length, self.clips, self.text) < 1:
      raise ValueError(f"a row needs at least one token, one clip and one text token, not {self}")


def array_specs(rows, shape, width, text_width=None, cond_width=0):
  """{name: (shape, dtype)} of the arrays of a PackedBatch; those that a model does not take are left out.

  rows: their number. shape: RowShape. width: P. text_width: E; None where texts are ids. cond_width: Q.
  """
  L, G, S = shape.length, shape.clips, shape.text
  specs = {
    "tokens_BLP": ((L, width), np.float32),
    "coords_BL3": ((L, 3), np.float32),
    "segment_BL": ((L,), np.int32),
    "given_BL": ((L,), bool),
    "prompt_BL": ((L,), np.int32),
    "prompt_BS": ((S,), np.int32),
    "uid_BG2": ((G, 2), np.uint32),
    "epoch_BG": ((G,), np.int32),
    "fps_BG": ((G,), np.float32),
    "size_BG3": ((G, 3), np.int32),
    "source_BG": ((G,), np.int32),
  }
  if text_width is None:
    specs["text_BS"] = ((S,), np.int32)
  else:
    specs["text_BSE"] = ((S, text_width), np.float32)
  if cond_width:
    specs["cond_BLQ"] = ((L, cond_width), np.float32)
  return {name: ((rows, *dims), dtype) for name, (dims, dtype) in specs.items()}


def pack(rows, shape):
  """Packs lists of `Clip`, one for each row -> PackedBatch of numpy arrays. An empty list is an empty row.

  Clips keep their order. Raises ValueError where a row exceeds `shape`, which the caller plans
  (data/plan.py), and where there is no clip at all: P and the kind of text follow from the clips.
  """
  clips = [clip for row in rows for clip in row]
  if not clips:
    raise ValueError("pack: a batch needs at least one clip, which tells its shape")
  first, num_rows = clips[0], len(rows)
  width = first.tokens_LP.shape[-1]
  is_ids = first.texts[0].ndim == 1
  L, G, S = shape.length, shape.clips, shape.text
  specs = array_specs(
    num_rows,
    shape,
    width,
    text_width=None if is_ids else first.texts[0].shape[1],
    cond_width=0 if first.cond_LQ is None else first.cond_LQ.shape[-1],
  )
  batch = PackedBatch(**{name: np.zeros(*spec) for name, spec in specs.items()})
  text = batch.text_BS if is_ids else batch.text_BSE
  for b, row in enumerate(rows):
    at = text_at = prompts = 0
    for g, clip in enumerate(row):
      n, spans = len(clip.tokens_LP), sum(len(t) for t in clip.texts)
      if at + n > L or g >= G or text_at + spans > S:
        raise ValueError(
          f"row {b} overflows {shape}: clip {g} adds {n} tokens to {at}, and {spans} text tokens to {text_at}"
        )
      span = slice(at, at + n)
      batch.tokens_BLP[b, span] = clip.tokens_LP
      batch.coords_BL3[b, span] = clip.coords_L3
      batch.segment_BL[b, span] = g + 1
      if clip.given_L is not None:
        batch.given_BL[b, span] = clip.given_L
      prompt_L = np.ones(n, np.int32) if clip.prompt_L is None else clip.prompt_L
      batch.prompt_BL[b, span] = np.where(prompt_L > 0, prompt_L + prompts, 0)
      if batch.cond_BLQ is not None:
        batch.cond_BLQ[b, span] = clip.cond_LQ
      for t in clip.texts:
        prompts += 1
        text[b, text_at : text_at + len(t)] = t
        batch.prompt_BS[b, text_at : text_at + len(t)] = prompts
        text_at += len(t)
      batch.uid_BG2[b, g] = (clip.uid >> 32) & 0xFFFFFFFF, clip.uid & 0xFFFFFFFF
      batch.epoch_BG[b, g], batch.fps_BG[b, g] = clip.epoch, clip.fps
      batch.size_BG3[b, g], batch.source_BG[b, g] = clip.size, clip.source
      at += n
  return batch


def image_channels(latents_THWC, channels, given_F=None):
  """Condition channels [T, H, W, channels] of a model that takes its image as channels (Wan I2V).

  latents_THWC: latents of the given frames with grey ones between. given_F: which frames are given, bool [F];
  None: the first. The channels before the latents are 1 for each pixel frame of a latent frame that is given,
  else 0; the first frame counts as often as a latent frame has pixel frames
  (`WanImageToVideoPipeline.prepare_latents`, diffusers 0.42.1).
  """
  T, H, W, own = latents_THWC.shape
  mask_TC = np.zeros((T, channels - own), np.float32)
  if given_F is None:
    mask_TC[0] = 1.0
  else:
    mask_TC[0] = given_F[0]
    mask_TC[1:] = given_F[1:].reshape(T - 1, -1)
  return np.concatenate(
    [np.broadcast_to(mask_TC[:, None, None], (T, H, W, channels - own)), latents_THWC], -1
  )


def fill(batch):
  """Fraction of the rows' tokens that are not padding, 0 to 1."""
  return float(np.mean(np.asarray(batch.segment_BL) > 0))
