"""Quality of a folder of videos, whatever they show; beside references of the same names, if there are any.

temporal_flickering  (255 - mean |x_t - x_t+1|) / 255, in %; as VBench's (arXiv:2311.17982, supplement), which
                     asks it of prompts without motion
motion_smoothness    the same of each frame and what optical flow makes of its two neighbours
                     (optical_flow.py); VBench has a network interpolate: its numbers are other ones
psnr, ssim           of each frame and the reference's, mean over frames; identical frames count 100 dB
vmaf                 by an `ffmpeg` that has libvmaf, where there is one
frechet_video        Frechet distance of both folders in logits of an I3D of Kinetics (the user's file): FVD
frechet_vae          without one: in statistics of latents of our small VAE. It orders folders of the same
                     kind of clips; it is no FVD, and comparable with itself alone
"""

import collections
import pathlib
import re
import shutil
import subprocess

import jax
import numpy as np

from launch.common.progress import Bar, say
from launch.jobs import sample
from sora_jax import codec, frechet, metrics, optical_flow, video, workdir as workdirs
from sora_jax.errors import BadInput
from sora_jax.models import i3d, vae
from sora_jax.weights import i3d as i3d_weights

FRAMES = 16  # of each video, for the Frechet distance, as in Unterthiner et al.
EXACT = 100.0  # dB
FLOW_SIDE = 256  # pixels: longer short sides are scaled down for optical flow


class Unlike(Exception):
  """A video that cannot be set beside its reference."""


def find(directory):
  """{name: (path, category)} of the videos of a folder: those of its manifest that were made, or, where it
  has none, all files that end as videos do. BadInput where there is none.
  """
  directory = pathlib.Path(directory)
  lines = sample.read_manifest(directory)
  if lines:
    made = {name: line for name, line in lines.items() if line.get("status") == "ok"}
    found = {name: (directory / line["path"], line.get("category")) for name, line in made.items()}
  else:
    files = sorted(directory.glob("*")) if directory.is_dir() else []
    found = {path.stem: (path, None) for path in files if path.suffix.lower() in video.VIDEO_SUFFIXES}
  if not found:
    raise BadInput(f"{directory} holds no video; name a folder of videos, or one that launch.sample wrote")
  return found


def measure(directory, reference, i3d_file, check_stop):
  """-> {"quality": {measure: mean}, "by_category": {category: {measure: mean, "videos"}}, "quality_of":
  {name: {measure: value}}, "not_measured": {name: reason}}.

  reference: a folder of videos of the same names, or "". i3d_file: weights of an I3D, or "". check_stop: is
  called often, and raises to end it.
  """
  found, references = find(directory), find(reference) if reference else {}
  weights = i3d_weights.load(i3d_file) if i3d_file else None
  embed = features_of(weights)
  values, skipped, features = {}, {}, {"ours": [], "theirs": []}
  with Bar("measuring", len(found)) as bar:
    for name, (path, _) in found.items():
      check_stop()
      try:
        values[name] = of_video(path)
        if reference:
          if name not in references:
            raise Unlike(f"{reference} holds no video of this name")
          other = references[name][0]
          values[name] |= of_pair(path, other)
          features["ours"].append(embed(path))
          features["theirs"].append(embed(other))
      except (video.BadClip, Unlike, OSError) as error:
        values.pop(name, None)
        skipped[name] = str(error)
      bar.advance()
  if skipped:
    name, why = next(iter(skipped.items()))
    say(f"{len(skipped)} of {len(found)} videos could not be measured, such as {name}: {why}")
  report = {"quality": means(values.values()), "quality_of": values, "not_measured": skipped}
  if len(features["ours"]) > 1:
    key = "frechet_video" if weights else "frechet_vae"
    report["quality"][key] = frechet.distance(features["ours"], features["theirs"])
    width = features["ours"][0].size
    if len(values) < width:
      say(f"{key}: {len(values)} videos for {width} features; compare it with as many videos alone")
  groups = collections.defaultdict(list)
  for name, row in values.items():
    groups[found[name][1] or "all"].append(row)
  report["by_category"] = {key: means(rows) | {"videos": len(rows)} for key, rows in sorted(groups.items())}
  return report


def means(rows):
  """Mean of each measure over those that have it."""
  rows = list(rows)
  names = dict.fromkeys(name for row in rows for name in row)
  return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def of_video(path):
  """{measure: value} of one video, of which three frames are in memory at a time."""
  changes, misses, last = [], [], collections.deque(maxlen=3)
  for frame in video.read(path):
    last.append(frame.image_HWC.astype(np.float32))
    if len(last) > 1:
      changes.append(np.abs(last[-1] - last[-2]).mean())
    if len(last) == 3:
      before, now, after = (shrunk(image) for image in last)
      misses.append(np.abs(optical_flow.between(before, after) - now).mean())
  values = {}
  if changes:
    values["temporal_flickering"] = 100 * (1 - float(np.mean(changes)) / 255)
  if misses:
    values["motion_smoothness"] = 100 * (1 - float(np.mean(misses)) / 255)
  return values


def shrunk(image_HWC):
  """The image, every n-th mean of n x n pixels, so that its short side is at most 2 x FLOW_SIDE."""
  n = max(1, min(image_HWC.shape[:2]) // FLOW_SIDE)
  h, w = (side // n * n for side in image_HWC.shape[:2])
  return image_HWC[:h, :w].reshape(h // n, n, w // n, n, -1).mean((1, 3))


def of_pair(path, other):
  """{measure: value} of a video beside its reference. Unlike where their sizes or lengths differ."""
  psnr, ssim, readers = [], [], [video.read(path), video.read(other)]
  missing = object()
  while True:
    ours, theirs = (next(reader, missing) for reader in readers)
    if ours is missing or theirs is missing:
      break
    a, b = ours.image_HWC, theirs.image_HWC
    if a.shape != b.shape:
      raise Unlike(f"it is {a.shape[:2]}, and its reference {b.shape[:2]}")
    psnr.append(min(EXACT, metrics.psnr(a / 255, b / 255)))
    if min(a.shape[:2]) >= metrics.WINDOW:
      ssim.append(metrics.ssim(a / 255, b / 255))
  if ours is not theirs:
    raise Unlike(f"it has not as many frames as its reference ({len(psnr)} in common)")
  values = {"psnr": float(np.mean(psnr))}
  if ssim:
    values["ssim"] = float(np.mean(ssim))
  vmaf = of_ffmpeg(path, other) if has_vmaf() else None
  return values | ({"vmaf": vmaf} if vmaf is not None else {})


def has_vmaf():
  """Whether the `ffmpeg` of this machine has libvmaf."""
  program = shutil.which("ffmpeg")
  if not program:
    return False
  listed = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
  return " libvmaf " in listed.stdout


def of_ffmpeg(path, other):
  """VMAF of a video beside its reference, 0 to 100; None where ffmpeg gives none."""
  command = ["ffmpeg", "-nostdin", "-i", str(path), "-i", str(other), "-lavfi", "libvmaf", "-f", "null", "-"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  score = re.search(r"VMAF score: ([\d.]+)", done.stderr)
  return float(score[1]) if score else None


def features_of(weights):
  """-> function from the path of a video to its features, float64 [D]: an I3D's logits, or of our VAE."""
  if weights:
    run = jax.jit(i3d.features)
    return lambda path: np.asarray(run(weights, head(path, i3d.SIZE)[None] / 127.5 - 1)[0], np.float64)
  cfg, params = workdirs.load_vae(workdirs.shipped() / "vae")

  def statistics(path):
    clip = np.clip(head(path, 64) + 0.5, 0, 255).astype(np.uint8)
    (raw,) = codec.encode_clips(cfg, params, [np.concatenate([clip[:1], clip])])
    latents_THWC = np.asarray(vae.normalise(raw, cfg), np.float64)
    steps = np.abs(np.diff(latents_THWC, axis=0)).mean((0, 1, 2))
    return np.concatenate([latents_THWC.mean((0, 1, 2)), latents_THWC.std((0, 1, 2)), steps])

  return statistics


def head(path, side):
  """The first FRAMES of a video, scaled to side x side; the last one is repeated where there are fewer."""
  frames = []
  for frame in video.read(path):
    image = frame.image_HWC.astype(np.float32)
    frames.append(np.asarray(jax.image.resize(image, (side, side, 3), "linear", antialias=True)))
    if len(frames) == FRAMES:
      break
  return np.stack(frames + [frames[-1]] * (FRAMES - len(frames)))
