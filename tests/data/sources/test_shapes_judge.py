"""The judges are right on at least 99 % of true renderings, also as mp4 or blurred, and wrong videos fail."""

import itertools

import numpy as np
import pytest

from data.sources import shapes
from data.sources.shapes import judge
from sora_jax import video

CLIPS = 160
SEED = 11


def mp4(clip, path):
  """What a viewer of our file sees."""
  if len(clip) == 1:
    return clip  # an image is written as png, which loses nothing
  video.write_mp4(path, clip, shapes.FPS)
  return video.load(path)[0]


def blurred(clip, sigma=1.2, noise=5):
  """Blurred and noisy, as by a poor decoder."""
  tap = np.exp(-0.5 * (np.arange(-3, 4, dtype=np.float32) / sigma) ** 2)
  tap /= tap.sum()
  x = np.pad(clip.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), "edge")
  height, width = clip.shape[1:3]
  x = sum(weight * x[:, i : i + height] for i, weight in enumerate(tap))
  x = sum(weight * x[:, :, i : i + width] for i, weight in enumerate(tap))
  grain = noise * np.random.default_rng(0).standard_normal(x.shape, np.float32)
  return np.clip(x + grain, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def world():
  """[(pixels, caption)] of some hundred scenes, all kinds well represented."""
  source = shapes.Source(CLIPS, SEED)
  drawn = [(next(source.read(item)).video_THWC, item.caption) for item in source.items()]
  rng = np.random.default_rng(SEED)
  for kind in ("bounces", "behind", "order", "pan", "zoom", "relation", "leaves", "turns"):
    for i in range(20):
      scene = shapes.draw_scene(rng, "train", {kind: 1.0})
      frames = {"order": 17, "leaves": (17, 25)[i % 2]}.get(kind, (9, 17)[i % 2])
      clip = shapes.render(scene, shapes.SIZES[i % len(shapes.SIZES)], frames, (SEED, i))
      drawn.append((clip, shapes.caption(scene)))
  return drawn


@pytest.mark.parametrize("seen_as", ["drawn", "mp4", "blurred"])
def test_true_renderings_pass(world, seen_as, tmp_path):
  """Every judge, at least 99 % (so of fewer than 100 scenes, at most one fails)."""
  through = {
    "drawn": lambda clip: clip,
    "mp4": lambda clip: mp4(clip, tmp_path / "a.mp4"),
    "blurred": blurred,
  }[seen_as]
  table = judge.summary([judge.judge(through(clip), caption) for clip, caption in world])
  assert set(table) == set(judge.CHANCES)
  for name, score in table.items():
    assert score["of"] - score["right"] <= max(1, 0.01 * score["of"]), (name, score)
  assert table["colour"]["of"] > 200 and table["direction"]["of"] > 70


def test_wrong_videos_fail(world):
  """Judged by another caption of the same kind, a video passes only in the words that both captions share."""
  by_kind = {}
  for clip, caption in world:
    by_kind.setdefault(shapes.parse(caption).kind, []).append((clip, shapes.parse(caption)))
  answers_of = {name: [] for name in judge.CHANCES}  # where the captions differ
  for of_kind in by_kind.values():
    for (clip, own), (_, other) in itertools.pairwise(of_kind[:30]):
      answers = judge.judge(clip, shapes.caption(other))
      differ = {
        "colour": [c for c, _ in own.objects] != [c for c, _ in other.objects],
        "shape": [s for _, s in own.objects] != [s for _, s in other.objects],
      }
      for name, right in answers.items():
        if name in ("colour", "shape"):
          if differ[name]:
            answers_of[name].append(right)
        elif len(own.objects) == 2:
          if {c for c, _ in own.objects} != {c for c, _ in other.objects}:
            answers_of[name].append(right)
        elif own.words != other.words:
          answers_of[name].append(right)
  for name, passed in answers_of.items():
    assert len(passed) >= 8 and sum(passed) <= 0.01 * len(passed), (name, passed)


def test_two_objects_are_distinguished(world):
  """If the caption exchanges the two, who is behind or left of whom is wrong."""
  for clip, caption in world:
    scene = shapes.parse(caption)
    if len(scene.objects) == 2:
      answers = judge.judge(clip, shapes.caption(shapes.Scene(scene.kind, scene.objects[::-1], scene.words)))
      assert answers["two colours"] and not answers[scene.kind], caption


@pytest.mark.parametrize(
  ("change", "fails"),
  [
    (lambda clip: clip[::-1], "direction"),
    (lambda clip: clip[:1].repeat(len(clip), 0), "direction"),
    (lambda clip: np.concatenate([clip, clip[::-1]]), "direction"),
    (lambda clip: clip[..., [2, 1, 0]], "colour"),
    (lambda clip: np.full_like(clip, 128), "colour"),
    (lambda clip: np.full_like(clip, 128), "shape"),
    (lambda clip: np.random.default_rng(0).integers(0, 256, clip.shape, np.uint8), "direction"),
  ],
)
def test_a_spoilt_video_fails(change, fails):
  """Played backwards, frozen, there and back, red for blue, grey, noise."""
  clip = shapes.render(shapes.parse("a red ball moves left"), (64, 64), 9, 0)
  assert judge.judge(clip, "a red ball moves left") == {"colour": True, "shape": True, "direction": True}
  assert not judge.judge(change(clip), "a red ball moves left")[fails]


def test_a_moving_object_is_no_camera():
  """A pan is detected by the floor, a bounce by its turn; an object that merely moves is neither."""
  clip = shapes.render(shapes.parse("a red ball moves right"), (64, 64), 9, 0)
  assert not judge.judge(clip, "the camera pans left over a red ball")["camera"]
  assert not judge.judge(clip, "a red ball bounces left and right")["bounce"]
  assert not judge.judge(clip, "first a red ball moves right, then it moves up")["order"]


def test_no_judge_answers_from_the_caption_alone():
  """A model that always shows the same video scores about the stated chance."""
  clip = shapes.render(shapes.parse("a red ball moves left"), (64, 64), 9, 0)
  captions = [
    shapes.caption(shapes.Scene("moves", ((colour, shape),), (way,)))
    for colour in shapes.COLOURS
    for shape in shapes.SHAPES
    for way in shapes.DIRECTIONS
  ]
  for score in judge.summary([judge.judge(clip, caption) for caption in captions]).values():
    assert score["share"] == pytest.approx(score["chance"])


def test_a_caption_of_another_world_is_refused():
  with pytest.raises(ValueError, match="a cat"):
    judge.judge(np.zeros((9, 64, 64, 3), np.uint8), "a cat")


def test_whole_subjects_are_in_view():
  """Moving objects are wholly in view; objects that are cut at a side and empty frames are not."""
  scenes = [
    shapes.Scene("moves", ((colour, shape),), (way,))
    for colour in shapes.COLOURS
    for shape in shapes.SHAPES
    for way in shapes.DIRECTIONS
  ]
  clips = [
    shapes.render(scene, shapes.SIZES[i % len(shapes.SIZES)], 9, (SEED, i)) for i, scene in enumerate(scenes)
  ]
  assert sum(map(judge.in_view, clips)) >= 0.99 * len(clips)
  assert not judge.in_view(np.full_like(clips[0], 200))
  for clip in clips[:20]:
    columns = judge.detect(clip).objects[0].mask_THW.any((0, 1)).nonzero()[0]
    middle = (columns[0] + columns[-1]) // 2
    assert not judge.in_view(clip[:, :, :middle]) and not judge.in_view(clip[:, :, middle:])
