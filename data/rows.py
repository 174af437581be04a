"""Clips into rows: bin packing under three budgets (tokens, clips, text tokens). numpy only.

Best-fit decreasing alone fills rows of large clips first and leaves the small ones together, in rows that run into the
budgets of clips and of text before they are full of tokens, and whose attention costs a fraction of the others'. So the
largest clips are dealt out first, each to the emptiest of the rows that all will need (longest processing time, Graham
1969), until `1 - share` of the tokens are placed: rows of like content. The rest finishes the rows, in one of two ways:

  best fit   each clip, largest first, to the row that it leaves fullest (Johnson et al. 1974): 10 us a clip;
  exact      row by row, the subset of some 20 waiting clips that fills it best (subset sums as bits of an integer):
             30 us a clip.

Best fit is enough where sizes are many. Where they are few (six sizes of frame, three lengths) it cannot close the
gaps, which subset sums do: `fill_rows` tries in turn, keeps the first result with little enough padding, else the best.
"""

import bisect
import collections
import heapq

import numpy as np

ENOUGH = 0.005       # share of padding at which no other way is tried
SAMPLE = 20          # waiting clips of which a subset is chosen


def fill_rows(tokens, text, shape, spare=0):
  """Which clips share a row -> lists of places in [0, N), one a row; none is empty, each clip is in one.

  tokens, text: int arrays [N], each within `shape`, a RowShape. spare: the padding of so many rows, the emptiest, does
  not matter.
  """
  best, least = [], None
  for finish, share in ((_best_fit, 0.2), (_best_fit, 0.35), (_exact, 0.4)) if len(tokens) else ():
    rows = _Rows(tokens, text, shape)
    finish(rows, _deal(rows, share))
    filled = [row for row in rows.clips if row]
    empty = sorted(room for room, row in zip(rows.room, rows.clips, strict=True) if row)
    empty = empty[:max(1, len(empty) - spare)]
    padding = sum(empty) / (len(empty) * shape.length)
    if least is None or padding < least:
      best, least = filled, padding
    if least <= ENOUGH:
      break
  return best


class _Rows:
  """Rows under way: `clips` (places), `room` (tokens left), `words` (text tokens left), one entry a row."""

  def __init__(self, tokens, text, shape):
    self.tokens, self.text, self.shape = tokens.tolist(), text.tolist(), shape
    self.order = np.argsort(-tokens, kind="stable").tolist()           # largest first
    count = max(-(-sum(self.tokens) // shape.length), -(-len(tokens) // shape.clips), -(-sum(self.text) // shape.text))
    self.clips, self.room, self.words = [[] for _ in range(count)], [shape.length] * count, [shape.text] * count

  def open(self):
    self.clips.append([])
    self.room.append(self.shape.length)
    self.words.append(self.shape.text)
    return len(self.clips) - 1

  def put(self, clip, row):
    self.clips[row].append(clip)
    self.room[row] -= self.tokens[clip]
    self.words[row] -= self.text[clip]

  def takes(self, clip, row):
    return (self.tokens[clip] <= self.room[row] and self.text[clip] <= self.words[row]
            and len(self.clips[row]) < self.shape.clips)


def _deal(rows, share):
  """Deals the largest clips out, each to the emptiest row, until a share of the tokens is left -> the clips left."""
  left, keep, rest = sum(rows.tokens), share * sum(rows.tokens), []
  heap = [(-rows.room[row], row) for row in range(len(rows.clips))]
  for at, clip in enumerate(rows.order):
    if left <= keep:
      return rest + rows.order[at:]
    left -= rows.tokens[clip]
    row = heap[0][1]
    if rows.takes(clip, row):
      rows.put(clip, row)
      heapq.heapreplace(heap, (-rows.room[row], row))
    else:
      rest.append(clip)
  return rest


def _best_fit(rows, waiting):
  """Places each clip, largest first, in the row that it leaves fullest; where none takes it, in a new one."""
  of_room = collections.defaultdict(list)         # tokens left: rows that take another clip
  for row, room in enumerate(rows.room):
    if room and len(rows.clips[row]) < rows.shape.clips:
      of_room[room].append(row)
  rooms, least_words = sorted(of_room), min(rows.text)
  for clip in waiting:
    size, words, found = rows.tokens[clip], rows.text[clip], None
    for at in range(bisect.bisect_left(rooms, size), len(rooms)):
      fitting = of_room[rooms[at]]
      found = next((j for j in range(len(fitting) - 1, -1, -1) if rows.words[fitting[j]] >= words), None)
      if found is not None:
        row = fitting.pop(found)
        if not fitting:
          del of_room[rooms.pop(at)]
        break
    if found is None:
      row = rows.open()
    rows.put(clip, row)
    room = rows.room[row]
    if room and rows.words[row] >= least_words and len(rows.clips[row]) < rows.shape.clips:
      if room not in of_room:
        bisect.insort(rooms, room)
      of_room[room].append(row)


def _exact(rows, waiting):
  """Fills row after row, the fullest first, each with the subset of some waiting clips that leaves the least room."""
  queue, smallest = collections.deque(sorted(waiting)), min(rows.tokens)       # in the order of drawing: a fair sample
  for row in sorted(range(len(rows.clips)), key=rows.room.__getitem__):
    while rows.room[row] >= smallest and len(rows.clips[row]) < rows.shape.clips and queue:
      sample = [queue.popleft() for _ in range(min(SAMPLE, len(queue)))]
      fitting = sorted((clip for clip in sample if rows.takes(clip, row)), key=lambda clip: -rows.tokens[clip])
      chosen = _subset([rows.tokens[clip] for clip in fitting], rows.room[row])
      taken = set()
      for clip in (fitting[i] for i in chosen):
        if rows.takes(clip, row):
          rows.put(clip, row)
          taken.add(clip)
      queue.extend(clip for clip in sample if clip not in taken)
      if len(taken) < len(fitting) or not fitting:
        break
  _best_fit(rows, sorted(queue, key=lambda clip: (-rows.tokens[clip], clip)))


def _subset(sizes, room):
  """Indices of sizes, given in descending order, whose sum is the largest that is <= room; larger ones preferred."""
  if sum(sizes) <= room:
    return range(len(sizes))
  mask, reached = (1 << (room + 1)) - 1, [1]          # bit s of reached[i]: some of the first i sizes sum to s
  for size in sizes:
    reached.append((reached[-1] | (reached[-1] << size)) & mask)
  total, chosen = reached[-1].bit_length() - 1, []
  while total:
    i = bisect.bisect_left(range(1, len(sizes) + 1), 1, key=lambda i: reached[i] >> total & 1)
    chosen.append(i)
    total -= sizes[i]
  return chosen[::-1]
