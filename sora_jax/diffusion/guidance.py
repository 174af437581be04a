"""Guidance: velocities of several prompts -> one velocity.

Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), as an extrapolation from the velocity without the prompt:

  v = v_null + scale * (v_prompt - v_null)

scale 1 is no guidance. Rescaling (Lin et al., arXiv:2305.08891, sec. 3.4) draws the guided velocity back to the spread of v_prompt.
"""

import jax.numpy as jnp


def classifier_free(v_prompt, v_null, scale, rescale=0.0):
  """Guided velocity. v_*: [..., L, P]; `scale` and `rescale` (0 off .. 1 full) are numbers or broadcast against them."""
  guided = v_null + scale * (v_prompt - v_null)
  spread = lambda v: jnp.std(v, axis=(-2, -1), keepdims=True)  # noqa: E731
  matched = guided * spread(v_prompt) / jnp.maximum(spread(guided), 1e-8)
  return rescale * matched + (1 - rescale) * guided
