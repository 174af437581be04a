"""A frozen text encoder, W/text: prompts as token ids -> embeddings, in batches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax import layout as layouts, multihost, parts, workdir as workdirs
from sora_jax.models import text

# texts embedded together; a row is a multiple of STEP tokens long, so that compilations are few
BATCH, STEP = 8, 64


@functools.partial(jax.jit, static_argnames=("cfg", "layout"))
def embed(params, ids_BS, prompt_BS, *, cfg, layout):
  """Token ids, and 1 where they are a prompt's -> embeddings [B, S, E]."""
  return text.TextEncoder(cfg, layout).apply({"params": params}, ids_BS, prompt_BS)


def targets(cfg, layout):
  """The weights of a TextConfig as ShapeDtypeStructs, on `layout`."""
  row = jnp.zeros((1, 1), jnp.int32)
  boxed = jax.eval_shape(text.TextEncoder(cfg).init, jax.random.key(0), row, row)["params"]
  return layouts.targets(boxed, layout, cfg.dtype)


def local_layout():
  """-> Layout over the devices of this host, which cuts weights and texts; None if there is one device."""
  devices = jax.local_devices()
  count = math.gcd(len(devices), BATCH)
  return layouts.Layout(layouts.make_mesh(fsdp=count, devices=devices[:count])) if count > 1 else None


class Embedder:
  """Lists of token ids [S] -> float32 [S, E] each, of true length.

  An embedding depends on its own text alone: batches are of one shape for texts of one length, in steps of
  STEP tokens. Weights are loaded at the first call, live on `layout`, and can be freed: they may be larger
  than the DiT's.
  """

  def __init__(self, directory, layout=None):
    self._directory, self._layout, self._params = epath.Path(directory), layout, None
    self._cfg = workdirs.text_config(directory)

  @property
  def width(self):
    """E: values of a token's embedding."""
    return self._cfg.width

  def load(self):
    """Loads the weights, unless they are there."""
    if self._params is None:
      _, weights = parts.load_part(self._directory, None)
      self._params = parts.put(weights, targets(self._cfg, self._layout))

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
        text_BSE = multihost.to_host(
          embed(self._params, ids_BS, prompt_BS, cfg=self._cfg, layout=self._layout)
        )
        for row, i in enumerate(batch):
          embeddings[i] = text_BSE[row, : len(texts[i])]
    return embeddings
