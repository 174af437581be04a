"""A timeline: what is given of a video, frame by frame, and what is to be made. Canvases for the model follow
from it.

A task (tasks.py) says in frames what is given; this module turns that into latents. A causal VAE of stride 4
makes a latent of the first frame, then one of every four. A latent is given only if all its frames are. So
that the frames next to made ones are in given latents, the canvas may begin a few frames after the timeline
(these are given) or before it (these are made, and cut off). Given frames that no given latent holds, as at
the far ends, are pasted into the result with all others.

A video longer than the model's window is made in windows, each of which is given the latents that come before
it. The latents are kept; only the frame that a window begins with is decoded, and encoded as a first frame.
numpy only; the VAE is passed in.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from sora_jax.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Codec:
  """The VAE of a model, for one size of frames.

  encode: uint8 [1 + stride n, H, W, 3] -> normalised latents [1 + n, h, w, C]. decode: the inverse, an
  iterator of uint8 frames. Frames are cut to the size of the request; latents cover whole patches.
  """

  encode: Callable
  decode: Callable
  stride: int  # in time
  shape: tuple  # (h, w, C) of a latent frame
  cell: tuple  # pixels (y, x) of a latent
  together: int = 1  # latent frames in a token


@dataclasses.dataclass
class Timeline:
  """F frames, of which `pieces` are given: [(number of its first frame, uint8 [n, H, W, 3])], in order.

  out: how many frames are kept, from the first. start: noise level that what is not given begins with; below
  1 it begins as `pieces` with noise, which are then all frames, and only those of kept_F are given. mask_FHW:
  uint8; what is made of a given frame: 0 nothing, 255 all.
  """

  frames: int
  size: tuple
  texts: list
  prompt_F: np.ndarray  # int: which of `texts` a frame reads, from 1
  pieces: list = dataclasses.field(default_factory=list)
  out: int | None = None
  start: float = 1.0
  kept_F: np.ndarray | None = None  # bool, where not all of `pieces` is given
  mask_FHW: np.ndarray | None = None

  @property
  def given_F(self):
    """Which frames are given, at least in part."""
    given = np.zeros(self.frames, bool)
    for first, pixels in self.pieces:
      given[first : first + len(pixels)] = True
    return given if self.kept_F is None else given & self.kept_F

  @property
  def is_partly_new(self):
    """Whether frames change that are there, so that all of them are in the canvas."""
    return self.start < 1 or self.mask_FHW is not None

  def pixels(self, first, last):
    """Frames first to last, both included, of the pieces: uint8 [n, H, W, 3]; after the end the last."""
    found = [pixels[max(0, first - start) : max(0, last + 1 - start)] for start, pixels in self.pieces]
    after = last - max(first - 1, self.frames - 1)
    return np.concatenate([*found, *[found[-1][-1:]] * after])


@dataclasses.dataclass
class Canvas:
  """What the sampler fills: a latent video, partly given. Latents are normalised."""

  latents_THWC: np.ndarray  # float32; values count where given, or where start is below 1
  given_THW: np.ndarray  # bool: latents that are kept
  prompt_T: np.ndarray  # int: which of `texts` a latent frame reads, from 1
  texts: list
  start: float = 1.0  # noise level of what is not given
  # channels joined to the latents, for a model that takes conditions so (Wan I2V)
  cond_THWC: np.ndarray | None = None


def place(given_F, stride, room=None):
  """Where the canvas of a timeline lies -> (frame that its first latent stands for, number of its latents).

  given_F: bool [F]. The frame may be negative. room: latents that may be given before or after what is made;
  None: all.
  """
  made = np.flatnonzero(~given_F)
  if not len(made):
    raise BadInput("all frames are given, and none is left to make; ask for more frames")
  first_made, last_made, frames = int(made[0]), int(made[-1]), len(given_F)

  def cover(start):
    """-> (frames given next to what is made that are in no given latent; number of latents)."""
    count = 1 + -(-(last_made - start) // stride)
    tail = (frames - 1 - start) // stride + 1  # latents that end within the timeline
    count = max(count, min(tail, count + room) if room else tail)
    held = np.zeros(frames, bool)
    for i in np.flatnonzero(given_latents(given_F, start, count, stride)):
      held[latent_frames(i, start, stride)] = True
    last = max(last_made, np.flatnonzero(held).max(initial=0))
    return int((given_F & ~held)[max(0, start) : last + 1].sum()), count

  skip = max(0, (first_made - 1) // stride - room) * stride if room and first_made else 0
  starts = [skip + s for s in range(min(stride, max(1, first_made - skip)))]
  starts += [-s for s in range(1, stride)] if not skip else []
  best = min(starts, key=lambda start: (*cover(start), abs(start - skip)))
  return best, cover(best)[1]


def latent_frames(i, start, stride):
  """The frames of latent i, as a slice of a timeline whose canvas begins at frame `start`."""
  last = start + i * stride
  return slice(max(0, last - (stride - 1 if i else 0)), max(0, last + 1))


def given_latents(given_F, start, count, stride):
  """Which of `count` latents are given: all their frames are, and there are such."""
  frames = start + np.arange(1 + stride * (count - 1))
  inside = (frames >= 0) & (frames < len(given_F))
  given = np.where(inside, given_F[np.clip(frames, 0, len(given_F) - 1)], False)
  return np.concatenate([given[:1], given[1:].reshape(-1, stride).all(1)])


class Work:
  """A timeline as it is made, window by window.

    while canvas := work.canvas():
      work.take(latents of the filled canvas)
    for frame in work.result(): ...

  Nothing is encoded before the first canvas is asked for. window: latents that the model makes at a time;
  None: all.
  """

  def __init__(self, timeline, codec, window=None):
    self.timeline, self.codec, stride = timeline, codec, codec.stride
    if timeline.is_partly_new:
      self.start, self.count = 0, 1 + -(-(timeline.frames - 1) // stride)
    else:
      self.start, self.count = place(timeline.given_F, stride, window and max(1, window // 2))
    self.count = -(-self.count // codec.together) * codec.together
    self.window = self.count if window is None else min(window, self.count)
    self.overlap = max(1, window // 4) if window else 1
    given = given_latents(timeline.given_F, self.start, self.count, stride)
    self._given_THW = np.zeros((self.count, *codec.shape[:2]), bool)
    self._given_THW[given] = True
    if timeline.mask_FHW is not None:
      self._given_THW &= ~self._masked()
    self.known = self._given_THW.all((1, 2))  # latent frames that are given, or made
    self._latents = self._at = None

  def _encode(self, given):
    """Latents of what is given; of all frames where noise is added to them."""
    line, stride = self.timeline, self.codec.stride
    latents_THWC = np.zeros((self.count, *self.codec.shape), np.float32)
    there = np.ones_like(given) if line.start < 1 else given
    edges = np.flatnonzero(np.diff(np.concatenate([[0], there, [0]])))
    for i, end in zip(edges[::2], edges[1::2]):
      frames = latent_frames(i, self.start, stride).start, self.start + (end - 1) * stride
      pixels = self._without_mask(line.pixels(*frames), *frames)
      if i:  # a lead-in, so that what follows is of the kind of later latents
        pixels = np.concatenate([pixels[:1], pixels])
      latents_THWC[i:end] = self.codec.encode(pixels)[1 if i else 0 :]
    return latents_THWC

  def _without_mask(self, pixels, first, last):
    """Frames whose masked pixels have the mean of the others."""
    if self.timeline.mask_FHW is None or self.timeline.start < 1:
      return pixels
    made = self.timeline.mask_FHW[first : last + 1, ..., None] / 255.0
    kept = 1 - made
    mean = (pixels * kept).sum((0, 1, 2)) / np.maximum(kept.sum((0, 1, 2)), 1)
    return (pixels * kept + mean * made + 0.5).astype(np.uint8)

  def _masked(self):
    """bool [T, h, w]: latents of which a pixel is masked."""
    mask, stride, (cy, cx) = self.timeline.mask_FHW > 0, self.codec.stride, self.codec.cell
    h, w = self.codec.shape[:2]
    padded = np.zeros((len(mask), h * cy, w * cx), bool)
    padded[:, : mask.shape[1], : mask.shape[2]] = mask[:, : h * cy, : w * cx]
    cells = padded.reshape(len(mask), h, cy, w, cx).any((2, 4))
    return np.stack([cells[latent_frames(i, self.start, stride)].any(0) for i in range(self.count)])

  @property
  def done(self):
    return bool(self.known.all())

  @property
  def windows(self):
    """How many canvases are left."""
    known, count = self.known.copy(), 0
    while not known.all():
      begin, end = self.span(known)
      known[begin + bool(begin) : end] = True
      count += 1
    return count

  def span(self, known):
    """(first, end) of the latents of the next window, where these are known."""
    unknown = np.flatnonzero(~known)
    size, first, last = self.window, int(unknown[0]), int(unknown[-1])
    if self.count <= size:
      return 0, self.count
    if known[-1] and not known[0]:  # backwards, from what is known
      end = min(self.count, last + 1 + self.overlap)
      return max(0, end - size), max(end, size)
    begin = min(max(0, first - 1 - self.overlap), self.count - size)
    return begin, begin + size

  def canvas(self):
    """The next Canvas; None where all is made."""
    if self.done:
      return None
    if self._latents is None:
      self._latents = self._encode(
        given_latents(self.timeline.given_F, self.start, self.count, self.codec.stride)
      )
    begin, end = self._at = self.span(self.known)
    latents = self._latents[begin:end].copy()
    given = self._given_THW[begin:end] | self.known[begin:end, None, None]
    if begin:  # the first latent of a window is of one frame
      given[0] = self.known[begin]
      if self.known[begin]:
        latents[0] = self.codec.encode(self._frame_of(begin)[None])[0]
    middle = self.start + np.arange(begin, end) * self.codec.stride - (self.codec.stride - 1) / 2
    frame_T = np.clip(np.ceil(middle), 0, self.timeline.frames - 1).astype(int)
    used, prompt_T = np.unique(self.timeline.prompt_F[frame_T], return_inverse=True)
    texts = [self.timeline.texts[i - 1] for i in used]
    return Canvas(latents, given, prompt_T.reshape(-1) + 1, texts, self.timeline.start)

  def _frame_of(self, i):
    """The last frame of latent i: the given one, or that of the latents before it, decoded."""
    frame = self.start + i * self.codec.stride
    if 0 <= frame < self.timeline.frames and self.timeline.given_F[frame] and self.timeline.mask_FHW is None:
      return self.timeline.pixels(frame, frame)[0]
    before = self._latents[max(0, i - 3) : i + 1]
    *_, last = self.codec.decode(before)
    return last

  def take(self, latents_THWC):
    """The latents of the last canvas, filled."""
    begin, end = self._at
    fresh = ~self.known[begin:end]
    if begin:
      fresh[0] = False  # it was made as a first frame
    self._latents[begin:end][fresh] = latents_THWC[fresh]
    self.known[begin:end] |= fresh

  @property
  def latents_THWC(self):
    """All latents, once they are made."""
    return self._latents

  def result(self) -> Iterable:
    """Yields the frames to keep, uint8 [H, W, 3]: given ones as they were, decoded ones otherwise."""
    line, given = self.timeline, self.timeline.given_F
    decoded = None
    for f in range(line.frames if line.out is None else line.out):
      c = f - self.start
      frame = None
      if 0 <= c < 1 + self.codec.stride * (self.count - 1):
        if decoded is None:
          decoded = iter(self.codec.decode(self._latents))
          for _ in range(c):
            next(decoded)
        frame = next(decoded)
      if given[f]:
        own = line.pixels(f, f)[0]
        if line.mask_FHW is not None and frame is not None:
          made = line.mask_FHW[f, ..., None] / 255.0
          own = (own * (1 - made) + frame * made + 0.5).astype(np.uint8)
        frame = own
      yield frame
