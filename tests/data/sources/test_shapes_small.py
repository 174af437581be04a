"""Laws of the small clips: the same world as data/sources/shapes, in fewer pixels."""

import types

import numpy as np
import pytest

from data.sources import shapes, shapes_small
from data.sources.shapes import judge


@pytest.fixture(scope="module")
def items():
  return {split: shapes_small.Source(600, 3, split).items() for split in shapes.SPLITS}


def video(item):
  (clip,) = shapes_small.Source(1).read(item)
  return clip.video_THWC


def test_captions_and_the_held_out_rule_are_those_of_shapes(items):
  for split, of_split in items.items():
    for item in of_split:
      assert shapes.parse(item.caption) == item.location.scene
      assert shapes.held_out(item.location.scene) == (split == "held_out")
  kinds = [item.location.scene.kind for item in items["train"]]
  assert set(kinds) == {"still", "moves"} and 0.3 < kinds.count("still") / len(kinds) < 0.4


def test_open_source_takes_a_config():
  """A clip is a function of (seed, split, index); its file is not that of a clip of shapes."""
  source = shapes_small.open_source(types.SimpleNamespace(count=40, seed=7, split="train"))
  assert source.name == "shapes_small" and source.items()[:20] == shapes_small.Source(20, 7).items()
  assert not {item.file for item in source.items()} & {item.file for item in shapes.Source(40, 7).items()}
  with pytest.raises(ValueError, match="train, held_out"):
    shapes_small.Source(1, 0, "test")


def test_objects_are_as_large_as_in_the_smallest_full_frames(items):
  """In pixels, and wholly in view; a judge still sees colour and shape."""
  areas = []
  for item in items["train"][:60]:
    frames = video(item)
    assert frames.shape == (item.location.frames, *item.location.size, 3)
    ((colour, shape),) = item.location.scene.objects
    (detection,) = judge.detect(frames).objects
    assert detection.colour == colour
    areas.append(detection.area_T.mean())
    assert np.ptp(detection.area_T) < 0.2 * detection.area_T.max() + 8
  assert 0.04 * shapes.LEAST_SHORT**2 < min(areas) and max(areas) < 0.2 * shapes.LEAST_SHORT**2
