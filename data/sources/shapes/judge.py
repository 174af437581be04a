"""Judges of videos of the embedded world: image processing on decoded frames, without a model or the prompt.

`detect` finds the coloured objects. Chroma (a pixel minus its grey) is taken relative to the frame's border,
so that the gradients and tiles of the background, which are grey, cancel. Each strong pixel votes for the
nearest of the world's hues; the largest connected piece of the pixels of a hue is an object with a mask and a
track. Each judge then answers one question with one of a fixed set of words, or None if it cannot tell:

  colour     the hue with the most pixels
  shape      the template, of equal area, that overlaps the object best
  direction  of the net displacement, which must be most of the path
  order      the directions of the two halves
  bounce     the axis of the larger range, if the track turns
  camera     growth of the object, else the flow of the floor
  relation   the side of the second object on which the first lies
  behind     whether the first object is hidden in the middle, and visible on both sides
  returns    the side on which the object leaves, if it is gone in the middle and comes back as it was
  turns      whether the first object is there at the beginning, and the second at the end

`judge` compares the answers with the caption; `chance` is the share that a blind guesser gets right.
"""

import dataclasses

import numpy as np

from data.sources.shapes import (
  AXES,
  COLOURS,
  DIRECTIONS,
  RELATIONS,
  SHAPES,
  SIDES,
  ZOOMS,
  distance,
  parse,
)

# One over the number of answers that the grammar allows. The colours, or directions, of a pair always differ.
CHANCES = {
  "colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "direction": 1 / len(DIRECTIONS),
  "bounce": 1 / len(AXES), "order": 1 / 12, "camera": 1 / (len(DIRECTIONS) + len(ZOOMS)),
  "relation": 1 / len(RELATIONS), "behind": 1 / 2, "two colours": 1 / 15, "two shapes": 1 / 9,
  "returns": 1 / len(SIDES), "turns": 1 / 2,
}  # fmt: skip
QUESTIONS = {  # asked of a single object, besides colour and shape
  "still": (), "moves": ("direction",), "bounces": ("bounce",), "order": ("order",), "pan": ("camera",),
  "zoom": ("camera",), "leaves": ("returns",),
}  # fmt: skip
STRONG = 0.30  # share of a colour's full chroma from which a pixel votes
# The least area of an object in its best frame, in squares of the short side. The world's smallest: 0.043.
PRESENT = 0.02
SOFT = 2.0  # pixels over which a template's edge fades, as edges of a decoded video do


@dataclasses.dataclass(frozen=True)
class Detection:
  """An object of one colour.

  mask_THW: its largest piece. area_T: all its pixels. centre_T2: y, x, or NaN if it is not visible.
  """

  colour: str
  mask_THW: np.ndarray
  area_T: np.ndarray
  centre_T2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
  """The objects, the most visible first, and the pixels, float32 in [0, 1]."""

  objects: tuple
  video_THWC: np.ndarray

  @property
  def short(self):
    """The short side of a frame, in pixels."""
    return min(self.video_THWC.shape[1:3])


def detect(video_THWC) -> Detections:
  """Finds the objects in uint8 [T, H, W, 3] frames."""
  video = np.asarray(video_THWC, np.float32) / 255
  chroma = video - video.mean(-1, keepdims=True)
  border = np.concatenate(
    [
      chroma[:, :2].reshape(-1, 3),
      chroma[:, -2:].reshape(-1, 3),
      chroma[:, :, :2].reshape(-1, 3),
      chroma[:, :, -2:].reshape(-1, 3),
    ]
  )
  chroma = chroma - np.median(border, axis=0)
  reference = np.array(list(COLOURS.values()), np.float32) / 255
  reference = reference - reference.mean(-1, keepdims=True) - np.median(border, axis=0)
  size = np.linalg.norm(reference, axis=-1)
  strong = (chroma**2).sum(-1) > (STRONG * size.min()) ** 2
  projection = chroma[strong] @ (reference / size[:, None]).T  # [strong pixels, colours]
  label = np.full(strong.shape, -1)
  label[strong] = projection.argmax(-1)
  share = np.zeros(strong.shape, np.float32)
  share[strong] = (projection / size)[np.arange(len(projection)), label[strong]]
  objects = []
  for index, colour in enumerate(COLOURS):
    votes = (label == index) & (share > STRONG)
    if votes.sum((1, 2)).max() < PRESENT * min(video.shape[1:3]) ** 2:
      continue
    full = np.quantile(share[votes], 0.8)  # a paler object than ours has its edge at half of its own chroma
    mask = votes & (share > 0.5 * full)
    area = mask.sum((1, 2))
    if area.max() >= PRESENT * min(video.shape[1:3]) ** 2:
      piece = _largest_piece(mask)
      objects.append(Detection(colour, piece, area, _centres(piece)))
  return Detections(tuple(sorted(objects, key=lambda detection: -detection.area_T.sum())), video)


def _largest_piece(mask_THW):
  """The largest 4-connected piece of each frame.

  Every pixel takes the largest number in reach, until none changes.
  """
  number = np.where(mask_THW, np.arange(1, mask_THW[0].size + 1).reshape(mask_THW.shape[1:]), 0)
  while True:
    by_rows = _spread_largest(number)
    by_columns = _spread_largest(by_rows.swapaxes(1, 2)).swapaxes(1, 2)
    if np.array_equal(by_columns, number):
      break
    number = by_columns
  best = [np.bincount(frame.ravel(), minlength=2)[1:].argmax() + 1 for frame in number]
  return (number == np.array(best)[:, None, None]) & mask_THW


def _spread_largest(number_THW):
  """Sets each run of nonzero numbers along the last axis to the largest of them."""
  line = np.pad(number_THW, ((0, 0), (0, 0), (0, 1))).ravel()  # a zero ends each row
  starts = np.append(0, np.flatnonzero(np.diff(line > 0)) + 1)
  lengths = np.diff(starts, append=len(line))
  largest = np.repeat(np.maximum.reduceat(line, starts), lengths)
  return largest.reshape(*number_THW.shape[:2], -1)[..., :-1]


def _centres(mask_THW):
  """The centre of each frame's mask, [T, 2] as y, x; NaN for an empty one."""
  t, h, w = mask_THW.shape
  area = mask_THW.sum((1, 2))
  total = np.stack([mask_THW.sum(2) @ (np.arange(h) + 0.5), mask_THW.sum(1) @ (np.arange(w) + 0.5)], axis=1)
  return np.where(area[:, None] > 0, total / np.maximum(area, 1)[:, None], np.nan)


# --- the judges: detections -> a word, or None


def _moments(shape, n=200):
  """Area of a shape, and height of its centre, at diameter 1."""
  grid = (np.arange(4 * n) + 0.5) / n - 2
  inside = distance(shape, grid[:, None], grid[None], 1.0) < 0
  return inside.mean() * 16, (inside.sum(1) @ grid) / inside.sum()


_MOMENTS = {shape: _moments(shape) for shape in SHAPES}


def shape_of(detection: Detection, detections: Detections, after=0.0) -> str:
  """The shape whose template, of the object's area and centre, overlaps it best in a mean over 6 frames.

  The frames are those in which the object is not hidden, after this share of the clip.

  Overlap: sum of the lesser / sum of the greater of the two coverages, pixel by pixel.
  """
  begin = int(after * len(detection.area_T))
  area_T = np.where(np.arange(len(detection.area_T)) < begin, 0, detection.area_T)
  frames = np.flatnonzero(area_T >= 0.85 * area_T.max())
  frames = frames[np.unique(np.linspace(0, len(frames) - 1, 6).astype(int))]
  other_objects = np.zeros_like(detection.mask_THW)
  for other in detections.objects:
    if other is not detection:
      other_objects |= other.mask_THW
  covers = _coverage(detection.mask_THW[frames], other_objects[frames], detections.video_THWC[frames])
  y, x = (np.arange(n, dtype=float) + 0.5 for n in covers.shape[1:])
  scores = dict.fromkeys(SHAPES, 0.0)
  for cover, centre in zip(covers, _centres(covers), strict=True):
    for shape, (area, middle) in _MOMENTS.items():
      diameter = np.sqrt(cover.sum() / area)
      top = centre[0] - middle * diameter
      signed_distance = distance(shape, (y - top)[:, None], (x - centre[1])[None], diameter)
      template = np.clip(0.5 - signed_distance / SOFT, 0, 1)
      scores[shape] += np.minimum(cover, template).sum() / np.maximum(cover, template).sum()
  return max(scores, key=scores.get)


def _coverage(masks_NHW, other_masks_NHW, frames_NHWC):
  """How much of each pixel near the mask the object covers, float32 [N, H, W].

  The position of the pixel on the line from the median colour of a ring around the object (0) to that of the
  object (1). All of the colour is used, because yuv420 halves the resolution of chroma.
  """
  near = _grow(masks_NHW, 2)
  rings = _grow(masks_NHW, 4) & ~near & ~_grow(other_masks_NHW, 1)
  covers = masks_NHW.astype(np.float32)
  edges = near & ~other_masks_NHW
  for cover, mask, ring, frame, edge in zip(covers, masks_NHW, rings, frames_NHWC, edges, strict=True):
    if ring.sum() >= 8:
      outside = np.median(frame[ring], axis=0)
      line = np.median(frame[mask], axis=0) - outside
      cover[:] = np.clip((frame - outside) @ line / (line @ line), 0, 1) * edge
  return covers


def _word(way, table):
  """The word whose (y, x) unit vector is nearest; None if neither axis is twice the other."""
  y, x = np.abs(way)
  if max(y, x) < 2 * min(y, x) or max(y, x) == 0:
    return None
  return max(table, key=lambda word: np.dot(table[word], way))


def _visible(centre_T2):
  """The centres of the frames in which the object is visible."""
  return centre_T2[~np.isnan(centre_T2[:, 0])]


def direction(centre_T2, short) -> str | None:
  """Direction from the first frames to the last.

  None below an eighth of the short side or 0.7 of the track's range.
  """
  track = _visible(centre_T2)
  if len(track) < 3:
    return None
  ends = max(1, len(track) // 8)
  net = track[-ends:].mean(0) - track[:ends].mean(0)
  axis = int(np.abs(net).argmax())
  if np.abs(net[axis]) < max(short / 8, 0.7 * np.ptp(track[:, axis])):
    return None
  return _word(net, DIRECTIONS)


def bounce(centre_T2, short) -> str | None:
  """Axis of a track that turns: it goes back by 0.4 of its range.

  The range must be at least an eighth of the short side.
  """
  track = _visible(centre_T2)
  if len(track) < 4:
    return None
  span = np.ptp(track, axis=0)
  axis = int(span.argmax())
  if span[axis] < short / 8 or span[axis] < 2 * span[1 - axis]:
    return None
  line = track[:, axis]
  back = 0.4 * span[axis]
  if not _turns_back(line, back) and not _turns_back(-line, back):
    return None
  return "left and right" if axis == 1 else "up and down"


def _turns_back(line, least):
  """Whether a track along an axis rises by `least` and then falls by `least`."""
  for i in range(2, len(line)):
    peak = line[:i].max()
    if peak - line[i] >= least and peak - line[0] >= least:
      return True
  return False


def order(centre_T2, short) -> tuple:
  """The directions of the two halves of a track."""
  middle = len(centre_T2) // 2
  return direction(centre_T2[: middle + 1], short), direction(centre_T2[middle:], short)


def relation(first: Detection, second: Detection) -> str | None:
  """Position of the first relative to the second, as a mean over the frames that show both."""
  return _word(np.nan_to_num(np.nanmean(first.centre_T2 - second.centre_T2, axis=0)), RELATIONS)


def behind(first: Detection, second: Detection) -> bool:
  """Whether the first passes behind: visible on both sides and hidden in between, while the second is not."""
  both = np.flatnonzero(~np.isnan(first.centre_T2[:, 0]) & ~np.isnan(second.centre_T2[:, 0]))
  if len(both) < 3:
    return False
  ends = both[[0, -1]]
  offset = first.centre_T2[ends] - second.centre_T2[ends]
  axis = int(np.abs(offset[1] - offset[0]).argmax())
  crosses = offset[0, axis] * offset[1, axis] < 0
  first_share, second_share = _least_visible(first), _least_visible(second)
  first_is_hidden = first_share < 0.75 and first_share + 0.15 < second_share
  return bool(crosses and first_is_hidden and second_share > 0.7)


def returns(detection: Detection, detections: Detections) -> str | None:
  """The side on which an object leaves, if it is gone in the middle and comes back with its shape and size.

  Its colour is that of the detection.
  """
  area_T, third = detection.area_T, len(detection.area_T) // 3
  if not third:
    return None
  first, last = area_T[:third].max(), area_T[-third:].max()
  gone = np.flatnonzero(area_T < 0.1 * first)
  if not len(gone) or not third // 2 <= gone[0] < len(area_T) - third or not 0.6 * first < last < 1.6 * first:
    return None
  if shape_of(detection, detections) != shape_of(detection, detections, after=0.6):
    return None
  track = _visible(detection.centre_T2[: gone[0]])
  return _word(track[-1] - track[0], SIDES) if len(track) > 1 else None


def turns(first: Detection, second: Detection) -> bool:
  """Whether the first object is all there is at the beginning, and the second at the end."""
  (a, b), (c, d) = ((one.area_T[0], one.area_T[-1]) for one in (first, second))
  return bool(a > 4 * c and d > 4 * b)


def _least_visible(detection):
  """The least area in the middle of the clip, relative to that at its ends."""
  margin = max(1, len(detection.area_T) // 5)
  return detection.area_T[margin:-margin].min() / max(detection.area_T[0], detection.area_T[-1], 1)


def camera(detections: Detections) -> str | None:
  """Zoom, if the main object's width grows or shrinks by a third; else the direction the floor comes from."""
  if not detections.objects or len(detections.video_THWC) < 3:
    return None
  width = np.sqrt(detections.objects[0].area_T)
  ends = max(1, len(width) // 8)
  growth = width[-ends:].mean() / max(width[:ends].mean(), 1e-6)
  if max(growth, 1 / max(growth, 1e-6)) > 4 / 3:
    return "in on" if growth > 1 else "out from"
  flow = _flow(detections)
  if np.abs(flow).max() < detections.short / 8:
    return None
  return _word(-flow, DIRECTIONS)


def _flow(detections, reach=12):
  """Displacement of the floor in pixels (y, x): the sum over steps of the shift of least variance.

  A step shifts along one axis.
  """
  grey_THW = detections.video_THWC.mean(-1)
  t = len(grey_THW)
  step = max(1, (t - 1) // 8)  # of 17 frames, every other one is used
  hidden = np.zeros(grey_THW.shape, bool)
  for detection in detections.objects:
    hidden |= _grow(detection.mask_THW, 2)
  shifts = [(s, 0) for s in range(-reach, reach + 1)] + [(0, s) for s in range(-reach, reach + 1) if s]
  total = np.zeros(2)
  for i in range(0, t - step, step):
    errors = []
    for y, x in shifts:
      now = (slice(max(-y, 0), min(-y, 0) or None), slice(max(-x, 0), min(-x, 0) or None))
      later = (slice(max(y, 0), min(y, 0) or None), slice(max(x, 0), min(x, 0) or None))
      clear = ~(hidden[i][now] | hidden[i + step][later])
      difference = (grey_THW[i + step][later] - grey_THW[i][now])[clear]
      errors.append(np.var(difference) if difference.size else np.inf)
    total += shifts[int(np.argmin(errors))]
  return total


def _grow(mask_THW, by):
  """The mask with all pixels within `by` rows and columns of it."""
  t, h, w = mask_THW.shape
  padded = np.pad(mask_THW, ((0, 0), (by, by), (by, by)))
  tall = np.logical_or.reduce([padded[:, y : y + h] for y in range(2 * by + 1)])
  return np.logical_or.reduce([tall[:, :, x : x + w] for x in range(2 * by + 1)])


# --- comparison with the caption


def judge(video_THWC, caption: str) -> dict[str, bool]:
  """Score name -> whether the video, uint8 [T, H, W, 3], shows it.

  ValueError for a caption that is not of the grammar.

  The kind of the caption decides which questions are asked, never what the answers are.
  """
  scene = parse(caption)
  if scene is None:
    raise ValueError(f"judge: {caption!r} is not a sentence of the world of shapes")
  detections = detect(video_THWC)
  if len(scene.objects) == 2:
    return _judge_two(scene, detections)
  ((colour, shape),) = scene.objects
  questions = ("colour", "shape", *QUESTIONS[scene.kind])
  if not detections.objects:
    return dict.fromkeys(questions, False)
  main = detections.objects[0]
  answers = {
    "colour": lambda: main.colour == colour,
    "shape": lambda: shape_of(main, detections) == shape,
    "direction": lambda: direction(main.centre_T2, detections.short) == scene.words[0],
    "bounce": lambda: bounce(main.centre_T2, detections.short) == scene.words[0],
    "order": lambda: order(main.centre_T2, detections.short) == scene.words,
    "camera": lambda: camera(detections) == scene.words[0],
    "returns": lambda: returns(main, detections) == scene.words[0],
  }
  return {name: bool(answers[name]()) for name in questions}


def _judge_two(scene, detections):
  by_colour = {detection.colour: detection for detection in detections.objects[:2]}
  (first_colour, first_shape), (second_colour, second_shape) = scene.objects
  colours_match = set(by_colour) == {first_colour, second_colour}
  results = {"two colours": colours_match, "two shapes": False, scene.kind: False}
  if colours_match:
    first, second = by_colour[first_colour], by_colour[second_colour]
    shapes = (shape_of(first, detections), shape_of(second, detections))
    results["two shapes"] = shapes == (first_shape, second_shape)
    if scene.kind == "behind":
      results[scene.kind] = behind(first, second)
    elif scene.kind == "turns":
      results[scene.kind] = turns(first, second)
    else:
      results[scene.kind] = relation(first, second) == scene.words[0]
  return results


def in_view(video_THWC) -> bool:
  """Whether an object is visible in every frame, uint8 [T, H, W, 3], and never touches the frame's edges."""
  detections = detect(video_THWC)
  if not detections.objects:
    return False
  mask = detections.objects[0].mask_THW
  edges = (mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1])
  return bool(mask.any((1, 2)).all() and not any(edge.any() for edge in edges))


def chance(name: str) -> float:
  """The share of right answers of a guesser who knows only the grammar."""
  return CHANCES[name]


def summary(results) -> dict[str, dict]:
  """Results of many `judge` calls -> {score: {"right", "of", "share", "chance"}}, in the order of CHANCES."""
  table = {}
  for name in CHANCES:
    answers = [result[name] for result in results if name in result]
    if answers:
      right, of = sum(answers), len(answers)
      table[name] = {"right": right, "of": of, "share": right / of, "chance": chance(name)}
  return table
