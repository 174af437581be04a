"""How a plan packs: numbers of its rows and steps, settings that limit them, clips by size.

For launch.preflight and launch.packing.
"""

import dataclasses

import numpy as np

from data.plan import StepPlan
from launch.reports import encoded, page, rows, sizes, tables

LOOK = 1 << 17  # clips drawn for the steps that are counted; or a window, if that is more
SELDOM = 0.02  # a limit is mentioned if it stops more than this share of the rows
LOOSE = 0.98  # rows that no limit stops are called loose below this fill
NAMED = 10  # clips without a row that are named
DRAWN = 6  # rows in the picture
KINDS = ("image", "clip under 3 s", "clip of 3 to 8 s", "clip of 8 s and more")  # of the picture
EDGES = (3, 8)  # seconds, between the kinds of clips


@dataclasses.dataclass(frozen=True)
class Packing:
  """The first whole windows of a plan, as A steps in order, of R rows each.

  clips_AR, tokens_AR, text_AR: number of clips, tokens and text tokens of each row.
  costs_AR: sum of n^2 over the clips of each row.
  smallest: tokens of the smallest clip.  shortest: text tokens of the shortest text.
  epochs: how many epochs of the index were drawn.
  step: the step for the picture: of those that are at least as full as the mean, the one with the most sizes.
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
    """Number of steps that draw as many clips as there are in the index."""
    return len(self.clips_AR) / self.epochs


def look(plan, most=LOOK):
  """Plans whole windows until `most` clips are drawn, or as many as the index has -> Packing."""
  steps = []
  for cursor, step in plan.steps():
    steps.append(step)
    if cursor.step == 0 and cursor.window * plan.window_clips >= min(most, len(plan.index)):
      break
  rows = [row for step in steps for row in step.rows]
  clips_AR = np.array([len(row) for row in rows]).reshape(len(steps), -1)
  tokens_AR, costs_AR = (np.array([getattr(step, name) for step in steps]) for name in ("tokens", "costs"))
  tokens, text, _ = plan.sizes(np.array([position for row in rows for position, _ in row]))
  row_of_clip = np.repeat(np.arange(len(rows)), clips_AR.ravel())
  text_AR = np.bincount(row_of_clip, text, len(rows)).astype(np.int64).reshape(clips_AR.shape)
  tokens_of_step = np.split(tokens, np.cumsum(clips_AR.sum(1))[:-1])
  full = np.flatnonzero(tokens_AR.sum(1) >= tokens_AR.sum(1).mean())
  varied = max(full, key=lambda i: len(np.unique(tokens_of_step[i])))
  return Packing(
    clips_AR=clips_AR,
    tokens_AR=tokens_AR,
    text_AR=text_AR,
    costs_AR=costs_AR,
    smallest=int(tokens.min()),
    shortest=int(text.min()),
    epochs=cursor.window * plan.window_clips / len(plan.index),
    step=steps[varied],
  )


def max_over_mean(loads_AR):
  """What uneven rows cost, as a step takes as long as its most expensive row.

  -> (sum of the maxima of the steps / sum of their means, the largest ratio of a single step).
  """
  most, mean = loads_AR.max(1), loads_AR.mean(1)
  return most.sum() / mean.sum(), (most / mean).max()


def stopped_short(plan, packing):
  """Shares of the rows that have room for the tokens of another clip, but may take none.

  -> (share that row_clips stops, share that row_text stops).
  """
  room = plan.shape.length - packing.tokens_AR >= packing.smallest
  clips = room & (packing.clips_AR == plan.shape.clips)
  text = room & (plan.shape.text - packing.text_AR < packing.shortest)
  return clips.mean(), text.mean()


def shares(plan):
  """The share of all drawn clips that comes from each dataset of a plan."""
  return np.array(plan.weights) / sum(plan.weights)


def by_class(plan, stride):
  """Counts the clips of the whole index that fit in a row, by length and short side. stride: of the VAE.

  -> [(length, short side, clips, share of clips drawn, share of tokens drawn)], without empty classes.
  """
  sides, first = len(sizes.SHORT_SIDES), 0
  counts = np.zeros((len(sizes.LENGTHS) * sides, 3))
  for count, share in zip(plan.counts, shares(plan)):
    for start in range(first, first + count, sizes.PART):
      positions = slice(start, min(start + sizes.PART, first + count))
      part, (tokens, _, fits) = plan.index[positions], plan.sizes(positions)
      size_N3 = sizes.pixels(part, stride)
      classes = sizes.length_class(size_N3, part["fps"]) * sides + sizes.short_side_class(size_N3)
      class_clips = np.bincount(classes[fits], minlength=len(counts))
      class_tokens = np.bincount(classes[fits], tokens[fits], len(counts))
      counts += np.stack([class_clips, class_clips * share / count, class_tokens * share / count], -1)
    first += count
  counts[:, 1:] /= counts[:, 1:].sum(0)
  classes = []
  for i in np.flatnonzero(counts[:, 0]):
    length, side = sizes.LENGTHS[i // sides], f"{sizes.SHORT_SIDES[i % sides]} px"
    classes.append((length, side, int(counts[i, 0]), *counts[i, 1:].tolist()))
  return classes


def advice(plan, packing):
  """Settings that would make rows fuller, as sentences; empty if the rows are full."""
  shape, hints = plan.shape, []
  if plan.misfits:
    tokens, text, _ = plan.sizes(np.array([misfit.position for misfit in plan.misfits]))
    if tokens.max() > shape.length:
      hints.append(
        f"--config.data.row_tokens={tokens.max()} or more, which the largest clip needs; "
        "or encode with a smaller --max_seconds"
      )
    if text.max() > shape.text:
      hints.append(f"--config.data.row_text={text.max()} or more, which the longest text needs")
  clips_share, text_share = stopped_short(plan, packing)
  if clips_share > SELDOM:
    hints.append(
      raise_limit(packing, shape, "row_clips", "clips", packing.clips_AR, shape.clips, clips_share)
    )
  if text_share > SELDOM:
    hints.append(
      raise_limit(packing, shape, "row_text", "tokens of text", packing.text_AR, shape.text, text_share)
    )
  if packing.tokens_AR.mean() < LOOSE * shape.length and not hints:
    hints.append(
      f"a larger --config.data.row_tokens: with {packing.clips_AR.mean():.1f} clips a row there are few ways "
      "to combine clips"
    )
  epochs = plan.window_clips / len(plan.index)
  if epochs > 2:
    hints.append(
      f"more clips: rows are chosen among {plan.window_clips} draws, which are {epochs:.1f} epochs of "
      f"{len(plan.index)} clips, so a clip may occur several times in a step"
    )
  return hints


def raise_limit(packing, shape, setting, unit, held_AR, limit, share):
  """The hint to raise a limit of a row. held_AR: units in each row.  share: of the rows that are stopped."""
  room = shape.length - packing.tokens_AR >= packing.smallest
  in_full_row_AR = held_AR * shape.length / np.maximum(packing.tokens_AR, 1)  # with as many tokens a unit
  needed = int(np.ceil(in_full_row_AR[room].max()))
  return (
    f"--config.data.{setting}={max(needed, limit + 1)}: {100 * share:.1f} % of the rows reach their limit of "
    f"{limit} {unit} before their tokens"
  )


def picture(plan, packing, stride):
  """Some rows of a step, from the cheapest to the most expensive -> SVG. stride (t, y, x): of the VAE."""
  step, length, fill = packing.step, plan.shape.length, packing.tokens_AR.mean() / plan.shape.length
  order = np.argsort(step.costs, kind="stable")
  drawn = order[np.unique(np.linspace(0, len(order) - 1, DRAWN).astype(int))]
  which = "The rows of one training step"
  if len(drawn) < len(order):
    which = f"{len(drawn)} of the {len(order)} rows of one training step"
  return rows.packed_rows(
    [[segment(plan, position, stride) for position, _ in step.rows[i]] for i in drawn],
    [step.costs[i] / np.mean(step.costs) for i in drawn],
    length,
    KINDS,
    f"Clips of every size share rows of {length:,} tokens, {percent(fill)} full",
    f"{which}. A segment is a clip: frames × height × width in pixels.",
  )


def segment(plan, position, stride):
  """A clip of the plan's index, for the picture."""
  positions = np.array([position])
  row, (tokens, _, _) = plan.index[positions], plan.sizes(positions)
  (size,) = sizes.pixels(row, stride)
  kind = 0
  if size[0] > 1:
    kind = 1 + int(np.searchsorted(EDGES, size[0] / row["fps"][0], side="right"))
  return rows.Segment(int(tokens[0]), tuple(size.tolist()), kind)


def percent(share):
  """A share as text, with two decimals close to 0 or 1, else with one."""
  close = 0 < share < 0.01 or 0.99 < share < 1
  return f"{100 * share:.2f} %" if close else f"{100 * share:.1f} %"


class View:
  """The numbers of a plan, to be printed, or written as a page and a picture.

  index: the RecordIndex or Mixture that the plan is of.
  """

  CLASSES = ("seconds", "short side", "clips", "of clips", "of tokens")  # columns of `classes`

  def __init__(self, config, index, plan):
    self.config, self.index, self.plan = config, index, plan
    self.stride = index.header["vae_stride"]
    self.packing = look(plan)
    self.classes = [
      (length, side, f"{clips:,}", percent(of_clips), percent(of_tokens))
      for length, side, clips, of_clips, of_tokens in by_class(plan, self.stride)
    ]
    self.advice = advice(plan, self.packing)
    self.misfits = [(index.describe(misfit.position), misfit.reason) for misfit in plan.misfits[:NAMED]]
    self.fill = self.packing.tokens_AR.mean() / plan.shape.length
    self.attention, self.linear = max_over_mean(self.packing.costs_AR), max_over_mean(self.packing.tokens_AR)

  def facts(self):
    """-> [(name, text)], all numbers of the plan."""
    packing, plan, steps = self.packing, self.plan, self.config.steps
    epoch = packing.steps_an_epoch
    tokens = epoch * packing.tokens_AR.sum(1).mean()
    clips_share, text_share = stopped_short(plan, packing)
    sample = "; a sample" if packing.epochs < 1 else ""
    patch = " x ".join(map(str, plan.patch))
    return [
      ("clips", f"{len(self.index):,} in the index"),
      *self.datasets(),
      (
        "an epoch",
        f"{epoch:,.1f} steps of {plan.rows_per_step} rows x {plan.shape.length} tokens, "
        f"about {tokens:,.0f} tokens; config.steps = {steps} make {steps / epoch:.3g} epochs",
      ),
      (
        "looked at",
        f"{len(packing.clips_AR):,} steps with {packing.clips_AR.sum():,} clips: "
        f"{packing.epochs:.3g} epochs{sample}",
      ),
      ("fill", f"{percent(self.fill)} of the slots hold tokens; padding {percent(1 - self.fill)}"),
      (
        "balance",
        f"dearest row of a step / mean: attention (sum of n^2) {self.attention[0]:.3f}, "
        f"worst step {self.attention[1]:.3f}; linear {self.linear[0]:.3f}, worst {self.linear[1]:.3f}",
      ),
      (
        "clips a row",
        f"{mean_and_range(packing.clips_AR)}, at most {plan.shape.clips} (row_clips), "
        f"which stops {percent(clips_share)} of the rows short",
      ),
      (
        "text a row",
        f"{mean_and_range(packing.text_AR)} tokens, at most {plan.shape.text} (row_text), "
        f"which stops {percent(text_share)} of the rows short",
      ),
      ("fit in no row", f"{len(plan.misfits):,} clips"),
      ("trimmed", f"{plan.trimmed:,} clips lose latents at an edge that fill no patch of {patch}"),
    ]

  def datasets(self):
    """Of each of several datasets: the number of its clips, and how they are drawn."""
    plan = self.plan
    for index, count, share in zip(getattr(self.index, "indexes", ()), plan.counts, shares(plan)):
      steps = self.packing.steps_an_epoch * count / (share * len(plan.index))
      drawn = f"{percent(share)} of the clips drawn, each once in {steps:,.1f} steps"
      yield "", f"{count:,} in {index.directory}: {drawn}"

  def lines(self):
    """Yields the lines to print."""
    yield from indented(tables.lines((), self.facts(), left=(0, 1)))
    if self.misfits:
      share = f"{len(self.plan.misfits)} of {len(self.index)} clips"
      yield f"fit in no row: {share}; the first {len(self.misfits)}:"
    for name, reason in self.misfits:
      yield f"  {name}: {reason}"
    yield from indented(tables.lines(self.CLASSES, self.classes))
    for hint in self.advice:
      yield f"what would help: {hint}"

  def write(self, out):
    """Writes DIR/rows.svg and DIR/data.html."""
    svg = picture(self.plan, self.packing, self.stride)
    page.save(out / "rows.svg", svg)
    page.save(out / "data.html", page.document("How the data packs", self._header(), self._sections(svg)))

  def _header(self):
    shape = self.plan.shape
    limits = f"at most {shape.clips:,} clips and {shape.text:,} tokens of text"
    facts = (
      ("of all slots hold tokens", percent(self.fill)),
      ("attention, dearest row / mean", f"{self.attention[0]:.3f}"),
      ("linear, dearest row / mean", f"{self.linear[0]:.3f}"),
      ("clips a row", f"{self.packing.clips_AR.mean():.1f}"),
      ("clips fit in no row", f"{len(self.plan.misfits):,}"),
    )
    return page.header(
      {
        "title": "How the data packs",
        "command": "launch.preflight --data-only",
        "machine": self.config.data.path,
        "lede": f"{len(self.index):,} clips in rows of {shape.length:,} tokens, {limits}; "
        f"{self.plan.rows_per_step} rows a step.",
        "facts": [{"name": name, "value": value} for name, value in facts],
      }
    )

  def _sections(self, svg):
    facts = self.facts()
    drawing = f'<div class="scroll"><div style="min-width:720px">{svg}</div></div>'
    numbers = encoded.table((), facts, len(facts))
    sections = [
      page.section("Rows of a step", "As they will be trained on.", drawing),
      page.section("In numbers", "Planned as launch.train does, from the index alone.", numbers),
    ]
    if self.advice:
      hints = "".join(f"<li>{page.escape(hint)}</li>" for hint in self.advice)
      sections.append(
        page.section("What would help", "Settings that limit how full the rows are.", f"<ul>{hints}</ul>")
      )
    if self.misfits:
      misfits = encoded.table(("clip", "why"), self.misfits, len(self.plan.misfits))
      say = "Clips that no row can hold: launch.train leaves them out."
      sections.append(page.section("Fits in no row", say, misfits))
    classes = encoded.table(self.CLASSES, self.classes, len(self.classes), numeric=range(1, 5))
    say = "Clips by length and by short side (about so many pixels), as they are drawn."
    sections.append(page.section("Tokens by size", say, classes))
    clips_a_row = sizes.powers("Clips a row, in the rows looked at", self.packing.clips_AR.ravel())
    cards = [*sizes.histograms(self.plan.index, self.stride).values(), clips_a_row]
    sections.append(page.section("The clips", "By class, from the index.", encoded.histogram_cards(cards)))
    return sections


def indented(lines):
  return (f"  {line}" for line in lines)


def mean_and_range(values):
  """Mean, minimum and maximum, as text."""
  return f"{values.mean():.1f} ({values.min()} to {values.max()})"
