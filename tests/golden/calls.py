"""Runs in one row of our DiT what the reference runs in several calls, for golden and live comparisons."""

import jax
import numpy as np

from sora_jax import patches
from sora_jax.models import dit


def dit_velocities(cfg, params, clips):
  """Velocities [T, H, W, C] of clips that are packed in one row.

  clips: list of (latents_THWC with conditions joined, time 0..1000 of the clip or of each token, text_SE).
  """
  row = {"tokens": [], "coords": [], "segment": [], "sigma": [], "text": [], "prompt": [], "cond": []}
  for i, (latents, timestep, text) in enumerate(clips, start=1):
    tokens = patches.patchify(latents[..., : cfg.channels], cfg.patch)
    row["tokens"].append(tokens)
    row["cond"].append(patches.patchify(latents[..., cfg.channels :], cfg.patch))
    row["coords"].append(patches.coords(patches.grid(latents.shape[:3], cfg.patch)))
    row["segment"].append(np.full(len(tokens), i))
    row["sigma"].append(np.broadcast_to(np.float32(timestep) / 1000, len(tokens)))
    row["text"].append(text)
    row["prompt"].append(np.full(len(text), i))
  row = {name: np.concatenate(parts)[None] for name, parts in row.items()}
  sigma_U, index_L = np.unique(row["sigma"][0], return_inverse=True)
  velocity = jax.jit(dit.DiT(cfg).apply)(
    {"params": params},
    row["tokens"],
    row["coords"],
    row["segment"],
    sigma_U[None],
    index_L[None],
    row["text"],
    row["segment"],
    row["prompt"],
    row["cond"] if cfg.cond_channels else None,
  )[0]
  sizes = [latents.shape[:3] for latents, _, _ in clips]
  ends = np.cumsum([patches.token_count(size, cfg.patch) for size in sizes])[:-1]
  parts = np.split(np.asarray(velocity), ends)
  return [patches.unpatchify(part, size, cfg.patch) for part, size in zip(parts, sizes, strict=True)]
