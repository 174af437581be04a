"""Checks a run before it is paid for: compiles its program for a TPU pod, on this machine, without a TPU.

  python -m launch.preflight --config=configs/pod.py:xl-high-v5e --topology=v5e:16x16 [--out=DIR]
  python -m launch.preflight --config=... --topology=... --program=sample|text|encode|decode
  python -m launch.preflight --config=... --topology=... --search
  python -m launch.preflight --config=configs/t2v.py:tiny --config.data.path=RECORDS --data-only [--out=DIR]

The program is the very function that runs on the pod. Prints what a device needs of memory against what it
has, model and executed FLOPs, bytes of collectives, what limits the step, and about how long it takes. Where
it does not fit, the three settings that help most are compiled, too. --search compiles the sensible meshes
and remat policies and prints a table. --data-only packs the clips of the records, and compiles nothing.
DIR/preflight.txt, preflight.json and preflight.svg hold the same; DIR/data.html and rows.svg the packing.
"""

import pathlib
import shlex
import sys

from absl import flags
from etils import epath

from data import mixture
from launch.common import program, settings
from launch.common.progress import say
from launch.preflight import data, programs, report, search
from sora_jax import files, workdir as workdirs
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS
PROGRAMS = ("train", "sample", "text", "encode", "decode")
NO_DATA = "no --config.data.path; give the directory that launch.encode wrote"


def define_flags():
  flags.DEFINE_string(
    "topology", "", "slice to compile for: v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, ..."
  )
  flags.DEFINE_enum(
    "program", "train", PROGRAMS, "what runs there; text is UMT5-XXL, encode and decode are those of the VAE"
  )
  flags.DEFINE_string("vae", "wan2.1", "a key of sora_jax.models.vae.SIZES, for encode and decode")
  flags.DEFINE_list("size", ["720", "1280"], "height, width in pixels, for encode and decode")
  flags.DEFINE_integer("frames", 81, "of a video, for encode and decode", lower_bound=1)
  flags.DEFINE_boolean("search", False, "try the sensible meshes and remat policies")
  flags.DEFINE_boolean("data_only", False, "check only how the data packs")
  flags.DEFINE_alias("data-only", "data_only")
  flags.DEFINE_string("out", "", "directory for text, JSON and pictures; empty: print only")
  program.define_config("configs/t2v.py:tiny")


def main():
  config = program.get_config()
  if not FLAGS.data_only and not FLAGS.topology:
    raise BadInput("no --topology; name the slice, as --topology=v5p:4x4x4, or give --data-only")
  if FLAGS.data_only and not config.data.path:
    raise BadInput(NO_DATA)
  devices = None if FLAGS.data_only else programs.devices_of(FLAGS.topology)
  workdirs.adopt(config)
  index = mixture.open_all(config.data.path) if config.data.path else None
  first = config.data.path.split(",")[0].strip()  # if there are several, all have its VAE and text encoder
  text = epath.Path(first) / "text" if first else workdirs.shipped() / "text"
  if index is not None:
    model = workdirs.make_model(config, text, None)
    settings.check_index(index, model, first)
    data.check(config, index, model, FLAGS.out)
  fits = True
  if devices:
    fits = check_program(config, devices, index, text)
  config_flags = shlex.join(arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config"))
  say(
    f"Next: python -m launch.train {config_flags} --workdir=W" if fits else "Next: change what is named above"
  )
  return program.OK


def check_program(config, devices, index, text):
  """Compiles and reports -> whether it fits."""

  def make(config):
    return make_program(config, devices, index, text)

  if FLAGS.search:
    return search.table(config, make, FLAGS.topology, FLAGS.out)
  say(f"compiling {FLAGS.program} for {FLAGS.topology}: one to four minutes of CPU time")
  numbers, found = search.check(make(config), FLAGS.topology)
  lines = list(report.lines(numbers))
  for line in lines:
    say(line)
  if FLAGS.out:
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "preflight.txt").write_text("\n".join(lines) + "\n")
    files.write_json(out / "preflight.json", numbers)
    say(f"the same: {out}/preflight.txt, preflight.json")
    if numbers["memory"]["assigned"] is not None:
      (out / "preflight.svg").write_text(report.picture(numbers))
      say(f"what fills the memory: {out}/preflight.svg")
  if not found.fits and FLAGS.program == "train":
    search.suggest(config, make, FLAGS.topology, found)
  return found.fits


def make_program(config, devices, index, text):
  """The Program that the flags ask for."""
  if FLAGS.program in ("encode", "decode"):
    return programs.coding(FLAGS.program, FLAGS.vae, devices, frame_size(), FLAGS.frames)
  if FLAGS.program == "text":
    return programs.embedding(config, devices, "umt5-xxl")
  if FLAGS.program == "sample":
    layout = workdirs.sampling_layout(config, devices=devices)
    return programs.sampling(config, workdirs.make_model(config, text, layout), rows=config.sample.rows)
  model = workdirs.make_model(config, text, workdirs.make_layout(config, devices))
  if index is None:
    row = programs.full_row(config, model)
  else:
    row = programs.median_row(settings.plan_rows(config, index, model))
  return programs.training(config, model, model.layout, row)


def frame_size():
  """--size -> (height, width)."""
  if len(FLAGS.size) != 2 or not all(side.isdigit() and int(side) for side in FLAGS.size):
    raise BadInput(f"--size={','.join(FLAGS.size)}: height and width in pixels, as 720,1280")
  return tuple(int(side) for side in FLAGS.size)


if __name__ == "__main__":
  program.run(main, define_flags)
