"""Measures how well clips of native size pack into rows, and rows into steps: our plan beside other methods.

  python -m launch.packing [--clips=N] [--out=FILE.json] [--picture=FILE.svg]
  python -m launch.packing --loading

All methods pack the reference mixture. Takes two to three minutes on one core. launch/packing/figures.py
defines the columns; launch/packing/peers.py describes the other methods and what is assumed of them.
"""

import os

from absl import flags

from launch.common import program
from launch.common.progress import say
from launch.packing import figures
from sora_jax import files

FLAGS = flags.FLAGS


def define_flags():
  flags.DEFINE_integer("clips", 1 << 20, "number of clips of the mixture in an epoch", lower_bound=1)
  flags.DEFINE_boolean("loading", False, "time the loading of records instead")
  flags.DEFINE_string("out", "", "file for the numbers, as JSON")
  flags.DEFINE_string("picture", "", "file for a picture of some of our rows, as SVG")


def main():
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  numbers = figures.loading() if FLAGS.loading else figures.packing(FLAGS.clips, FLAGS.picture)
  if FLAGS.out:
    files.write_json(FLAGS.out, numbers)
    say(f"numbers: {FLAGS.out}")
  return program.OK


if __name__ == "__main__":
  program.run(main, define_flags)
