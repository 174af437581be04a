"""Crops of raw clips, for training the VAE: step number -> clips and images in [-1, 1].

A pure function of the step number, the seed and the settings. Reading is dear (a video is decoded from its start),
crops are small: so a file that is read gives several at once, of random places and times, dealt out over many steps:

  lanes    crop j of the stream comes from lane j mod V; a lane shows one file for K crops, then the next one of an
           endless list of files, shuffled anew each epoch. Lanes change files at different times, so reading is even.
  memory   the crops of about 1.5 V files, as uint8, within `pool_bytes`, and one piece of a video a reading thread,
           whatever the length of the videos. Where files are few, K grows to fill the pool: four clips are read once in
           some hundred crops, not at each step.

Places and times are uniform; nothing is flipped, nor scaled: sizes are cut to the crop. A clip smaller than the crop is
reflected at its edges. A clip of fewer frames than a crop serves as images only.
"""

import collections
import concurrent.futures
import threading

import grain
import numpy as np

from data.clips import BadClip
from data.plan import mix64, shuffle
from sora_jax.errors import BadInput

FILES, PIECE, PLACE = 5, 6, 7      # salts: what a hash is for
LANES = 64                         # at most so many files are mixed at a time


class CropStream:
  """An endless list of crops [T, H, W, 3] uint8 of one size: `stream[j]`.

  reads: crops that a file which is read gives, at least. pool_bytes: memory for crops to come.
  bad: {file: reason} of the files that could not be read (whole), short: {file: frames} of those too short, once met.
  """

  def __init__(self, source, items, size_THW, *, seed, reads, pool_bytes, on_bad):
    self.source, self.items, self.size, self.seed, self.on_bad = source, items, tuple(size_THW), seed, on_bad
    room = max(1, int(pool_bytes / 1.5 / (3 * np.prod(self.size))))        # crops held
    self.lanes = max(1, min(len(items), LANES, room // reads))
    self.reads = reads if self.lanes < len(items) else int(np.clip(room // self.lanes, reads, 1024))
    self.bad, self.short = {}, {}
    self._lock, self._visits = threading.Lock(), collections.OrderedDict()

  def __getitem__(self, j):
    turn, lane = divmod(int(j), self.lanes)
    nth, k = divmod(turn + lane * self.reads // self.lanes, self.reads)
    return self._visit(nth * self.lanes + lane)[k]

  def _visit(self, number):
    """The crops of one reading; whoever comes first reads, the others wait for it."""
    with self._lock:
      future, first = self._visits.get(number), number not in self._visits
      if first:
        future = self._visits[number] = concurrent.futures.Future()
        while len(self._visits) > self.lanes + self.lanes // 2 + 1:
          self._visits.popitem(last=False)
      self._visits.move_to_end(number)
    if first:
      try:
        future.set_result(self._find(number))
      except BaseException as e:
        with self._lock:
          self._visits.pop(number, None)
        future.set_exception(e)
    return future.result()

  def _find(self, number):
    """Crops of the file whose turn it is, or of the first one after it, in the shuffled order, that has any."""
    epoch, rank = divmod(number, len(self.items))
    for later in range(len(self.items)):
      (i,) = shuffle([(rank + later) % len(self.items)], len(self.items), self.seed, FILES, epoch)
      item = self.items[i]
      if item.file in self.short:
        continue
      crops, frames = self._read(item, number)
      if crops is not None:
        return crops
      if item.file not in self.bad:
        self.short[item.file] = frames
    if self.bad:
      file, reason = next(iter(self.bad.items()))
      detail = f"{len(self.bad)} cannot be read, such as {file}: {reason}"
    else:
      detail = f"the longest has {max(self.short.values(), default=0)} frames"
    raise BadInput(f"source {self.source.name}: of {len(self.items)} files none has {self.size[0]} frames; {detail}; "
                   "train on shorter crops, or bring other files")

  def _read(self, item, number):
    """One pass through a file -> (crops [K, T, H, W, 3] or None, frames of its longest piece).

    Each crop is drawn uniformly from all times of all pieces, in one pass (reservoir sampling): one piece is in memory.
    """
    T, crops, starts, longest = self.size[0], None, 0, 0
    which = np.arange(self.reads)
    try:
      for p, piece in enumerate(self.source.read(item)):
        longest = max(longest, len(piece.video_THWC))
        here = len(piece.video_THWC) - T + 1
        if here < 1:
          continue
        starts += here
        crops = np.empty((self.reads, *self.size, 3), np.uint8) if crops is None else crops
        lots = (mix64(self.seed, PIECE, number, p, which) % np.uint64(starts)).tolist()
        places = mix64(self.seed, PLACE, number, p, which).tolist()
        for k, (lot, place) in enumerate(zip(lots, places, strict=True)):
          if lot < here:
            crops[k] = cut(piece.video_THWC[lot:lot + T], self.size[1:], place >> 32, place & 0xFFFFFFFF)
    except BadClip as e:
      with self._lock:
        known = item.file in self.bad
        self.bad[item.file] = str(e)
      if not known:
        self.on_bad(f"{item.file}: {e}")
    return crops, longest


def cut(video_THWC, size, top, left):
  """A crop of `size` (height, width) at the place that two random integers say; if larger, reflected at the edges."""
  for axis, want in zip((1, 2), size, strict=True):
    lack = want - video_THWC.shape[axis]
    if lack > 0:
      pads = [(0, 0)] * 4
      pads[axis] = (lack // 2, lack - lack // 2)
      video_THWC = np.pad(video_THWC, pads, mode="reflect" if video_THWC.shape[axis] > 1 else "edge")
  y, x = (place % (have - want + 1)
          for have, want, place in zip(video_THWC.shape[1:3], size, (top, left), strict=True))
  return video_THWC[:, y:y + size[0], x:x + size[1]]


class Crops:
  """Iterator over {"clips": float32 [clips, frames, H, W, 3], "images": float32 [images, 1, H, W, 3]} in [-1, 1].

  bad, short: as of CropStream; of short ones, those that the clips passed over.
  """

  def __init__(self, source, *, seed, step=0, clips, images, frames, size, reads=4, pool_bytes=256 << 20, on_bad=print,
               threads=2, prefetch=4):
    """From step number `step` on, without end.

    source: see data/clips.py. size: (height, width) in pixels; `frames`: of each clip.
    reads: crops that a file which is read gives, at least. pool_bytes: memory for crops to come.
    on_bad(line) is told each file that cannot be read, once, from a reading thread.
    threads, prefetch: how many read, and how many steps ahead.
    Raises BadInput if the source is empty; while reading, if no file has enough frames.
    """
    items = source.items()
    if not items:
      raise BadInput(f"source {source.name}: it holds no clips; at least one is needed; give another")
    told, lock = set(), threading.Lock()

    def tell(line):
      with lock:
        known, _ = line in told, told.add(line)
      if not known:
        on_bad(line)

    self._counts = {"clips": clips, "images": images}
    self._streams = {
        name: CropStream(source, items, (length, *size), seed=2 * seed + i, reads=reads, on_bad=tell,
                         pool_bytes=pool_bytes * length // (frames + 1))
        for i, (name, length) in enumerate({"clips": frames, "images": 1}.items())}
    self.bad = collections.ChainMap(*(stream.bad for stream in self._streams.values()))
    self.short = self._streams["clips"].short
    dataset = grain.MapDataset.range(step, 1 << 62).map(self._batch)
    self._batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._batches)

  def _batch(self, step):
    batch = {}
    for name, count in self._counts.items():
      stream = self._streams[name]
      crops = np.empty((count, *stream.size, 3), np.float32)
      for i in range(count):
        crops[i] = stream[step * count + i]
      batch[name] = crops / np.float32(127.5) - 1
    return batch
