"""Crops of raw clips, for training the VAE: step number -> clips and images in [-1, 1].

A pure function of the step number, the seed and the settings. Reading a file is expensive (a video is decoded
from its start) and crops are small, so each reading of a file gives several crops, from random positions and
times, which are spread over many steps:

  lanes    crop j of the stream comes from lane j mod V. A lane takes K crops from one file, then goes on to
           the next of an endless list of files, which is shuffled anew each epoch. Lanes change files at
           different times, so the load of reading is even.
  memory   the crops of about 1.5 V files, as uint8, within `pool_bytes`, and one piece of a video for each
           reading thread, whatever the length of the videos. If there are few files, K grows until the pool
           is full: four clips are read once in some hundred crops, not at each step.

Positions and times are uniform. Nothing is flipped or scaled; frames are only cropped. A clip smaller than
the crop is reflected at its edges. A clip with fewer frames than a crop gives images only.
"""

import collections
import concurrent.futures
import threading

import grain
import numpy as np

from data.clips import BadClip
from data.plan import mix64, shuffle
from sora_jax.errors import BadInput

FILES, PIECE, POSITION = 5, 6, 7  # salts: one for each use of the hash
LANES = 64  # the most files that are mixed at a time


class CropStream:
  """An endless list of crops [T, H, W, 3] uint8 of one size: `stream[j]`.

  reads: the least number of crops that one reading of a file gives. pool_bytes: memory for crops read in
  advance.
  bad: {file: reason} of the files that could not be read, or not to their end. short: {file: frames} of the
  files that are too short. Both hold the files met so far.
  """

  def __init__(self, source, items, size_THW, *, seed, reads, pool_bytes, on_bad):
    self.source, self.items, self.size, self.seed, self.on_bad = source, items, tuple(size_THW), seed, on_bad
    capacity = max(1, int(pool_bytes / 1.5 / (3 * np.prod(self.size))))  # crops in the pool
    self.lanes = max(1, min(len(items), LANES, capacity // reads))
    self.reads = reads
    if self.lanes >= len(items):
      self.reads = int(np.clip(capacity // self.lanes, reads, 1024))
    self.bad, self.short = {}, {}
    self._lock, self._readings = threading.Lock(), collections.OrderedDict()

  def __getitem__(self, j):
    round_number, lane = divmod(int(j), self.lanes)
    nth, k = divmod(round_number + lane * self.reads // self.lanes, self.reads)
    return self._reading(nth * self.lanes + lane)[k]

  def _reading(self, number):
    """The crops of one reading. The first thread that asks reads; the others wait for it."""
    with self._lock:
      future, first = self._readings.get(number), number not in self._readings
      if first:
        future = self._readings[number] = concurrent.futures.Future()
        while len(self._readings) > self.lanes + self.lanes // 2 + 1:
          self._readings.popitem(last=False)
      self._readings.move_to_end(number)
    if first:
      try:
        future.set_result(self._read_next(number))
      except BaseException as e:
        with self._lock:
          self._readings.pop(number, None)
        future.set_exception(e)
    return future.result()

  def _read_next(self, number):
    """Crops of file `number` in the shuffled order, or of the first one after it that is long enough."""
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
    raise BadInput(
      f"source {self.source.name}: of {len(self.items)} files none has {self.size[0]} frames; {detail}; "
      "train on shorter crops, or give other files"
    )

  def _read(self, item, number):
    """Reads a file once -> (crops [K, T, H, W, 3] or None, frames of its longest piece).

    Each crop is uniform over all times of all pieces. Reservoir sampling draws it in one pass with one piece
    in memory.
    """
    T, crops, starts, longest = self.size[0], None, 0, 0
    index_K = np.arange(self.reads)
    try:
      for p, piece in enumerate(self.source.read(item)):
        longest = max(longest, len(piece.video_THWC))
        piece_starts = len(piece.video_THWC) - T + 1
        if piece_starts < 1:
          continue
        starts += piece_starts
        if crops is None:
          crops = np.empty((self.reads, *self.size, 3), np.uint8)
        times = (mix64(self.seed, PIECE, number, p, index_K) % np.uint64(starts)).tolist()
        positions = mix64(self.seed, POSITION, number, p, index_K).tolist()
        for k, (time, position) in enumerate(zip(times, positions, strict=True)):
          if time < piece_starts:
            frames_THWC = piece.video_THWC[time : time + T]
            crops[k] = crop_at_random(frames_THWC, self.size[1:], position >> 32, position & 0xFFFFFFFF)
    except BadClip as e:
      with self._lock:
        known = item.file in self.bad
        self.bad[item.file] = str(e)
      if not known:
        self.on_bad(f"{item.file}: {e}")
    return crops, longest


def crop_at_random(video_THWC, size, random_y, random_x):
  """A crop of `size` (height, width).

  Two random integers choose its position. Frames smaller than it are reflected.
  """
  for axis, length in zip((1, 2), size, strict=True):
    missing = length - video_THWC.shape[axis]
    if missing > 0:
      pads = [(0, 0)] * 4
      pads[axis] = (missing // 2, missing - missing // 2)
      video_THWC = np.pad(video_THWC, pads, mode="reflect" if video_THWC.shape[axis] > 1 else "edge")
  height, width = video_THWC.shape[1:3]
  y, x = random_y % (height - size[0] + 1), random_x % (width - size[1] + 1)
  return video_THWC[:, y : y + size[0], x : x + size[1]]


class Crops:
  """Iterator over {"clips": [clips, frames, H, W, 3], "images": [images, 1, H, W, 3]}, float32 in [-1, 1].

  bad: as in CropStream, of clips and images.  short: as in CropStream, of the clips.
  """

  def __init__(
    self,
    source,
    *,
    seed,
    step=0,
    clips,
    images,
    frames,
    size,
    part=0,
    parts=1,
    reads=4,
    pool_bytes=256 << 20,
    on_bad=print,
    threads=2,
    prefetch=4,
  ):
    """Begins at step number `step`; has no end.

    source: see data/clips.py. size: (height, width) in pixels. frames: of each clip.
    part, parts: of `clips` and `images` the part-th of so many equal shares is read, for one process of
    several; `parts` divides both.
    reads: the least number of crops that one reading of a file gives. pool_bytes: memory for crops read in
    advance. on_bad(line): called once for each file that cannot be read, from a reading thread.
    threads: how many threads read. prefetch: how many steps they read ahead.
    Raises BadInput if the source is empty; while reading, if no file has enough frames.
    """
    items = source.items()
    if not items:
      raise BadInput(f"source {source.name}: it holds no clips; at least one is needed; give another")
    reported, lock = set(), threading.Lock()

    def report(line):
      """Calls on_bad, once for a line that both streams give."""
      with lock:
        if line in reported:
          return
        reported.add(line)
      on_bad(line)

    self._counts, self._part, self._parts = {"clips": clips, "images": images}, part, parts
    self._streams = {}
    for i, (name, length) in enumerate({"clips": frames, "images": 1}.items()):
      self._streams[name] = CropStream(
        source,
        items,
        (length, *size),
        seed=2 * seed + i,
        reads=reads,
        on_bad=report,
        pool_bytes=pool_bytes * length // (frames + 1),
      )
    self.bad = collections.ChainMap(*(stream.bad for stream in self._streams.values()))
    self.short = self._streams["clips"].short
    dataset = grain.MapDataset.range(step, 1 << 62).map(self._batch)
    self._batches = iter(
      dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )

  def __iter__(self):
    return self

  def __next__(self):
    return next(self._batches)

  def _batch(self, step):
    batch = {}
    for name, count in self._counts.items():
      stream = self._streams[name]
      share = count // self._parts
      crops = np.empty((share, *stream.size, 3), np.float32)
      for i in range(share):
        crops[i] = stream[step * count + self._part * share + i]
      batch[name] = crops / np.float32(127.5) - 1
    return batch
