"""The embedded world in square crops: the central square of each clip of data/sources/shapes.

This is how clips are cropped for models of a single frame shape. launch.framing compares it with clips at
native sizes.
"""

import dataclasses
from collections.abc import Iterator

from data.clips import Item, RawClip
from data.sources import shapes


@dataclasses.dataclass(frozen=True)
class Source(shapes.Source):
  """shapes.Source with frames cropped to a square."""

  name: str = "squares"

  def read(self, item: Item) -> Iterator[RawClip]:
    for clip in super().read(item):
      height, width = clip.video_THWC.shape[1:3]
      side = min(height, width)
      top, left = (height - side) // 2, (width - side) // 2
      yield dataclasses.replace(clip, video_THWC=clip.video_THWC[:, top : top + side, left : left + side])


def open_source(config) -> Source:
  """config: count, seed and split, as in data/sources/shapes."""
  return Source(config.count, config.seed, config.split)
