"""Framing: the same small model trained on clips at their native sizes, and on the squares in their middle. Same clips, steps, tokens, prompts.

  python -m launch.framing --out=out/framing
  python -m launch.framing --out=out/framing-from-nothing --from_nothing --steps=1000

The report on Sora says that native sizes frame subjects better than square crops do (OpenAI 2024, Video generation models as world
simulators, "Improved framing and composition"). Here on the embedded world, whose subjects are wholly in view in every training clip:
the middle square cuts off what leaves it. Both models begin with the weights that ship, whose clips had native sizes, and go on for as many
steps of as many tokens; what differs at the end is what the crops taught. (The second command: both begin with nothing; an hour.)

The share of videos whose subject is wholly in view in every frame, by the judge of data/sources/shapes/judge.py, at square sizes, which both
were trained on, and at all. Writes OUT/framing.json, and OUT/framing.png: three frames each of videos of the same prompts and seeds, native
above, squares below, framed red where the subject is cut off. 20 to 30 minutes on two CPU cores; stop it at any time and run it again.
"""

import json
import pathlib

import numpy as np
from absl import flags
from rich.table import Table

from data.sources import shapes
from data.sources.shapes import judge
from launch.common import children, program, progress
from launch.common.progress import say
from launch.jobs import sample
from sora_jax import files, video, workdir

FLAGS = flags.FLAGS
SOURCES = {"native": "shapes", "square": "squares"}      # of clips, in data/sources
TRAINING = (f"--config.init={workdir.shipped()}", "--config.optim.learning_rate=2e-3", "--config.ema_decay=0.99")
SHOWN, BAND = 12, 4           # videos in the picture, and in a row of it
GAP, ENLARGED = 2, 2          # pixels between frames; how many a pixel becomes
WHOLE, CUT = (46, 160, 67), (207, 34, 46)      # green, red
HEIGHT = max(height for height, _ in shapes.SIZES)


def define_flags():
  flags.DEFINE_string("out", "out/framing", "where everything goes")
  flags.DEFINE_integer("clips", 8000, "clips of the embedded world to train on", lower_bound=64)
  flags.DEFINE_integer("steps", 400, "steps of each model", lower_bound=1)
  flags.DEFINE_boolean("from_nothing", False, "draw the weights that both begin with; give more --steps, and another --out")
  flags.DEFINE_integer("prompts", 96, "videos of each model", lower_bound=1)


def main():
  out = pathlib.Path(FLAGS.out).resolve()
  out.mkdir(parents=True, exist_ok=True)
  requests = out / "requests.jsonl"
  requests.write_text("".join(json.dumps(request) + "\n" for request in prompts(FLAGS.prompts)))
  story = [stage for kind in SOURCES for stage in stages(kind, out / kind, requests)]
  for number, stage in enumerate(story, 1):
    code = children.run_stage(number, len(story), *stage)
    if code:
      return code
  report = {kind: score(out / kind / "videos") for kind in SOURCES}
  files.write_json(out / "framing.json", {"clips": FLAGS.clips, "steps": FLAGS.steps, "from_nothing": FLAGS.from_nothing, **report})
  show(report)
  video.write_png(out / "framing.png", picture([out / kind / "videos" for kind in SOURCES]))
  say(f"look at {out / 'framing.png'}: native above, squares below")
  return program.OK


def stages(kind, out, requests):
  """(what it does, program, arguments) of each stage of one model, in order."""
  records, dit, videos = out / "records", out / "dit", out / "videos"
  config, training = children.root() / "configs/t2v.py", () if FLAGS.from_nothing else TRAINING
  return [
      (f"{kind}: {FLAGS.clips} clips become latents", "encode", [f"--source={SOURCES[kind]}:{FLAGS.clips}", f"--out={records}"]),
      (f"{kind}: a model is trained", "train", [f"--config={config}:world", f"--config.steps={FLAGS.steps}", *training,
                                                f"--config.data.path={records}", f"--workdir={dit}"]),
      (f"{kind}: {FLAGS.prompts} videos", "sample", [f"--workdir={dit}", f"--requests={requests}", f"--out={videos}"])]


def show(report):
  """The table, for the terminal."""
  table = Table(box=None)
  for name in ("subject wholly in view", "squares", "all sizes"):
    table.add_column(name, justify="left" if name.startswith("subject") else "right")
  for kind, scores in report.items():
    shares = [f"{sum(values)}/{len(values)} {100 * np.mean(values):.0f} %" for values in (scores["squares"], scores["all"])]
    table.add_row(f"trained on {kind}", *shares)
  progress.console.print(table)


def prompts(count):
  """Requests: a thing that moves, at all sizes of the world in turn."""
  scenes = [shapes.Scene("moves", ((colour, shape),), (way,)) for shape in shapes.SHAPES for colour in shapes.COLOURS for way in shapes.DIRECTIONS]
  order = np.random.default_rng(0).permutation(len(scenes))
  return [{"id": f"{i:03d}", "prompt": shapes.caption(scenes[order[i % len(scenes)]]), "size": list(shapes.SIZES[i % len(shapes.SIZES)]), "frames": 9,
           "fps": shapes.FPS, "seed": i} for i in range(count)]


def score(directory):
  """A folder of videos -> whether the subject of each is wholly in view: {"squares": [0 or 1], "all": [0 or 1]}."""
  scores = {"squares": [], "all": []}
  for line in sample.read_manifest(directory).values():
    seen = int(judge.in_view(video.load(directory / line["path"])[0]))
    scores["all"].append(seen)
    if line["size"][0] == line["size"][1]:
      scores["squares"].append(seen)
  return scores


def picture(directories):
  """First, middle and last frame of the first videos, of all sizes, enlarged; bands of a row for each directory -> uint8 [H, W, 3].

  Videos whose subject is not wholly in view are framed in CUT, the others in WHOLE."""
  shown = {directory: [line["path"] for _, line in sorted(sample.read_manifest(directory).items())][:SHOWN] for directory in directories}
  rows = []
  for first in range(0, len(shown[directories[0]]), BAND):
    for directory, paths in shown.items():
      clips = [video.load(directory / path)[0] for path in paths[first:first + BAND]]
      rows.append(np.concatenate([tile(clip, WHOLE if judge.in_view(clip) else CUT) for clip in clips], 1))
    rows.append(np.full((4 * GAP, 1, 3), 255, np.uint8))
  width = max(row.shape[1] for row in rows)
  rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows[:-1]]
  return np.concatenate(rows).repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def tile(clip, colour):
  """Three frames of a clip [T, h, w, 3] in a frame of a colour, in the middle of a white field as high as the highest -> [H, W, 3]."""
  height, width = clip.shape[1:3]
  strip = np.full((height + 2 * GAP, 3 * (width + GAP) + GAP, 3), colour, np.uint8)
  for left, image in zip(range(GAP, strip.shape[1], width + GAP), (clip[0], clip[len(clip) // 2], clip[-1])):
    strip[GAP:-GAP, left:left + width] = image
  missing = HEIGHT + 2 * GAP - len(strip)
  return np.pad(strip, ((missing // 2, missing - missing // 2 + GAP), (0, 3 * GAP), (0, 0)), constant_values=255)


if __name__ == "__main__":
  program.run(main, define_flags)
