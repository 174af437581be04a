"""Laws of the world that the small model learns: as data/sources/shapes, with shots and rests."""

import types

import numpy as np
import pytest

from data.clips import join_shots
from data.sources import shapes, world


@pytest.fixture(scope="module")
def items():
  return {split: world.Source(800, 3, split).items() for split in shapes.SPLITS}


def video(item):
  (clip,) = world.Source(1).read(item)
  return clip.video_THWC


def test_every_kind_is_drawn_and_the_held_out_rule_is_that_of_shapes(items):
  for split, of_split in items.items():
    scenes = [item.location.scene for item in of_split]
    assert all(shapes.held_out(scene) == (split == "held_out") for scene in scenes)
    assert {scene.kind for scene in scenes} == set(world.KINDS) - (
      {"still"} if split == "held_out" else set()
    )
    assert {item.location.frames for item in of_split} == set(world.LENGTHS)


def test_a_clip_is_a_function_of_seed_split_and_index():
  source = world.open_source(types.SimpleNamespace(count=40, seed=7, split="train"))
  assert source.items()[:20] == world.Source(20, 7).items()
  assert np.array_equal(video(source.items()[3]), video(world.Source(4, 7).items()[3]))


def test_a_video_has_the_frames_of_its_item_and_rests_where_it_says(items):
  """The last latent of a video that rests is one frame, repeated; that of another is not."""
  moves = [item for item in items["train"] if item.location.scene.kind == "moves"][:60]
  resting = [item.location.rest == world.REST for item in moves]
  assert 2 < sum(resting) < 25
  for item, rests in zip(moves, resting, strict=True):
    clip = video(item)
    assert len(clip) == item.location.frames
    assert rests == np.array_equal(clip[-1], clip[-5])


def test_half_of_the_scenes_of_two_movements_have_a_caption_for_each(items):
  order = [item for item in items["train"] if item.location.scene.kind == "order"]
  with_shots = [item for item in order if item.shots]
  assert 0.3 < len(with_shots) / len(order) < 0.7
  for item in with_shots:
    (_, first), (start, second) = item.shots
    scene = item.location.scene
    assert item.caption == join_shots(item.shots)
    assert [shapes.parse(text).words for text in (first, second)] == [(word,) for word in scene.words]
    assert start == (item.location.frames - item.location.rest - 1) / 2 / shapes.FPS
