"""Checks a training run before it starts. So far it checks the data: how the clips pack into rows and steps.

  python -m launch.preflight --config=configs/t2v.py:tiny --config.data.path=RECORDS --data-only [--out=DIR]

The plan is that of launch.train, made from the index alone: no record is opened, nothing compiles. Prints how
full the rows are, how similar the rows of a step are, and which settings limit them. DIR/data.html shows the
same with pictures, DIR/rows.svg shows some rows of a step, and DIR/misfits.txt names the clips that fit in no
row.
"""

import pathlib
import shlex
import sys

from absl import flags
from etils import epath

from data import mixture
from launch.common import program, settings
from launch.common.progress import say
from launch.reports import packing
from sora_jax import workdir as workdirs
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS


def define_flags():
  flags.DEFINE_boolean("data_only", False, "check only the data")
  flags.DEFINE_alias("data-only", "data_only")
  flags.DEFINE_string("out", "", "directory for data.html, rows.svg and misfits.txt; empty: print only")
  program.define_config("configs/t2v.py:tiny")


def main():
  if not FLAGS.data_only:
    raise BadInput("only the data of a step can be checked so far, not the whole step; give --data-only")
  config = program.get_config()
  if not config.data.path:
    raise BadInput("no --config.data.path; give the directory that launch.encode wrote")
  workdirs.adopt(config)
  index = mixture.open_all(config.data.path)
  first = config.data.path.split(",")[0].strip()  # if there are several, all have its VAE and text encoder
  model = workdirs.make_model(config, epath.Path(first) / "text", None)
  settings.check_index(index, model, first)
  plan = settings.plan_rows(config, index, model)
  say(
    f"planning rows of {plan.shape.length} tokens from the index of {len(index)} clips in {config.data.path}"
  )
  view = packing.View(config, index, plan)
  for line in view.lines():
    say(line)
  if FLAGS.out:
    view.write(pathlib.Path(FLAGS.out))
    settings.name_misfits(index, plan, FLAGS.out)
    say(f"pictures: {FLAGS.out}/data.html, {FLAGS.out}/rows.svg")
    if plan.misfits:
      say(f"all clips that fit in no row: {FLAGS.out}/{settings.MISFITS}")
  config_flags = shlex.join(arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config"))
  say(f"Next: python -m launch.train {config_flags} --workdir=W")
  return program.OK


if __name__ == "__main__":
  program.run(main, define_flags)
