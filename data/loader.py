"""The input pipeline: step number -> this host's rows of a PackedBatch.

It is a Grain MapDataset over the steps of the plan. The plan says which clips share a row; threads here read,
patchify and pack them. The only state is the plan's cursor. It is returned with each batch and stored in the
checkpoint, and `batches` resumes from it on any number of hosts. What is random about a clip (whether its
caption is dropped, what of it is given) is a hash of (seed, uid, epoch), so it depends on
neither the neighbours, nor the hosts, nor the order of reading.

A damaged record is reported once and counted, and its place in the row is padding. Too many of them stop the
run.
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

CAPTION, GIVEN = 3, 4  # salts: one for each use of the hash


def batches(
  index,
  plan,
  *,
  seed,
  cursor=None,
  host=0,
  hosts=1,
  embedded=False,
  caption_dropout=0.1,
  given=None,
  base_fps=None,
  cond_channels=0,
  max_damaged=10,
  on_damage=print,
  epochs=None,
  threads=2,
  prefetch=4,
):
  """Iterator over (PackedBatch of numpy with this host's rows, Cursor after the step), starting at `cursor`.

  index: RecordIndex or Mixture. plan: Plan over index.rows. Its rows_per_step, R, counts the rows of all
    hosts: host h of H has the rows [h R / H, (h + 1) R / H) of each step.
  embedded: texts are the embeddings in the records, not the token ids.
  caption_dropout: share of the clips whose text is the null text.
  given: {one of masks.KINDS: share of the clips of which that is given}.
  base_fps: coordinate t counts latent frames of a video of this rate (`time_scale`); None: of the clip's own
  rate.
  cond_channels: channels joined to the latents, for models that take their image this way (Wan I2V); 0: none.
  max_damaged: how many records may be damaged, on each host. on_damage(line): called once for each, from a
    reading thread.
  epochs: stop after this many; the last step is filled up with empty rows. None: never stop.
  threads: how many threads read. prefetch: how many steps they read ahead.

  Raises BadInput if hosts do not divide the rows, if embeddings are asked for and the records hold none, or
  (from `next`) if too many records are damaged.
  """
  if plan.rows_per_step % hosts:
    raise BadInput(f"rows a step: {plan.rows_per_step}; a multiple of the {hosts} hosts; change either")
  share = plan.rows_per_step // hosts
  load = _Loader(
    index,
    plan,
    seed,
    slice(host * share, (host + 1) * share),
    embedded,
    caption_dropout,
    given or {},
    base_fps,
    cond_channels,
    max_damaged,
    on_damage,
  )
  dataset = grain.MapDataset.source(_Steps(plan.steps(cursor, epochs=epochs))).map(load)
  steps = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
  return itertools.takewhile(bool, steps)


def draw_uniform(seed, purpose, uid, epoch):
  """Uniform in [0, 1), one a clip: a hash of (seed, uid, epoch) and a salt. uid uint64 [N], epoch int [N]."""
  return (mix64(seed, purpose, uid, epoch) >> np.uint64(11)) * 2.0**-53


class _Steps:
  """A plan's steps as Grain's random access source: entry i is the i-th step after the cursor.

  Entries after the last step are (): Grain skips None and would search for ever. A step is planned when it is
  asked for and dropped once it is returned, so about one window is in memory.
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
  """(cursor, StepPlan) -> (PackedBatch of a slice of the step's rows, cursor).

  The fields are as in `batches`.
  """

  index: RecordIndex | Mixture
  plan: Plan
  seed: int
  rows: slice
  embedded: bool
  caption_dropout: float
  given: dict
  base_fps: float | None
  cond_channels: int
  max_damaged: int
  on_damage: collections.abc.Callable

  def __post_init__(self):
    ids, embedding_SE = self.index.null_text
    if self.embedded and embedding_SE is None:
      raise BadInput(
        f"{self.index.directory}: its records hold no text embeddings, which the model needs; encode again "
        "with a text encoder, or train one with the model"
      )
    null = np.asarray(embedding_SE, np.float32) if self.embedded else ids
    if len(null) > self.plan.null_text_tokens:
      raise ValueError(
        f"the null text has {len(null)} tokens, the plan allows for {self.plan.null_text_tokens}"
      )
    self.null = self.pad_text(null)
    if self.cond_channels and not self.index.header.get("conditions"):
      raise BadInput(
        f"{self.index.directory}: its records do not hold what this model is given of an image; encode "
        "again with --workdir of it"
      )
    self.damaged, self.lock = set(), threading.Lock()

  def __call__(self, step):
    if not step:
      return step
    cursor, rows = step[0], step[1].rows[self.rows]
    positions, epochs = np.array([clip for row in rows for clip in row], np.int64).reshape(-1, 2).T
    entries = self.index.rows[positions]
    drop = draw_uniform(self.seed, CAPTION, entries["uid"], epochs) < self.caption_dropout
    seeds = mix64(self.seed, GIVEN, entries["uid"], epochs)
    clips = map(self.clip, positions.tolist(), epochs.tolist(), entries, drop, seeds)
    packed = [[clip for clip in itertools.islice(clips, len(row)) if clip is not None] for row in rows]
    if not any(packed):
      packed[0] = [self.empty_clip()]
    return pack(packed, self.plan.shape), cursor

  def clip(self, position, epoch, entry, drop, seed):
    """One clip of the index, ready to be packed; None if its record is damaged."""
    try:
      record = self.index[position]
    except DamagedRecord as e:
      self.count_damaged(position, str(e))
      return None
    patch, fps = self.plan.patch, float(entry["fps"])
    latents_THWC = whole(record.latents_THWC, patch).astype(np.float32)
    size = latents_THWC.shape[:3]
    given_L = None
    if any(self.given.values()):
      given_L = masks.tokens(masks.draw(np.random.default_rng(seed), self.given, size, patch), patch)
    texts, prompt_L = [self.null], None
    if not drop:
      text = record.text_SE.astype(np.float32) if self.embedded else record.text_ids_S
      texts = [self.pad_text(part) for part in np.split(text, np.cumsum(record.spans_N2[:-1, 0]))]
      at_T = np.searchsorted(record.spans_N2[:, 1], np.arange(0, size[0], patch[0]), side="right")
      prompt_L = np.repeat(at_T, np.prod(size[1:]) // np.prod(patch[1:]))
    cond_LQ = None
    if self.cond_channels:
      cond_THWC = whole(record.cond_THWC, patch).astype(np.float32)
      cond_LQ = patchify(image_channels(cond_THWC, self.cond_channels), patch)
    coords_L3 = coords(grid(size, patch), time_scale(self.base_fps, fps))
    return Clip(
      tokens_LP=patchify(latents_THWC, patch),
      coords_L3=coords_L3,
      texts=texts,
      given_L=given_L,
      prompt_L=prompt_L,
      cond_LQ=cond_LQ,
      uid=int(entry["uid"]),
      size=size,
      fps=fps,
      epoch=epoch,
      source=int(entry["source"]),
    )

  def pad_text(self, text):
    """The text, followed by one zero if it is shorter than the plan's text_pad (embeddings for Wan)."""
    if len(text) >= (self.plan.text_pad or 0):
      return text
    return np.pad(text, [(0, 1)] + [(0, 0)] * (text.ndim - 1))

  def empty_clip(self):
    """A clip of no tokens. It tells `pack` the widths of the arrays when this host has no clip in a step."""

    def zeros(width):
      return np.zeros((0, width), np.float32)

    values = int(np.prod(self.plan.patch))
    tokens_LP = zeros(values * self.index.header["latent_channels"])
    cond_LQ = zeros(values * self.cond_channels) if self.cond_channels else None
    return Clip(
      tokens_LP=tokens_LP,
      coords_L3=zeros(3),
      texts=[self.null[:0]],
      uid=0,
      size=(0, 0, 0),
      fps=0.0,
      cond_LQ=cond_LQ,
    )

  def count_damaged(self, position, line):
    """Reports a damaged record, once. Raises BadInput if there are more than max_damaged."""
    with self.lock:
      if position in self.damaged:
        return
      self.damaged.add(position)
      count = len(self.damaged)
    self.on_damage(line)
    if count > self.max_damaged:
      raise BadInput(
        f"{self.index.directory}: {count} records are damaged, at most {self.max_damaged} are skipped "
        f"(max_damaged); the last: {line}; copy the records again, or encode again"
      )
