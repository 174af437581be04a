"""Model FLOPs of a DiT: what its clips need, whatever the program computes beside that (padding, tiles of
attention that are masked, activations that are computed again).

Of a clip of n tokens that reads s tokens of text, in a layer of width D with an mlp of width F:

  8 n D^2 + 4 n^2 D                          self-attention: its four products with weights, its scores
  4 n D^2 + 4 s D^2 + 4 n s D                cross-attention: query and output, key and value, its scores
  4 n D F                                    mlp

and once the embeddings of patches and text, and the last layer. A product of [a, b] with [b, c] has 2 a b c.
MaxDiffusion counts a layer of Wan in the same way (base_wan_trainer.py, calculate_tflops). The modulation,
a few products with each noise level of a row, is left out.
"""


def parts(cfg, tokens, text):
  """FLOPs of a forward pass -> (of products with weights, of attention's scores and their sums of values).

  cfg: DiTConfig. tokens, text: arrays of one shape, numpy or jax, an entry a clip; 0 where there is none.
  """
  n, s, D = 1.0 * tokens, 1.0 * text, cfg.width
  layer = 12 * n * D * D + 4 * s * D * D + 4 * n * D * cfg.mlp
  ends = 4 * n * cfg.values_in * D + 2 * n * cfg.values_cond * D + 2 * s * (cfg.text_width + D) * D
  return (cfg.depth * layer + ends).sum(), (cfg.depth * (4 * n * n + 4 * n * s) * D).sum()


def forward(cfg, tokens, text):
  """FLOPs of a forward pass over clips, see `parts`."""
  return sum(parts(cfg, tokens, text))


def step(cfg, tokens, text, frozen=False):
  """FLOPs of an update: a product costs as much again for the gradient of each of its two factors.

  frozen: the weights have no gradient, as those that adapters adapt; the adapters' own products are left out.
  """
  products, attention = parts(cfg, tokens, text)
  return (2 if frozen else 3) * products + 3 * attention
