"""The encoding job: a source's clips in, records and a report out. Used by launch.encode.

Work is saved a shard at a time; a file is done when a shard says so. A run that was killed, and one that was not, end
in the same records: clips are encoded in batches of a shape that depends on the size of the clip alone, and what else
is in a batch changes nothing.
"""

import collections
import dataclasses
import itertools
import math
import zlib

import jax
import numpy as np

from data import clips, records
from launch import build, cli, page, report as reports
from sora_jax import checkpoint, layout
from sora_jax.errors import BadInput
from sora_jax.models import text, vae

BATCH = 16                      # clips encoded at a time, if they are small
SMALL = 17 * 96 * 96            # pixels of a small clip; a larger one is encoded by itself, four frames at a time
UNIT_PIXELS, UNIT_CLIPS = 256 << 20, 2048      # what a kill may cost
MAX_TEXT = 512                  # tokens of a caption, as many as Wan takes; a longer one is cut, and noted
TEXT_BATCH, TEXT_STEP = 8, 64   # captions embedded together; rows are of these lengths, so that compilations are few


def stamp(item):
  """Changes when a file or its caption does."""
  return f"{getattr(item, 'version', '')}-{zlib.crc32(item.caption.encode('utf-8', 'backslashreplace')):08x}"


def is_done(item, writer, out):
  """Was the file dealt with in an earlier run? BadInput if it was taken and has changed since."""
  entry = writer.files.get(item.file)
  if entry is None or entry["stamp"] == stamp(item):
    return entry is not None
  if entry["pieces"]:
    raise BadInput(f"{item.file}: it or its caption has changed since it was encoded into {out}; give another --out")
  return False


class Encoder:
  """Pixels and captions -> what records hold, by the parts in OUT.

  stride (t, y, x), channels: of the latents.  sizes, canvases: (height, width) of the frames so far, and of what they were encoded on.
  programs: those compiled for them, (rows, height, width, is it that of first frames?).
  """

  def __init__(self, directory, conditions=False):
    self.conditions = conditions            # do records hold what a model is given that takes its image as channels?
    self.sizes, self.canvases, self.programs = set(), set(), set()
    self._cfg, self._params = build.load_vae(directory / "vae")
    self.stride, self.channels = self._cfg.stride, self._cfg.z_dim
    self._tokenizer = text.Tokenizer(directory / "text" / "tokenizer.model")
    frozen = (directory / "text" / checkpoint.WEIGHTS).exists()
    self._embed = Embedder(directory / "text") if frozen else None

  def latents(self, videos):
    """uint8 [T, H, W, 3] of one `shape_on_canvas`, at most `batch_of` it -> normalised latents, float32 [t, h, w, C] each."""
    for video_THWC in videos:
      self._count(video_THWC, batch_of(shape_on_canvas(video_THWC, self.stride)))
    return [vae.normalise(latents, self._cfg) for latents in encode_batch(self._cfg, self._params, videos)]

  def condition(self, video_THWC):
    """uint8 [T, H, W, 3] -> normalised latents of its first frame and grey ones after it, float32 [t, h, w, C]."""
    self._count(video_THWC, 1)
    pixels = video_THWC[:1].astype(np.float32) / 127.5 - 1
    return vae.normalise(encode_image_video(self._params, pixels, 1 + (len(video_THWC) - 1) // self.stride[0], self._cfg), self._cfg)

  def _count(self, video_THWC, rows):
    frames, *canvas = shape_on_canvas(video_THWC, self.stride)
    self.sizes.add(video_THWC.shape[1:3])
    self.canvases.add(tuple(canvas))
    self.programs |= {(rows, *canvas, first) for first in (True, False)[:frames]}

  def texts(self, captions):
    """-> [(ids int32 [S], at most MAX_TEXT of them, embedding [S, E] or None)]."""
    ids = [np.asarray(self._tokenizer.encode(caption, MAX_TEXT), np.int32) for caption in captions]
    return list(zip(ids, self._embed(ids) if self._embed else [None] * len(ids)))

  def is_long(self, caption):
    """Does it lose its end?"""
    return len(caption) > MAX_TEXT and len(self._tokenizer.encode(caption)) > MAX_TEXT


class Embedder:
  """The frozen encoder in W/text: lists of ids -> float32 [S, E] each, of true length. Its weights are loaded when they are first needed,
  live on the Layout `where`, and can be let go: they may be larger than the DiT's."""

  def __init__(self, directory, where=None):
    self._directory, self._where, self._params = directory, where, None
    self._cfg = cfg = build.text_config(directory)
    self._run = jax.jit(lambda params, *row: text.TextEncoder(cfg, where).apply({"params": params}, *row))

  def _load(self):
    row = jax.numpy.zeros((1, 1), jax.numpy.int32)
    boxed = jax.eval_shape(text.TextEncoder(self._cfg).init, jax.random.key(0), row, row)["params"]
    _, weights = checkpoint.load_part(self._directory, None)
    self._params = checkpoint.place(weights, layout.targets(boxed, self._where, self._cfg.dtype))

  def free(self):
    """Lets the weights go."""
    self._params = None

  def __call__(self, texts):
    if self._params is None:
      self._load()
    found = [None] * len(texts)
    rows = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for batch in (rows[i:i + TEXT_BATCH] for i in range(0, len(rows), TEXT_BATCH)):
      ids_BS = np.zeros((TEXT_BATCH, -(-len(texts[batch[-1]]) // TEXT_STEP) * TEXT_STEP), np.int32)
      prompt_BS = np.zeros_like(ids_BS)
      for row, i in enumerate(batch):
        ids_BS[row, :len(texts[i])], prompt_BS[row, :len(texts[i])] = texts[i], 1
      text_BSE = np.asarray(self._run(self._params, ids_BS, prompt_BS))
      for row, i in enumerate(batch):
        found[i] = text_BSE[row, :len(texts[i])]
    return found


def encode_batch(cfg, params, videos):
  """uint8 [T, H, W, 3] of one `shape_on_canvas`, at most `batch_of` it -> raw latents [t, h, w, C] each."""
  rows, t = batch_of(shape_on_canvas(videos[0], cfg.stride)), cfg.stride[0]
  chunks = ([video[i:i + t] / np.float32(127.5) - 1 for video in videos] for i in range(0, len(videos[0]), t))
  return encode_on_canvas(cfg, params, chunks, [video.shape[1:3] for video in videos], rows)


def encode_on_canvas(cfg, params, chunks, sizes, rows):
  """Clips of unlike sizes on one canvas, streamed in time -> raw latents [t, h, w, C] each: those that each gives alone, at its own size.

  chunks: iterable of lists, the next frames [n, h, w, 3] of each clip, in [-1, 1].  sizes: (h, w) of each clip, of one `vae.canvas`.
  rows: of the batch, of which those without a clip stay empty.
  """
  canvas, valid_B2 = vae.canvas(*sizes[0], cfg.stride), np.zeros((rows, 2), np.int32)
  valid_B2[:len(sizes)] = np.array(sizes) // cfg.stride[1:]

  def on_canvas(frames):
    video_BTHWC = np.zeros((rows, len(frames[0]), *canvas, 3), np.float32)
    for row, (h, w), clip in zip(video_BTHWC, sizes, frames):
      row[:, :h, :w] = clip
    return video_BTHWC

  means = [np.asarray(mean) for mean in vae.encode_stream(params, map(on_canvas, chunks), cfg, valid=valid_B2)]
  return [row[:, :h, :w] for row, (h, w) in zip(np.concatenate(means, 1), valid_B2[:len(sizes)])]


def encode_clips(cfg, params, videos, note=lambda done: None):
  """uint8 [T, H, W, 3] each -> raw latents [t, h, w, C] each; in the batches of the encoding job, so that few compilations serve
  all. `note` is told how many more are done."""
  found, groups = [None] * len(videos), {}
  for i, video in enumerate(videos):
    groups.setdefault(shape_on_canvas(video, cfg.stride), []).append(i)
  for shape, members in groups.items():
    for some in (members[i:i + batch_of(shape)] for i in range(0, len(members), batch_of(shape))):
      for i, mean_THWC in zip(some, encode_batch(cfg, params, [videos[i] for i in some])):
        found[i] = mean_THWC
      note(len(some))
  return found


def decode_clips(cfg, params, latents, note=lambda done: None):
  """Raw latents [t, h, w, C] each -> uint8 [T, H, W, 3] each; one by one, as a sampling job decodes, so that one compilation serves both."""
  found = []
  for latents_THWC in latents:
    chunks = (latents_THWC[None, i:i + 1] for i in range(len(latents_THWC)))
    frames = np.concatenate([np.asarray(chunk)[0] for chunk in vae.decode_stream(params, chunks, cfg)])
    found.append(np.clip((frames + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8))
    note(1)
  return found


def encode_image_video(params, image_1HWC, latent_frames, cfg):
  """An image in [-1, 1] -> raw latents [t, h, w, C] of a video of it and grey frames after it; streamed in time."""
  grey = np.zeros((cfg.stride[0], *image_1HWC.shape[1:]), np.float32)
  chunks = itertools.chain([[image_1HWC]], itertools.repeat([grey], latent_frames - 1))
  return encode_on_canvas(cfg, params, chunks, [image_1HWC.shape[1:3]], 1)[0]


def shape_on_canvas(video_THWC, stride):
  """(T, H, W) of the frames of a clip and its canvas: clips for which it is the same are encoded together."""
  return len(video_THWC), *vae.canvas(*video_THWC.shape[1:3], stride)


def batch_of(shape):
  """How many clips are encoded together. By their `shape_on_canvas` alone: see the head of this file."""
  return BATCH if math.prod(shape) <= SMALL else 1


class Unit:
  """Clips between two savings: encoded as their batches fill, added to the writer in order."""

  def __init__(self, encoder, writer):
    self._encoder, self._writer = encoder, writer
    self._begin()

  def _begin(self):
    self._records, self._waiting, self._entries, self._pixels = [], {}, {}, 0

  @property
  def full(self):
    return self._pixels >= UNIT_PIXELS or len(self._records) >= UNIT_CLIPS

  def add(self, clip, video_THWC, source):
    record = records.Record(None, None, clip.caption, clip.file, clip.start, clip.fps, source)
    shape = shape_on_canvas(video_THWC, self._encoder.stride)
    batch = self._waiting.setdefault(shape, [])
    batch.append((len(self._records), video_THWC))
    self._records.append(record)
    self._pixels += np.prod(video_THWC.shape[:3])
    if len(batch) == batch_of(shape):
      self._run(self._waiting.pop(shape))

  def close(self, file, entry):
    """All pieces of `file` are added."""
    self._entries[file] = entry

  def _run(self, batch):
    for (i, _), latents in zip(batch, self._encoder.latents([video for _, video in batch])):
      if not np.isfinite(latents).all():
        raise BadInput(f"{self._records[i].file}: its latents are not finite; the VAE is broken: train it again")
      self._records[i] = dataclasses.replace(self._records[i], latents_THWC=latents)
    for i, video_THWC in batch if self._encoder.conditions else ():
      self._records[i] = dataclasses.replace(self._records[i], cond_THWC=self._encoder.condition(video_THWC))

  def save(self):
    """Encodes what waits, and finishes a shard."""
    for batch in list(self._waiting.values()):
      self._run(batch)
    captions = sorted({record.caption for record in self._records})
    texts = dict(zip(captions, self._encoder.texts(captions)))
    for record in self._records:
      ids, embedding = texts[record.caption]
      self._writer.add(dataclasses.replace(record, text_ids_S=ids, text_SE=embedding))
    for file, entry in self._entries.items():
      self._writer.close_file(file, entry)
    self._writer.commit()
    self._begin()


def encode(source, items, encoder, writer, stop, square=False):
  """All items into the writer -> True; False if `stop()` said so in between: what was encoded by then is saved.

  square: of each clip the square in its middle.
  """
  unit = Unit(encoder, writer)
  with cli.Bar("encoding", len(items)) as bar:
    for item in items:
      entry = {"stamp": stamp(item), "pieces": 0}
      try:
        for clip in source.read(item):
          if isinstance(clip, clips.Dropped):
            entry.setdefault("dropped", []).append(dataclasses.asdict(clip))
          else:
            video_THWC = clips.crop(clip.video_THWC, encoder.stride, square)
            if records.uid(clip.file, clip.start) not in writer.uids:
              unit.add(clip, video_THWC, source.name)
            describe(entry, clip, video_THWC)
            bar.advance(0, f"{item.file} up to {entry['seconds']:.1f} s")
          if unit.full:
            unit.save()
          if stop():
            unit.save()
            return False
      except clips.BadClip as e:
        entry["passed_over"] = f"from {entry['seconds']:.3f} s on: {e}" if entry["pieces"] else str(e)
      if "dropped" in entry and not entry["pieces"]:
        entry.setdefault("passed_over", nothing_left(entry["dropped"]))
      if encoder.is_long(item.caption):
        entry.setdefault("notes", []).append(f"its caption is cut to {MAX_TEXT} tokens")
      unit.close(item.file, entry)
      bar.advance()
    unit.save()
  return True


def nothing_left(dropped):
  """Why a file has none left: the reasons, the one of most seconds first."""
  seconds = collections.Counter()
  for piece in dropped:
    seconds[piece["why"]] += piece["seconds"]
  return "; ".join(f"{why}: {total:.2f} s" for why, total in seconds.most_common())


def describe(entry, clip, video_THWC):
  """Adds a piece to what the report says of its file."""
  frames, *size = clip.video_THWC.shape[:3]
  entry["pieces"] += 1
  entry["frames"] = entry.get("frames", 0) + len(video_THWC)
  entry["seconds"] = clip.start + frames / clip.fps
  entry["fps"], entry["size"] = clip.fps, list(video_THWC.shape[1:3])
  if entry["size"] != size:
    entry["cropped"] = {"from": size, "to": entry["size"]}
  if getattr(clip, "scaled_from", None):
    entry["scaled"] = {"from": list(clip.scaled_from), "to": size}
  left_out = entry.get("frames_left_out", 0) + getattr(clip, "left_out", 0) + frames - len(video_THWC)
  if left_out:
    entry["frames_left_out"] = left_out
  if getattr(clip, "notes", ()):
    entry["notes"] = list(clip.notes)


def write_report(path, source, spec, items, writer, index=None):
  """What was taken, and what was passed over and why, by file -> the report.

  A damaged video whose beginning is good stands in both. `notes`: what the listing of the source found. Once there is an index of the records,
  `numbers` is beside them, and a page that shows all of it is written to report.html.
  """
  taken, passed_over, notes = {}, dict(getattr(source, "ignored", ())), {}
  for file, note in getattr(source, "notes", ()):
    notes.setdefault(file, []).append(note)
  for item in items:
    entry = {k: v for k, v in writer.files.get(item.file, {}).items() if k != "stamp"}
    if "passed_over" in entry:
      passed_over[item.file] = entry["passed_over"]
    if entry.get("pieces"):
      taken[item.file] = entry | {"notes": entry.get("notes", []) + notes.pop(item.file, [])}
  report = {"format_version": 1, "source": spec, "files": len(items), "records": len(writer.uids),
            "sizes": "height, width in pixels", "taken": taken, "passed_over": passed_over, "notes": notes}
  if index is not None:
    report["numbers"] = reports.numbers(report, index)
    page.save(path.with_suffix(".html"), reports.report_page(report, index))
  records.write_json(path, report)
  return report


def finish(writer, encoder, out):
  """Writes the index -> RecordIndex."""
  (null_ids, null_embedding), = encoder.texts([""])
  return writer.finish({
      "latent_channels": encoder.channels, "vae_stride": list(encoder.stride),
      "vae_fingerprint": build.fingerprint(out / "vae"), "text_fingerprint": build.fingerprint(out / "text"),
      "conditions": encoder.conditions,
  }, null_ids, null_embedding)
