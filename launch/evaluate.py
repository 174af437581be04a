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
  passed_over      {id: why}: videos that could not be judged (skipped)
"""

import dataclasses
import pathlib
import zlib

import jax
import ml_collections
import numpy as np
from absl import flags
from rich.table import Table

from data import clips, records
from data.sources import folder, shapes
from data.sources.shapes import judge
from launch.common import program, progress
from launch.common.progress import Bar, say
from launch.jobs import sample as sampling_job
from sora_jax import batch as batches, codec, files, metrics, parts, patches, sample, train, video, workdir as workdirs
from sora_jax.errors import BadInput, Stopped
from sora_jax.models import vae
from sora_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
SIGMAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SHOWN = 6  # reconstructions kept as files


def define_flags():
  flags.DEFINE_string("workdir", "", "work directory whose VAE, and DiT if it has one, are measured")
  flags.DEFINE_string("videos", "", "folder that launch.sample wrote; its videos are judged, none are made")
  flags.DEFINE_string("out", "", "where the report goes, a .json file")
  flags.DEFINE_string("source", "shapes", "clips to measure on: shapes (those held out), or a folder of clips")
  flags.DEFINE_integer("clips", 64, "how many clips, the first", lower_bound=1)
  flags.DEFINE_integer("prompts", 64, "how many held-out prompts, where videos are to be made", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "of the held-out clips, and of the noise they are mixed with")


def main():
  if not FLAGS.workdir and not FLAGS.videos:
    raise BadInput("nothing to measure; give --workdir=W, or --videos=DIR, or both")
  if not FLAGS.out.endswith(".json"):
    raise BadInput(f"--out={FLAGS.out}: give the .json file that the report is to be written to")
  out, given = pathlib.Path(FLAGS.out), inputs()
  before = files.read_json_if_exists(out)
  if before.get("inputs") == given:
    say(f"{out} holds these measurements already; nothing to do")
    print_report(before)
    return program.OK
  report = {"format_version": parts.FORMAT_VERSION, "inputs": given}
  say(f"measuring {' and '.join(filter(None, (FLAGS.workdir, FLAGS.videos)))}; the report goes to {out}")
  if FLAGS.workdir:
    report |= measure_workdir(pathlib.Path(FLAGS.workdir), out)
  if FLAGS.videos:
    report |= judge_folder(pathlib.Path(FLAGS.videos))
  files.write_json(out, report)
  print_report(report)
  say(f"written to {out}")
  return program.OK


def check_stop():
  """Raises Stopped where that was asked for: nothing is half written."""
  if program.stop_requested():
    raise Stopped


def advance_unless_stopped(bar):
  """A callback that moves the bar, and ends the program where that was asked for."""

  def callback(done):
    check_stop()
    bar.advance(done)

  return callback


def inputs():
  """What a report depends on: where it is the same, so is the report."""
  given = {"source": FLAGS.source, "clips": FLAGS.clips, "prompts": FLAGS.prompts, "seed": FLAGS.seed}
  if FLAGS.workdir:
    workdir = pathlib.Path(FLAGS.workdir)
    if not (workdir / "vae" / "config.json").exists():
      raise BadInput(f"--workdir={workdir} holds no vae/config.json; name a work directory of launch.train, or one of "
                     "launch.train_vae that is done")
    given["workdir"] = workdirs.identity(workdir)
  if FLAGS.videos:
    path = pathlib.Path(FLAGS.videos) / "manifest.jsonl"
    if not path.exists():
      raise BadInput(f"--videos={FLAGS.videos} holds no manifest.jsonl; name a folder that launch.sample wrote")
    given["videos"] = f"{zlib.crc32(path.read_bytes()):08x}"
  return given


# --- a work directory

def measure_workdir(workdir, out):
  """VAE and, where W holds a DiT, its loss; and its videos of held-out prompts, unless others are to be judged."""
  cfg, params = workdirs.load_vae(workdir / "vae")
  raw = held_out_clips(cfg)
  with Bar("encoding", len(raw)) as bar:
    latents = codec.encode_clips(cfg, params, [clip.video_THWC for clip in raw], advance_unless_stopped(bar))
  report = measure_vae(cfg, params, raw, latents, out)
  config = files.read_json_if_exists(workdir / "config.json")
  if "sample" not in config:
    return report
  pipe = Pipeline.open(workdir, say=say)
  report |= {"step": pipe.step, "loss_by_sigma": loss_by_sigma(pipe, raw, latents)}
  if FLAGS.source == "shapes" and not FLAGS.videos and "dit" not in config["model"]:      # an imported model does not know that world
    folder_of_step = workdir / "samples" / f"held-out-{pipe.step}"
    counts = sampling_job.run(pipe, shapes.held_out_requests(FLAGS.prompts), folder_of_step)
    if counts["stopped"]:
      raise Stopped
    report |= judge_folder(folder_of_step)
  return report


def held_out_clips(cfg):
  """RawClips of --source, cut to whole strides."""
  if FLAGS.source == "shapes":
    source = shapes.Source(FLAGS.clips, FLAGS.seed, "held_out")
  else:
    source = folder.open_source(ml_collections.ConfigDict({"path": FLAGS.source, "max_seconds": 1.0, "temporal_stride": cfg.stride[0]}))
  found = []
  for item in source.items():
    try:
      for clip in source.read(item):
        check_stop()
        clip = dataclasses.replace(clip, video_THWC=clips.crop(clip.video_THWC, cfg.stride))
        if min(clip.video_THWC.shape[1:3]) < metrics.WINDOW:
          raise clips.BadClip(f"smaller than {metrics.WINDOW} x {metrics.WINDOW} pixels, which SSIM needs")
        found.append(clip)
        if len(found) == FLAGS.clips:
          return found
    except clips.BadClip as error:
      say(f"{item.file} is skipped: {error}")
  if not found:
    raise BadInput(f"--source={FLAGS.source} holds no clip that can be read; give a folder of videos and images")
  return found


def measure_vae(cfg, params, raw, latents, out):
  """PSNR and SSIM of every clip against its reconstruction; a few of them become files in OUT's folder."""
  scores, kept = [], []
  shown = sorted(range(len(raw)), key=lambda i: len(raw[i].video_THWC) == 1)[:SHOWN]        # what moves comes first
  directory = out.with_suffix("").with_name(out.stem + "-reconstructions")
  with Bar("decoding", len(raw)) as bar:
    decoded = codec.decode_clips(cfg, params, latents, advance_unless_stopped(bar))
  for i, (clip, decoded_THWC) in enumerate(zip(raw, decoded, strict=True)):
    a, b = (pixels / 255 for pixels in (clip.video_THWC, decoded_THWC))
    scores.append((metrics.psnr(a, b), metrics.ssim(a, b)))
    if i in shown:
      names = [write(directory / f"{i}-{name}", pixels, clip.fps) for name, pixels in (("original", clip.video_THWC), ("reconstruction", decoded_THWC))]
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


def loss_by_sigma(pipe, raw, latents):
  """{sigma: loss} over all tokens of the clips. A clip's noise depends on its uid alone, so models may be compared."""
  packed = [packed_clip(pipe, clip, mean_THWC) for clip, mean_THWC in zip(raw, latents, strict=True)]
  tokens, text_tokens = [len(clip.tokens_LP) for clip in packed], [len(clip.texts[0]) for clip in packed]
  rows, shape = sample.share_rows(tokens, text_tokens, pipe.row_tokens)
  measure = jax.jit(train.loss_at_sigma, static_argnames="model")
  key, losses = jax.random.key(FLAGS.seed), {}
  with Bar("loss by noise level", len(SIGMAS)) as bar:
    for sigma in SIGMAS:
      weights, _ = pipe.model.expert(pipe.params, sigma)
      total = count = 0.0
      for start in range(0, len(rows), pipe.rows):
        check_stop()
        step = [[packed[i] for i in row] for row in rows[start : start + pipe.rows]]
        batch = batches.pack(step + [[]] * (pipe.rows - len(step)), shape)
        squares, counted = measure(weights, batch, key, np.float32(sigma), model=pipe.model)
        total, count = total + float(squares), count + float(counted)
      losses[f"{sigma:g}"] = total / count
      bar.advance()
  return losses


def packed_clip(pipe, clip, mean_THWC):
  """A RawClip and its raw latents -> batch.Clip."""
  patch, cond_channels = pipe.model.dit.patch, pipe.model.dit.cond_channels
  mean_THWC = patches.whole(mean_THWC, patch)
  size, cond_LQ = mean_THWC.shape[:3], None
  if cond_channels:
    image = codec.to_float(clip.video_THWC[:1])
    given_THWC = patches.whole(codec.encode_image_video(pipe.vae_cfg, pipe.vae_params, image, len(mean_THWC)), patch)
    cond_THWC = batches.image_channels(vae.normalise(given_THWC, pipe.vae_cfg), cond_channels)
    cond_LQ = patches.patchify(cond_THWC, patch)
  return batches.Clip(
    tokens_LP=patches.patchify(vae.normalise(mean_THWC, pipe.vae_cfg), patch),
    coords_L3=patches.coords(patches.grid(size, patch), patches.time_scale(pipe.base_fps, clip.fps)),
    texts=[pipe.embed([clip.caption])[0]],
    size=size,
    fps=clip.fps,
    uid=records.uid(clip.file, clip.start),
    cond_LQ=cond_LQ,
  )


# --- a folder of videos

def judge_folder(directory):
  """Judges each video of a manifest whose prompt is a sentence of the embedded world."""
  verdicts, skipped = {}, {}
  lines = sampling_job.read_manifest(directory)
  with Bar("judging", len(lines)) as bar:
    for name, line in lines.items():
      check_stop()
      prompt = line.get("prompt") or ""
      if shapes.parse(prompt) is None:
        skipped[name] = f"not a sentence of the embedded world: {prompt[:80]!r}"
      elif line.get("status") != "ok":
        skipped[name] = f"it was not made: {line.get('error')}"
      else:
        try:
          verdicts[name] = judge.judge(video.load(directory / line["path"])[0], prompt)
        except (video.BadClip, OSError) as error:
          skipped[name] = str(error)
      bar.advance()
  if skipped:
    name, why = next(iter(skipped.items()))
    say(f"{len(skipped)} of {len(lines)} videos could not be judged, such as {name}: {why}")
  return {"scores": judge.summary(verdicts.values()), "videos": verdicts, "passed_over": skipped}


def print_report(report):
  """The numbers, for the terminal."""
  if "vae" in report:
    quality = report["vae"]
    say(f"VAE on {quality['clips']} clips: PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f}")
  if "loss_by_sigma" in report:
    say("loss by sigma: " + "  ".join(f"{sigma} {loss:.4f}" for sigma, loss in report["loss_by_sigma"].items()))
  if report.get("scores"):
    table = Table(box=None)
    table.add_column("score")
    for name in ("right", "share", "chance"):
      table.add_column(name, justify="right")
    for name, score in report["scores"].items():
      shares = (f"{100 * score[of]:.1f} %" for of in ("share", "chance"))
      table.add_row(name, f"{score['right']}/{score['of']}", *shares)
    progress.console.print(table)


if __name__ == "__main__":
  program.run(main, define_flags)
