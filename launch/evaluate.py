"""Measures a work directory, a folder of videos, or both: a table, and the same as JSON. Done once, never done again.

  python -m launch.evaluate --workdir=W --out=FILE.json                 # the VAE; of a DiT, its loss and its videos
  python -m launch.evaluate --videos=DIR --out=FILE.json                # what launch.sample wrote
  python -m launch.evaluate --workdir=W --source=CLIPS --out=FILE.json  # on a folder of clips, not the embedded world

What is in FILE.json, each where it applies:

  vae              {psnr: dB, ssim, clips}: means over clips, of the embedded world those that no training sees
  reconstructions  [{caption, original, reconstruction, psnr, ssim}]: a few of them, as files beside FILE.json
  loss_by_sigma    {sigma: mean squared error of the velocity on the same clips, all at that noise level}
  scores           {question: {right, of, share, chance}}: prompts of the embedded world, judged from the decoded files
  videos           {id: {question: bool}}
  passed_over      {id: why}: videos that could not be judged
"""

import dataclasses
import pathlib
import zlib

import jax
import ml_collections
import numpy as np
from absl import flags

from data import clips, records
from data.sources import folder, shapes, shapes_judge
from launch import build, cli, encoding, sampling
from sora_jax import batch as batches, checkpoint, metrics, patches, train, video
from sora_jax.errors import BadInput
from sora_jax.models import vae

WORKDIR = flags.DEFINE_string("workdir", "", "work directory whose VAE, and DiT if it has one, are measured")
VIDEOS = flags.DEFINE_string("videos", "", "folder that launch.sample wrote; its videos are judged, none are made")
OUT = flags.DEFINE_string("out", "", "where the report goes, a .json file")
SOURCE = flags.DEFINE_string("source", "shapes", "clips to measure on: shapes (those held out), or a folder of clips")
CLIPS = flags.DEFINE_integer("clips", 64, "how many clips, the first", lower_bound=1)
PROMPTS = flags.DEFINE_integer("prompts", 64, "how many held-out prompts, where videos are to be made", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the held-out clips, and of the noise they are mixed with")

SIGMAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SHOWN = 6                       # reconstructions kept as files


def main():
  if not WORKDIR.value and not VIDEOS.value:
    raise BadInput("nothing to measure; give --workdir=W, or --videos=DIR, or both")
  if not OUT.value.endswith(".json"):
    raise BadInput(f"--out={OUT.value}: give the .json file that the report is to be written to")
  out, given = pathlib.Path(OUT.value), inputs()
  before = checkpoint.read_json(out) if out.exists() else {}
  if before.get("inputs") == given:
    cli.say(f"{out} holds these measurements already; nothing to do")
    print_report(before)
    return cli.OK
  report = {"format_version": checkpoint.FORMAT_VERSION, "inputs": given}
  cli.say(f"measuring {' and '.join(filter(None, (WORKDIR.value, VIDEOS.value)))}; the report goes to {out}")
  try:
    if WORKDIR.value:
      report |= measure_workdir(pathlib.Path(WORKDIR.value), out)
    if VIDEOS.value:
      report |= judge_folder(pathlib.Path(VIDEOS.value))
  except Stopped:
    cli.say("stopped on request; run the same command again")
    return cli.STOPPED
  checkpoint.write_json(out, report)
  print_report(report)
  cli.say(f"written to {out}")
  return cli.OK


class Stopped(Exception):
  """SIGTERM or Ctrl-C: nothing is half written."""


def check_stop():
  if cli.stop_requested():
    raise Stopped


def bar_or_stop(bar):
  """A `note` that moves the bar, and ends the program where that was asked for."""
  def note(done):
    check_stop()
    bar.advance(done)
  return note


def inputs():
  """What a report depends on: where it is the same, so is the report."""
  found = {"source": SOURCE.value, "clips": CLIPS.value, "prompts": PROMPTS.value, "seed": SEED.value}
  if WORKDIR.value:
    workdir = pathlib.Path(WORKDIR.value)
    if not (workdir / "vae" / "config.json").exists():
      raise BadInput(f"--workdir={workdir} holds no vae/config.json; name a work directory of launch.train, or one of "
                     "launch.train_vae that is done")
    found["workdir"] = checkpoint.identity(workdir)
  if VIDEOS.value:
    path = pathlib.Path(VIDEOS.value) / "manifest.jsonl"
    if not path.exists():
      raise BadInput(f"--videos={VIDEOS.value} holds no manifest.jsonl; name a folder that launch.sample wrote")
    found["videos"] = f"{zlib.crc32(path.read_bytes()):08x}"
  return found


# --- a work directory

def measure_workdir(workdir, out):
  """VAE and, where W holds a DiT, its loss; and its videos of held-out prompts, unless others are to be judged."""
  cfg, params = build.load_vae(workdir / "vae")
  raw = held_out_clips(cfg)
  with cli.Bar("encoding", len(raw)) as bar:
    latents = encoding.encode_clips(cfg, params, [clip.video_THWC for clip in raw], bar_or_stop(bar))
  report = measure_vae(cfg, params, raw, latents, out)
  config = checkpoint.read_json(workdir / "config.json") if (workdir / "config.json").exists() else {}
  if "sample" not in config:
    return report
  bundle = sampling.Bundle.open(workdir)
  report |= {"step": bundle.step, "loss_by_sigma": loss_by_sigma(bundle, raw, latents)}
  if SOURCE.value == "shapes" and not VIDEOS.value and "dit" not in config["model"]:      # an imported model does not know that world
    folder_of_step = workdir / "samples" / f"held-out-{bundle.step}"
    counts = sampling.run_job(bundle, shapes.held_out_requests(PROMPTS.value), folder_of_step)
    if counts["stopped"]:
      raise Stopped
    report |= judge_folder(folder_of_step)
  return report


def held_out_clips(cfg):
  """RawClips of --source, cut to whole strides."""
  if SOURCE.value == "shapes":
    source = shapes.Source(CLIPS.value, SEED.value, "held_out")
  else:
    source = folder.open_source(ml_collections.ConfigDict({"path": SOURCE.value, "max_seconds": 1.0, "fps": 0.0}))
  found = []
  for item in source.items():
    try:
      for clip in source.read(item):
        check_stop()
        clip = dataclasses.replace(clip, video_THWC=clips.crop(clip.video_THWC, cfg.stride))
        if min(clip.video_THWC.shape[1:3]) < metrics.WINDOW:
          raise clips.BadClip(f"smaller than {metrics.WINDOW} x {metrics.WINDOW} pixels, which SSIM needs")
        found.append(clip)
        if len(found) == CLIPS.value:
          return found
    except clips.BadClip as error:
      cli.say(f"{item.file} is passed over: {error}")
  if not found:
    raise BadInput(f"--source={SOURCE.value} holds no clip that can be read; give a folder of videos and images")
  return found


def measure_vae(cfg, params, raw, latents, out):
  """PSNR and SSIM of every clip against its reconstruction; a few of them become files in OUT's folder."""
  scores, kept = [], []
  shown = sorted(range(len(raw)), key=lambda i: len(raw[i].video_THWC) == 1)[:SHOWN]        # what moves comes first
  where = out.with_suffix("").with_name(out.stem + "-reconstructions")
  with cli.Bar("decoding", len(raw)) as bar:
    decoded = encoding.decode_clips(cfg, params, latents, bar_or_stop(bar))
  for i, (clip, again) in enumerate(zip(raw, decoded, strict=True)):
    a, b = (pixels / 255 for pixels in (clip.video_THWC, again))
    scores.append((metrics.psnr(a, b), metrics.ssim(a, b)))
    if i in shown:
      names = [write(where / f"{i}-{name}", pixels, clip.fps) for name, pixels in (("original", clip.video_THWC), ("reconstruction", again))]
      kept.append({"caption": clip.caption, "original": names[0], "reconstruction": names[1], "psnr": scores[-1][0], "ssim": scores[-1][1]})
  psnr, ssim = np.mean(np.minimum(scores, 100), axis=0).tolist()       # a clip that comes back exactly counts 100 dB
  return {"vae": {"psnr": psnr, "ssim": ssim, "clips": len(raw)}, "reconstructions": kept}


def write(path, video_THWC, fps):
  """Writes a clip as mp4, an image as png -> its path from the report's folder on."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if len(video_THWC) == 1:
    path = path.with_suffix(".png")
    video.write_png(path, video_THWC[0])
  else:
    path = path.with_suffix(".mp4")
    video.write_mp4(path, video_THWC, fps)
  return f"{path.parent.name}/{path.name}"


def loss_by_sigma(bundle, raw, latents):
  """{sigma: loss} over all tokens of the clips. A clip's noise depends on its uid alone, so models may be compared."""
  patch, packed = bundle.model.dit.patch, []
  for clip, mean in zip(raw, latents):
    mean, time_scale = patches.whole(mean, patch), bundle.base_fps / clip.fps if bundle.base_fps else 1.0
    size, tokens = mean.shape[:3], patches.patchify(vae.normalise(mean, bundle.vae_cfg), patch)
    coords = patches.coords(patches.grid(size, patch), time_scale)
    cond_LQ = None
    if bundle.model.dit.cond_channels:
      given = encoding.encode_image_video(bundle.vae_params, clip.video_THWC[:1] / np.float32(127.5) - 1, len(mean), bundle.vae_cfg)
      given = patches.whole(vae.normalise(given, bundle.vae_cfg), patch)
      cond_LQ = patches.patchify(batches.image_channels(given, bundle.model.dit.cond_channels), patch)
    packed.append(batches.Clip(tokens, coords, [bundle.tokenize(clip.caption)], size=size, fps=clip.fps,
                               uid=records.uid(clip.file, clip.start), cond_LQ=cond_LQ))
  rows, shape = share_rows(packed, bundle.row_tokens)
  measure = jax.jit(train.loss_at_sigma, static_argnames="model")
  key, losses = jax.random.key(SEED.value), {}
  with cli.Bar("loss by noise level", len(SIGMAS)) as bar:
    for sigma in SIGMAS:
      total = count = 0.0
      for some in (rows[i:i + bundle.rows] for i in range(0, len(rows), bundle.rows)):
        check_stop()
        batch = batches.pack([*some, *[[]] * (bundle.rows - len(some))], shape)
        part = measure(bundle.model.expert(bundle.params, sigma)[0], batch, key, np.float32(sigma), model=bundle.model)
        total, count = total + float(part[0]), count + float(part[1])
      losses[f"{sigma:g}"] = total / count
      bar.advance()
  return losses


def share_rows(packed, row_tokens):
  """Clips, largest first, each into the first row with room -> (rows, RowShape that holds them)."""
  length = max(row_tokens, *(len(clip.tokens_LP) for clip in packed))
  rows = []
  for clip in sorted(packed, key=lambda clip: -len(clip.tokens_LP)):
    fits = (row for row in rows if sum(len(other.tokens_LP) for other in [*row, clip]) <= length)
    row = next(fits, None)
    if row is None:
      rows.append(row := [])
    row.append(clip)
  text = max(sum(len(clip.texts[0]) for clip in row) for row in rows)
  return rows, batches.RowShape(length, max(map(len, rows)), text)


# --- a folder of videos

def judge_folder(directory):
  """Judges each video of a manifest whose prompt is a sentence of the embedded world."""
  results, passed_over = {}, {}
  lines = sampling.read_manifest(directory)
  with cli.Bar("judging", len(lines)) as bar:
    for name, line in lines.items():
      check_stop()
      prompt = line.get("prompt") or ""
      if shapes.parse(prompt) is None:
        passed_over[name] = f"not a sentence of the embedded world: {prompt[:80]!r}"
      elif line.get("status") != "ok":
        passed_over[name] = f"it was not made: {line.get('error')}"
      else:
        try:
          results[name] = shapes_judge.judge(video.load(directory / line["path"])[0], prompt)
        except (video.BadClip, OSError) as error:
          passed_over[name] = str(error)
      bar.advance()
  if passed_over:
    name, why = next(iter(passed_over.items()))
    cli.say(f"{len(passed_over)} of {len(lines)} videos could not be judged, such as {name}: {why}")
  return {"scores": shapes_judge.summary(results.values()), "videos": results, "passed_over": passed_over}


def print_report(report):
  """The table, for the terminal."""
  if "vae" in report:
    found = report["vae"]
    cli.say(f"VAE on {found['clips']} clips: PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}")
  if "loss_by_sigma" in report:
    cli.say("loss by sigma: " + "  ".join(f"{sigma} {loss:.4f}" for sigma, loss in report["loss_by_sigma"].items()))
  if report.get("scores"):
    cli.say(f"{'score':<12} {'right':>9} {'share':>8} {'chance':>8}")
    for name, score in report["scores"].items():
      tally = f"{score['right']}/{score['of']}"
      cli.say(f"{name:<12} {tally:>9} {100 * score['share']:>6.1f} % {100 * score['chance']:>6.1f} %")


if __name__ == "__main__":
  cli.run(main)
