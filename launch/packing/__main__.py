"""How well clips of native size pack into rows, and rows into steps: our plan beside the ways of others, on the reference mixture.

  python -m launch.packing [--clips=N] [--out=FILE.json] [--picture=FILE.svg]
  python -m launch.packing --loading

Two to three minutes on one core. What the columns say, how the others work and what is assumed of them: launch/packing/figures.py,
launch/packing/peers.py.
"""

import os

from absl import flags

from launch.common import program
from launch.common.progress import say
from launch.packing import figures
from sora_jax import files

FLAGS = flags.FLAGS


def define_flags():
  flags.DEFINE_integer("clips", 1 << 20, "how many clips of the mixture make an epoch", lower_bound=1)
  flags.DEFINE_boolean("loading", False, "time the loading of records instead")
  flags.DEFINE_string("out", "", "where the numbers go, as JSON")
  flags.DEFINE_string("picture", "", "where a picture of some of our rows goes, as SVG")


def main():
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  numbers = figures.loading() if FLAGS.loading else figures.packing(FLAGS.clips, FLAGS.picture)
  if FLAGS.out:
    files.write_json(FLAGS.out, numbers)
    say(f"numbers: {FLAGS.out}")
  return program.OK


if __name__ == "__main__":
  program.run(main, define_flags)
