"""Guidance: combines the velocities of several prompts into one.

Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), as an extrapolation from the velocity without the
prompt:

  v = v_null + scale * (v_prompt - v_null)

Scale 1 means no guidance. Rescaling (Lin et al., arXiv:2305.08891, sec. 3.4) moves the standard deviation of
a clip's guided velocity to that of v_prompt.
"""

import jax.numpy as jnp


def classifier_free(v_prompt_BLP, v_null_BLP, scale_BL1, rescale_BL1, segment_BL, clips):
  """Guided velocity, [B, L, P]. rescale: 0 (off) to 1 (full). clips: the largest segment, G."""
  guided = v_null_BLP + scale_BL1 * (v_prompt_BLP - v_null_BLP)
  one_hot_BLG = (segment_BL[..., None] == jnp.arange(1, clips + 1)).astype(v_prompt_BLP.dtype)
  ratio_BG = _clip_std(v_prompt_BLP, one_hot_BLG) / jnp.maximum(_clip_std(guided, one_hot_BLG), 1e-8)
  rescaled = guided * jnp.einsum("BLG,BG->BL", one_hot_BLG, ratio_BG)[..., None]
  return rescale_BL1 * rescaled + (1 - rescale_BL1) * guided


def _clip_std(v_BLP, one_hot_BLG):
  """Standard deviation of all values of each clip, [B, G]."""
  count_BG = jnp.maximum(one_hot_BLG.sum(1), 1)
  mean_BG = jnp.einsum("BL,BLG->BG", v_BLP.mean(-1), one_hot_BLG) / count_BG
  square_BG = jnp.einsum("BL,BLG->BG", jnp.square(v_BLP).mean(-1), one_hot_BLG) / count_BG
  return jnp.sqrt(jnp.maximum(square_BG - mean_BG**2, 0.0))
