"""The plan: from the index of sizes alone, which clips share a row, and which rows a step. numpy only; opens no record.

A plan is a pure function of (index, seed, cursor). It knows `rows_per_step`, never hosts, devices or ranks: every host
computes the same plan and loads its own rows, so any number of hosts may go on from a cursor.

  draws    an endless list of clips: draw k is clip `shuffle(k mod n)` of epoch k // n. The shuffle, another one each
           epoch, is computed for one k alone (a Feistel network), so that 10^9 clips need no permutation in memory. A
           draw number thus names a clip and its epoch; every clip is drawn exactly once an epoch.
  datasets where several are mixed, draw k is draw j of dataset d, in integer arithmetic, for one k alone (`deal`): in
           any stretch of draws the shares are right to a clip or two, and every clip of a dataset is drawn exactly once
           an epoch of that dataset.
  windows  window w is the draws [w * window_clips, (w + 1) * window_clips) and those carried over from the one before.
           It runs over the end of an epoch, and over many epochs of a small dataset: rows are full whatever its size.
  rows     of like content, under three budgets: tokens, clips, text tokens (data/rows.py).
  steps    rows of like attention cost (sum of n^2) stand in one step, so that ranks finish together; the order of the
           steps is shuffled. The rows that make no whole step are the emptiest: their clips are carried over.

Sources: Patch n' Pack, arXiv:2307.06304; cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite
domains".
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

from data.rows import fill_rows
from sora_jax.errors import BadInput

FORMAT_VERSION = 1           # of the cursor; a change here or in data/rows.py that makes another plan counts it up
ORDER, STEPS = 1, 2          # salts: what a hash is for
CHUNK = 1 << 20              # entries of an index that are looked at at a time


def mix64(*words):
  """Hash of integers (or of integer arrays, elementwise) to uint64 [N]; splitmix64's finaliser after each word."""
  h = np.zeros((1,), np.uint64)
  for word in words:
    if not isinstance(word, np.ndarray):
      word = np.asarray(int(word) & 0xFFFFFFFFFFFFFFFF, np.uint64)
    h = (h + np.uint64(0x9E3779B97F4A7C15)) ^ word.astype(np.uint64)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    h = h ^ (h >> np.uint64(31))
  return h


def shuffle(rank, n, *key, rounds=6):
  """Places `rank` (int array, each in [0, n)) in a permutation of range(n) chosen by the `key` words (ints or arrays).

  A Feistel network over a square of side ceil(sqrt(n)), walked again while it leads out of [0, n).
  """
  side = np.uint64(max(2, int(np.ceil(np.sqrt(n)))))
  out = np.array(rank, np.uint64)
  key, todo = np.broadcast_to(mix64(*key), out.shape), np.arange(len(out))
  while len(todo):
    left, right, k = out[todo] // side, out[todo] % side, key[todo]
    for r in range(rounds):
      left = (left + mix64(k, right, 2 * r)) % side
      right = (right + mix64(k, left, 2 * r + 1)) % side
    out[todo] = left * side + right
    todo = todo[out[todo] >= n]
  return out.astype(np.int64)


def deal(draws, weights):
  """Draw numbers [N], dealt to datasets in proportion to positive ints -> (dataset [N], which draw of that dataset [N]).

  A tree of two-way splits: of the first k draws round(k a / (a + b)) go to the left side. So shares are right to half a
  clip at each fork, from any draw to any other; after sum(weights) draws, exactly.
  """
  which, own = np.zeros(len(draws), np.int64), np.array(draws, np.int64)

  def split(here, first, weights):
    if len(weights) == 1:
      which[here] = first
      return
    sums = list(itertools.accumulate(weights))
    cut = min(range(1, len(weights)), key=lambda i: abs(2 * sums[i - 1] - sums[-1]))
    part, total = sums[cut - 1], sums[-1]
    left = lambda k: k // total * part + (k % total * part + total // 2) // total  # noqa: E731
    before = left(own[here])
    goes = left(own[here] + 1) > before
    own[here] = np.where(goes, before, own[here] - before)
    split(here[goes], first, weights[:cut])
    split(here[~goes], first + cut, weights[cut:])

  split(np.arange(len(draws)), 0, list(weights))
  return which, own


def whole_weights(sizes, weights=None):
  """Datasets' sizes, and weights or None -> ints to deal by, of a sum below 2^31; in proportion to sizes without weights.

  BadInput unless there is one for each dataset, finite and above zero.
  """
  if weights is None:
    weights = sizes
    if sum(sizes) < 1 << 31:
      return list(sizes)           # exact: an epoch of all is an epoch of each
  if len(weights) != len(sizes):
    raise BadInput(f"data weights: {len(weights)} of them for {len(sizes)} datasets; give one for each, or none at all")
  for weight in weights:
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
      raise BadInput(f"data weights: {weight}; a finite number above 0; leave out a dataset that is not to be drawn from")
  return [max(1, round(weight / sum(weights) * (1 << 30))) for weight in weights]


class Joined:
  """Several indexes of sizes as one: entry i is counted through all of them. Nothing is copied but the entries asked for.

  sources: for each index, an array that renumbers its sources; as they are, if not given.
  """

  def __init__(self, parts, sources=None):
    self.parts, self.sources = tuple(parts), sources
    self.starts = np.cumsum([0, *map(len, self.parts)])

  def __len__(self):
    return int(self.starts[-1])

  def locate(self, places):
    """Int array (or int) of entries -> (which index, entry of that index)."""
    which = np.searchsorted(self.starts, places, side="right") - 1
    return which, places - self.starts[which]

  def __getitem__(self, places):
    """Entries at an int, an int array or a slice -> structured array; the name of a field -> all of it, copied."""
    if isinstance(places, str):
      return self[:][places]
    which, own = self.locate(np.arange(*places.indices(len(self))) if isinstance(places, slice) else np.asarray(places))
    rows = np.empty(which.shape, self.parts[0].dtype)
    for number, part in enumerate(self.parts):
      mine = which == number
      rows[mine] = part[own[mine]]
      if self.sources is not None:
        rows["source"][mine] = self.sources[number][rows["source"][mine]]
    return rows[()]


@dataclasses.dataclass(frozen=True)
class Cursor:
  """Where a run stands in its plan: the step to come next. Stored in the checkpoint, beside the step."""
  epoch: int = 0                     # of the window's first draw; for people, the plan does not read it
  window: int = 0
  step: int = 0                      # steps of this window already done
  carried: tuple[int, ...] = ()      # draws that came over from the window before
  plan: str = ""                     # name of the plan it belongs to; empty at the start of any

  def to_json(self):
    """A dict of plain ints, strings and lists."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self), "carried": list(self.carried)}

  @classmethod
  def from_json(cls, fields):
    """The inverse of `to_json`. Raises BadInput for a cursor of another version."""
    fields = dict(fields)
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
      raise BadInput(f"data cursor: format_version {version}; {FORMAT_VERSION} is read; use the code that wrote it")
    return cls(**fields | {"carried": tuple(fields["carried"])})


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """One step. rows: the clips of each as (index position, epoch); tokens, costs: sums of n and of n^2 of each row."""
  rows: tuple[tuple[tuple[int, int], ...], ...]
  tokens: tuple[int, ...]
  costs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Misfit:
  """A clip that no row can hold."""
  position: int
  tokens: int
  reason: str


class Plan:
  """Steps of rows of clips, from an index of sizes, or from several that are mixed.

  index: structured array (may be memory-mapped) with fields uid, t, h, w (latent size) and text_tokens; several as a `Joined`.
  weights: shares of the draws of each of several, above 0; None: in proportion to their sizes.
  shape: RowShape(length, clips, text): what a row holds at most. patch: (pt, ph, pw) of the model; latents at the lower and the
  right edge that fill no patch are left out.
  null_text_tokens: length of the null text, which may stand in for any caption (caption dropout).
  text_pad: a prompt of fewer tokens has a zero after it, which stands for its padding up to so many (Wan: 512); None: it has not.
  window_clips: draws of a window; 256 a row of a step if not given.
  Raises BadInput if an index is empty, or for weights that are none.
  """

  def __init__(self, index, *, rows_per_step, shape, patch, seed, weights=None, null_text_tokens=1, text_pad=None,
               window_clips=None):
    self.counts = [len(part) for part in index.parts] if isinstance(index, Joined) else [len(index)]
    if 0 in self.counts:
      raise BadInput("data index: it holds no clips; at least one; encode some (python -m launch.encode)")
    if rows_per_step < 1:
      raise BadInput(f"rows_per_step: {rows_per_step}; at least 1")
    self.index, self.rows_per_step, self.shape, self.patch = index, rows_per_step, shape, tuple(patch)
    self.seed, self.null_text_tokens, self.text_pad = seed, null_text_tokens, text_pad
    self.weights = whole_weights(self.counts, weights)
    self.window_clips = window_clips or 256 * rows_per_step
    some = np.linspace(0, len(index) - 1, num=min(len(index), 4096)).astype(np.int64)
    clips = index[some]
    sample = np.bitwise_xor.reduce(mix64(some, *(clips[field] for field in ("uid", "t", "h", "w", "text_tokens"))))
    mixed = (*self.counts, *self.weights) if len(self.weights) > 1 else ()
    (name,) = mix64(sample, len(index), seed, rows_per_step, shape.length, shape.clips, shape.text, *self.patch,
                    null_text_tokens, text_pad or 0, self.window_clips, *mixed)
    self.name = f"{int(name):016x}"          # cursors carry it: they mean nothing in another plan

  def sizes(self, positions):
    """Positions in the index (array or slice) -> tokens, text tokens (int64), fits (bool): a row can hold the clip."""
    tokens, text, whole = self._measure(positions)
    return tokens, text, whole & (tokens <= self.shape.length) & (text <= self.shape.text)

  def _measure(self, positions):
    clips = self.index[positions]
    size_N3 = np.stack([clips[name].astype(np.int64) for name in ("t", "h", "w")], axis=-1)
    whole = (size_N3 >= self.patch).all(axis=-1)
    text = np.maximum(clips["text_tokens"].astype(np.int64), self.null_text_tokens)
    text += text < (self.text_pad or 0)
    return (size_N3 // self.patch).prod(axis=-1), text, whole

  @functools.cached_property
  def misfits(self):
    """What no row can hold, as a list of `Misfit` in the order of the index. Reads the index through, once."""
    found = []
    for start in range(0, len(self.index), CHUNK):
      _, _, fits = self.sizes(slice(start, start + CHUNK))
      found += [self._misfit(start + int(i)) for i in np.flatnonzero(~fits)]
    return found

  @functools.cached_property
  def trimmed(self):
    """How many clips lose latents at an edge, because these fill no patch. Reads the index through, once."""
    count = 0
    for start in range(0, len(self.index), CHUNK):
      clips = self.index[start:start + CHUNK]
      count += int(np.any([clips[name] % p != 0 for name, p in zip("thw", self.patch, strict=True)], axis=0).sum())
    return count

  def _misfit(self, position):
    (tokens,), (text,), (whole,) = (a.tolist() for a in self._measure(np.array([position])))
    if not whole:
      size = tuple(int(self.index[position][name]) for name in "thw")
      return Misfit(position, tokens, f"latent size {size} is less than one patch {self.patch}")
    if tokens > self.shape.length:
      return Misfit(position, tokens, f"{tokens} tokens, a row holds {self.shape.length}")
    return Misfit(position, tokens, f"{text} text tokens, a row holds {self.shape.text}")

  def clips(self, draws):
    """Draw numbers [N] -> (positions [N], epochs [N] of the datasets that they are of)."""
    which, own = deal(draws, self.weights)
    positions, epochs, first = np.empty_like(own), np.empty_like(own), 0
    for number, count in enumerate(self.counts):
      mine = which == number
      epochs[mine], rank = np.divmod(own[mine], count)
      key = (self.seed, ORDER, epochs[mine]) + ((number,) if number else ())
      positions[mine] = first + shuffle(rank, count, *key)
      first += count
    return positions, epochs

  def window(self, number, carried=(), end=None):
    """Steps of one window -> (list of StepPlan, draws carried over).

    end: the first draw that is not to come. The window that reaches it carries nothing over: what makes no whole step
    is a last step, with empty rows.
    """
    start, stop = number * self.window_clips, (number + 1) * self.window_clips
    last = end is not None and stop >= end
    draws = np.concatenate([np.asarray(carried, np.int64), np.arange(start, end if last else stop, dtype=np.int64)])
    positions, epochs = self.clips(draws)
    tokens, text, fits = self.sizes(positions)
    draws, positions, epochs, tokens, text = (a[fits] for a in (draws, positions, epochs, tokens, text))
    rows = fill_rows(tokens, text, self.shape, spare=self.rows_per_step // 2)
    loads = np.array([tokens[row].sum() for row in rows], np.int64)
    costs = np.array([(tokens[row] ** 2).sum() for row in rows], np.int64)

    # The emptiest rows stay behind, yet rather not those with a clip that has waited already: none waits for ever.
    waited = np.array([(draws[row] < start).any() for row in rows], bool)
    behind = np.lexsort((loads, waited))[:len(rows) % self.rows_per_step]
    order = np.argsort(costs, kind="stable")
    groups = order[~np.isin(order, behind)].reshape(-1, self.rows_per_step)
    groups = list(groups[np.argsort(mix64(self.seed, STEPS, number, np.arange(len(groups))), kind="stable")])
    left = tuple(sorted(draws[i].item() for r in behind for i in rows[r]))
    if last and len(behind):
      groups, left = [*groups, behind], ()

    def step(group):
      padding = (0,) * (self.rows_per_step - len(group))
      members = tuple(tuple(zip(positions[rows[r]].tolist(), epochs[rows[r]].tolist(), strict=True)) for r in group)
      return StepPlan(members + ((),) * len(padding), (*loads[group].tolist(), *padding),
                      (*costs[group].tolist(), *padding))

    return [step(group) for group in groups], left

  def steps(self, cursor=None, *, epochs=None):
    """From a cursor on, yields (cursor after the step, StepPlan); without end, or to the end of that many epochs.

    Raises BadInput if no clip fits a row, or the cursor belongs to another plan.
    """
    cursor = cursor or Cursor()
    if cursor.plan not in ("", self.name):
      raise BadInput("data cursor: it belongs to another index, row shape, batch or seed; a run goes on with those "
                     "that it began with; put them back, or begin a new run")
    end = None if epochs is None else epochs * len(self.index)
    number, carried, done, barren = cursor.window, cursor.carried, cursor.step, 0
    while end is None or number * self.window_clips < end:
      steps, left = self.window(number, carried, end)
      epoch, epoch_after = (w * self.window_clips // len(self.index) for w in (number, number + 1))
      for i in range(done, len(steps)):
        after = Cursor(epoch, number, i + 1, tuple(carried), self.name)
        yield (after if i + 1 < len(steps) else Cursor(epoch_after, number + 1, 0, left, self.name)), steps[i]
      barren = 0 if steps or left else barren + self.window_clips
      if barren >= len(self.index) == len(self.misfits):
        raise BadInput(f"data index: none of its {len(self.index)} clips fits a row; the first: "
                       f"{self.misfits[0].reason}; raise what a row holds")
      number, carried, done = number + 1, left, 0
