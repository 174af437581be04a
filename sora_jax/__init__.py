"""sora_jax: text to video of the Sora kind, in JAX and Flax, for TPU pods."""

__version__ = "0.1.0"
