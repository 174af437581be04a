"""A frozen text encoder, W/text: prompts as token ids -> embeddings, in batches."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax import layout as layouts, multihost, parts, workdir as workdirs
from sora_jax.models import text

# texts embedded together; a row is a multiple of STEP tokens long, so that compilations are few
BATCH, STEP = 8, 64


class Embedder:
  """Lists of token ids [S] -> float32 [S, E] each, of true length.

  An embedding depends on its own text alone: batches are of one shape for texts of one length, in steps of
  STEP tokens. Weights are loaded at the first call, live on `layout`, and can be freed: they may be larger
  than the DiT's.
  """

  def __init__(self, directory, layout=None):
    self._directory, self._layout, self._params = epath.Path(directory), layout, None
    self._cfg = cfg = workdirs.text_config(directory)

    def run(params, ids_BS, prompt_BS):
      return text.TextEncoder(cfg, layout).apply({"params": params}, ids_BS, prompt_BS)

    self._run = jax.jit(run)

  @property
  def width(self):
    """E: values of a token's embedding."""
    return self._cfg.width

  def load(self):
    """Loads the weights, unless they are there."""
    if self._params is None:
      row = jnp.zeros((1, 1), jnp.int32)
      boxed = jax.eval_shape(text.TextEncoder(self._cfg).init, jax.random.key(0), row, row)["params"]
      _, weights = parts.load_part(self._directory, None)
      self._params = parts.put(weights, layouts.targets(boxed, self._layout, self._cfg.dtype))

  def free(self):
    """Lets the weights go."""
    self._params = None

  def __call__(self, texts):
    self.load()
    embeddings, by_length = [None] * len(texts), {}
    for i, ids in enumerate(texts):
      by_length.setdefault(-(-len(ids) // STEP) * STEP, []).append(i)
    for length, members in sorted(by_length.items()):
      for batch in (members[i : i + BATCH] for i in range(0, len(members), BATCH)):
        ids_BS = np.zeros((BATCH, length), np.int32)
        prompt_BS = np.zeros_like(ids_BS)
        for row, i in enumerate(batch):
          ids_BS[row, : len(texts[i])], prompt_BS[row, : len(texts[i])] = texts[i], 1
        text_BSE = multihost.to_host(self._run(self._params, ids_BS, prompt_BS))
        for row, i in enumerate(batch):
          embeddings[i] = text_BSE[row, : len(texts[i])]
    return embeddings
