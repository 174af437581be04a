"""How a plan packs: rows and steps counted, what stands in the way of fuller ones, clips by size. For launch.preflight and launch.packing."""

import dataclasses

import numpy as np

from data.plan import StepPlan
from launch.reports import encoded, page, rows, sizes

LOOK = 1 << 17          # clips drawn for the steps that are looked at, or a window where that is more
SELDOM = 0.02           # share of rows from which a cap is worth a word
LOOSE = 0.98            # fill below which rows that no cap stops are
NAMED = 10              # clips without a row that are named
DRAWN = 6               # rows in the picture
KINDS = ("image", "clip under 3 s", "clip of 3 to 8 s", "clip of 8 s and more")      # of the picture; edges in seconds:
EDGES = (3, 8)


@dataclasses.dataclass(frozen=True)
class Packing:
  """Some whole windows of a plan, from the first on, their steps in order: A of them, of R rows each.

  clips_AR, tokens_AR, text_AR, costs_AR: of each row, how many clips, tokens and text tokens, and the sum of n^2 over its clips.
  smallest, shortest: tokens of the smallest clip, text tokens of the shortest text.  epochs: of the index, that were drawn.
  step: the most varied of those that are no emptier than the mean, to be drawn.
  """
  clips_AR: np.ndarray
  tokens_AR: np.ndarray
  text_AR: np.ndarray
  costs_AR: np.ndarray
  smallest: int
  shortest: int
  epochs: float
  step: StepPlan

  @property
  def steps_an_epoch(self):
    """How many steps draw as many clips as there are in the index."""
    return len(self.clips_AR) / self.epochs


def look(plan, most=LOOK):
  """Plans whole windows until `most` clips are drawn, or as many as there are -> Packing."""
  steps = []
  for cursor, step in plan.steps():
    steps.append(step)
    if cursor.step == 0 and cursor.window * plan.window_clips >= min(most, len(plan.index)):
      break
  rows = [row for step in steps for row in step.rows]
  clips_AR = np.array([len(row) for row in rows]).reshape(len(steps), -1)
  tokens_AR, costs_AR = (np.array([getattr(step, name) for step in steps]) for name in ("tokens", "costs"))
  tokens, text, _ = plan.sizes(np.array([position for row in rows for position, _ in row]))
  text_AR = np.bincount(np.repeat(np.arange(len(rows)), clips_AR.ravel()), text, len(rows)).astype(np.int64).reshape(clips_AR.shape)
  of_step = np.split(tokens, np.cumsum(clips_AR.sum(1))[:-1])
  full = np.flatnonzero(tokens_AR.sum(1) >= tokens_AR.sum(1).mean())
  varied = max(full, key=lambda i: len(np.unique(of_step[i])))
  return Packing(clips_AR, tokens_AR, text_AR, costs_AR, int(tokens.min()), int(text.min()),
                 cursor.window * plan.window_clips / len(plan.index), steps[varied])


def dearest(loads_AR):
  """What it costs that a step takes as long as its dearest row -> (sum of the dearest / sum of the means, the same of the worst step)."""
  most, mean = loads_AR.max(1), loads_AR.mean(1)
  return most.sum() / mean.sum(), (most / mean).max()


def stopped_short(plan, packing):
  """Shares of the rows that have the tokens for another clip and take none: because of row_clips, because of row_text."""
  room = plan.shape.length - packing.tokens_AR >= packing.smallest
  clips = room & (packing.clips_AR == plan.shape.clips)
  text = room & (plan.shape.text - packing.text_AR < packing.shortest)
  return clips.mean(), text.mean()


def shares(plan):
  """Of each dataset of a plan: the share of all clips drawn that are its."""
  return np.array(plan.weights) / sum(plan.weights)


def by_class(plan, stride):
  """Clips that fit, by length and short side -> [(length, short side, clips, share of the clips drawn, share of the tokens drawn)].

  Of the whole index; classes that do not occur are left out.  stride: of the VAE.
  """
  sides, first = len(sizes.SHORT_SIDES), 0
  counts = np.zeros((len(sizes.LENGTHS) * sides, 3))
  for count, share in zip(plan.counts, shares(plan)):
    for start in range(first, first + count, sizes.PART):
      where = slice(start, min(start + sizes.PART, first + count))
      part, (tokens, _, fits) = plan.index[where], plan.sizes(where)
      size_N3 = sizes.pixels(part, stride)
      classes = (sizes.length_class(size_N3, part["fps"]) * sides + sizes.short_side_class(size_N3))[fits]
      clips, mine = (np.bincount(classes, weights, len(counts)) for weights in (None, tokens[fits]))
      counts += np.stack([clips, clips * share / count, mine * share / count], -1)
    first += count
  counts[:, 1:] /= counts[:, 1:].sum(0)
  return [(sizes.LENGTHS[i // sides], f"{sizes.SHORT_SIDES[i % sides]} px", int(counts[i, 0]), *counts[i, 1:].tolist())
          for i in np.flatnonzero(counts[:, 0])]


def advice(plan, packing):
  """What would make rows fuller, as sentences; none where they are full."""
  shape, found = plan.shape, []
  if plan.misfits:
    tokens, text, _ = plan.sizes(np.array([misfit.position for misfit in plan.misfits]))
    if tokens.max() > shape.length:
      found.append(f"--config.data.row_tokens={tokens.max()} or more: so many has the largest clip; or encode with a smaller --max_seconds")
    if text.max() > shape.text:
      found.append(f"--config.data.row_text={text.max()} or more: so many has the longest text")
  room = shape.length - packing.tokens_AR >= packing.smallest
  caps = (("row_clips", "clips", packing.clips_AR, shape.clips), ("row_text", "tokens of text", packing.text_AR, shape.text))
  for share, (name, what, held_AR, most) in zip(stopped_short(plan, packing), caps):
    if share > SELDOM:
      needed = int(np.ceil((held_AR * shape.length / np.maximum(packing.tokens_AR, 1))[room].max()))      # at the same tokens a clip
      found.append(f"--config.data.{name}={max(needed, most + 1)}: {100 * share:.1f} % of the rows have their {most} {what} before their tokens")
  if packing.tokens_AR.mean() < LOOSE * shape.length and not found:
    found.append(f"a larger --config.data.row_tokens: with {packing.clips_AR.mean():.1f} clips a row there is little choice of what stands together")
  epochs = plan.window_clips / len(plan.index)
  if epochs > 2:
    found.append(f"more clips: rows are chosen among {plan.window_clips} draws, which are {epochs:.1f} epochs of {len(plan.index)} clips, so that "
                 "a clip may stand several times in a step")
  return found


def picture(plan, packing, stride):
  """Some rows of a step, from the cheapest to the dearest -> SVG. stride (t, y, x): of the VAE."""
  step, length, fill = packing.step, plan.shape.length, packing.tokens_AR.mean() / plan.shape.length
  order = np.argsort(step.costs, kind="stable")
  chosen = order[np.unique(np.linspace(0, len(order) - 1, DRAWN).astype(int))]
  of = f"{len(chosen)} of the {len(order)} rows of one training step" if len(chosen) < len(order) else "The rows of one training step"
  return rows.packed_rows([[segment(plan, position, stride) for position, _ in step.rows[i]] for i in chosen],
                              [step.costs[i] / np.mean(step.costs) for i in chosen], length, KINDS,
                              f"Clips of every size share rows of {length:,} tokens, {percent(fill)} full",
                              f"{of}. A segment is a clip: frames × height × width in pixels.")


def segment(plan, position, stride):
  """A clip of the plan's index, for the picture."""
  where = np.array([position])
  row, (tokens, _, _) = plan.index[where], plan.sizes(where)
  (size,) = sizes.pixels(row, stride)
  kind = 0 if size[0] == 1 else 1 + int(np.searchsorted(EDGES, size[0] / row["fps"][0], side="right"))
  return rows.Segment(int(tokens[0]), tuple(size.tolist()), kind)


def percent(share):
  """As text, with a digit more where that tells something."""
  return f"{100 * share:.{2 if 0 < share < 0.01 or 0.99 < share < 1 else 1}f} %"


class View:
  """A plan, looked at, and told: as lines of text, as a page, as a picture.

  index: RecordIndex or Mixture, of which plan is a plan.
  """

  def __init__(self, config, index, plan):
    self.config, self.index, self.plan = config, index, plan
    self.stride = index.header["vae_stride"]
    self.packing = look(plan)
    self.classes = [(length, side, f"{clips:,}", percent(of_clips), percent(of_tokens))
                    for length, side, clips, of_clips, of_tokens in by_class(plan, self.stride)]
    self.advice = advice(plan, self.packing)
    self.misfits = [(index.describe(misfit.position), misfit.reason) for misfit in plan.misfits[:NAMED]]
    self.fill = self.packing.tokens_AR.mean() / plan.shape.length
    self.attention, self.linear = (dearest(loads_AR) for loads_AR in (self.packing.costs_AR, self.packing.tokens_AR))

  def facts(self):
    """-> [(name, what is to be said of it)]."""
    packing, plan, steps = self.packing, self.plan, self.config.steps
    epoch = packing.steps_an_epoch
    tokens = epoch * packing.tokens_AR.sum(1).mean()
    clips, text = stopped_short(plan, packing)
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
    for one, count, share in zip(getattr(self.index, "indexes", ()), plan.counts, shares(plan)):
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

  def write(self, out):
    """DIR/rows.svg and DIR/data.html."""
    svg, shape, packing = picture(self.plan, self.packing, self.stride), self.plan.shape, self.packing
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
        page.section("In numbers", "Planned as launch.train does, from the index alone.", encoded.table((), facts, len(facts))),
        page.section("What would help", "Settings that stand in the way of fuller rows.", f"<ul>{hints}</ul>") if hints else "",
        page.section("Fits in no row", "Clips that no row can hold: launch.train leaves them out.",
                     encoded.table(("clip", "why"), self.misfits, len(self.plan.misfits))) if self.misfits else "",
        page.section("Tokens by size", "Clips by length and by short side (about so many pixels), as they are drawn.",
                     encoded.table(names, self.classes, len(self.classes), numeric=range(1, 5))),
        page.section("The clips", "By class, from the index.", encoded.histogram_cards(cards)),
    ]))


def spread(values):
  """Mean, least and most, as text."""
  return f"{values.mean():.1f} ({values.min()} to {values.max()})"
