"""Samples the model that ships, then trains one from random weights and evaluates it, on two CPU cores.

  python -m launch.quickstart [--out=DIR]          (bash launch/quickstart.sh installs first)

Every stage runs one of the programs of launch/, as a user would run it. A stage that is done is not done
again. The result is DIR/index.html: what was trained, curves, originals beside reconstructions, each prompt
with its videos, scores, and what to try next.
"""

import json
import os
import pathlib
import time

from absl import flags

from data.sources import shapes
from launch.common import children, claims, log, program
from launch.common.progress import say
from launch.reports import page
from sora_jax import files

FLAGS = flags.FLAGS
SHOWN = 16  # prompts on the page

GOALS = {
  "shipped": {"colour": 0.98, "direction": 0.95, "shape": 0.90},
  "fresh": {"colour": 0.95, "direction": 0.60, "shape": 0.75},
}


def define_flags():
  flags.DEFINE_string("out", "out/quickstart", "directory for all results")
  flags.DEFINE_integer("clips", 4096, "clips of the embedded world to train on", lower_bound=64)
  flags.DEFINE_integer("vae_steps", 0, "steps of the VAE; 0: those of configs/vae.py", lower_bound=0)
  flags.DEFINE_integer("small_clips", 12_000, "small clips of it to train on before", lower_bound=64)
  flags.DEFINE_integer(
    "steps", 0, "steps of each of the DiT's two runs; 0: those of configs/t2v.py", lower_bound=0
  )
  flags.DEFINE_integer("prompts", 64, "held-out prompts to sample and judge", lower_bound=1)


def stages(out):
  """(name, description, program, arguments) of each stage, in order."""
  vae, records, small, start, dit = (out / name for name in ("vae", "records", "small", "start", "dit"))
  t2v = children.root() / "configs/t2v.py"
  vae_steps = [f"--config.steps={FLAGS.vae_steps}"] if FLAGS.vae_steps else []
  dit_steps = [f"--config.steps={FLAGS.steps}"] if FLAGS.steps else []
  return [
    (
      "look",
      "the model that ships makes videos of the same prompts, to look at meanwhile",
      "sample",
      [f"--requests={out / 'requests.jsonl'}", f"--out={out / 'shipped'}"],
    ),
    (
      "vae",
      "a VAE learns to turn clips into latents and back",
      "train_vae",
      [f"--config={children.root() / 'configs/vae.py'}:tiny", f"--workdir={vae}", *vae_steps],
    ),
    (
      "encode",
      f"{FLAGS.clips} clips become latents",
      "encode",
      [f"--source=shapes:{FLAGS.clips}", f"--workdir={vae}", f"--out={records}"],
    ),
    (
      "small",
      f"{FLAGS.small_clips} small clips become latents, with the same tokenizer",
      "encode",
      [f"--source=shapes_small:{FLAGS.small_clips}", f"--workdir={records}", f"--out={small}"],
    ),
    (
      "start",
      "a diffusion transformer learns to make latents of small clips from captions",
      "train",
      [f"--config={t2v}:start", f"--config.data.path={small}", f"--workdir={start}", *dit_steps],
    ),
    (
      "dit",
      "it learns the same for clips of all sizes and kinds",
      "train",
      [
        f"--config={t2v}:tiny",
        f"--config.data.path={records}",
        f"--config.init={start}",
        f"--workdir={dit}",
        *dit_steps,
      ],
    ),
    (
      "sample",
      f"{FLAGS.prompts} prompts that training never saw become videos",
      "sample",
      [f"--workdir={dit}", f"--requests={out / 'requests.jsonl'}", f"--out={out / 'fresh'}"],
    ),
    (
      "evaluate",
      "VAE, loss by noise level and videos are measured",
      "evaluate",
      [f"--workdir={dit}", f"--videos={out / 'fresh'}", f"--out={out / 'fresh.json'}"],
    ),
    (
      "judge",
      "the videos of the model that ships are judged",
      "evaluate",
      [f"--videos={out / 'shipped'}", f"--out={out / 'shipped.json'}"],
    ),
  ]


def main():
  out = pathlib.Path(FLAGS.out).resolve()
  claims.need_disk(out, 500e6, "the quickstart")
  write_requests(out)
  todo = stages(out)
  say("sora_jax quickstart: about 12 minutes on two CPU cores. It will, one after another:")
  for number, (_, description, _, _) in enumerate(todo, 1):
    say(f"  {number}. {description}")
  say(f"and write {out / 'index.html'}. Stop it at any time; run again, it goes on.")
  times = read_times(out)
  for number, (name, description, program_name, arguments) in enumerate(todo, 1):
    began = time.monotonic()
    code = children.run_stage(number, len(todo), description, program_name, arguments)
    if code:
      return code
    times.setdefault(name, time.monotonic() - began)  # keeps the time of the run that did the work
    files.write_json(out / "times.json", times)
    if name == "look":
      status = "This page was written while the rest is being trained; open it again in ten minutes."
      write_page(out, times, status)
      say(f"look at {out / 'index.html'} while the rest is trained")
  write_page(out, times)
  per_stage = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
  say(f"\n{per_stage}  in all {sum(times.values()) / 60:.1f} min")
  say(f"open {out / 'index.html'} in a browser")
  return program.OK


def write_requests(out):
  """Writes the held-out prompts as a file of requests."""
  path = out / "requests.jsonl"
  lines = [json.dumps(request) + "\n" for request in shapes.held_out_requests(FLAGS.prompts)]
  path.write_text("".join(lines))


def read_times(out):
  return files.read_json_if_exists(out / "times.json")


def write_page(out, times, status=None):
  """Writes OUT/index.html from the results so far."""
  requests = list(files.read_jsonl(out / "requests.jsonl"))
  models = [
    {"key": "shipped", "name": "the model that ships", "detail": "configs/t2v.py:world"},
    {"key": "fresh", "name": "trained just now", "detail": "configs/t2v.py:start, then tiny"},
  ]
  models = [model for model in models if (out / model["key"]).exists()]
  reports = {model["key"]: files.read_json_if_exists(out / f"{model['key']}.json") for model in models}
  fresh = reports.get("fresh", {})
  story = {
    "title": "sora_jax: a text-to-video model, trained while you waited",
    "lede": "A causal video VAE and a diffusion transformer on packed spacetime patches, trained on a small "
    "generated world of coloured shapes. Every prompt below names a combination that neither model met in "
    "training.",
    "machine": f"{os.cpu_count()} CPU cores",
    "command": "bash launch/quickstart.sh",
    "models": models,
    "phases": [{"name": name, "seconds": seconds} for name, seconds in times.items()],
    "prompts": [prompt_entry(request, out, reports) for request in requests[:SHOWN]],
    "scores": score_entries(reports),
    "curves": curve_entries(out),
    "bars": sigma_bars(fresh),
    "reconstructions": reconstruction_entries(out, fresh),
    "facts": facts(out, fresh),
    "next": next_commands(out),
  }
  story = {name: value for name, value in story.items() if value}
  if status:
    story["status"] = status
  page.write_page(out / "index.html", story)


def prompt_entry(request, out, reports):
  """A prompt with the video of each model and its verdicts."""
  suffix = ".png" if request["frames"] == 1 else ".mp4"
  videos, verdicts = {}, {}
  for key, report in reports.items():
    path = out / key / (request["id"] + suffix)
    videos[key] = path if path.exists() else None
    judged = report.get("videos", {}).get(request["id"])
    if judged:
      verdicts[key] = judged
  return {"prompt": request["prompt"], "videos": videos, "verdicts": verdicts}


def score_entries(reports):
  """The scores of the videos, with chance and goal, and those of the VAE."""
  names = list(dict.fromkeys(name for report in reports.values() for name in report.get("scores", {})))
  entries = []
  for name in names:
    scores = {
      key: report["scores"][name] for key, report in reports.items() if name in report.get("scores", {})
    }
    entries.append(
      {
        "name": name,
        "unit": "%",
        "values": {key: score["share"] for key, score in scores.items()},
        "chance": next(iter(scores.values()))["chance"],
        "goals": {key: goals[name] for key, goals in GOALS.items() if name in goals},
      }
    )
  vae = reports.get("fresh", {}).get("vae")
  if vae:
    psnr, ssim = {"fresh": vae["psnr"]}, {"fresh": vae["ssim"]}
    entries += [
      {
        "name": "VAE: PSNR on held-out clips",
        "unit": "dB",
        "values": psnr,
        "goals": {"fresh": 28.0},
        "most": 45.0,
      },
      {
        "name": "VAE: SSIM on held-out clips",
        "unit": "",
        "values": ssim,
        "goals": {"fresh": 0.9},
        "most": 1.0,
      },
    ]
  return entries


def curve_entries(out):
  """Loss curves from metrics.jsonl."""
  curves = []
  drawn = (
    ("vae", "VAE: PSNR on training crops", "psnr", "dB"),
    ("start", "DiT, small clips: loss", "loss", ""),
    ("dit", "DiT, all clips: loss", "loss", ""),
  )
  for folder, title, name, unit in drawn:
    lines = [line for line in log.read_metrics(out / folder) if line.get(name) is not None]
    if lines:
      steps, values = [line["step"] for line in lines], [line[name] for line in lines]
      series = [{"key": "fresh", "name": "trained just now", "x": steps, "y": values}]
      curves.append({"title": title, "unit": unit, "series": series})
  return curves


def sigma_bars(report):
  """Held-out loss by noise level."""
  losses = report.get("loss_by_sigma")
  if not losses:
    return []
  return [
    {
      "title": "held-out loss by noise level",
      "x": "sigma (0 data, 1 noise)",
      "labels": list(losses),
      "series": [{"key": "fresh", "name": "trained just now", "y": list(losses.values())}],
    }
  ]


def reconstruction_entries(out, report):
  """Original clips and their reconstructions."""
  entries = []
  for entry in report.get("reconstructions", ()):
    entries.append(
      {**entry, "original": out / entry["original"], "reconstruction": out / entry["reconstruction"]}
    )
  return entries


def facts(out, report):
  """The numbers in large type."""
  numbers = []
  lines = log.read_metrics(out / "dit")
  if report.get("vae"):
    numbers.append({"name": "VAE, held-out PSNR", "value": f"{report['vae']['psnr']:.1f} dB"})
  if lines and lines[-1].get("fill"):
    numbers.append(
      {"name": "of every row is tokens, not padding", "value": f"{100 * lines[-1]['fill']:.1f} %"}
    )
  for question in ("colour", "shape", "direction"):
    if question in report.get("scores", {}):
      share = report["scores"][question]["share"]
      numbers.append({"name": f"of the prompts get their {question}", "value": f"{100 * share:.0f} %"})
  return numbers


def next_commands(out):
  """What to try next, with the commands."""
  return [
    {
      "say": "Ask the model that ships for something",
      "command": 'python -m launch.sample --prompt="a red ball moves left" --out=out/mine',
    },
    {
      "say": "Ask the one just trained",
      "command": f'python -m launch.sample --workdir={out / "dit"} --prompt="a blue square moves up" '
      "--out=out/mine",
    },
    {
      "say": "Train it for longer",
      "command": "python -m launch.train --config=configs/t2v.py:tiny --config.steps=8000 "
      f"--config.data.path={out / 'records'} --config.init={out / 'dit'} --workdir=out/longer",
    },
    {
      "say": "Encode a folder of your own clips",
      "command": "python -m launch.encode --source=CLIPS --out=out/my-records",
    },
  ]


if __name__ == "__main__":
  program.run(main, define_flags)
