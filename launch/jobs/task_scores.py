"""What a model of the embedded world does with each task: requests whose right results are known, judged.

Each task has cases, made from renderings of held-out scenes. A case is right if its video does what the task
is for; beside it stands what doing nothing would score on the same question (the last frame held, a hard cut,
the video as it was). Places are in pixels, steps are mean absolute differences of successive frames.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from data.sources import shapes
from data.sources.shapes import judge
from launch.common import program
from launch.common.progress import Bar
from sora_jax import video
from sora_jax.errors import Stopped

NEAR = 5.0  # pixels between where an object is and where it should be, in the mean over frames
SEAM = 2.5  # a step at a seam, in usual steps of the same video
SIZE = (64, 64)
SHOWN, GAP, GIVEN = 9, 2, (20, 160, 60)  # frames of a video in the picture; their frame where they were given


@dataclasses.dataclass
class Case:
  """fields: of the request. right(video) -> bool. ideal: a video that is right, where there is one, uint8
  [T, H, W, 3]. idle: what doing nothing gives; None where that is no video, and `chance` is the share that a
  guesser gets.
  """

  task: str
  fields: dict
  right: Callable
  ideal: np.ndarray | None
  idle: np.ndarray | None = None
  chance: float = 0.0


def centres(clip, colour=None):
  """Centre of the object of a colour (or the most visible) in each frame, [T, 2]; NaN where there is none."""
  objects = judge.detect(clip).objects
  found = [one for one in objects if one.colour == colour] if colour else list(objects)
  return found[0].centre_T2 if found else np.full((len(clip), 2), np.nan)


def distance(clip, truth, frames=slice(None)):
  """Mean distance of the object in two videos, in pixels; infinite where it is missing in one."""
  apart = np.linalg.norm(centres(clip)[frames] - centres(truth)[frames], axis=-1)
  return float(np.nan_to_num(apart, nan=np.inf).mean())


def steps(clip):
  """Mean absolute difference of successive frames, [T - 1]."""
  return np.abs(np.diff(clip.astype(np.float32), axis=0)).mean((1, 2, 3))


def step_between(a, b):
  return float(np.abs(a.astype(np.float32) - b).mean())


def directed(clip, word, begin, end):
  """Does the object move as the word says from frame `begin` to `end`?"""
  return judge.direction(centres(clip)[begin:end], min(clip.shape[1:3])) == word


def held(clip, count):
  """The clip, its last frame held for so many more."""
  return np.concatenate([clip, np.repeat(clip[-1:], count, 0)])


def follows(clip, caption):
  """Are all answers of the judge right?"""
  return all(judge.judge(clip, caption).values())


class Maker:
  """Makes the cases of a number; their files go into a folder."""

  def __init__(self, folder, number):
    self.folder, self.number = pathlib.Path(folder), number
    self.rng = np.random.default_rng((number, 15))

  def scene(self, kind="moves"):
    return shapes.draw_scene(self.rng, "held_out", {kind: 1.0})

  def render(self, scene, frames, size=SIZE):
    return shapes.render(scene, size, frames, (self.number, frames, 15))

  def file(self, name, clip):
    """Writes a clip (an image if it has one frame) -> its path."""
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / f"{self.number:03d}-{name}{'.png' if len(clip) == 1 else '.mp4'}"
    if len(clip) == 1:
      video.write_png(path, clip[0])
    else:
      video.write_mp4(path, clip, shapes.FPS, crf=8)
    return str(path)

  def image_to_video(self):
    scene = self.scene()
    clip, caption = self.render(scene, 17), shapes.caption(scene)
    fields = {"image": self.file("first", clip[:1]), "frames": 17, "size": SIZE}
    fields |= {"prompt": caption}
    return Case("image_to_video", fields, lambda v: follows(v, caption), clip, held(clip[:1], 16))

  def last_image(self):
    scene = self.scene()
    clip, caption = self.render(scene, 17), shapes.caption(scene)
    fields = {"image": self.file("a", clip[:1]), "last_image": self.file("b", clip[-1:]), "frames": 17}

    def right(v):
      return follows(v, caption) and step_between(v[-2], v[-1]) <= SEAM * np.median(steps(v))

    fields |= {"prompt": caption, "size": SIZE, "task": "image_to_video"}
    idle = np.concatenate([held(clip[:1], 15), clip[-1:]])
    return Case("first and last image", fields, right, clip, idle)

  def extend_forward(self):
    scene = self.scene()
    clip, caption = self.render(scene, 25), shapes.caption(scene)
    fields = {"video": self.file("begin", clip[:9]), "frames": 25, "prompt": caption}
    right = lambda v: directed(v, scene.words[0], 8, 25) and follows(v, caption)  # noqa: E731
    return Case("extend_forward", fields, right, clip, held(clip[:9], 16))

  def extend_backward(self):
    scene = self.scene()
    clip, caption = self.render(scene, 25), shapes.caption(scene)
    fields = {"video": self.file("end", clip[16:]), "frames": 25, "prompt": caption}
    right = lambda v: directed(v, scene.words[0], 0, 17) and follows(v, caption)  # noqa: E731
    idle = np.concatenate([np.repeat(clip[16:17], 16, 0), clip[16:]])
    return Case("extend_backward", fields, right, clip, idle)

  def loop(self):
    scene = self.scene()
    clip = self.render(scene, 9)
    axis = "left and right" if scene.words[0] in ("left", "right") else "up and down"
    caption = shapes.caption(shapes.Scene("bounces", scene.objects, (axis,)))
    fields = {"video": self.file("loop", clip), "frames": 17, "prompt": caption}

    def right(v):
      usual = np.median(steps(clip))
      seams = step_between(v[-1], v[0]), step_between(v[8], v[9])
      return max(seams) <= SEAM * usual and not np.isnan(centres(v, scene.objects[0][0])).any()

    ideal = np.concatenate([clip, np.repeat(clip[7:0:-1], [2, 1, 1, 1, 1, 1, 1], 0)])
    return Case("loop", fields, right, ideal, held(clip, 8))

  def connect(self):
    first, second = self.scene(), self.scene()
    while second.objects[0][0] == first.objects[0][0]:
      second = self.scene()
    a, b = self.render(first, 9), self.render(second, 9)
    fields = {"video": self.file("a", a), "video_b": self.file("b", b), "frames": 26}

    def right(v):  # no step makes more than half of the way from one to the other
      return steps(v[8 : len(v) - 8]).max() <= 0.5 * step_between(a[-1], b[0])

    fields |= {"prompt": shapes.caption(shapes.Scene("turns", (first.objects[0], second.objects[0])))}
    share = np.linspace(0, 1, 10)[1:-1, None, None, None]
    ideal = np.concatenate([a, (a[-1] * (1 - share) + b[0] * share).astype(np.uint8), b])
    return Case("connect", fields, right, ideal, np.concatenate([a, np.repeat(a[-1:], 8, 0), b]))

  def fill(self):
    scene = self.scene()
    clip, caption = self.render(scene, 17), shapes.caption(scene)
    fields = {"video": self.file("gap", clip), "given": [[0, 4], [13, 16]], "prompt": caption}
    idle = np.concatenate([held(clip[:5], 8), clip[13:]])
    return Case("fill: frames", fields, lambda v: distance(v, clip, slice(5, 13)) <= NEAR, clip, idle)

  def region(self):
    scene = self.scene()
    clip, caption = self.render(scene, 9), shapes.caption(scene)
    mask = np.zeros((1, *SIZE, 3), np.uint8)
    band = (slice(None), slice(16, 48)) if scene.words[0] in ("left", "right") else (slice(16, 48),)
    mask[(0, *band)] = 255  # the object comes in, and goes out
    idle = np.where(mask > 0, np.median(clip[0, :4].reshape(-1, 3), axis=0), clip).astype(np.uint8)
    fields = {"video": self.file("hole", clip), "mask": self.file("mask", mask), "prompt": caption}
    right = lambda v: distance(v, clip) <= NEAR and follows(v, caption)  # noqa: E731
    return Case("fill: region", fields | {"task": "fill"}, right, clip, idle)

  def edit(self):
    scene = self.scene()
    clip = self.render(scene, 9)
    colours = [name for name in shapes.COLOURS if name != scene.objects[0][0]]
    colour = colours[int(self.rng.integers(len(colours)))]
    new = shapes.Scene("moves", ((colour, scene.objects[0][1]),), scene.words)
    fields = {"video": self.file("edit", clip), "strength": 0.9, "prompt": shapes.caption(new)}

    def right(v):
      answers = judge.judge(v, shapes.caption(new))
      return answers["colour"] and answers["direction"] and distance(v, clip) <= 2 * NEAR

    return Case("edit", fields, right, self.render(new, 9), clip)

  def upscale(self):
    scene = self.scene()
    clip, caption = self.render(scene, 9, (48, 48)), shapes.caption(scene)
    fields = {"video": self.file("small", clip), "size": SIZE, "strength": 0.7, "prompt": caption}

    def right(v):
      apart = np.linalg.norm(centres(v) - centres(clip) * (SIZE[0] / 48), axis=-1)
      return follows(v, caption) and bool(np.nan_to_num(apart, nan=np.inf).mean() <= NEAR)

    return Case("upscale", fields, right, None)

  def shots(self):
    scene = self.scene("order")
    parts = [shapes.Scene("moves", scene.objects, (word,)) for word in scene.words]
    fields = {"shots": [{"seconds": 1.5, "prompt": shapes.caption(part)} for part in parts], "size": SIZE}

    def right(v):
      ((colour, shape),) = scene.objects
      found = judge.detect(v)
      same = bool(found.objects) and found.objects[0].colour == colour
      same = same and judge.shape_of(found.objects[0], found) == shape
      return same and judge.order(centres(v), min(SIZE)) == scene.words

    ideal, chance = self.render(scene, 24), judge.CHANCES["order"]
    return Case("shots", fields | {"task": "text_to_video"}, right, ideal, chance=chance)

  def behind(self):
    return self._prompt("behind", "passes behind", 17)

  def leaves(self):
    return self._prompt("leaves", "leaves and returns", 25)

  def _prompt(self, kind, name, frames):
    scene = self.scene(kind)
    caption = shapes.caption(scene)
    fields = {"prompt": caption, "frames": frames, "size": SIZE, "task": "text_to_video"}
    return Case(name, fields, lambda v: follows(v, caption), self.render(scene, frames))


MAKERS = (
  "image_to_video last_image extend_forward extend_backward loop connect fill region edit upscale shots "
  "behind leaves"
).split()


def strip(case, made):
  """Frames of the first case of a task, from its beginning to its end: those that were given have a green
  frame. Of a video that changes as a whole, what it was stands above. -> uint8 [H, W, 3]
  """
  inputs = [
    video.load(case.fields[name])[0]
    for name in ("image", "last_image", "video", "video_b")
    if name in case.fields
  ]
  rows = []
  if case.task in ("edit", "upscale", "fill: region"):
    rows.append((inputs[0], np.ones(len(inputs[0]), bool)))
  given = [
    any(frame.shape == own.shape and (frame == own).all() for clip in inputs for own in clip)
    for frame in made
  ]
  rows.append((made, np.array(given)))
  return np.concatenate([_row(*row) for row in rows])


def _row(clip, given):
  picked, tiles = np.linspace(0, len(clip) - 1, SHOWN).round().astype(int), []
  for i in picked:
    tile = np.full((SIZE[0] + 4 * GAP, SIZE[1] + 4 * GAP, 3), 255, np.uint8)
    h, w = clip.shape[1:3]
    top, left = (SIZE[0] - h) // 2 + 2 * GAP, (SIZE[1] - w) // 2 + 2 * GAP
    if given[i]:
      tile[top - GAP : top + h + GAP, left - GAP : left + w + GAP] = GIVEN
    tile[top : top + h, left : left + w] = clip[i]
    tiles.append(tile)
  return np.concatenate(tiles, 1)


def measure(pipe, folder, count, picture):
  """`count` cases of each task -> {task: {right, of, share, idle}}; idle: the share that doing nothing gets.

  Their inputs are written into `folder`, and a picture of the first case of each task, in the order of the
  table, to the path `picture`. Raises Stopped if a stop was requested.
  """
  cases = []
  for name in MAKERS:
    for number in range(count):
      case = getattr(Maker(folder, len(cases)), name)()
      case.fields = {"task": name, **case.fields, "id": f"{name}-{number}", "seed": number}
      cases.append(case)
  done, strips, total = collections.defaultdict(list), {}, 100 * len(cases)
  with Bar("tasks", total) as bar:
    for result in pipe.run(
      [case.fields for case in cases],
      stop=program.stop_requested,
      progress=lambda now, of: bar.update(now * total // of),
    ):
      case = cases[result.position]
      idle = case.chance if case.idle is None else case.right(case.idle)
      made = result.video()
      done[case.task].append((bool(case.right(made)), float(idle)))
      if case.fields["id"].endswith("-0"):
        strips[case.task] = strip(case, made)
  if sum(map(len, done.values())) < len(cases):
    raise Stopped
  tasks = dict.fromkeys(case.task for case in cases)
  video.write_png(picture, np.concatenate([strips[task] for task in tasks]).repeat(2, 0).repeat(2, 1))
  table = {}
  for task in tasks:
    right, idle = np.array(done[task], float).T
    table[task] = {
      "right": int(right.sum()),
      "of": count,
      "share": float(right.mean()),
      "idle": float(idle.mean()),
    }
  return table
