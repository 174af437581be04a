"""How well clips of native size pack into rows, and rows into steps: our plan beside the ways of others, on the reference mixture.

  python -m launch.packing [--clips=N] [--out=FILE.json] [--picture=FILE.svg]
  python -m launch.packing --loading

Two to three minutes on one core. What the columns say, how the others work and what is assumed of them: launch/packing_figures.py,
launch/packing_peers.py.
"""

import json
import os
import pathlib

from absl import flags

from launch import cli, packing_figures

CLIPS = flags.DEFINE_integer("clips", 1 << 20, "how many clips of the mixture make an epoch", lower_bound=1)
LOADING = flags.DEFINE_boolean("loading", False, "time the loading of records instead")
OUT = flags.DEFINE_string("out", "", "where the numbers go, as JSON")
PICTURE = flags.DEFINE_string("picture", "", "where a picture of some of our rows goes, as SVG")


def main():
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  found = packing_figures.loading() if LOADING.value else packing_figures.packing(CLIPS.value, PICTURE.value)
  if OUT.value:
    pathlib.Path(OUT.value).write_text(json.dumps(found, indent=1) + "\n")
    cli.say(f"numbers: {OUT.value}")
  return cli.OK


if __name__ == "__main__":
  cli.run(main)
