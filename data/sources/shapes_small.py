"""The embedded world in small clips, for the first of two runs of training: images and nine frames, at the
smallest sizes, of the two simplest kinds.

Captions and held-out combinations are those of data/sources/shapes. Objects are as large, in pixels, as in
its smallest frames, so that what a model learns here about shapes and directions is true of larger frames.
A clip has 4 to 18 tokens (of 16 x 16 pixels, 4 frames), where one of shapes has 15 to 120.
"""

import dataclasses

import numpy as np

from data.clips import Item
from data.sources import shapes

SIZES = ((32, 32), (32, 48), (48, 32))  # (height, width) in pixels
SHARES = {"still": 0.35, "moves": 0.65}
LENGTHS = {"still": 1, "moves": 9}  # frames


def draw_item(seed: int, split: str, index: int) -> Item:
  """Clip `index` of (seed, split): its scene and its size in pixels."""
  key = (seed, shapes.SPLITS.index(split), index)
  rng = np.random.default_rng(key)
  scene = shapes.draw_scene(rng, split, SHARES)
  size = SIZES[rng.integers(len(SIZES))]
  location = shapes.RenderArgs(scene, size, LENGTHS[scene.kind], (*key, 1))
  return Item(f"shapes_small/{split}/{seed}/{index:08d}", shapes.caption(scene), location=location)


@dataclasses.dataclass(frozen=True)
class Source(shapes.Source):
  """`count` small clips of (seed, split)."""

  name: str = "shapes_small"

  def items(self) -> list[Item]:
    return [draw_item(self.seed, self.split, index) for index in range(self.count)]


def open_source(config) -> Source:
  """config: count, seed and split, as in data/sources/shapes."""
  return Source(config.count, config.seed, config.split)
