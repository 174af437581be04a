"""How the clips of a run pack into rows and steps: the plan of launch.train, made from the index alone."""

import pathlib

from launch.common import settings
from launch.common.progress import say
from launch.reports import packing


def check(config, index, model, out):
  """Prints how full the rows are, how similar the rows of a step are, and which settings limit them.

  out: a directory for data.html, rows.svg and misfits.txt; "": none.
  """
  plan = settings.plan_rows(config, index, model)
  say(
    f"planning rows of {plan.shape.length} tokens from the index of {len(index)} clips in {config.data.path}"
  )
  view = packing.View(config, index, plan)
  for line in view.lines():
    say(line)
  if out:
    view.write(pathlib.Path(out))
    settings.name_misfits(index, plan, out)
    say(f"pictures: {out}/data.html, {out}/rows.svg")
    if plan.misfits:
      say(f"all clips that fit in no row: {out}/{settings.MISFITS}")
