"""Measures a work directory, a folder of videos, or both. Prints the results and writes them to a JSON file.

  python -m launch.evaluate --workdir=W --out=FILE.json                 # the VAE; a DiT's loss and videos
  python -m launch.evaluate --videos=DIR --out=FILE.json                # any folder of videos
  python -m launch.evaluate --videos=DIR --reference=DIR2 --out=FILE.json   # beside those of the same names
  python -m launch.evaluate --workdir=W --source=CLIPS --out=FILE.json  # on a folder of clips

If FILE.json already holds the same measurements, they are printed and nothing is computed. Its keys, where
they apply:

  vae              {psnr: dB, ssim, clips}: means over clips; clips of the embedded world are held out of
                   training
  reconstructions  [{caption, original, reconstruction, psnr, ssim}]: a few clips, as files beside FILE.json
  loss_by_sigma    {sigma: mean squared error of the velocity on the same clips, all at that noise level}
  scores           {question: {right, of, share, chance}}: prompts of the embedded world, judged from the
                   decoded files
  tasks            {task: {right, of, share, idle}}: of a model of the embedded world, with --tasks; idle is
                   the share that doing nothing gets (launch/jobs/task_scores.py); FILE-tasks.png shows them
  videos           {id: {question: bool}}
  quality          {measure: mean} of a folder of videos; by_category, quality_of (each video), not_measured
                   (launch/jobs/folder_metrics.py)
  cache            [{cache, saved, psnr}]: the curve of the cache of block outputs, with --cache_curve
  passed_over      {id: reason}: videos that were skipped, because they could not be judged
"""

import dataclasses
import pathlib
import zlib

import jax
import ml_collections
import numpy as np
from absl import flags

from data import clips, records
from data.sources import folder, shapes
from data.sources.shapes import judge
from launch.common import program
from launch.common.progress import Bar, say
from launch.jobs import cache_curve, folder_metrics, sample as sampling_job, task_scores
from launch.reports import tables
from sora_jax import (
  batch as batches,
  codec,
  files,
  metrics,
  parts,
  patches,
  sample,
  train,
  video,
  workdir as workdirs,
)
from sora_jax.errors import BadInput, Stopped, checked
from sora_jax.models import vae
from sora_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
SIGMAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
SHOWN = 6  # reconstructions kept as files


def define_flags():
  flags.DEFINE_string("workdir", "", "work directory whose VAE, and DiT if it has one, are measured")
  flags.DEFINE_string("videos", "", "folder of videos: they are measured, and none are made")
  flags.DEFINE_string("reference", "", "with --videos: folder of videos of the same names to set beside them")
  flags.DEFINE_string(
    "i3d", "", "with --reference: an I3D of Kinetics as safetensors, for FVD (weights/i3d.py)"
  )
  flags.DEFINE_string("out", "", "file for the report, .json")
  flags.DEFINE_string("source", "shapes", "clips to measure on: shapes (held-out ones), or a folder of clips")
  flags.DEFINE_integer("clips", 64, "number of clips; the first ones are taken", lower_bound=1)
  flags.DEFINE_integer("prompts", 64, "number of held-out prompts, if videos are made", lower_bound=1)
  flags.DEFINE_list(
    "kinds",
    [],
    "instead of a mixture, so many held-out prompts of each of these kinds of scenes: relation, ...",
  )
  flags.DEFINE_integer("tasks", 0, "cases of each task that are made and judged; 0: none", lower_bound=0)
  flags.DEFINE_integer("cache_curve", 0, "prompts that `cache` is measured with; 0: it is not", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "seed of the held-out clips, and of the noise that they are mixed with")


def main():
  if not FLAGS.workdir and not FLAGS.videos:
    raise BadInput("nothing to measure; give --workdir=W, or --videos=DIR, or both")
  if not FLAGS.out.endswith(".json"):
    raise BadInput(f"--out={FLAGS.out}: give the .json file that the report is to be written to")
  if (FLAGS.reference and not FLAGS.videos) or (FLAGS.i3d and not FLAGS.reference):
    raise BadInput(
      "--reference goes with --videos=DIR, and --i3d with --reference=DIR; give both, or neither"
    )
  out, current = pathlib.Path(FLAGS.out), inputs()
  previous = files.read_json_if_exists(out)
  if previous.get("inputs") == current:
    say(f"{out} holds these measurements already; nothing to do")
    print_report(previous)
    return program.OK
  report = {"format_version": parts.FORMAT_VERSION, "inputs": current}
  subjects = " and ".join(filter(None, (FLAGS.workdir, FLAGS.videos)))
  say(f"measuring {subjects}; the report goes to {out}")
  if FLAGS.workdir:
    report |= measure_workdir(pathlib.Path(FLAGS.workdir), out)
  if FLAGS.videos:
    report |= folder_metrics.measure(FLAGS.videos, FLAGS.reference, FLAGS.i3d, check_stop)
    report |= judge_folder(pathlib.Path(FLAGS.videos))
  files.write_json(out, report)
  print_report(report)
  say(f"written to {out}")
  return program.OK


def check_stop():
  """Raises Stopped if a stop was requested. No file is left half written."""
  if program.stop_requested():
    raise Stopped


def advance_unless_stopped(bar):
  """-> a callback that advances the bar, and ends the program if a stop was requested."""

  def callback(done):
    check_stop()
    bar.advance(done)

  return callback


def inputs():
  """Everything that a report depends on: with equal inputs, reports are equal."""
  values = {"source": FLAGS.source, "clips": FLAGS.clips, "prompts": FLAGS.prompts, "seed": FLAGS.seed}
  values |= {
    name: FLAGS[name].value for name in ("kinds", "tasks", "cache_curve", "i3d") if FLAGS[name].value
  }
  if FLAGS.workdir:
    held_out_requests()  # a kind that is not known is an error before anything is measured
    workdir = pathlib.Path(FLAGS.workdir)
    if not (workdir / "vae" / "config.json").exists():
      raise BadInput(
        f"--workdir={workdir} holds no vae/config.json; name a work directory of launch.train, "
        "or a finished one of launch.train_vae"
      )
    values["workdir"] = workdirs.identity(workdir)
  for name in ("videos", "reference"):
    if FLAGS[name].value:
      paths = [path for path, _ in folder_metrics.find(FLAGS[name].value).values()]
      found = [(str(path), path.stat().st_size) for path in paths if path.exists()]
      manifest = pathlib.Path(FLAGS[name].value) / "manifest.jsonl"
      known = manifest.read_bytes() if manifest.exists() else b""
      values[name] = f"{zlib.crc32(repr(found).encode() + known):08x}"
  return values


# --- a work directory


def measure_workdir(workdir, out):
  """Measures the VAE and, if W has a DiT, its loss and videos of held-out prompts -> part of the report.

  With --videos, or on other clips than those of the embedded world, no videos are made.
  """
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
  imported = "dit" in config["model"]  # an imported model was not trained on the embedded world
  if FLAGS.source == "shapes" and not FLAGS.videos and not imported:
    folder_of_step = workdir / "samples" / "-".join(["held-out", str(pipe.step), *FLAGS.kinds])
    counts = sampling_job.run(pipe, held_out_requests(), folder_of_step)
    if counts["stopped"]:
      raise Stopped
    report |= judge_folder(folder_of_step)
  if FLAGS.tasks:
    inputs_folder = out.with_suffix("").with_name(out.stem + "-tasks")
    picture = inputs_folder.with_suffix(".png")
    report["tasks"] = task_scores.measure(pipe, inputs_folder, FLAGS.tasks, picture)
  if FLAGS.cache_curve:
    requests = shapes.held_out_requests(FLAGS.cache_curve)
    report["cache"] = cache_curve.measure(
      pipe, [{k: v for k, v in one.items() if k != "id"} for one in requests]
    )
  return report


def held_out_clips(cfg):
  """RawClips of --source, cropped to whole strides."""
  if FLAGS.source == "shapes":
    source = shapes.Source(FLAGS.clips, FLAGS.seed, "held_out")
  else:
    options = {"path": FLAGS.source, "max_seconds": 1.0, "temporal_stride": cfg.stride[0]}
    source = folder.open_source(ml_collections.ConfigDict(options))
  taken = []
  for item in source.items():
    try:
      for clip in source.read(item):
        check_stop()
        clip = dataclasses.replace(clip, video_THWC=clips.crop(clip.video_THWC, cfg.stride))
        if min(clip.video_THWC.shape[1:3]) < metrics.WINDOW:
          raise clips.BadClip(f"smaller than {metrics.WINDOW} x {metrics.WINDOW} pixels, which SSIM needs")
        taken.append(clip)
        if len(taken) == FLAGS.clips:
          return taken
    except clips.BadClip as error:
      say(f"{item.file} is skipped: {error}")
  if not taken:
    raise BadInput(
      f"--source={FLAGS.source} holds no clip that can be read; give a folder of videos and images"
    )
  return taken


def measure_vae(cfg, params, raw, latents, out):
  """PSNR and SSIM of every clip against its reconstruction -> part of the report.

  A few reconstructions become files in OUT's folder.
  """
  scores, reconstructions = [], []
  shown = sorted(range(len(raw)), key=lambda i: len(raw[i].video_THWC) == 1)[:SHOWN]  # videos before images
  directory = out.with_suffix("").with_name(out.stem + "-reconstructions")
  with Bar("decoding", len(raw)) as bar:
    decoded = codec.decode_clips(cfg, params, latents, advance_unless_stopped(bar))
  for i, (clip, decoded_THWC) in enumerate(zip(raw, decoded, strict=True)):
    a, b = clip.video_THWC / 255, decoded_THWC / 255
    psnr, ssim = metrics.psnr(a, b), metrics.ssim(a, b)
    scores.append((psnr, ssim))
    if i in shown:
      reconstructions.append(
        {
          "caption": clip.caption,
          "original": write(directory / f"{i}-original", clip.video_THWC, clip.fps),
          "reconstruction": write(directory / f"{i}-reconstruction", decoded_THWC, clip.fps),
          "psnr": psnr,
          "ssim": ssim,
        }
      )
  psnr, ssim = np.mean(np.minimum(scores, 100), axis=0).tolist()  # an exact reconstruction counts 100 dB
  return {"vae": {"psnr": psnr, "ssim": ssim, "clips": len(raw)}, "reconstructions": reconstructions}


def write(path, video_THWC, fps):
  """Writes a video as mp4, an image as png -> its path relative to the report's folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if len(video_THWC) == 1:
    path = path.with_suffix(".png")
    video.write_png(path, video_THWC[0])
  else:
    path = path.with_suffix(".mp4")
    video.write_mp4(path, video_THWC, fps)
  return f"{path.parent.name}/{path.name}"


def loss_by_sigma(pipe, raw, latents):
  """{sigma: loss} over all tokens of the clips.

  The noise of a clip depends on its uid and the seed alone, so the losses of two models may be compared.
  """
  texts = pipe.embed([clip.caption for clip in raw])
  if pipe.embedder:
    pipe.embedder.free()
  packed = [packed_clip(pipe, *inputs) for inputs in zip(raw, latents, texts, strict=True)]
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


def packed_clip(pipe, clip, mean_THWC, text):
  """A RawClip, its raw latents, and its caption as the model takes it -> batch.Clip."""
  patch, cond_channels = pipe.model.dit.patch, pipe.model.dit.cond_channels
  mean_THWC = patches.whole(mean_THWC, patch)
  size, cond_LQ = mean_THWC.shape[:3], None
  if cond_channels:
    image = codec.to_float(clip.video_THWC[:1])
    given_THWC = patches.whole(
      codec.encode_image_video(pipe.vae_cfg, pipe.vae_params, image, len(mean_THWC)), patch
    )
    cond_THWC = batches.image_channels(vae.normalise(given_THWC, pipe.vae_cfg), cond_channels)
    cond_LQ = patches.patchify(cond_THWC, patch)
  return batches.Clip(
    tokens_LP=patches.patchify(vae.normalise(mean_THWC, pipe.vae_cfg), patch),
    coords_L3=patches.coords(patches.grid(size, patch), patches.time_scale(pipe.base_fps, clip.fps)),
    texts=[text],
    size=size,
    fps=clip.fps,
    uid=records.uid(clip.file, clip.start),
    cond_LQ=cond_LQ,
  )


# --- a folder of videos


def judge_folder(directory):
  """Judges the videos of a manifest whose prompts belong to the embedded world -> part of the report."""
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
  if skipped and verdicts:
    name, why = next(iter(skipped.items()))
    say(f"{len(skipped)} of {len(lines)} videos could not be judged, such as {name}: {why}")
  return {"scores": judge.summary(verdicts.values()), "videos": verdicts, "passed_over": skipped}


def held_out_requests():
  """The prompts that --prompts and --kinds ask for."""
  if not FLAGS.kinds:
    return shapes.held_out_requests(FLAGS.prompts)
  return checked(lambda: shapes.held_out_requests_of(FLAGS.kinds, FLAGS.prompts), "--kinds")


def print_report(report):
  """Prints the numbers of a report."""
  if "vae" in report:
    quality = report["vae"]
    say(f"VAE on {quality['clips']} clips: PSNR {quality['psnr']:.2f} dB, SSIM {quality['ssim']:.4f}")
  if "loss_by_sigma" in report:
    losses = "  ".join(f"{sigma} {loss:.4f}" for sigma, loss in report["loss_by_sigma"].items())
    say(f"loss by sigma: {losses}")
  if report.get("scores"):
    rows = []
    for name, score in report["scores"].items():
      right = f"{score['right']}/{score['of']}"
      rows.append((name, right, f"{100 * score['share']:.1f} %", f"{100 * score['chance']:.1f} %"))
    for line in tables.lines(("score", "right", "share", "chance"), rows):
      say(line)
  for category, values in report.get("by_category", {}).items():
    alone = len(report["by_category"]) == 1
    shown = report["quality"] if alone else {k: v for k, v in values.items() if k != "videos"}
    numbers = "  ".join(f"{name} {value:.2f}" for name, value in shown.items())
    say(f"{values['videos']} videos{'' if alone else f' of {category}'}: {numbers}")
  if "cache" in report:
    rows = [
      (f"{row['cache']:g}", f"{row['saved']:.2f} x", f"{row['psnr']:.1f} dB") for row in report["cache"]
    ]
    for line in tables.lines(("cache", "fewer block FLOPs", "beside none"), rows):
      say(line)
  if "tasks" in report:
    rows = [
      (name, f"{row['right']}/{row['of']}", f"{100 * row['share']:.1f} %", f"{100 * row['idle']:.1f} %")
      for name, row in report["tasks"].items()
    ]
    for line in tables.lines(("task", "right", "share", "doing nothing"), rows):
      say(line)


if __name__ == "__main__":
  program.run(main, define_flags)
