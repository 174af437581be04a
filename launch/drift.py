"""A minute and more of the embedded world: what a long video costs, and how far it drifts.

  python -m launch.drift --out=out/drift                       # the small model that ships; some minutes
  python -m launch.drift --workdir=W --seconds=10,60,120 --out=out/drift

For each length, launch.sample makes videos of subjects that stay in view, in a process of its own, whose
largest memory is noted. Then each second of a video is measured: colour of the subject (how far from the
named one), its size (share of the frame), its shape (is it what was asked?), brightness of the background.
Drift is |M(first 15 %) - M(last 15 %)| of such a measure M, as in HeliosBench.

Beside the longest videos stand such as users make by hand: each link extends the file before it, so that what
was decoded is encoded again; a video of launch.sample goes on from the latents. And one follows several
prompts over time, which are judged one by one.

Writes OUT/drift.json, OUT/drift.svg (colour by second, memory by length) and OUT/frames.png (a frame of every
tenth of the videos). Run again, it goes on where it was.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from absl import flags

from data.sources import shapes
from data.sources.shapes import judge
from launch.common import children, program
from launch.common.progress import Bar, say
from launch.jobs import sample
from launch.reports import charts, page, tables
from sora_jax import files, video, workdir as workdirs
from sora_jax.errors import BadInput, Stopped
from sora_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
SHARE = 0.15  # of a video, at each end
LINKS = 16  # extensions of a file, one after another
SHOT = 2  # seconds
MEASURES = {
  "colour": "distance of the subject's mean colour from the named one, in 8-bit steps",
  "size": "pixels of the subject, in % of the frame",
  "shape": "seconds in which the shape is as asked, in %",
  "background": "mean brightness of what is not the subject, in 8-bit steps",
}


def define_flags():
  flags.DEFINE_string("workdir", "", "a model of the embedded world; without it, the small model that ships")
  flags.DEFINE_string("out", "out/drift", "directory for all results")
  flags.DEFINE_list("seconds", "10,60,120", "lengths, in seconds, rising")
  flags.DEFINE_integer("prompts", 4, "subjects", lower_bound=1, upper_bound=18)


def main():
  out, lengths = pathlib.Path(FLAGS.out), seconds()
  workdir = FLAGS.workdir or str(workdirs.shipped())
  window = workdirs.read_config(workdir).sample.get("window", 0)
  if not window or lengths[-1] * shapes.FPS <= window:
    raise BadInput(
      f"{workdir} makes {window or 'all'} frames at a time, and --seconds={FLAGS.seconds[-1]} has "
      f"{lengths[-1] * shapes.FPS:.0f}, so nothing would be made in windows; set config.sample.window, or "
      "give more seconds"
    )
  out.mkdir(parents=True, exist_ok=True)
  subjects = scenes(FLAGS.prompts)
  report = {"workdir": workdir, "window": window, "fps": shapes.FPS, "lengths": {}}
  for length in lengths:
    report["lengths"][f"{length:g}"] = make(workdir, out / f"{length:g}s", subjects, length)
  longest = out / f"{lengths[-1]:g}s"
  by_hand = extend_files(workdir, out / "links", subjects, window)
  pairs = {"latents kept": longest, "files extended": by_hand}
  report["by_second"] = {name: measured(folder, subjects) for name, folder in pairs.items()}
  report["drift"] = {
    name: {measure: drift(values) for measure, values in report["by_second"][name].items()} for name in pairs
  }
  report["links"] = links(report["by_second"], window)
  report["shots"] = judge_shots(longest / "shots.mp4", lengths[-1])
  files.write_json(out / "drift.json", report)
  page.save(out / "drift.svg", chart(report))
  video.write_png(
    out / "frames.png", sheet([folder / f"{i:02d}.mp4" for i in range(2) for folder in pairs.values()])
  )
  print_report(report)
  say(f"written to {out}: drift.json, drift.svg, frames.png")
  return program.OK


def seconds():
  """--seconds -> floats; BadInput where they are no rising lengths."""
  try:
    lengths = [float(text) for text in FLAGS.seconds]
  except ValueError:
    lengths = []
  if not lengths or sorted(set(lengths)) != lengths or not 2 <= lengths[0] <= lengths[-1] <= 3600:
    raise BadInput(
      f"--seconds={','.join(FLAGS.seconds)}: give rising numbers from 2 to 3600, as --seconds=10,60,120"
    )
  return lengths


def scenes(count):
  """Subjects that move, and stay in view; each colour and shape in turn."""
  colours, axes = tuple(shapes.COLOURS), tuple(shapes.AXES)
  return [
    shapes.Scene("bounces", ((colours[i % 6], shapes.SHAPES[(i + i // 6) % 3]),), (axes[i % 2],))
    for i in range(count)
  ]


# --- videos


def make(workdir, folder, subjects, length):
  """Videos of a length by launch.sample, in a process of its own -> {frames, peak_mb, seconds_a_second}."""
  folder.mkdir(parents=True, exist_ok=True)
  report = files.read_json_if_exists(folder / "cost.json")
  if report:
    return report
  requests = [
    {"id": f"{i:02d}", "prompt": shapes.caption(scene), "seconds": length, "seed": i, "fps": shapes.FPS}
    for i, scene in enumerate(subjects)
  ]
  requests.append({"id": "shots", "shots": shots(length), "seed": 0, "fps": shapes.FPS})
  for request in requests:
    request["size"] = [64, 64]
  path = folder / "requests.jsonl"
  path.write_text("".join(json.dumps(request) + "\n" for request in requests))
  say(f"{len(requests)} videos of {length:g} s")
  began = time.monotonic()
  peak = run(["launch.sample", f"--workdir={workdir}", f"--requests={path}", f"--out={folder}"])
  report = {
    "frames": round(length * shapes.FPS),
    "videos": len(requests),
    "peak_mb": round(peak / 2**20, 1),
    "seconds_a_second": round((time.monotonic() - began) / length / len(requests), 3),
  }
  files.write_json(folder / "cost.json", report)
  return report


def run(arguments):
  """A program in a process of its own -> the most memory that it had, in bytes. Stopped, where it was."""
  child = subprocess.Popen([sys.executable, "-m", *arguments], preexec_fn=children.end_with_parent)
  while True:
    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    if pid:
      break
    if program.stop_requested():
      child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
  code = child.returncode = os.waitstatus_to_exitcode(status)
  if code == program.STOPPED or program.stop_requested():
    raise Stopped
  if code:
    raise BadInput(f"{arguments[0]} ended with exit code {code}; see its lines above")
  return usage.ru_maxrss * 1024


def shots(length):
  """Prompts over time: an object goes to and fro, and up and down, a few seconds each."""
  count = max(2, int(length // SHOT))
  words = ("left", "up", "right", "down")
  return [{"seconds": length / count, "prompt": f"a red ball moves {words[i % 4]}"} for i in range(count)]


def extend_files(workdir, folder, subjects, window):
  """Videos of LINKS extensions, each of the file before it -> their folder."""
  folder.mkdir(parents=True, exist_ok=True)
  if all((folder / f"{i:02d}.mp4").exists() for i in range(len(subjects))):
    return folder
  pipe, made = Pipeline.open(workdir), window - 5
  base = {"size": [64, 64], "fps": shapes.FPS}
  with Bar("extending files", LINKS + 1) as bar:
    for link in range(LINKS + 1):
      requests = []
      for i, scene in enumerate(subjects):
        fields = base | {"id": f"{i:02d}-{link:02d}", "prompt": shapes.caption(scene)}
        fields |= {"seed": i + 1000 * link, "frames": window + made * link}
        if link:
          before = str(folder / f"{i:02d}-{link - 1:02d}.mp4")
          fields = {k: v for k, v in fields.items() if k != "size"} | {
            "task": "extend_forward",
            "video": before,
          }
        requests.append(fields)
      counts = sample.run(pipe, requests, folder, quiet=True)
      if counts["stopped"]:
        raise Stopped
      bar.advance()
  for i in range(len(subjects)):
    os.replace(folder / f"{i:02d}-{LINKS:02d}.mp4", folder / f"{i:02d}.mp4")
  return folder


# --- measures


def measured(folder, subjects):
  """Means over the videos of a folder -> {measure: [a value for each second]}."""
  values = [measure(video.load(folder / f"{i:02d}.mp4")[0], scene) for i, scene in enumerate(subjects)]
  return {name: np.nanmean([one[name] for one in values], 0).tolist() for name in MEASURES}


def measure(clip, scene):
  """{measure: [S]} of a clip, uint8 [T, H, W, 3]; NaN where there is no subject."""
  ((colour, shape),) = scene.objects
  rows = {name: [] for name in MEASURES}
  step = round(shapes.FPS)
  for first in range(0, len(clip) - step + 1, step):
    second = clip[first : first + step]
    found = judge.detect(second)
    mask = found.objects[0].mask_THW if found.objects else np.zeros(second.shape[:3], bool)
    inner = second[mask].astype(float)
    apart = np.linalg.norm(inner.mean(0) - shapes.COLOURS[colour]) if len(inner) else np.nan
    rows["colour"].append(apart)
    rows["size"].append(100 * mask.mean())
    right = bool(found.objects) and judge.shape_of(found.objects[0], found) == shape
    rows["shape"].append(100.0 * right)
    rows["background"].append(float(second[~mask].mean()))
  return {name: np.array(row) for name, row in rows.items()}


def drift(values):
  """|mean of the first 15 % - mean of the last 15 %|."""
  count = max(1, round(SHARE * len(values)))
  return abs(float(np.nanmean(values[:count]) - np.nanmean(values[-count:])))


def links(by_second, window):
  """{measure: {way: {links: |value after so many links - at the beginning|}}}; a link is so many frames."""
  table = {}
  for name in MEASURES:
    table[name] = {}
    for way, values in by_second.items():
      ends = {n: int((window + (window - 5) * n) / shapes.FPS) - 1 for n in (1, 2, 4, 8, 16)}
      series = values[name]
      first = float(np.nanmean(series[:2]))
      table[name][way] = {
        n: abs(float(np.nanmean(series[max(0, end - 1) : end + 1])) - first)
        for n, end in ends.items()
        if end < len(series)
      }
  return table


def judge_shots(path, length):
  """How many prompts over time are followed: {right, of}."""
  clip, parts = video.load(path)[0], shots(length)
  right, at = 0, 0
  for part in parts:
    count = round(part["seconds"] * shapes.FPS)
    own = clip[at : at + count]
    at += count
    answers = judge.judge(own, part["prompt"])
    right += answers["colour"] and answers["direction"]
  return {"right": int(right), "of": len(parts)}


# --- reports


def chart(report):
  """Colour by second, and memory by length, as one SVG."""
  series = [
    {"key": i, "name": way, "x": list(range(len(values["colour"]))), "y": values["colour"]}
    for i, (way, values) in enumerate(report["by_second"].items())
  ]
  curve = {"title": "the subject's colour, from the named one", "x": "second", "series": series}
  lengths = report["lengths"]
  memory = {"key": 2, "name": "MB", "y": [row["peak_mb"] for row in lengths.values()]}
  bars = {"title": "largest memory, MB", "x": "seconds of video", "labels": list(lengths), "series": [memory]}
  return charts.sheet(curve, bars)


def sheet(paths, columns=11):
  """Frames of each video, from its beginning to its end, a video a row -> uint8 [H, W, 3]."""
  rows = []
  for path in paths:
    if path.exists():
      clip = video.load(path)[0]
      picked = clip[np.linspace(0, len(clip) - 1, columns).round().astype(int)]
      rows.append(
        np.concatenate([np.pad(f, [(1, 1), (1, 1), (0, 0)], constant_values=255) for f in picked], 1)
      )
  return np.concatenate(rows)


def print_report(report):
  rows = [
    (f"{name} s", str(row["frames"]), f"{row['peak_mb']:.0f} MB", f"{row['seconds_a_second']:.2f} s")
    for name, row in report["lengths"].items()
  ]
  for line in tables.lines(("length", "frames", "largest memory", "work a second of video"), rows):
    say(line)
  rows = [(name, *(f"{report['drift'][way][name]:.1f}" for way in report["drift"])) for name in MEASURES]
  for line in tables.lines(("drift of", *report["drift"]), rows):
    say(line)
  rows = [
    (str(n), *(f"{report['links']['colour'][way].get(n, float('nan')):.1f}" for way in report["drift"]))
    for n in (1, 2, 4, 8, 16)
  ]
  for line in tables.lines(("links: drift of colour", *report["drift"]), rows):
    say(line)
  say(f"prompts over time: {report['shots']['right']} of {report['shots']['of']} followed")


if __name__ == "__main__":
  program.run(main, define_flags)
