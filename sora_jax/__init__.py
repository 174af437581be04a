"""sora_jax: text to video of the Sora kind, in JAX and Flax, for TPU pods.

pipe = sora_jax.Pipeline.shipped()
video = pipe("a red ball moves left")      # uint8 [T, H, W, 3]
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
  "Pipeline": "sora_jax.pipeline",
  "Result": "sora_jax.pipeline",
  "Request": "sora_jax.tasks",
  "BadInput": "sora_jax.errors",
}


def __getattr__(name):
  """Imports what is exported when it is first used, so that `import sora_jax` costs nothing."""
  if name not in _EXPORTS:
    raise AttributeError(f"module 'sora_jax' has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
  return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
  return sorted([*globals(), *_EXPORTS])
