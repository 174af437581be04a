"""Judges of videos of the embedded world, by image processing on decoded frames: no model, and no look at the prompt.

`look` finds the coloured objects: by chroma (a pixel minus its grey) relative to the frame's border, so that slopes and
tiles of the background, which are grey, drop out; each strong pixel votes for the nearest of the world's hues, and the
pixels of a hue, in their largest connected piece, are a thing with a mask and a track. Each judge then answers one
question with one of a fixed set of words, or None where it cannot tell:

  colour     the hue with the most pixels
  shape      the template, of equal area, that overlaps the thing best
  direction  of the net way, which must be most of the whole way
  order      the directions of the two halves
  bounce     the axis of the larger range, if the track turns
  camera     growth of the thing, else the flow of the floor
  relation   the side of the second on which the first lies
  behind     whether the first is hidden in the middle, and out on both sides

`judge` compares the answers with what the caption says; `chance` is the share that a blind guesser gets right.
"""

import dataclasses

import numpy as np

from data.sources.shapes import AXES, COLOURS, DIRECTIONS, RELATIONS, SHAPES, ZOOMS, distance, parse

# One over the number of answers that the grammar allows: pairs of colours and of directions are of two different ones.
CHANCES = {
    "colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "direction": 1 / len(DIRECTIONS), "bounce": 1 / len(AXES),
    "order": 1 / 12, "camera": 1 / (len(DIRECTIONS) + len(ZOOMS)), "relation": 1 / len(RELATIONS), "behind": 1 / 2,
    "two colours": 1 / 15, "two shapes": 1 / 9,
}
STRONG = 0.30      # share of a colour's full chroma from which a pixel votes
PRESENT = 0.02     # area of a thing in its best frame, in squares of the short side; the world's smallest has 0.043

SOFT = 2.0         # pixels over which a template's edge fades, as those of a decoded video do


@dataclasses.dataclass(frozen=True)
class Thing:
  """What was seen of one colour. mask_THW: its largest piece; area_T: all its pixels; centre_T2: y, x, or NaN."""
  colour: str
  mask_THW: np.ndarray
  area_T: np.ndarray
  centre_T2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Seen:
  """Things, the most visible first, and the pixels, float32 in [0, 1]."""
  objects: tuple
  video_THWC: np.ndarray

  @property
  def short(self):
    return min(self.video_THWC.shape[1:3])


def look(video_THWC) -> Seen:
  """Finds the objects in uint8 [T, H, W, 3] frames."""
  video = np.asarray(video_THWC, np.float32) / 255
  chroma = video - video.mean(-1, keepdims=True)
  border = np.concatenate([chroma[:, :2].reshape(-1, 3), chroma[:, -2:].reshape(-1, 3),
                           chroma[:, :, :2].reshape(-1, 3), chroma[:, :, -2:].reshape(-1, 3)])
  chroma = chroma - np.median(border, axis=0)
  wanted = np.array(list(COLOURS.values()), np.float32) / 255
  wanted = wanted - wanted.mean(-1, keepdims=True) - np.median(border, axis=0)
  size = np.linalg.norm(wanted, axis=-1)
  strong = (chroma ** 2).sum(-1) > (STRONG * size.min()) ** 2
  along = chroma[strong] @ (wanted / size[:, None]).T               # [strong pixels, colours]
  label = np.full(strong.shape, -1)
  label[strong] = along.argmax(-1)
  share = np.zeros(strong.shape, np.float32)
  share[strong] = (along / size)[np.arange(len(along)), label[strong]]
  objects = []
  for index, colour in enumerate(COLOURS):
    votes = (label == index) & (share > STRONG)
    if votes.sum((1, 2)).max() < PRESENT * min(video.shape[1:3]) ** 2:
      continue
    full = np.quantile(share[votes], 0.8)       # the edge of a paler thing than ours is at half of its own chroma
    mask = votes & (share > 0.5 * full)
    area = mask.sum((1, 2))
    if area.max() >= PRESENT * min(video.shape[1:3]) ** 2:
      piece = _largest_piece(mask)
      objects.append(Thing(colour, piece, area, _centres(piece)))
  return Seen(tuple(sorted(objects, key=lambda thing: -thing.area_T.sum())), video)


def _largest_piece(mask_THW):
  """Of each frame, the largest 4-connected piece. Every pixel takes the largest number in reach, until none changes."""
  number = np.where(mask_THW, np.arange(1, mask_THW[0].size + 1).reshape(mask_THW.shape[1:]), 0)
  while True:
    grown = _spread(_spread(number).swapaxes(1, 2)).swapaxes(1, 2)     # along the rows, then along the columns
    if np.array_equal(grown, number):
      break
    number = grown
  best = [np.bincount(frame.ravel(), minlength=2)[1:].argmax() + 1 for frame in number]
  return (number == np.array(best)[:, None, None]) & mask_THW


def _spread(number_THW):
  """Each run of nonzero numbers along the last axis takes its largest."""
  line = np.pad(number_THW, ((0, 0), (0, 0), (0, 1))).ravel()           # a zero ends each row
  starts = np.append(0, np.flatnonzero(np.diff(line > 0)) + 1)
  lengths = np.diff(starts, append=len(line))
  most = np.repeat(np.maximum.reduceat(line, starts), lengths)
  return most.reshape(*number_THW.shape[:2], -1)[..., :-1]


def _centres(mask_THW):
  t, h, w = mask_THW.shape
  area = mask_THW.sum((1, 2))
  total = np.stack([mask_THW.sum(2) @ (np.arange(h) + 0.5), mask_THW.sum(1) @ (np.arange(w) + 0.5)], axis=1)
  return np.where(area[:, None] > 0, total / np.maximum(area, 1)[:, None], np.nan)


# --- the judges: Seen -> a word, or None

def _moments(shape, n=200):
  grid = (np.arange(4 * n) + 0.5) / n - 2
  inside = distance(shape, grid[:, None], grid[None], 1.0) < 0
  return inside.mean() * 16, (inside.sum(1) @ grid) / inside.sum()     # area and height of the centre, at diameter 1


_MOMENTS = {shape: _moments(shape) for shape in SHAPES}


def shape_of(thing: Thing, seen: Seen) -> str:
  """The shape whose template, of the thing's own area and centre, overlaps it best; a mean over 6 unhidden frames.

  Overlap: sum of the lesser / sum of the greater of the two coverages, pixel by pixel.
  """
  frames = np.flatnonzero(thing.area_T >= 0.85 * thing.area_T.max())
  frames = frames[np.unique(np.linspace(0, len(frames) - 1, 6).astype(int))]
  others = np.zeros_like(thing.mask_THW)
  for other in seen.objects:
    if other is not thing:
      others |= other.mask_THW
  covers = _coverage(thing.mask_THW[frames], others[frames], seen.video_THWC[frames])
  y, x = (np.arange(n, dtype=float) + 0.5 for n in covers.shape[1:])
  scores = dict.fromkeys(SHAPES, 0.0)
  for cover, centre in zip(covers, _centres(covers), strict=True):
    for shape, (area, middle) in _MOMENTS.items():
      diameter = np.sqrt(cover.sum() / area)
      top = centre[0] - middle * diameter
      away = distance(shape, (y - top)[:, None], (x - centre[1])[None], diameter)
      template = np.clip(0.5 - away / SOFT, 0, 1)
      scores[shape] += np.minimum(cover, template).sum() / np.maximum(cover, template).sum()
  return max(scores, key=scores.get)


def _coverage(masks_NHW, others_NHW, frames_NHWC):
  """How much of each pixel near the mask the thing covers, by all of its colour, as yuv420 halves that of chroma:

  where the pixel lies on the line from the median colour of a ring around the thing (0) to that of the thing (1).
  """
  near = _grow(masks_NHW, 2)
  rings = _grow(masks_NHW, 4) & ~near & ~_grow(others_NHW, 1)
  covers = masks_NHW.astype(np.float32)
  for cover, mask, ring, frame, edge in zip(covers, masks_NHW, rings, frames_NHWC, near & ~others_NHW, strict=True):
    if ring.sum() >= 8:
      outside = np.median(frame[ring], axis=0)
      line = np.median(frame[mask], axis=0) - outside
      cover[:] = np.clip((frame - outside) @ line / (line @ line), 0, 1) * edge
  return covers


def _word(way, table):
  """The word whose (y, x) unit vector is nearest; None where neither axis is twice the other."""
  y, x = np.abs(way)
  if max(y, x) < 2 * min(y, x) or max(y, x) == 0:
    return None
  return max(table, key=lambda word: np.dot(table[word], way))


def _seen(centre_T2):
  return centre_T2[~np.isnan(centre_T2[:, 0])]


def direction(centre_T2, short) -> str | None:
  """Of the way from first frames to last: at least an eighth of the short side, and 0.7 of the track's range."""
  track = _seen(centre_T2)
  if len(track) < 3:
    return None
  ends = max(1, len(track) // 8)
  net = track[-ends:].mean(0) - track[:ends].mean(0)
  axis = int(np.abs(net).argmax())
  if np.abs(net[axis]) < max(short / 8, 0.7 * np.ptp(track[:, axis])):
    return None
  return _word(net, DIRECTIONS)


def bounce(centre_T2, short) -> str | None:
  """Axis of a track that turns: it goes back by 0.4 of its range, which is at least an eighth of the short side."""
  track = _seen(centre_T2)
  if len(track) < 4:
    return None
  span = np.ptp(track, axis=0)
  axis = int(span.argmax())
  if span[axis] < short / 8 or span[axis] < 2 * span[1 - axis]:
    return None
  line = track[:, axis]
  back = 0.4 * span[axis]
  up = any(line[:i].max() - line[i] >= back and line[:i].max() - line[0] >= back for i in range(2, len(line)))
  down = any(line[i] - line[:i].min() >= back and line[0] - line[:i].min() >= back for i in range(2, len(line)))
  return (tuple(AXES)[axis == 1]) if up or down else None


def order(centre_T2, short) -> tuple:
  middle = len(centre_T2) // 2
  return direction(centre_T2[:middle + 1], short), direction(centre_T2[middle:], short)


def relation(first: Thing, second: Thing) -> str | None:
  """Where the first is, seen from the second, on the mean of the frames that show both."""
  return _word(np.nan_to_num(np.nanmean(first.centre_T2 - second.centre_T2, axis=0)), RELATIONS)


def behind(first: Thing, second: Thing) -> bool:
  """Whether the first passes behind: seen on both sides of the second, between them hidden, while the second is not."""
  both = np.flatnonzero(~np.isnan(first.centre_T2[:, 0]) & ~np.isnan(second.centre_T2[:, 0]))
  if len(both) < 3:
    return False
  way = first.centre_T2[both[[0, -1]]] - second.centre_T2[both[[0, -1]]]
  axis = int(np.abs(way[1] - way[0]).argmax())
  third = max(1, len(first.area_T) // 5)
  hidden = [thing.area_T[third:-third].min() / max(thing.area_T[0], thing.area_T[-1], 1) for thing in (first, second)]
  return bool(way[0, axis] * way[1, axis] < 0 and hidden[0] < 0.75 and hidden[0] + 0.15 < hidden[1] > 0.7)


def camera(seen: Seen) -> str | None:
  """Zoom, where the main thing grows or shrinks by a third across; else whence the floor flows."""
  if not seen.objects or len(seen.video_THWC) < 3:
    return None
  across = np.sqrt(seen.objects[0].area_T)
  ends = max(1, len(across) // 8)
  growth = across[-ends:].mean() / max(across[:ends].mean(), 1e-6)
  if max(growth, 1 / max(growth, 1e-6)) > 4 / 3:
    return "in on" if growth > 1 else "out from"
  flow = _flow(seen)
  if np.abs(flow).max() < seen.short / 8:
    return None
  return _word(-flow, DIRECTIONS)


def _flow(seen, reach=12):
  """The floor's whole way in pixels (y, x): at each step, the shift along an axis that leaves the least variance."""
  grey_THW = seen.video_THWC.mean(-1)
  t = len(grey_THW)
  step = max(1, (t - 1) // 8)                       # a pan of 17 frames is looked at in every other one
  hidden = np.zeros(grey_THW.shape, bool)
  for thing in seen.objects:
    hidden |= _grow(thing.mask_THW, 2)
  shifts = [(s, 0) for s in range(-reach, reach + 1)] + [(0, s) for s in range(-reach, reach + 1) if s]
  total = np.zeros(2)
  for i in range(0, t - step, step):
    errors = []
    for y, x in shifts:
      now = (slice(max(-y, 0), min(-y, 0) or None), slice(max(-x, 0), min(-x, 0) or None))
      later = (slice(max(y, 0), min(y, 0) or None), slice(max(x, 0), min(x, 0) or None))
      clear = ~(hidden[i][now] | hidden[i + step][later])
      gap = (grey_THW[i + step][later] - grey_THW[i][now])[clear]
      errors.append(np.var(gap) if gap.size else np.inf)
    total += shifts[int(np.argmin(errors))]
  return total


def _grow(mask_THW, by):
  """The mask with all pixels within `by` rows and columns of it."""
  t, h, w = mask_THW.shape
  padded = np.pad(mask_THW, ((0, 0), (by, by), (by, by)))
  tall = np.logical_or.reduce([padded[:, y:y + h] for y in range(2 * by + 1)])
  return np.logical_or.reduce([tall[:, :, x:x + w] for x in range(2 * by + 1)])


# --- answers against the caption

def judge(video_THWC, caption: str) -> dict[str, bool]:
  """Score name -> whether the video, uint8 [T, H, W, 3], shows it. ValueError for a caption that is not of this world.

  The kind of the caption decides which questions are asked, never what the answers are.
  """
  scene = parse(caption)
  if scene is None:
    raise ValueError(f"judge: {caption!r} is not a sentence of the world of shapes")
  seen = look(video_THWC)
  if len(scene.objects) == 2:
    return _judge_two(scene, seen)
  (colour, shape), = scene.objects
  if not seen.objects:
    return dict.fromkeys(_questions(scene), False)
  thing = seen.objects[0]
  answers = {
      "colour": lambda: thing.colour == colour,
      "shape": lambda: shape_of(thing, seen) == shape,
      "direction": lambda: direction(thing.centre_T2, seen.short) == scene.words[0],
      "bounce": lambda: bounce(thing.centre_T2, seen.short) == scene.words[0],
      "order": lambda: order(thing.centre_T2, seen.short) == scene.words,
      "camera": lambda: camera(seen) == scene.words[0],
  }
  return {name: bool(answers[name]()) for name in _questions(scene)}


def in_view(video_THWC) -> bool:
  """Whether a thing is seen in every frame, uint8 [T, H, W, 3], and never touches its edges."""
  seen = look(video_THWC)
  if not seen.objects:
    return False
  mask = seen.objects[0].mask_THW
  edges = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
  return bool(mask.any((1, 2)).all() and not any(edge.any() for edge in edges))


def _questions(scene):
  last = {"moves": ["direction"], "bounces": ["bounce"], "order": ["order"], "pan": ["camera"], "zoom": ["camera"]}
  return ["colour", "shape"] + last.get(scene.kind, [])


def _judge_two(scene, seen):
  by_colour = {thing.colour: thing for thing in seen.objects[:2]}
  (first, first_shape), (second, second_shape) = scene.objects
  found = set(by_colour) == {first, second}
  results = {"two colours": found, "two shapes": False, scene.kind: False}
  if found:
    one, other = by_colour[first], by_colour[second]
    results["two shapes"] = (shape_of(one, seen), shape_of(other, seen)) == (first_shape, second_shape)
    results[scene.kind] = behind(one, other) if scene.kind == "behind" else relation(one, other) == scene.words[0]
  return results


def chance(name: str) -> float:
  """The share of right answers of a guesser who knows the grammar and nothing else."""
  return CHANCES[name]


def summary(results) -> dict[str, dict]:
  """Many `judge` answers -> {score: {"right", "of", "share", "chance"}}, in the order of CHANCES."""
  table = {}
  for name in CHANCES:
    answers = [result[name] for result in results if name in result]
    if answers:
      right, of = sum(answers), len(answers)
      table[name] = {"right": right, "of": of, "share": right / of, "chance": chance(name)}
  return table
