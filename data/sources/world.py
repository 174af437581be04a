"""The embedded world as the model that ships is trained on it: shapes with more of what is hard to learn.

Scenes of two objects, of two movements and of objects that are not seen for a while are many, clips are
longer, one scene fades into another, and some come to rest at the end, as they do before a given last image.
Half of the scenes of two movements have a caption for each: shots. Captions, held-out combinations and pixels
are those of data/sources/shapes.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from data.clips import Item, RawClip, join_shots
from data.sources import shapes

# kind: (share of the clips, probabilities of 1, 9, 17 and 25 frames)
KINDS = {
  "still": (0.05, (1.0, 0.0, 0.0, 0.0)),
  "moves": (0.22, (0.0, 0.5, 0.3, 0.2)),
  "bounces": (0.05, (0.0, 0.3, 0.4, 0.3)),
  "behind": (0.15, (0.0, 0.4, 0.4, 0.2)),
  "relation": (0.22, (0.8, 0.2, 0.0, 0.0)),
  "order": (0.10, (0.0, 0.0, 0.6, 0.4)),
  "pan": (0.03, (0.0, 0.5, 0.3, 0.2)),
  "zoom": (0.02, (0.0, 0.5, 0.3, 0.2)),
  "leaves": (0.05, (0.0, 0.0, 0.5, 0.5)),
  "turns": (0.11, (0.0, 0.3, 0.4, 0.3)),
}
LENGTHS = (1, 9, 17, 25)  # frames
SHARES = {kind: share for kind, (share, _) in KINDS.items()}
RESTING = 0.15  # of the videos
REST = 4  # frames that the last one stands for: those of a latent


@dataclasses.dataclass(frozen=True)
class RenderArgs(shapes.RenderArgs):
  """As of shapes; `rest` of the frames are the last one, repeated."""

  rest: int = 0


def draw_item(seed: int, split: str, index: int) -> Item:
  """Clip `index` of (seed, split): its scene, its size in pixels, its length, and whether it has shots."""
  key = (seed, shapes.SPLITS.index(split), index)
  rng = np.random.default_rng(key)
  scene = shapes.draw_scene(rng, split, SHARES)
  size = shapes.SIZES[rng.integers(len(shapes.SIZES))]
  frames = LENGTHS[np.searchsorted(np.cumsum(KINDS[scene.kind][1]), rng.random(), side="right")]
  rest = REST if frames > 1 and rng.random() < RESTING else 0
  caption, shots = shapes.caption(scene), ()
  if scene.kind == "order" and rng.random() < 0.5:
    shots = shots_of(scene, frames - rest)
    caption = join_shots(shots)
  location = RenderArgs(scene, size, frames, (*key, 1), rest)
  return Item(f"world/{split}/{seed}/{index:08d}", caption, location=location, shots=shots)


def shots_of(scene, frames):
  """A scene of two movements -> a caption for each: ((seconds, caption), ...)."""
  parts = [shapes.caption(shapes.Scene("moves", scene.objects, (word,))) for word in scene.words]
  return tuple(zip((0.0, (frames - 1) / 2 / shapes.FPS), parts))


@dataclasses.dataclass(frozen=True)
class Source(shapes.Source):
  """`count` clips of (seed, split)."""

  name: str = "world"

  def items(self) -> list[Item]:
    return [draw_item(self.seed, self.split, index) for index in range(self.count)]

  def read(self, item: Item) -> Iterator[RawClip]:
    args = item.location
    video_THWC = shapes.render(args.scene, args.size, args.frames - args.rest, args.seed)
    video_THWC = np.concatenate([video_THWC, np.repeat(video_THWC[-1:], args.rest, axis=0)])
    yield RawClip(video_THWC, shapes.FPS, item.caption, item.file, 0.0)


def open_source(config) -> Source:
  """config: count, seed and split, as in data/sources/shapes."""
  return Source(config.count, config.seed, config.split)
