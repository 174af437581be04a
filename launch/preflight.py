"""What a training run will meet, before it begins. So far of its data: how the clips of one's records pack into rows and steps.

  python -m launch.preflight --config=configs/t2v.py:tiny --config.data.path=RECORDS --data-only [--out=DIR]

Plans as launch.train does, from the index alone: no record is opened, nothing compiles. Prints how full rows are, how alike the rows of a step,
what stands in the way of better ones; DIR/data.html shows the same with pictures, DIR/rows.svg some rows of a step; DIR/misfits.txt names the
clips that fit in none.
"""

import pathlib
import shlex
import sys

from absl import flags
from etils import epath

from data import mixture
from launch import build, cli, plan_report
from sora_jax.errors import BadInput

DATA_ONLY = flags.DEFINE_boolean("data_only", False, "look at the data alone")
flags.DEFINE_alias("data-only", "data_only")
OUT = flags.DEFINE_string("out", "", "where data.html, rows.svg and misfits.txt go; empty: text alone")


def main():
  if not DATA_ONLY.value:
    raise BadInput("a whole step cannot be looked at yet, only its data; give --data-only")
  config = cli.get_config()
  if not config.data.path:
    raise BadInput("no --config.data.path; give the directory that launch.encode wrote")
  build.adopt(config)
  index = mixture.open_all(config.data.path)
  first = config.data.path.split(",")[0].strip()         # where there are several, all are of its VAE and text encoder
  model = build.make_model(config, epath.Path(first) / "text", None)
  build.check_index(index, model, first)
  plan = build.plan_rows(config, index, model)
  cli.say(f"planning rows of {plan.shape.length} tokens from the index of {len(index)} clips in {config.data.path}")
  view = plan_report.View(config, index, plan)
  for line in view.lines():
    cli.say(line)
  if OUT.value:
    view.write(pathlib.Path(OUT.value))
    build.name_misfits(index, plan, OUT.value)
    cli.say(f"pictures: {OUT.value}/data.html, {OUT.value}/rows.svg")
    if plan.misfits:
      cli.say(f"all clips that fit in no row: {OUT.value}/{build.MISFITS}")
  given = shlex.join(arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config"))
  cli.say(f"Next: python -m launch.train {given} --workdir=W")
  return cli.OK


if __name__ == "__main__":
  cli.define_config("configs/t2v.py:tiny")
  cli.run(main)
