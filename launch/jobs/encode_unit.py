"""Clips in, records out: what one process of the encoding job does with its share of the files.

Work is saved one shard at a time; a file is done once a shard lists it. A run that was killed and started
again gives the same records as one that was not: clips are encoded in batches whose shape depends only on the
size of the clip, and the other clips of a batch do not change the result.
"""

import dataclasses
import zlib

import numpy as np

from data import clips, records
from launch.common.progress import Bar
from launch.reports import encoded, page
from sora_jax import codec, files, parts, workdir as workdirs
from sora_jax.embedder import Embedder, local_layout
from sora_jax.errors import BadInput
from sora_jax.models import text, vae

UNIT_PIXELS, UNIT_CLIPS = 256 << 20, 2048  # the most work that is lost when the job is killed
MAX_TEXT = 512  # tokens of a caption, as many as Wan takes; a longer caption is cut, and the report notes it


def stamp(item):
  """A text that changes when the file or its caption does."""
  caption = item.caption.encode("utf-8", "backslashreplace")
  return f"{getattr(item, 'version', '')}-{zlib.crc32(caption):08x}"


def is_done(item, writer, out):
  """True if an earlier run has finished the file. Raises BadInput if it was taken and has changed since."""
  entry = writer.files.get(item.file)
  if entry is None:
    return False
  if entry["stamp"] == stamp(item):
    return True
  if entry["pieces"]:
    raise BadInput(
      f"{item.file}: it or its caption has changed since it was encoded into {out}; give another --out"
    )
  return False


class Encoder:
  """Pixels and captions -> the arrays of records, by the VAE and text encoder or tokenizer in OUT.

  stride (t, y, x), channels: of the latents.
  conditions: records also hold the condition of a model that takes its image as channels.
  sizes: (height, width) of the frames so far.  canvases: (height, width) on which they were encoded.
  programs: those compiled so far, as (rows, height, width, True for first frames).
  """

  def __init__(self, directory, conditions=False):
    self.conditions = conditions
    self.sizes, self.canvases, self.programs = set(), set(), set()
    self._cfg, self._params = workdirs.load_vae(directory / "vae")
    self.stride, self.channels = self._cfg.stride, self._cfg.z_dim
    self._tokenizer = text.Tokenizer(directory / "text" / "tokenizer.model")
    frozen = (directory / "text" / parts.WEIGHTS).exists()
    self._embed = Embedder(directory / "text", local_layout()) if frozen else None

  def latents(self, videos):
    """Encodes a batch -> normalised latents of each video, float32 [t, h, w, C].

    videos: uint8 [T, H, W, 3], all of one `codec.shape_on_canvas`; at most `codec.batch_size` of that shape.
    """
    for video_THWC in videos:
      self._count(video_THWC, codec.batch_size(codec.shape_on_canvas(video_THWC, self.stride)))
    return [
      vae.normalise(latents, self._cfg) for latents in codec.encode_batch(self._cfg, self._params, videos)
    ]

  def condition(self, video_THWC):
    """uint8 [T, H, W, 3] -> normalised latents of its first frame, then grey ones, float32 [t, h, w, C]."""
    self._count(video_THWC, 1)
    pixels, frames = codec.to_float(video_THWC[:1]), 1 + (len(video_THWC) - 1) // self.stride[0]
    return vae.normalise(codec.encode_image_video(self._cfg, self._params, pixels, frames), self._cfg)

  def _count(self, video_THWC, rows):
    frames, *canvas = codec.shape_on_canvas(video_THWC, self.stride)
    self.sizes.add(video_THWC.shape[1:3])
    self.canvases.add(tuple(canvas))
    self.programs |= {(rows, *canvas, first) for first in (True, False)[:frames]}

  def texts(self, captions):
    """-> [(ids, int32 [S], S <= MAX_TEXT; embedding [S, E], or None without a frozen text encoder)]."""
    ids = [np.asarray(self._tokenizer.encode(caption, MAX_TEXT), np.int32) for caption in captions]
    embeddings = self._embed(ids) if self._embed else [None] * len(ids)
    return list(zip(ids, embeddings))

  def is_long(self, caption):
    """True if the caption has more than MAX_TEXT tokens, so that it is cut."""
    return len(caption) > MAX_TEXT and len(self._tokenizer.encode(caption)) > MAX_TEXT


class Unit:
  """The clips of one shard. Each batch is encoded when it is full; clips are added to the writer in order."""

  def __init__(self, encoder, writer):
    self._encoder, self._writer = encoder, writer
    self._begin()

  def _begin(self):
    self._records, self._waiting, self._entries, self._pixels = [], {}, {}, 0
    self._spans = []  # of each record: [(first latent frame, caption)]

  @property
  def full(self):
    return self._pixels >= UNIT_PIXELS or len(self._records) >= UNIT_CLIPS

  def add(self, clip, video_THWC, source, shots=()):
    """shots: of its file, as in data.clips.Item."""
    record = records.Record(None, None, clip.caption, clip.file, clip.start, clip.fps, source)
    stride = self._encoder.stride[0]
    spans = clips.shots_of_piece(shots, clip.start, len(video_THWC), clip.fps, stride)
    self._spans.append(spans or [(0, clip.caption)])
    shape = codec.shape_on_canvas(video_THWC, self._encoder.stride)
    batch = self._waiting.setdefault(shape, [])
    batch.append((len(self._records), video_THWC))
    self._records.append(record)
    self._pixels += np.prod(video_THWC.shape[:3])
    if len(batch) == codec.batch_size(shape):
      self._run(self._waiting.pop(shape))

  def close(self, file, entry):
    """Call after all pieces of `file` were added."""
    self._entries[file] = entry

  def _run(self, batch):
    batch_latents = self._encoder.latents([video_THWC for _, video_THWC in batch])
    for (i, video_THWC), latents_THWC in zip(batch, batch_latents):
      record = self._records[i]
      if not np.isfinite(latents_THWC).all():
        raise BadInput(f"{record.file}: its latents are not finite; the VAE is broken: train it again")
      record = dataclasses.replace(record, latents_THWC=latents_THWC)
      if self._encoder.conditions:
        record = dataclasses.replace(record, cond_THWC=self._encoder.condition(video_THWC))
      self._records[i] = record

  def save(self):
    """Encodes the incomplete batches and writes the shard."""
    for batch in list(self._waiting.values()):
      self._run(batch)
    captions = sorted({caption for spans in self._spans for _, caption in spans})
    texts = dict(zip(captions, self._encoder.texts(captions)))
    for record, spans in zip(self._records, self._spans, strict=True):
      ids, embeddings = zip(*(texts[caption] for _, caption in spans))
      spans_N2 = np.array([(len(one), at) for one, (at, _) in zip(ids, spans)], np.int32)
      self._writer.add(
        dataclasses.replace(
          record,
          text_ids_S=np.concatenate(ids),
          text_SE=None if embeddings[0] is None else np.concatenate(embeddings),
          text_spans_N2=spans_N2 if len(spans) > 1 else None,
          caption=clips.join_shots(spans),
        )
      )
    for file, entry in self._entries.items():
      self._writer.close_file(file, entry)
    self._writer.commit()
    self._begin()


def encode(source, items, encoder, writer, stop):
  """Encodes all items into the writer -> True; False if `stop()` became true, with the work so far saved."""
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
              unit.add(clip, video_THWC, source.name, item.shots)
            encoded.add_piece(entry, clip, video_THWC)
            bar.advance(0, f"{item.file} up to {entry['seconds']:.1f} s")
          if unit.full:
            unit.save()
          if stop():
            unit.save()
            return False
      except clips.BadClip as error:
        after = f"from {entry['seconds']:.3f} s on: " if entry["pieces"] else ""
        entry["passed_over"] = f"{after}{error}"
      if "dropped" in entry and not entry["pieces"]:
        entry.setdefault("passed_over", encoded.all_dropped(entry["dropped"]))
      if encoder.is_long(item.caption):
        entry.setdefault("notes", []).append(f"its caption is cut to {MAX_TEXT} tokens")
      unit.close(item.file, entry)
      bar.advance()
    unit.save()
  return True


def write_report(path, source, spec, items, writer, index=None):
  """Writes report.json, by file (see launch/reports/encoded.py) -> the report.

  Once there is an index of the records, `numbers` is in it, and a page that shows all of it is written to
  report.html.
  """
  report = encoded.make_report(source, spec, items, writer.files, len(writer.uids))
  if index is not None:
    report["numbers"] = encoded.numbers(report, index)
    page.save(path.with_suffix(".html"), encoded.report_page(report, index))
  files.write_json(path, report, depth=2)
  return report


def finish(writer, encoder, out):
  """Writes the index -> RecordIndex."""
  ((null_ids, null_embedding),) = encoder.texts([""])
  header = {
    "latent_channels": encoder.channels,
    "vae_stride": list(encoder.stride),
    "vae_fingerprint": parts.fingerprint(out / "vae"),
    "text_fingerprint": parts.fingerprint(out / "text"),
    "conditions": encoder.conditions,
  }
  return writer.finish(header, null_ids, null_embedding)
