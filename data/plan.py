"""The plan: which clips share a row, and which rows share a step, from the index of sizes alone. numpy only.

A plan is a pure function of (index, seed, cursor); it opens no record. It knows `rows_per_step`, never hosts,
devices or ranks: every host computes the same plan and loads its own rows, so any number of hosts may resume
from a cursor.

  draws    an endless list of clips: draw k is clip `shuffle(k mod n)` of epoch k // n. The shuffle differs in
           each epoch and is computed for a single k (a Feistel network), so 10^9 clips need no permutation in
           memory. A draw number therefore identifies a clip and its epoch. Every clip is drawn exactly once
           an epoch.
  datasets if several are mixed, draw k is draw j of dataset d, computed in integers for a single k (`deal`).
           In any range of draws the shares are right to one or two clips, and every clip of a dataset is
           drawn exactly once in an epoch of that dataset.
  windows  window w is the draws [w * window_clips, (w + 1) * window_clips) and those carried over from the
           window before. It runs past the end of an epoch, and over many epochs of a small dataset, so rows
           are full whatever the size of the dataset.
  rows     rows of similar content, under three budgets: tokens, clips, text tokens (data/rows.py).
  steps    rows of similar attention cost (sum of n^2) are in one step, so that ranks finish together. The
           order of the steps is shuffled. The rows that do not make a whole step are the emptiest; their
           clips are carried over.

Sources: Patch n' Pack, arXiv:2307.06304; cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary
finite domains".
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

from data.rows import fill_rows
from sora_jax.errors import BadInput

FORMAT_VERSION = 1  # of the cursor; raised by any change here or in data/rows.py that changes plans
ORDER, STEPS = 1, 2  # salts: one for each use of the hash
CHUNK = 1 << 20  # entries of an index that are read at a time


def mix64(*words):
  """Hash of integers (or integer arrays, elementwise) -> uint64 [N]: splitmix64's finaliser for each word."""
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
  """Entries `rank` (int array, each in [0, n)) of a permutation of range(n) chosen by `key` (ints or arrays).

  A Feistel network over a square of side ceil(sqrt(n)), applied again while its output is outside [0, n).
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
  """Deals draws [N] to datasets in proportion to positive ints -> (dataset [N], number of its own draw [N]).

  A tree of two-way splits: of the first k draws, round(k a / (a + b)) go to the left side. So shares are
  right to half a clip at each split, over any range of draws, and exact after sum(weights) draws.
  """
  datasets, own_draws = np.zeros(len(draws), np.int64), np.array(draws, np.int64)

  def split(members, first, weights):
    """Deals the draws at indices `members` to the datasets from number `first` on."""
    if len(weights) == 1:
      datasets[members] = first
      return
    sums = list(itertools.accumulate(weights))
    middle = min(range(1, len(weights)), key=lambda i: abs(2 * sums[i - 1] - sums[-1]))
    left_weight, total = sums[middle - 1], sums[-1]

    def left_count(k):
      """How many of the first k draws go to the left side."""
      cycles, rest = k // total, k % total
      return cycles * left_weight + (rest * left_weight + total // 2) // total

    before = left_count(own_draws[members])
    goes_left = left_count(own_draws[members] + 1) > before
    own_draws[members] = np.where(goes_left, before, own_draws[members] - before)
    split(members[goes_left], first, weights[:middle])
    split(members[~goes_left], first + middle, weights[middle:])

  split(np.arange(len(draws)), 0, list(weights))
  return datasets, own_draws


def whole_weights(sizes, weights=None):
  """The sizes of datasets, and weights or None -> ints for `deal`, of a sum below 2^31.

  None: in proportion to the sizes.

  Raises BadInput unless there is one weight for each dataset, finite and above zero.
  """
  if weights is None:
    weights = sizes
    if sum(sizes) < 1 << 31:
      return list(sizes)  # exact: an epoch of the mixture is an epoch of each dataset
  if len(weights) != len(sizes):
    raise BadInput(
      f"data weights: {len(weights)} of them for {len(sizes)} datasets; give one for each, or none at all"
    )
  for weight in weights:
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
      raise BadInput(
        f"data weights: {weight}; a finite number above 0; leave out a dataset that is not to be drawn from"
      )
  return [max(1, round(weight / sum(weights) * (1 << 30))) for weight in weights]


class Joined:
  """Several indexes of sizes as one.

  Entries are numbered through all of them; only the entries asked for are copied.

  sources: for each index, an array that renumbers its sources; None: they stay as they are.
  """

  def __init__(self, parts, sources=None):
    self.parts, self.sources = tuple(parts), sources
    self.starts = np.cumsum([0, *map(len, self.parts)])

  def __len__(self):
    return int(self.starts[-1])

  def locate(self, positions):
    """Int array (or int) of entries -> (number of the index, entry in that index)."""
    which = np.searchsorted(self.starts, positions, side="right") - 1
    return which, positions - self.starts[which]

  def __getitem__(self, key):
    """An int, an int array or a slice -> those entries; the name of a field -> the whole field, copied."""
    if isinstance(key, str):
      return self[:][key]
    positions = np.arange(*key.indices(len(self))) if isinstance(key, slice) else np.asarray(key)
    which, own = self.locate(positions)
    rows = np.empty(which.shape, self.parts[0].dtype)
    for number, part in enumerate(self.parts):
      in_part = which == number
      rows[in_part] = part[own[in_part]]
      if self.sources is not None:
        rows["source"][in_part] = self.sources[number][rows["source"][in_part]]
    return rows[()]


@dataclasses.dataclass(frozen=True)
class Cursor:
  """The position of a run in its plan: the next step. Stored in the checkpoint, beside the step number."""

  epoch: int = 0  # of the window's first draw; for people, the plan does not read it
  window: int = 0
  step: int = 0  # steps of this window already done
  carried: tuple[int, ...] = ()  # draws carried over from the window before
  plan: str = ""  # name of the plan it belongs to; empty at the start of any plan

  def to_json(self):
    """The cursor as a dict of plain ints, strings and lists."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self), "carried": list(self.carried)}

  @classmethod
  def from_json(cls, fields):
    """The inverse of `to_json`. Raises BadInput for a cursor of another version."""
    fields = dict(fields)
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
      raise BadInput(
        f"data cursor: format_version {version}; this code reads {FORMAT_VERSION}; use the code that wrote it"
      )
    return cls(**fields | {"carried": tuple(fields["carried"])})


@dataclasses.dataclass(frozen=True)
class StepPlan:
  """One step.

  rows: of each row, its clips as (index position, epoch). tokens, costs: sums of n and of n^2 of each row.
  """

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

  index: structured array (may be memory-mapped) with fields uid, t, h, w (latent size) and text_tokens;
  several of them as a `Joined`.
  weights: shares of the draws, above 0, one for each index of a `Joined`; None: in proportion to their sizes.
  shape: RowShape(length, clips, text), the budgets of a row. patch: (pt, ph, pw) of the model; latents at the
  lower and the right edge that do not fill a patch are left out.
  null_text_tokens: length of the null text, which may replace any caption (caption dropout).
  text_pad: a prompt of fewer tokens is followed by one zero that stands for its padding to this length (Wan:
  512); None: no padding.
  window_clips: draws of a window; None: 256 for each row of a step.
  Raises BadInput if an index is empty, or for invalid weights.
  """

  def __init__(
    self,
    index,
    *,
    rows_per_step,
    shape,
    patch,
    seed,
    weights=None,
    null_text_tokens=1,
    text_pad=None,
    window_clips=None,
  ):
    self.counts = [len(part) for part in index.parts] if isinstance(index, Joined) else [len(index)]
    if 0 in self.counts:
      raise BadInput("data index: it holds no clips; at least one; encode some (python -m launch.encode)")
    if rows_per_step < 1:
      raise BadInput(f"rows_per_step: {rows_per_step}; at least 1")
    self.index, self.rows_per_step, self.shape, self.patch = index, rows_per_step, shape, tuple(patch)
    self.seed, self.null_text_tokens, self.text_pad = seed, null_text_tokens, text_pad
    self.weights = whole_weights(self.counts, weights)
    self.window_clips = window_clips or 256 * rows_per_step
    self.name = self._fingerprint()

  def _fingerprint(self):
    """16 hexadecimal digits from all that the plan depends on; of the index, up to 4,096 entries.

    Cursors carry it.
    """
    positions = np.linspace(0, len(self.index) - 1, num=min(len(self.index), 4096)).astype(np.int64)
    clips = self.index[positions]
    fields = [clips[name] for name in ("uid", "t", "h", "w", "text_tokens")]
    sample = np.bitwise_xor.reduce(mix64(positions, *fields))
    mixed = (*self.counts, *self.weights) if len(self.weights) > 1 else ()
    (name,) = mix64(
      sample,
      len(self.index),
      self.seed,
      self.rows_per_step,
      self.shape.length,
      self.shape.clips,
      self.shape.text,
      *self.patch,
      self.null_text_tokens,
      self.text_pad or 0,
      self.window_clips,
      *mixed,
    )
    return f"{int(name):016x}"

  def sizes(self, positions):
    """Positions (array or slice) -> tokens, text tokens (int64), whether a row can hold the clip (bool)."""
    tokens, text, whole = self._measure(positions)
    return tokens, text, whole & (tokens <= self.shape.length) & (text <= self.shape.text)

  def _measure(self, positions):
    """-> tokens, text tokens, whether the clip is at least one patch in size."""
    clips = self.index[positions]
    size_N3 = np.stack([clips[name].astype(np.int64) for name in ("t", "h", "w")], axis=-1)
    whole = (size_N3 >= self.patch).all(axis=-1)
    text = np.maximum(clips["text_tokens"].astype(np.int64), self.null_text_tokens)
    text += text < (self.text_pad or 0)
    return (size_N3 // self.patch).prod(axis=-1), text, whole

  @functools.cached_property
  def misfits(self):
    """The clips that no row can hold: a list of `Misfit` in the order of the index.

    Reads the whole index, once.
    """
    misfits = []
    for start in range(0, len(self.index), CHUNK):
      _, _, fits = self.sizes(slice(start, start + CHUNK))
      misfits += [self._misfit(start + int(i)) for i in np.flatnonzero(~fits)]
    return misfits

  @functools.cached_property
  def trimmed(self):
    """How many clips lose latents at an edge that do not fill a patch. Reads the whole index, once."""
    count = 0
    for start in range(0, len(self.index), CHUNK):
      clips = self.index[start : start + CHUNK]
      has_rest = [clips[name] % p != 0 for name, p in zip("thw", self.patch, strict=True)]
      count += int(np.any(has_rest, axis=0).sum())
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
    """Draw numbers [N] -> (positions in the index [N], epochs of their own datasets [N])."""
    datasets, own_draws = deal(draws, self.weights)
    positions, epochs, first = np.empty_like(own_draws), np.empty_like(own_draws), 0
    for number, count in enumerate(self.counts):
      members = datasets == number
      epochs[members], rank = np.divmod(own_draws[members], count)
      key = [self.seed, ORDER, epochs[members]]
      if number:  # the first dataset is drawn as if it were alone
        key.append(number)
      positions[members] = first + shuffle(rank, count, *key)
      first += count
    return positions, epochs

  def window(self, number, carried=(), end=None):
    """Steps of one window -> (list of StepPlan, draws carried over).

    end: draws from this number on are left out. The window that reaches it carries nothing over: the rows
    that do not make a whole step become a last step, with empty rows.
    """
    start, stop = number * self.window_clips, (number + 1) * self.window_clips
    last = end is not None and stop >= end
    draws = np.concatenate(
      [np.asarray(carried, np.int64), np.arange(start, end if last else stop, dtype=np.int64)]
    )
    positions, epochs = self.clips(draws)
    tokens, text, fits = self.sizes(positions)
    draws, positions, epochs, tokens, text = (a[fits] for a in (draws, positions, epochs, tokens, text))
    rows = fill_rows(tokens, text, self.shape, spare=self.rows_per_step // 2)
    loads = np.array([tokens[row].sum() for row in rows], np.int64)
    costs = np.array([(tokens[row] ** 2).sum() for row in rows], np.int64)

    # The emptiest rows are carried over. Rows with a clip that was already carried over are chosen last, so
    # that no clip waits for ever.
    waited = np.array([(draws[row] < start).any() for row in rows], bool)
    leftover = np.lexsort((loads, waited))[: len(rows) % self.rows_per_step]
    by_cost = np.argsort(costs, kind="stable")
    groups = by_cost[~np.isin(by_cost, leftover)].reshape(-1, self.rows_per_step)
    step_order = np.argsort(mix64(self.seed, STEPS, number, np.arange(len(groups))), kind="stable")
    groups = list(groups[step_order])
    carried_over = tuple(sorted(draws[i].item() for r in leftover for i in rows[r]))
    if last and len(leftover):
      groups, carried_over = [*groups, leftover], ()

    def step(group):
      padding = (0,) * (self.rows_per_step - len(group))
      members = tuple(
        tuple(zip(positions[rows[r]].tolist(), epochs[rows[r]].tolist(), strict=True)) for r in group
      )
      return StepPlan(
        members + ((),) * len(padding), (*loads[group].tolist(), *padding), (*costs[group].tolist(), *padding)
      )

    return [step(group) for group in groups], carried_over

  def steps(self, cursor=None, *, epochs=None):
    """Yields (cursor after the step, StepPlan) from a cursor on, without end or to the end of `epochs`.

    Raises BadInput if no clip fits a row, or if the cursor belongs to another plan.
    """
    cursor = cursor or Cursor()
    if cursor.plan not in ("", self.name):
      raise BadInput(
        "data cursor: it belongs to another index, row shape, batch or seed; a run continues with those "
        "that it began with; restore them, or begin a new run"
      )
    end = None if epochs is None else epochs * len(self.index)
    number, carried, done = cursor.window, cursor.carried, cursor.step
    empty_draws = 0  # draws of the last windows that gave no clip
    while end is None or number * self.window_clips < end:
      steps, carried_over = self.window(number, carried, end)
      epoch, next_epoch = (w * self.window_clips // len(self.index) for w in (number, number + 1))
      for i in range(done, len(steps)):
        if i + 1 < len(steps):
          after = Cursor(epoch, number, i + 1, tuple(carried), self.name)
        else:
          after = Cursor(next_epoch, number + 1, 0, carried_over, self.name)
        yield after, steps[i]
      empty_draws = 0 if steps or carried_over else empty_draws + self.window_clips
      if empty_draws >= len(self.index) == len(self.misfits):
        raise BadInput(
          f"data index: none of its {len(self.index)} clips fits a row; the first: "
          f"{self.misfits[0].reason}; raise what a row holds"
        )
      number, carried, done = number + 1, carried_over, 0
