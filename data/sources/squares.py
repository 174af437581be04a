"""The embedded world in square crops: of each clip of data/sources/shapes the square in its middle.

What a model that knows one shape of frame is trained on. launch.framing compares it with clips at their native sizes.
"""

import dataclasses
from collections.abc import Iterator

from data.clips import Item, RawClip
from data.sources import shapes


@dataclasses.dataclass(frozen=True)
class Source(shapes.Source):
  """As shapes.Source; frames lose what lies outside the square."""

  name: str = "squares"

  def read(self, item: Item) -> Iterator[RawClip]:
    for clip in super().read(item):
      height, width = clip.video_THWC.shape[1:3]
      side = min(height, width)
      top, left = (height - side) // 2, (width - side) // 2
      yield dataclasses.replace(clip, video_THWC=clip.video_THWC[:, top : top + side, left : left + side])


def open_source(config) -> Source:
  """config: count, seed and split, as of data/sources/shapes."""
  return Source(config.count, config.seed, config.split)
