"""The frozen text encoder, in batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax import embedder, layout, parts
from sora_jax.models import text


def test_texts_of_a_frozen_encoder(tmp_path):
  """Batched, sorted and padded, each embedding is what its text gives alone, and of its true length."""
  cfg = text.TextConfig(vocab=40, width=16, depth=2, heads=2, head_size=8, mlp=32)
  model = text.TextEncoder(cfg)
  params = layout.unbox(
    jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), int), jnp.ones((1, 8), int))["params"]
  )
  parts.save_part(tmp_path, dataclasses.asdict(cfg), params)
  texts = [np.random.default_rng(i).integers(3, 40, 1 + 5 * i).astype(np.int32) for i in range(11)]
  embeddings = embedder.Embedder(tmp_path)(texts)
  assert [len(e) for e in embeddings] == [len(i) for i in texts]
  alone = model.apply({"params": params}, texts[4][None], np.ones((1, 21), int))[0]
  np.testing.assert_allclose(embeddings[4], alone, atol=1e-5)
  mesh = layout.Layout(layout.make_mesh(fsdp=2, context=2))  # and data=2: as in a sampling job on a pod
  for there, here in zip(embedder.Embedder(tmp_path, mesh)(texts), embeddings, strict=True):
    np.testing.assert_allclose(there, here, atol=1e-5)
