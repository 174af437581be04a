"""Clips with captions -> records of latents and text, at native size. Run again, it goes on where it was.

  python -m launch.encode --source=DIR --out=OUT [--workdir=W]            # a folder, tar shards, TFDS dataset
  python -m launch.encode --source=clips.parquet --out=OUT [--workdir=W]  # a manifest: .jsonl, .csv, .parquet
  python -m launch.encode --source=shapes:4000 --out=OUT --workdir=W

The VAE and the text encoder come from W (without --workdir: those of the small model that ships) and are
copied into OUT, which is then all that launch.train needs. Where W has no tokenizer, one is trained on the
captions. OUT/report.json says, file by file, what was taken, what was cropped, and what was skipped and why;
OUT/report.html shows it. Several processes share the files: launch/hosts.py.
"""

import dataclasses

from absl import flags

from data import bucket, curation
from launch.common import processes, program, progress
from launch.jobs import encode
from sora_jax import files, workdir as workdirs
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS


def define_flags():
  flags.DEFINE_string(
    "source",
    "",
    "folder of clips and captions, manifest (.jsonl .csv .parquet), tar shards, TFDS dataset, or "
    "NAME[:COUNT] of data/sources",
  )
  flags.DEFINE_string("out", "", "where the records go")
  flags.DEFINE_string("workdir", "", "where vae/ and text/ are; empty: the small ones that ship")
  flags.DEFINE_float("max_seconds", 5.0, "longer videos become pieces; 0: never", lower_bound=0)
  flags.DEFINE_float("min_seconds", 0.0, "shorter pieces of videos are dropped", lower_bound=0)
  flags.DEFINE_float("fps", 0.0, "frames a second of all clips; 0: each video's own", lower_bound=0)
  flags.DEFINE_float("max_fps", 0.0, "videos of more frames a second get so many; 0: no limit", lower_bound=0)
  flags.DEFINE_integer(
    "max_pixels", 0, "frames of more pixels are made smaller, in their shape; 0: never", lower_bound=0
  )
  flags.DEFINE_float(
    "scene_threshold",
    10.0,
    "score from which a frame begins a scene, as of FFmpeg's scdet; 0: no cuts",
    lower_bound=0,
  )
  flags.DEFINE_boolean("drop_dull", True, "drop pieces that are black or frozen all along")
  flags.DEFINE_integer(
    "captions_vocab", 1000, "entries of a tokenizer trained on the captions", lower_bound=300
  )
  flags.DEFINE_integer("limit", 0, "take so many files of the source, the first; 0: all", lower_bound=0)
  flags.DEFINE_string("split", "train", "part of a generated source")
  flags.DEFINE_integer("seed", 0, "seed of a generated source")


def main():
  if not FLAGS.source:
    raise BadInput("no --source; give a folder of clips, or a generated source such as shapes:4000")
  if not FLAGS.out:
    raise BadInput("no --out; give a directory for the records")
  if not processes.join():
    progress.mute()
  out, model = bucket.path_of(FLAGS.out), bucket.path_of(FLAGS.workdir or workdirs.shipped())
  # that of the VAE
  rules = (field.name for field in dataclasses.fields(curation.Rules) if field.name != "temporal_stride")
  options = {name: FLAGS[name].value for name in rules}
  options |= {"split": FLAGS.split, "seed": FLAGS.seed}
  if not encode.run(FLAGS.source, out, model, options, vocab=FLAGS.captions_vocab, limit=FLAGS.limit):
    return program.STOPPED
  progress.say(next_step(out, model))
  return program.OK


def next_step(out, model):
  config = files.read_json_if_exists(model / "config.json")
  imported = "dit" in config.get("model", {})
  page = f"configs/t2v.py:finetune --config.init={FLAGS.workdir}" if imported else "configs/t2v.py:tiny"
  return f"Next: python -m launch.train --config={page} --config.data.path={out} --workdir=W"


if __name__ == "__main__":
  program.run(main, define_flags)
