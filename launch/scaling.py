"""Quality against compute: three sizes of the quickstart's transformer, trained on the same data.

  python -m launch.scaling --quickstart=out/quickstart --out=out/scaling

The report on Sora shows samples of the same prompts at rising training compute (OpenAI 2024, Video generation
models as world simulators, "Scaling transformers for video generation"). This program does it on the embedded
world. A smaller and a larger transformer are trained as launch.quickstart trained its own: on its records, by
its two configs, with the same clips in the same order, the same noise and learning rate. All three then get
the prompts that the quickstart judged.

Writes OUT/scaling.json, OUT/scaling.svg (loss while training against compute; shares of prompts that are
followed) and OUT/index.html (these, and the videos of each prompt side by side). Compute is model FLOPs
(sora_jax/flops.py). It should take about half an hour on two CPU cores; it may be stopped at any time and run
again.
"""

import pathlib

from absl import flags

from launch.common import children, log, program
from launch.common.progress import say
from launch.reports import charts, page, tables
from sora_jax import files
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS
# Keys of sora_jax.models.dit_config.SIZES; the quickstart's is quick.
SIZES = ("quick-small", "quick", "quick-large")
SHOWN = 16  # prompts on the page
LIGHT = 0.5  # noise levels below count less in training (sigma.light in configs/t2v.py)
QUESTIONS = ("colour", "shape", "direction")
NEEDED = ("records", "small", "start", "dit", "fresh", "fresh.json", "requests.jsonl")


def define_flags():
  flags.DEFINE_string("quickstart", "out/quickstart", "directory of a finished launch.quickstart")
  flags.DEFINE_string("out", "out/scaling", "directory for all results")
  flags.DEFINE_integer(
    "steps", 0, "steps of each of a model's two runs; 0: those of configs/t2v.py", lower_bound=0
  )


def main():
  start, out = pathlib.Path(FLAGS.quickstart).resolve(), pathlib.Path(FLAGS.out).resolve()
  missing = [name for name in NEEDED if not (start / name).exists()]
  if missing:
    raise BadInput(
      f"--quickstart={FLAGS.quickstart} holds no {missing[0]}; name the directory of a finished "
      "launch.quickstart, or run that first"
    )
  out.mkdir(parents=True, exist_ok=True)
  homes = {size: start if size == "quick" else out / size for size in SIZES}
  todo = [stage for size, home in homes.items() if home != start for stage in stages(size, start, home)]
  for number, (description, name, arguments) in enumerate(todo, 1):
    code = children.run_stage(number, len(todo), description, name, arguments)
    if code:
      return code
  models = {size: measured(home) for size, home in homes.items()}
  files.write_json(out / "scaling.json", models)
  print_table(models)
  page.save(out / "scaling.svg", charts.sheet(*pictures(models)))
  write_page(out, homes, models)
  say(f"look at {out / 'index.html'}")
  return program.OK


def stages(size, start, home):
  """(description, program, arguments) of each stage of a model, in order: those of launch.quickstart."""
  config = children.root() / "configs/t2v.py"
  settings = [f"--config.model.size={size}"] + [f"--config.steps={FLAGS.steps}"] * bool(FLAGS.steps)

  def train(variant, records, *more):
    return [f"--config={config}:{variant}", f"--config.data.path={start / records}", *settings, *more]

  first, second, videos = home / "start", home / "dit", home / "fresh"
  return [
    (f"{size}: small clips", "train", train("start", "small", f"--workdir={first}")),
    (
      f"{size}: all clips",
      "train",
      train("tiny", "records", f"--config.init={first}", f"--workdir={second}"),
    ),
    (
      f"{size}: videos of the quickstart's prompts",
      "sample",
      [f"--workdir={second}", f"--requests={start / 'requests.jsonl'}", f"--out={videos}"],
    ),
    (
      f"{size}: held-out loss, and the videos judged",
      "evaluate",
      [f"--workdir={second}", f"--videos={videos}", f"--out={home / 'fresh.json'}"],
    ),
  ]


def measured(home):
  """What is known of a model -> {flops, loss, loss_by_sigma, scores, curve: [(FLOPs so far, loss)]}.

  The loss is the mean of those that training weighs in full.
  """
  report, spent, curve = files.read_json(home / "fresh.json"), 0.0, []
  for run in ("start", "dit"):
    before = 0
    for line in log.read_metrics(home / run):
      spent += (line["step"] - before) * 1e12 * line["tflops"] / line["steps_per_second"]
      before = line["step"]
      if run == "dit":
        curve.append((spent, line["loss"]))
  losses = report["loss_by_sigma"]
  weighed = [loss for sigma, loss in losses.items() if float(sigma) >= LIGHT]
  return {
    "flops": spent,
    "loss": sum(weighed) / len(weighed),
    "loss_by_sigma": losses,
    "scores": {name: report["scores"][name] for name in QUESTIONS if name in report["scores"]},
    "curve": curve,
  }


def print_table(models):
  """A line a model."""
  rows = [
    (size, f"{model['flops'] / 1e12:.1f} TFLOPs", f"{model['loss']:.4f}")
    + tuple(f"{score['right']}/{score['of']} {score['share']:.0%}" for score in model["scores"].values())
    for size, model in models.items()
  ]
  names = next(iter(models.values()))["scores"]
  for line in tables.lines(("size", "training", "held-out loss", *names), rows):
    say(line)


def pictures(models):
  """-> (curve of the loss, bars of the scores), as launch/reports/page.py takes them."""
  curve = {
    "title": "loss while training on all clips, against training compute",
    "x": "TFLOPs spent, small clips included",
    "log": True,
    "log_x": True,
    "series": [
      {
        "key": str(i),
        "name": size,
        "x": [x / 1e12 for x, _ in model["curve"]],
        "y": [y for _, y in model["curve"]],
      }
      for i, (size, model) in enumerate(models.items())
    ],
  }
  bars = {
    "title": "held-out prompts that are followed, %",
    "x": "",
    "labels": list(next(iter(models.values()))["scores"]),
    "series": [
      {"key": str(i), "name": size, "y": [100 * score["share"] for score in model["scores"].values()]}
      for i, (size, model) in enumerate(models.items())
    ],
  }
  return curve, bars


def write_page(out, homes, models):
  """OUT/index.html."""
  requests = list(files.read_jsonl(homes["quick"] / "requests.jsonl"))
  keys = {size: str(i) for i, size in enumerate(SIZES)}
  prompts = []
  for request in requests[:SHOWN]:
    suffix = ".png" if request["frames"] == 1 else ".mp4"
    videos = {keys[size]: home / "fresh" / (request["id"] + suffix) for size, home in homes.items()}
    prompts.append({"prompt": request["prompt"], "videos": videos})
  curve, bars = pictures(models)
  page.write_page(
    out / "index.html",
    {
      "title": "sora_jax: quality against compute",
      "lede": "Three sizes of one transformer, trained on the same clips in the same order, and asked the "
      "same: no prompt below occurs in training.",
      "command": "python -m launch.scaling",
      "models": [
        {"key": keys[size], "name": size, "detail": f"{models[size]['flops'] / 1e12:.1f} TFLOPs of training"}
        for size in SIZES
      ],
      "prompts": prompts,
      "curves": [curve],
      "bars": [bars],
    },
  )


if __name__ == "__main__":
  program.run(main, define_flags)
