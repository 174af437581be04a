"""How a plan packs: rows and steps counted, what stands in the way of fuller ones, clips by size. For launch.preflight; numpy only."""

import dataclasses

import numpy as np

from data.plan import StepPlan
from launch import sizes

LOOK = 1 << 17          # clips drawn for the steps that are looked at, or a window where that is more
SELDOM = 0.02           # share of rows from which a cap is worth a word
LOOSE = 0.98            # fill below which rows that no cap stops are


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
