"""Packs clips into rows: bin packing under three budgets (tokens, clips, text tokens). numpy only.

Best-fit decreasing alone fills rows with large clips first and packs the small ones together at the end.
Those rows reach the budgets of clips and of text before they are full of tokens, and their attention costs a
fraction of that of other rows. So the largest clips are dealt first, each to the emptiest of the least number
of rows that can hold all clips (longest processing time, Graham 1969), until `1 - share` of the tokens are
placed. This makes rows of similar content. The other clips complete the rows, in one of two ways:

  best fit   each clip, largest first, goes to the row that it leaves fullest (Johnson et al. 1974): 10 us a
             clip;
  exact      row by row, the subset of some 20 waiting clips that fills it best (subset sums as bits of an
             integer): 30 us a clip.

Best fit is enough for many different sizes. For few (six frame sizes, three lengths) it cannot close the
gaps, and subset sums can. `fill_rows` tries these in turn and keeps the first result with little enough
padding, else the best.
"""

import bisect
import collections
import heapq

import numpy as np

ENOUGH = 0.005  # share of padding below which no other way is tried
SAMPLE = 20  # waiting clips from which a subset is chosen


def fill_rows(tokens, text, shape, spare=0):
  """Assigns clips to rows -> lists of clip indices in [0, N), one a row.

  No row is empty; each clip is in one row.

  tokens, text: int arrays [N], each entry within `shape`, a RowShape. spare: how many of the emptiest rows do
  not count when the padding of a result is measured.
  """
  if not len(tokens):
    return []
  best, least = [], None
  for finish, share in ((_best_fit, 0.2), (_best_fit, 0.35), (_exact, 0.4)):
    rows = _Rows(tokens, text, shape)
    finish(rows, _deal(rows, share))
    filled = [row for row in rows.clips if row]
    room = sorted(room for room, row in zip(rows.room, rows.clips, strict=True) if row)
    room = room[: max(1, len(room) - spare)]
    padding = sum(room) / (len(room) * shape.length)
    if least is None or padding < least:
      best, least = filled, padding
    if least <= ENOUGH:
      break
  return best


class _Rows:
  """Rows being filled.

  One entry a row: `clips` (indices), `room` (tokens left), `text_room` (text tokens left).
  """

  def __init__(self, tokens, text, shape):
    self.tokens, self.text, self.shape = tokens.tolist(), text.tolist(), shape
    self.order = np.argsort(-tokens, kind="stable").tolist()  # largest first
    for_tokens = -(-sum(self.tokens) // shape.length)  # rounded up
    for_clips = -(-len(tokens) // shape.clips)
    for_text = -(-sum(self.text) // shape.text)
    count = max(for_tokens, for_clips, for_text)
    self.clips = [[] for _ in range(count)]
    self.room, self.text_room = [shape.length] * count, [shape.text] * count

  def open(self):
    """Adds an empty row -> its number."""
    self.clips.append([])
    self.room.append(self.shape.length)
    self.text_room.append(self.shape.text)
    return len(self.clips) - 1

  def put(self, clip, row):
    self.clips[row].append(clip)
    self.room[row] -= self.tokens[clip]
    self.text_room[row] -= self.text[clip]

  def fits(self, clip, row):
    return (
      self.tokens[clip] <= self.room[row]
      and self.text[clip] <= self.text_room[row]
      and len(self.clips[row]) < self.shape.clips
    )


def _deal(rows, share):
  """Deals the largest clips, each to the emptiest row, until `share` of the tokens is left -> other clips."""
  left, keep, rest = sum(rows.tokens), share * sum(rows.tokens), []
  heap = [(-rows.room[row], row) for row in range(len(rows.clips))]
  for i, clip in enumerate(rows.order):
    if left <= keep:
      return rest + rows.order[i:]
    left -= rows.tokens[clip]
    row = heap[0][1]
    if rows.fits(clip, row):
      rows.put(clip, row)
      heapq.heapreplace(heap, (-rows.room[row], row))
    else:
      rest.append(clip)
  return rest


def _best_fit(rows, waiting):
  """Puts each clip, largest first, into the row that it leaves fullest, or into a new row if it fits none."""
  open_rows = _OpenRows(rows)
  for clip in waiting:
    row = open_rows.take(clip)
    if row is None:
      row = rows.open()
    rows.put(clip, row)
    open_rows.add(row)


class _OpenRows:
  """The rows that can take another clip, by the tokens that they have left."""

  def __init__(self, rows):
    self._rows, self._least_text = rows, min(rows.text)
    self._by_room = collections.defaultdict(list)  # tokens left: rows
    for row, room in enumerate(rows.room):
      if room and len(rows.clips[row]) < rows.shape.clips:
        self._by_room[room].append(row)
    self._rooms = sorted(self._by_room)

  def take(self, clip):
    """Pops the row that the clip leaves fullest, the last added of equal ones; None if it fits none."""
    size, text = self._rows.tokens[clip], self._rows.text[clip]
    for i in range(bisect.bisect_left(self._rooms, size), len(self._rooms)):
      candidates = self._by_room[self._rooms[i]]
      for j in range(len(candidates) - 1, -1, -1):
        if self._rows.text_room[candidates[j]] >= text:
          row = candidates.pop(j)
          if not candidates:
            del self._by_room[self._rooms.pop(i)]
          return row
    return None

  def add(self, row):
    """Adds a row, unless it is full."""
    rows, room = self._rows, self._rows.room[row]
    if room and rows.text_room[row] >= self._least_text and len(rows.clips[row]) < rows.shape.clips:
      if room not in self._by_room:
        bisect.insort(self._rooms, room)
      self._by_room[room].append(row)


def _exact(rows, waiting):
  """Fills the rows, fullest first, each with the subset of SAMPLE clips that leaves the least room."""
  smallest = min(rows.tokens)
  queue = collections.deque(sorted(waiting))  # in the order of drawing: a fair sample
  for row in sorted(range(len(rows.clips)), key=rows.room.__getitem__):
    while rows.room[row] >= smallest and len(rows.clips[row]) < rows.shape.clips and queue:
      sample = [queue.popleft() for _ in range(min(SAMPLE, len(queue)))]
      fitting = sorted((clip for clip in sample if rows.fits(clip, row)), key=lambda clip: -rows.tokens[clip])
      chosen = _subset([rows.tokens[clip] for clip in fitting], rows.room[row])
      placed = set()
      for clip in (fitting[i] for i in chosen):
        if rows.fits(clip, row):
          rows.put(clip, row)
          placed.add(clip)
      queue.extend(clip for clip in sample if clip not in placed)
      if len(placed) < len(fitting) or not fitting:
        break
  _best_fit(rows, sorted(queue, key=lambda clip: (-rows.tokens[clip], clip)))


def _subset(sizes, room):
  """Indices of the sizes, given in descending order, of the largest sum <= room; larger ones preferred."""
  if sum(sizes) <= room:
    return range(len(sizes))
  mask, reached = (1 << (room + 1)) - 1, [1]  # bit s of reached[i]: some of the first i sizes sum to s
  for size in sizes:
    reached.append((reached[-1] | (reached[-1] << size)) & mask)
  total, chosen = reached[-1].bit_length() - 1, []
  while total:
    i = bisect.bisect_left(range(1, len(sizes) + 1), 1, key=lambda i: reached[i] >> total & 1)
    chosen.append(i)
    total -= sizes[i]
  return chosen[::-1]
