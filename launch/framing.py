"""Framing: the same small model trained on clips at their native sizes, and on the squares in their middle. Same clips, steps, tokens, prompts.

  python -m launch.framing --out=out/framing
  python -m launch.framing --out=out/framing-from-nothing --from_nothing --steps=1000

The report on Sora says that native sizes frame subjects better than square crops do (OpenAI 2024, Video generation models as world
simulators, "Improved framing and composition"). Here on the embedded world, whose subjects are wholly in view in every training clip:
the middle square cuts off what leaves it. Both models begin with the weights that ship, whose clips had native sizes, and go on for as many
steps of as many tokens; what differs at the end is what the crops taught. (The second command: both begin with nothing; an hour.)

The share of videos whose subject is wholly in view in every frame, by the judge of data/sources/shapes_judge.py, at square sizes, which both
were trained on, and at all. Writes OUT/framing.json, and OUT/framing.png: three frames each of videos of the same prompts and seeds, native
above, squares below, framed red where the subject is cut off. 20 to 30 minutes on two CPU cores; stop it at any time and run it again.
"""

import json
import pathlib

import numpy as np
from absl import flags

from data.sources import shapes, shapes_judge
from launch import cli, sampling, stages
from sora_jax import checkpoint, video

OUT = flags.DEFINE_string("out", "out/framing", "where everything goes")
CLIPS = flags.DEFINE_integer("clips", 8000, "clips of the embedded world to train on", lower_bound=64)
STEPS = flags.DEFINE_integer("steps", 400, "steps of each model", lower_bound=1)
FROM_NOTHING = flags.DEFINE_boolean("from_nothing", False, "draw the weights that both begin with; give more --steps, and another --out")
PROMPTS = flags.DEFINE_integer("prompts", 96, "videos of each model", lower_bound=1)
KINDS = {"native": [], "square": ["--square"]}
TRAINING = (f"--config.init={checkpoint.shipped()}", "--config.optim.learning_rate=2e-3", "--config.ema_decay=0.99")
SHOWN, BAND = 12, 4           # videos in the picture, and in a row of it
GAP, ENLARGED = 2, 2          # pixels between frames; how many a pixel becomes
WHOLE, CUT = (46, 160, 67), (207, 34, 46)      # green, red
HEIGHT = max(height for height, _ in shapes.SIZES)


def main():
  out = pathlib.Path(OUT.value).resolve()
  out.mkdir(parents=True, exist_ok=True)
  requests, training = out / "requests.jsonl", () if FROM_NOTHING.value else TRAINING
  requests.write_text("".join(json.dumps(request) + "\n" for request in prompts(PROMPTS.value)))
  story = [stage for kind, flag in KINDS.items() for stage in (
      (f"{kind}: {CLIPS.value} clips become latents", "encode", [f"--source=shapes:{CLIPS.value}", *flag, f"--out={out / kind / 'records'}"]),
      (f"{kind}: a model is trained", "train", [f"--config={stages.root() / 'configs/t2v.py'}:world", f"--config.steps={STEPS.value}", *training,
                                                f"--config.data.path={out / kind / 'records'}", f"--workdir={out / kind / 'dit'}"]),
      (f"{kind}: {PROMPTS.value} videos", "sample", [f"--workdir={out / kind / 'dit'}", f"--requests={requests}", f"--out={out / kind / 'videos'}"]))]
  for number, stage in enumerate(story, 1):
    code = stages.run(number, len(story), *stage)
    if code:
      return code
  report = {kind: score(out / kind / "videos") for kind in KINDS}
  checkpoint.write_json(out / "framing.json", {"clips": CLIPS.value, "steps": STEPS.value, "from_nothing": FROM_NOTHING.value, **report})
  cli.say(f"\n{'subject wholly in view':<24}{'squares':>16}{'all sizes':>16}")
  for kind, found in report.items():
    shares = (f"{sum(values)}/{len(values)} {100 * np.mean(values):.0f} %" for values in (found["squares"], found["all"]))
    cli.say(f"trained on {kind:<13}" + "".join(f"{share:>16}" for share in shares))
  video.write_png(out / "framing.png", picture([out / kind / "videos" for kind in KINDS]))
  cli.say(f"look at {out / 'framing.png'}: native above, squares below")
  return cli.OK


def prompts(count):
  """Requests: a thing that moves, at all sizes of the world in turn."""
  scenes = [shapes.Scene("moves", ((colour, shape),), (way,)) for shape in shapes.SHAPES for colour in shapes.COLOURS for way in shapes.DIRECTIONS]
  order = np.random.default_rng(0).permutation(len(scenes))
  return [{"id": f"{i:03d}", "prompt": shapes.caption(scenes[order[i % len(scenes)]]), "size": list(shapes.SIZES[i % len(shapes.SIZES)]), "frames": 9,
           "fps": shapes.FPS, "seed": i} for i in range(count)]


def score(directory):
  """A folder of videos -> whether the subject of each is wholly in view: {"squares": [0 or 1], "all": [0 or 1]}."""
  found = {"squares": [], "all": []}
  for line in sampling.read_manifest(directory).values():
    seen = int(shapes_judge.in_view(video.load(directory / line["path"])[0]))
    found["all"].append(seen)
    if line["size"][0] == line["size"][1]:
      found["squares"].append(seen)
  return found


def picture(directories):
  """First, middle and last frame of the first videos, of all sizes, enlarged; bands of a row for each directory -> uint8 [H, W, 3].

  Videos whose subject is not wholly in view are framed in CUT, the others in WHOLE."""
  shown = {directory: [line["path"] for _, line in sorted(sampling.read_manifest(directory).items())][:SHOWN] for directory in directories}
  rows = []
  for first in range(0, len(shown[directories[0]]), BAND):
    for directory, paths in shown.items():
      clips = [video.load(directory / path)[0] for path in paths[first:first + BAND]]
      rows.append(np.concatenate([tile(clip, WHOLE if shapes_judge.in_view(clip) else CUT) for clip in clips], 1))
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
  cli.run(main)
