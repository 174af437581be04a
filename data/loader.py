"""The pipeline: step number -> this host's rows of a PackedBatch, as a Grain MapDataset of the plan's steps.

The plan says which clips stand where; here threads read, patch and pack them. The state is the plan's cursor alone: it
comes out with each batch, goes into the checkpoint, and back into `batches` on any number of hosts. What is random
about a clip (is its caption dropped, is its first frame given) is a hash of (seed, uid, epoch): neither neighbours nor
hosts nor the order of reading can change it.

A damaged record is named once and counted, and its place in the row is padding; too many of them stop the run.
"""

import collections.abc
import dataclasses
import itertools
import threading

import grain
import numpy as np

from data.mixture import Mixture
from data.plan import Plan, mix64
from data.records import DamagedRecord, RecordIndex
from sora_jax import masks
from sora_jax.batch import Clip, image_channels, pack
from sora_jax.errors import BadInput
from sora_jax.patches import coords, grid, patchify, time_scale, whole

CAPTION, GIVEN = 3, 4          # salts: what a hash is for


def batches(index, plan, *, seed, cursor=None, host=0, hosts=1, embedded=False, caption_dropout=0.1, image_to_video=0.0,
            base_fps=None, cond_channels=0, max_damaged=10, on_damage=print, epochs=None, threads=2, prefetch=4):
  """Iterator over (PackedBatch of numpy with this host's rows, Cursor after the step), from `cursor` on.

  index: RecordIndex or Mixture. plan: Plan over index.rows; its rows_per_step, R, is that of all hosts together: host h of H has
    the rows [h R / H, (h + 1) R / H) of each step.
  embedded: texts are the embeddings in the records, not the token ids.
  caption_dropout: share of the clips whose text is the null text.
  image_to_video: share of the clips of more than one latent frame whose first one is given.
  base_fps: coordinate t counts latent frames of a video of this rate (`time_scale`); None: the clip's own.
  cond_channels: how many channels are joined to the latents, by a model that takes its image so (Wan I2V); 0: none.
  max_damaged: so many records may be damaged, on a host; on_damage(line) is told each once, from a reading thread.
  epochs: stop after so many, the last step filled up with empty rows; None: never.
  threads, prefetch: how many read, and how many steps ahead.

  Raises BadInput where hosts do not divide the rows, records hold no embeddings, or (from `next`) too many are damaged.
  """
  if plan.rows_per_step % hosts:
    raise BadInput(f"rows a step: {plan.rows_per_step}; a multiple of the {hosts} hosts; change either")
  share = plan.rows_per_step // hosts
  load = _Loader(index, plan, seed, slice(host * share, (host + 1) * share), embedded, caption_dropout, image_to_video,
                 base_fps, cond_channels, max_damaged, on_damage)
  dataset = grain.MapDataset.source(_Steps(plan.steps(cursor, epochs=epochs))).map(load)
  steps = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
  return itertools.takewhile(bool, steps)


def chance(seed, purpose, uid, epoch):
  """Uniform in [0, 1), one a clip, from (seed, uid, epoch) and what it is for; uid uint64 [N], epoch int [N]."""
  return (mix64(seed, purpose, uid, epoch) >> np.uint64(11)) * 2.0 ** -53


class _Steps:
  """A plan's steps as Grain's random access source: entry i is the i-th step from the cursor on.

  () after the last: Grain would pass over None, and search on for ever. Steps are planned when asked for, and forgotten
  once given: about a window at a time is in memory.
  """

  def __init__(self, steps):
    self._steps, self._planned, self._next, self._lock = steps, {}, 0, threading.Lock()

  def __len__(self):
    return 1 << 62

  def __getitem__(self, i):
    with self._lock:
      while self._next <= i:
        self._planned[self._next] = next(self._steps, ())
        self._next += 1
      return self._planned.pop(i)


@dataclasses.dataclass
class _Loader:
  """(cursor, StepPlan) -> (PackedBatch of some rows of the step, cursor). Fields as in `batches`."""
  index: RecordIndex | Mixture
  plan: Plan
  seed: int
  rows: slice
  embedded: bool
  caption_dropout: float
  image_to_video: float
  base_fps: float | None
  cond_channels: int
  max_damaged: int
  on_damage: collections.abc.Callable

  def __post_init__(self):
    ids, embedding_SE = self.index.null_text
    if self.embedded and embedding_SE is None:
      raise BadInput(f"{self.index.directory}: its records hold no text embeddings; the model takes them; encode again "
                     "with a text encoder, or train one with the model")
    null = np.asarray(embedding_SE, np.float32) if self.embedded else ids
    if len(null) > self.plan.null_text_tokens:
      raise ValueError(f"the null text has {len(null)} tokens, the plan allows for {self.plan.null_text_tokens}")
    self.null = self.padded(null)
    if self.cond_channels and not self.index.header.get("conditions"):
      raise BadInput(f"{self.index.directory}: its records do not hold what this model is given of an image; encode again with --workdir of it")
    self.damaged, self.lock = set(), threading.Lock()

  def __call__(self, step):
    if not step:
      return step
    cursor, rows = step[0], step[1].rows[self.rows]
    positions, epochs = np.array([clip for row in rows for clip in row], np.int64).reshape(-1, 2).T
    entries = self.index.rows[positions]
    drop = chance(self.seed, CAPTION, entries["uid"], epochs) < self.caption_dropout
    clips = map(self.clip, positions.tolist(), epochs.tolist(), entries, drop, chance(self.seed, GIVEN, entries["uid"], epochs))
    packed = [[clip for clip in itertools.islice(clips, len(row)) if clip is not None] for row in rows]
    if not any(packed):
      packed[0] = [self.nothing()]
    return pack(packed, self.plan.shape), cursor

  def clip(self, position, epoch, entry, drop, uniform):
    """One clip of the index, ready to be packed; None if its record is damaged."""
    try:
      record = self.index[position]
    except DamagedRecord as e:
      self.count(position, str(e))
      return None
    latents_THWC, fps = whole(record.latents_THWC, self.plan.patch).astype(np.float32), float(entry["fps"])
    size = latents_THWC.shape[:3]
    given_T = masks.draw(uniform, self.image_to_video, size[0], self.plan.patch[0])
    given_N = masks.tokens(np.broadcast_to(given_T[:, None, None], size), self.plan.patch) if given_T.any() else None
    text = self.null
    if not drop:
      text = self.padded(record.text_SE.astype(np.float32) if self.embedded else record.text_ids_S)
    cond_LQ = None
    if self.cond_channels:
      cond_LQ = patchify(image_channels(whole(record.cond_THWC, self.plan.patch).astype(np.float32), self.cond_channels), self.plan.patch)
    tyx_N3 = coords(grid(size, self.plan.patch), time_scale(self.base_fps, fps))
    return Clip(tokens_LP=patchify(latents_THWC, self.plan.patch), coords_L3=tyx_N3, texts=[text], given_L=given_N, cond_LQ=cond_LQ,
                uid=int(entry["uid"]), size=size, fps=fps, epoch=epoch, source=int(entry["source"]))

  def padded(self, text):
    """The text, with a zero after it where it is shorter than the plan's text_pad: embeddings for a model of this text_pad (Wan)."""
    missing = int(len(text) < (self.plan.text_pad or 0))
    return np.pad(text, [(0, missing)] + [(0, 0)] * (text.ndim - 1)) if missing else text

  def nothing(self):
    """A clip of no tokens, which tells `pack` its widths where this host has no clip in a step."""
    values = int(np.prod(self.plan.patch))
    empty = lambda width: np.zeros((0, width), np.float32)  # noqa: E731
    return Clip(tokens_LP=empty(values * self.index.header["latent_channels"]), coords_L3=empty(3), texts=[self.null[:0]], uid=0, size=(0, 0, 0),
                fps=0.0, cond_LQ=empty(values * self.cond_channels) if self.cond_channels else None)

  def count(self, position, line):
    """Tells of a damaged record, once. Raises BadInput for one too many."""
    with self.lock:
      if position in self.damaged:
        return
      self.damaged.add(position)
      count = len(self.damaged)
    self.on_damage(line)
    if count > self.max_damaged:
      raise BadInput(f"{self.index.directory}: {count} records are damaged, at most {self.max_damaged} are passed over "
                     f"(max_damaged); the last: {line}; copy the records again, or encode again")
