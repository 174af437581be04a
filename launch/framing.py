"""Compares a small model trained on clips at their native sizes with one trained on their centre squares.

  python -m launch.framing --out=out/framing
  python -m launch.framing --out=out/framing-from-nothing --from_nothing --steps=1000

The report on Sora says that native sizes frame subjects better than square crops (OpenAI 2024, Video
generation models as world simulators, "Improved framing and composition"). This program tests the claim on
the embedded world, whose subjects are wholly in view in every training clip; a centre crop cuts off what lies
outside the square. Both models have the same clips, steps, tokens and prompts. Both start from the weights
that ship, which were trained on clips of native sizes, so the difference at the end is the effect of the
crops. With the second command both start from random weights; that takes an hour.

The measure is the share of videos whose subject is wholly in view in every frame, by the judge of
data/sources/shapes/judge.py: at square sizes, which both models were trained on, and at all sizes. Writes
OUT/framing.json, and OUT/framing.png: three frames each of videos of the same prompts and seeds, native
above, squares below, with a red frame if the subject is cut off. Takes 20 to 30 minutes on two CPU cores; it
may be stopped at any time and run again.
"""

import json
import pathlib

import numpy as np
from absl import flags

from data.sources import shapes
from data.sources.shapes import judge
from launch.common import children, program
from launch.common.progress import say
from launch.jobs import sample
from launch.reports import tables
from sora_jax import files, video, workdir as workdirs

FLAGS = flags.FLAGS
SOURCES = {"native": "shapes", "square": "squares"}  # of clips, in data/sources
TRAINING = (
  f"--config.init={workdirs.shipped()}",
  "--config.optim.learning_rate=2e-3",
  "--config.ema_decay=0.99",
)
SHOWN = 12  # videos in the picture
BAND = 4  # videos side by side
GAP = 2  # pixels between frames
ENLARGED = 2  # pixels of a side of an enlarged pixel
WHOLE, CUT = (46, 160, 67), (207, 34, 46)  # green, red
HEIGHT = max(height for height, _ in shapes.SIZES)


def define_flags():
  flags.DEFINE_string("out", "out/framing", "directory for all results")
  flags.DEFINE_integer("clips", 8000, "clips of the embedded world to train on", lower_bound=64)
  flags.DEFINE_integer("steps", 400, "steps of each model", lower_bound=1)
  random_weights = "start both models from random weights; give more --steps, and another --out"
  flags.DEFINE_boolean("from_nothing", False, random_weights)
  flags.DEFINE_integer("prompts", 96, "videos of each model", lower_bound=1)


def main():
  out = pathlib.Path(FLAGS.out).resolve()
  out.mkdir(parents=True, exist_ok=True)
  requests = out / "requests.jsonl"
  requests.write_text("".join(json.dumps(request) + "\n" for request in prompts(FLAGS.prompts)))
  todo = []
  for kind in SOURCES:
    todo += stages(kind, out / kind, requests)
  for number, (description, name, arguments) in enumerate(todo, 1):
    code = children.run_stage(number, len(todo), description, name, arguments)
    if code:
      return code
  videos = {kind: out / kind / "videos" for kind in SOURCES}
  scores = {kind: score(directory) for kind, directory in videos.items()}
  settings = {"clips": FLAGS.clips, "steps": FLAGS.steps, "from_nothing": FLAGS.from_nothing}
  files.write_json(out / "framing.json", settings | scores)
  print_table(scores)
  video.write_png(out / "framing.png", picture(list(videos.values())))
  say(f"look at {out / 'framing.png'}: native above, squares below")
  return program.OK


def stages(kind, out, requests):
  """(description, program, arguments) of each stage of one model, in order."""
  records, dit, videos = out / "records", out / "dit", out / "videos"
  config = children.root() / "configs/t2v.py"
  encode = [f"--source={SOURCES[kind]}:{FLAGS.clips}", f"--out={records}"]
  train = [f"--config={config}:world", f"--config.steps={FLAGS.steps}"]
  if not FLAGS.from_nothing:
    train += TRAINING
  train += [f"--config.data.path={records}", f"--workdir={dit}"]
  return [
    (f"{kind}: {FLAGS.clips} clips become latents", "encode", encode),
    (f"{kind}: a model is trained", "train", train),
    (
      f"{kind}: {FLAGS.prompts} videos",
      "sample",
      [f"--workdir={dit}", f"--requests={requests}", f"--out={videos}"],
    ),
  ]


def print_table(report):
  """Prints the shares of videos, by training set and size."""
  rows = [
    (f"trained on {kind}", share(scores["squares"]), share(scores["all"])) for kind, scores in report.items()
  ]
  for line in tables.lines(("subject wholly in view", "squares", "all sizes"), rows):
    say(line)


def share(values):
  """[0 or 1] -> text such as "3/4 75 %"."""
  return f"{sum(values)}/{len(values)} {100 * np.mean(values):.0f} %"


def prompts(count):
  """Requests for videos of one moving object, which take all sizes of the world in turn."""
  objects = [(colour, shape) for shape in shapes.SHAPES for colour in shapes.COLOURS]
  scenes = [
    shapes.Scene("moves", (item,), (direction,)) for item in objects for direction in shapes.DIRECTIONS
  ]
  order = np.random.default_rng(0).permutation(len(scenes))
  requests = []
  for i in range(count):
    prompt = shapes.caption(scenes[order[i % len(scenes)]])
    size = list(shapes.SIZES[i % len(shapes.SIZES)])
    requests.append(
      {"id": f"{i:03d}", "prompt": prompt, "size": size, "frames": 9, "fps": shapes.FPS, "seed": i}
    )
  return requests


def score(directory):
  """Judges a folder of videos: is the subject wholly in view? -> {"squares": [0 or 1], "all": [0 or 1]}."""
  scores = {"squares": [], "all": []}
  for line in sample.read_manifest(directory).values():
    in_view = int(judge.in_view(video.load(directory / line["path"])[0]))
    scores["all"].append(in_view)
    height, width = line["size"]
    if height == width:
      scores["squares"].append(in_view)
  return scores


def picture(directories):
  """Enlarged first, middle and last frames of the first videos of each directory -> uint8 [H, W, 3].

  Each group of BAND videos has one row for each directory. A video has a frame of the colour CUT if its
  subject is not wholly in view, of WHOLE otherwise.
  """
  shown = {}
  for directory in directories:
    lines = sorted(sample.read_manifest(directory).items())[:SHOWN]
    shown[directory] = [line["path"] for _, line in lines]
  rows = []
  for first in range(0, len(shown[directories[0]]), BAND):
    for directory, paths in shown.items():
      clips = [video.load(directory / path)[0] for path in paths[first : first + BAND]]
      tiles = [tile(clip, WHOLE if judge.in_view(clip) else CUT) for clip in clips]
      rows.append(np.concatenate(tiles, 1))
    rows.append(np.full((4 * GAP, 1, 3), 255, np.uint8))
  rows = rows[:-1]
  width = max(row.shape[1] for row in rows)
  rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
  return np.concatenate(rows).repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def tile(clip, colour):
  """Three frames of a clip [T, h, w, 3], side by side, with a frame of the given colour -> [H, W, 3].

  They are centred in a white area as high as the highest clip.
  """
  height, width = clip.shape[1:3]
  strip = np.full((height + 2 * GAP, 3 * (width + GAP) + GAP, 3), colour, np.uint8)
  for left, image in zip(range(GAP, strip.shape[1], width + GAP), (clip[0], clip[len(clip) // 2], clip[-1])):
    strip[GAP:-GAP, left : left + width] = image
  missing = HEIGHT + 2 * GAP - len(strip)
  above = missing // 2
  return np.pad(strip, ((above, missing - above + GAP), (0, 3 * GAP), (0, 0)), constant_values=255)


if __name__ == "__main__":
  program.run(main, define_flags)
