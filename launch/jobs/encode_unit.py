"""Clips in, records out: what the encoding job does with its share of the files.

Work is saved a shard at a time; a file is done when a shard says so. A run that was killed, and one that was not, end
in the same records: clips are encoded in batches of a shape that depends on the size of the clip alone, and what else
is in a batch changes nothing.
"""

import collections
import dataclasses
import zlib

import numpy as np

from data import clips, records
from launch.common.progress import Bar
from launch.reports import encoded, page
from sora_jax import codec, files, parts, workdir
from sora_jax.embedder import Embedder
from sora_jax.errors import BadInput
from sora_jax.models import text, vae

UNIT_PIXELS, UNIT_CLIPS = 256 << 20, 2048      # what a kill may cost
MAX_TEXT = 512                  # tokens of a caption, as many as Wan takes; a longer one is cut, and noted


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
    self._cfg, self._params = workdir.load_vae(directory / "vae")
    self.stride, self.channels = self._cfg.stride, self._cfg.z_dim
    self._tokenizer = text.Tokenizer(directory / "text" / "tokenizer.model")
    frozen = (directory / "text" / parts.WEIGHTS).exists()
    self._embed = Embedder(directory / "text") if frozen else None

  def latents(self, videos):
    """uint8 [T, H, W, 3] of one `codec.shape_on_canvas`, at most `codec.batch_size` it -> normalised latents, float32 [t, h, w, C] each."""
    for video_THWC in videos:
      self._count(video_THWC, codec.batch_size(codec.shape_on_canvas(video_THWC, self.stride)))
    return [vae.normalise(latents, self._cfg) for latents in codec.encode_batch(self._cfg, self._params, videos)]

  def condition(self, video_THWC):
    """uint8 [T, H, W, 3] -> normalised latents of its first frame and grey ones after it, float32 [t, h, w, C]."""
    self._count(video_THWC, 1)
    pixels, frames = codec.to_float(video_THWC[:1]), 1 + (len(video_THWC) - 1) // self.stride[0]
    return vae.normalise(codec.encode_image_video(self._cfg, self._params, pixels, frames), self._cfg)

  def _count(self, video_THWC, rows):
    frames, *canvas = codec.shape_on_canvas(video_THWC, self.stride)
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
    shape = codec.shape_on_canvas(video_THWC, self._encoder.stride)
    batch = self._waiting.setdefault(shape, [])
    batch.append((len(self._records), video_THWC))
    self._records.append(record)
    self._pixels += np.prod(video_THWC.shape[:3])
    if len(batch) == codec.batch_size(shape):
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


def encode(source, items, encoder, writer, stop):
  """All items into the writer -> True; False if `stop()` was true in between: what was encoded by then is saved."""
  unit = Unit(encoder, writer)
  with Bar("encoding", len(items)) as bar:
    for item in items:
      entry = {"stamp": stamp(item), "pieces": 0}
      try:
        for clip in source.read(item):
          if isinstance(clip, clips.Dropped):
            entry.setdefault("dropped", []).append(dataclasses.asdict(clip))
          else:
            video_THWC = clips.crop(clip.video_THWC, encoder.stride)
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
    report["numbers"] = encoded.numbers(report, index)
    page.save(path.with_suffix(".html"), encoded.report_page(report, index))
  files.write_json(path, report, depth=2)
  return report


def finish(writer, encoder, out):
  """Writes the index -> RecordIndex."""
  (null_ids, null_embedding), = encoder.texts([""])
  return writer.finish({
      "latent_channels": encoder.channels, "vae_stride": list(encoder.stride),
      "vae_fingerprint": parts.fingerprint(out / "vae"), "text_fingerprint": parts.fingerprint(out / "text"),
      "conditions": encoder.conditions,
  }, null_ids, null_embedding)
