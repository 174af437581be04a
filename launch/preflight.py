"""What a training run will meet, before it begins. So far of its data: how the clips of one's records pack into rows and steps.

  python -m launch.preflight --config=configs/t2v.py:tiny --config.data.path=RECORDS --data-only [--out=DIR]

Plans as launch.train does, from the index alone: no record is opened, nothing compiles. Prints how full rows are, how alike the rows of a step,
what stands in the way of better ones; DIR/data.html shows the same with pictures, DIR/rows.svg some rows of a step.
"""

import pathlib
import shlex
import sys

import numpy as np
from absl import flags
from etils import epath

from data import mixture
from launch import build, cli, page, pictures, plan_report as packings, report, sizes, train
from sora_jax.errors import BadInput

DATA_ONLY = flags.DEFINE_boolean("data_only", False, "look at the data alone")
flags.DEFINE_alias("data-only", "data_only")
OUT = flags.DEFINE_string("out", "", "where data.html and rows.svg go; empty: text alone")

NAMED = 10              # clips without a row that are named
DRAWN = 6               # rows in the picture
KINDS = ("image", "clip under 3 s", "clip of 3 to 8 s", "clip of 8 s and more")      # of the picture; edges in seconds:
EDGES = (3, 8)


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
  train.check_index(index, model, first)
  plan = train.plan_rows(config, index, model)
  cli.say(f"planning rows of {plan.shape.length} tokens from the index of {len(index)} clips in {config.data.path}")
  view = View(config, index, plan)
  for line in view.lines():
    cli.say(line)
  if OUT.value:
    view.write(pathlib.Path(OUT.value))
    cli.say(f"pictures: {OUT.value}/data.html, {OUT.value}/rows.svg")
  given = shlex.join(arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config"))
  cli.say(f"Next: python -m launch.train {given} --workdir=W")
  return cli.OK


class View:
  """A plan, looked at, and told: as lines of text, as a page, as a picture.

  index: RecordIndex or Mixture, of which plan is a plan.
  """

  def __init__(self, config, index, plan):
    self.config, self.index, self.plan = config, index, plan
    self.stride = index.header["vae_stride"]
    self.packing = packings.look(plan)
    self.classes = [(length, side, f"{clips:,}", percent(of_clips), percent(of_tokens))
                    for length, side, clips, of_clips, of_tokens in packings.by_class(plan, self.stride)]
    self.advice = packings.advice(plan, self.packing)
    self.misfits = [(index.describe(misfit.position), misfit.reason) for misfit in plan.misfits[:NAMED]]
    self.fill = self.packing.tokens_AR.mean() / plan.shape.length
    self.attention, self.linear = (packings.dearest(loads_AR) for loads_AR in (self.packing.costs_AR, self.packing.tokens_AR))

  def facts(self):
    """-> [(name, what is to be said of it)]."""
    packing, plan, steps = self.packing, self.plan, self.config.steps
    epoch = packing.steps_an_epoch
    tokens = epoch * packing.tokens_AR.sum(1).mean()
    clips, text = packings.stopped_short(plan, packing)
    sample = "; a sample" if packing.epochs < 1 else ""
    return [
        ("clips", f"{len(self.index):,} in the index"), *self.datasets(),
        ("an epoch", f"{epoch:,.1f} steps of {plan.rows_per_step} rows x {plan.shape.length} tokens, about {tokens:,.0f} tokens; "
                     f"config.steps = {steps} make {steps / epoch:.3g} epochs"),
        ("looked at", f"{len(packing.clips_AR):,} steps with {packing.clips_AR.sum():,} clips: {packing.epochs:.3g} epochs{sample}"),
        ("fill", f"{percent(self.fill)} of the slots hold tokens; padding {percent(1 - self.fill)}"),
        ("balance", f"dearest row of a step / mean: attention (sum of n^2) {self.attention[0]:.3f}, worst step {self.attention[1]:.3f}; "
                    f"linear {self.linear[0]:.3f}, worst {self.linear[1]:.3f}"),
        ("clips a row", f"{spread(packing.clips_AR)}, at most {plan.shape.clips} (row_clips), which stops {percent(clips)} of the rows short"),
        ("text a row", f"{spread(packing.text_AR)} tokens, at most {plan.shape.text} (row_text), which stops {percent(text)} of the rows short"),
        ("fit in no row", f"{len(plan.misfits):,} clips"),
        ("trimmed", f"{plan.trimmed:,} clips lose latents at an edge that fill no patch of {' x '.join(map(str, plan.patch))}"),
    ]

  def datasets(self):
    """Of each of several datasets: its clips, and what is drawn of them."""
    plan = self.plan
    for one, count, share in zip(getattr(self.index, "indexes", ()), plan.counts, packings.shares(plan)):
      steps = self.packing.steps_an_epoch * count / (share * len(plan.index))
      yield "", f"{count:,} in {one.directory}: {percent(share)} of the clips drawn, each once in {steps:,.1f} steps"

  def lines(self):
    """For a terminal."""
    for name, value in self.facts():
      yield f"  {name:15} {value}"
    if self.misfits:
      yield f"fit in no row: {len(self.plan.misfits)} of {len(self.index)} clips; the first {len(self.misfits)}:"
    for name, reason in self.misfits:
      yield f"  {name}: {reason}"
    yield f"  {'seconds':12} {'short side':>10} {'clips':>12} {'of clips':>9} {'of tokens':>10}"
    for row in self.classes:
      yield "  {:12} {:>10} {:>12} {:>9} {:>10}".format(*row)
    for hint in self.advice:
      yield f"what would help: {hint}"

  def picture(self):
    """Some rows of a step, from the cheapest to the dearest -> SVG."""
    step, length = self.packing.step, self.plan.shape.length
    order = np.argsort(step.costs, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, DRAWN).astype(int))]
    of = f"{len(chosen)} of the {len(order)} rows of one training step" if len(chosen) < len(order) else "The rows of one training step"
    return pictures.packed_rows([[self.segment(position) for position, _ in step.rows[i]] for i in chosen],
                                [step.costs[i] / np.mean(step.costs) for i in chosen], length, KINDS,
                                f"Clips of every size share rows of {length:,} tokens, {percent(self.fill)} full",
                                f"{of}. A segment is a clip: frames × height × width in pixels.")

  def segment(self, position):
    """A clip of the index, for the picture."""
    where = np.array([position])
    row, (tokens, _, _) = self.plan.index[where], self.plan.sizes(where)
    (size,) = sizes.pixels(row, self.stride)
    kind = 0 if size[0] == 1 else 1 + int(np.searchsorted(EDGES, size[0] / row["fps"][0], side="right"))
    return pictures.Segment(int(tokens[0]), tuple(size.tolist()), kind)

  def write(self, out):
    """DIR/rows.svg and DIR/data.html."""
    svg, shape, packing = self.picture(), self.plan.shape, self.packing
    page.save(out / "rows.svg", svg)
    head = page.header({
        "title": "How the data packs", "command": "launch.preflight --data-only", "machine": self.config.data.path,
        "lede": f"{len(self.index):,} clips in rows of {shape.length:,} tokens, at most {shape.clips:,} clips and {shape.text:,} tokens of text; "
                f"{self.plan.rows_per_step} rows a step.",
        "facts": [{"name": name, "value": value} for name, value in (
            ("of all slots hold tokens", percent(self.fill)), ("attention, dearest row / mean", f"{self.attention[0]:.3f}"),
            ("linear, dearest row / mean", f"{self.linear[0]:.3f}"), ("clips a row", f"{packing.clips_AR.mean():.1f}"),
            ("clips fit in no row", f"{len(self.plan.misfits):,}"))]})
    hints = "".join(f"<li>{page.escape(hint)}</li>" for hint in self.advice)
    facts, names = self.facts(), ("seconds", "short side", "clips", "of clips", "of tokens")
    cards = [*sizes.histograms(self.plan.index, self.stride).values(), sizes.powers("Clips a row, in the rows looked at", packing.clips_AR.ravel())]
    page.save(out / "data.html", page.document("How the data packs", head, [
        page.section("Rows of a step", "As they will be trained on.", f'<div class="scroll"><div style="min-width:720px">{svg}</div></div>'),
        page.section("In numbers", "Planned as launch.train does, from the index alone.", report.table((), facts, len(facts))),
        page.section("What would help", "Settings that stand in the way of fuller rows.", f"<ul>{hints}</ul>") if hints else "",
        page.section("Fits in no row", "Clips that no row can hold: launch.train leaves them out.",
                     report.table(("clip", "why"), self.misfits, len(self.plan.misfits))) if self.misfits else "",
        page.section("Tokens by size", "Clips by length and by short side (about so many pixels), as they are drawn.",
                     report.table(names, self.classes, len(self.classes), numeric=range(1, 5))),
        page.section("The clips", "By class, from the index.", report.histogram_cards(cards)),
    ]))


def percent(share):
  """As text, with a digit more where that tells something."""
  return f"{100 * share:.{2 if 0 < share < 0.01 or 0.99 < share < 1 else 1}f} %"


def spread(values):
  """Mean, least and most, as text."""
  return f"{values.mean():.1f} ({values.min()} to {values.max()})"


if __name__ == "__main__":
  cli.define_config("configs/t2v.py:tiny")
  cli.run(main)
