"""Clips with captions -> records of latents and text, at native size. Run again, it goes on where it was.

  python -m launch.encode --source=DIR --out=OUT [--workdir=W]
  python -m launch.encode --source=shapes:4000 --out=OUT --workdir=W

The VAE and the text encoder come from W (without --workdir: those of the small model that ships) and are copied into
OUT, which is then all that launch.train needs. Where W has no tokenizer, one is trained on the captions.
OUT/report.json says, file by file, what was taken, what was cropped, and what was passed over and why.

Work is saved a shard at a time; a file is done when a shard says so. A run that was killed, and one that was not, end
in the same records: clips are encoded in batches of a shape that depends on the size of the clip alone, and what else is
in a batch changes nothing.
"""

import dataclasses
import importlib
import pathlib
import pkgutil
import shutil
import zlib

import ml_collections
import numpy as np
from absl import flags

import data.sources
from data import clips, records
from data.sources import folder
from launch import build, cli
from sora_jax import checkpoint
from sora_jax.errors import BadInput
from sora_jax.models import text, vae

SOURCE = flags.DEFINE_string("source", "", "folder of clips with captions, or NAME[:COUNT] of data/sources, as shapes:4000")
OUT = flags.DEFINE_string("out", "", "where the records go")
WORKDIR = flags.DEFINE_string("workdir", "", "where vae/ and text/ are; empty: the small ones that ship")
MAX_SECONDS = flags.DEFINE_float("max_seconds", 5.0, "longer videos become consecutive pieces; 0: never", lower_bound=0)
FPS = flags.DEFINE_float("fps", 0.0, "frames a second of all clips; 0: each video's own", lower_bound=0)
VOCAB = flags.DEFINE_integer("captions_vocab", 1000, "entries of a tokenizer trained on the captions", lower_bound=300)
LIMIT = flags.DEFINE_integer("limit", 0, "take so many files of the source, the first; 0: all", lower_bound=0)
SPLIT = flags.DEFINE_string("split", "train", "part of a generated source")
SEED = flags.DEFINE_integer("seed", 0, "seed of a generated source")

BATCH = 16                      # clips encoded at a time, if they are small
SMALL = 17 * 96 * 96            # pixels of a small clip; a larger one is encoded by itself, four frames at a time
UNIT_PIXELS, UNIT_CLIPS = 256 << 20, 2048      # what a kill may cost
MAX_TEXT = 512                  # tokens of a caption, as many as Wan takes; a longer one is cut, and noted
GENERATED = 4096                # clips of a generated source, where no COUNT is given


def main():
  if not SOURCE.value:
    raise BadInput("no --source; give a folder of clips, or a generated source such as shapes:4000")
  if not OUT.value:
    raise BadInput("no --out; give a directory for the records")
  source = open_source(SOURCE.value)
  items = source.items()[:LIMIT.value or None]
  out, parts = pathlib.Path(OUT.value), pathlib.Path(WORKDIR.value or checkpoint.shipped())
  with records.RecordWriter(out, settings(source, parts)) as writer:
    todo = [item for item in items if not is_done(item, writer, out)]
    if not todo and (out / "index.json").exists():
      index = records.RecordIndex.open(out)
      cli.say(f"{out} holds all {len(items)} files of {SOURCE.value} ({len(index)} clips); nothing to do. {next_step(out)}")
      return cli.OK
    cli.say(f"encoding {len(todo)} of {len(items)} files of {SOURCE.value} with the VAE in {parts / 'vae'}; records go to {out}")
    prepare_parts(parts, out, [item.caption for item in items])
    encoder = Encoder(out)
    done = encode(source, todo, encoder, writer, stop=cli.stop_requested)
    report = write_report(out / "report.json", source, items, writer)
    if not done:
      cli.say(f"stopped on request; {len(writer.uids)} clips are safe in {out}; run the same command again")
      return cli.STOPPED
    if not writer.uids:
      file, why = next(iter(report["passed_over"].items()))
      raise BadInput(f"{SOURCE.value}: none of its {len(items)} files could be taken, such as {file}: {why}; "
                     f"{out}/report.json names all")
    index = finish(writer, encoder, out)
  cropped = sum("cropped" in entry for entry in report["taken"].values())
  cli.say(f"{len(index)} clips of {len(report['taken'])} files are in {out}; {cropped} files were cropped, "
          f"{len(report['passed_over'])} passed over: {out}/report.json says which and why. {next_step(out)}")
  return cli.OK


def next_step(out):
  return f"Next: python -m launch.train --config=configs/t2v.py:tiny --config.data.path={out} --workdir=W"


def open_source(spec):
  """--source -> a source (see data/clips.py)."""
  name, _, count = spec.partition(":")
  if pathlib.Path(spec).exists() or not name.isidentifier():
    return folder.open_source(ml_collections.ConfigDict(
        {"path": spec, "max_seconds": MAX_SECONDS.value, "fps": FPS.value}))
  modules = {m.name: importlib.import_module(f"data.sources.{m.name}") for m in pkgutil.iter_modules(data.sources.__path__)}
  known = sorted(m for m in modules if hasattr(modules[m], "open_source") and m != "folder")
  if name not in known or not (count or "1").isdigit():
    raise BadInput(f"--source={spec}: neither a folder that is there nor a generated source; give a folder, or one of "
                   f"{', '.join(known)}, with a number of clips as {known[0]}:4000")
  config = ml_collections.ConfigDict({"count": int(count or GENERATED), "split": SPLIT.value, "seed": SEED.value})
  return cli.checked(lambda: modules[name].open_source(config), "--source")


def settings(source, parts):
  """What decides the contents of records: a directory of records is of one kind."""
  if not (parts / "vae" / "config.json").exists():
    raise BadInput(f"{parts}: has no vae/config.json; train one (python -m launch.train_vae --workdir={parts}), or leave out "
                   "--workdir for the one that ships")
  own = (parts / "text" / "tokenizer.model").exists()
  return {"source": source.name, "max_seconds": MAX_SECONDS.value, "fps": FPS.value, "split": SPLIT.value,
          "seed": SEED.value, "vae": checkpoint.fingerprint(parts / "vae"),
          "text": checkpoint.fingerprint(parts / "text") if own else f"trained on the captions, {VOCAB.value} entries"}


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


def prepare_parts(parts, out, captions):
  """OUT/vae and OUT/text: copies, so that records are self-contained, or a tokenizer trained on the captions."""
  build.copy_part(parts / "vae", out / "vae")
  if (parts / "text" / "tokenizer.model").exists():
    build.copy_part(parts / "text", out / "text")
  elif not (out / "text" / "tokenizer.model").exists():
    captions = [caption for caption in captions if caption]
    if not captions:
      cli.say("no file has a caption: the tokenizer will know single bytes only, and a model will not learn to follow prompts")
      captions = ["video"]
    partial = out / "text.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    text.train_tokenizer(captions, partial / "tokenizer.model", VOCAB.value)
    partial.rename(out / "text")


class Encoder:
  """Pixels and captions -> what records hold, by the parts in OUT.

  stride (t, y, x), channels: of the latents.
  """

  def __init__(self, directory):
    self._cfg, self._params = build.load_vae(directory / "vae")
    self.stride, self.channels = self._cfg.stride, self._cfg.z_dim
    self._tokenizer = text.Tokenizer(directory / "text" / "tokenizer.model")
    self._embed = build.load_text(directory / "text") if (directory / "text" / checkpoint.WEIGHTS).exists() else None

  def latents(self, videos):
    """uint8 [T, H, W, 3] of one shape, at most `batch_of` it -> normalised latents, float32 [t, h, w, C] each."""
    shape = videos[0].shape
    video_BTHWC = np.stack([*videos, *[np.zeros(shape, np.uint8)] * (batch_of(shape) - len(videos))])
    chunks = (video_BTHWC[:, t:t + self.stride[0]].astype(np.float32) / 127.5 - 1 for t in range(0, shape[0], self.stride[0]))
    means = [np.asarray(mean) for mean in vae.encode_stream(self._params, chunks, self._cfg)]
    return list(vae.normalise(np.concatenate(means, 1), self._cfg)[:len(videos)])

  def texts(self, captions):
    """-> [(ids int32, embedding [S, E] or None, tokens before it was cut to MAX_TEXT)]; the last token, eos, is kept."""
    whole = [self._tokenizer.encode(caption) for caption in captions]
    ids = [np.asarray(w if len(w) <= MAX_TEXT else w[:MAX_TEXT - 1] + w[-1:], np.int32) for w in whole]
    embeddings = self._embed(ids) if self._embed else [None] * len(ids)
    return list(zip(ids, embeddings, map(len, whole)))


def batch_of(shape):
  """How many clips of [T, H, W, 3] are encoded together. By their size alone: see the head of this file."""
  return BATCH if np.prod(shape[:3]) <= SMALL else 1


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
    batch = self._waiting.setdefault(video_THWC.shape, [])
    batch.append((len(self._records), video_THWC))
    self._records.append(record)
    self._pixels += np.prod(video_THWC.shape[:3])
    if len(batch) == batch_of(video_THWC.shape):
      self._run(self._waiting.pop(video_THWC.shape))

  def close(self, file, entry):
    """All pieces of `file` are added."""
    self._entries[file] = entry

  def _run(self, batch):
    for (i, _), latents in zip(batch, self._encoder.latents([video for _, video in batch])):
      if not np.isfinite(latents).all():
        raise BadInput(f"{self._records[i].file}: its latents are not finite; the VAE is broken: train it again")
      self._records[i] = dataclasses.replace(self._records[i], latents_THWC=latents)

  def save(self):
    """Encodes what waits, and finishes a shard."""
    for batch in list(self._waiting.values()):
      self._run(batch)
    captions = sorted({record.caption for record in self._records})
    texts = dict(zip(captions, self._encoder.texts(captions)))
    for record in self._records:
      ids, embedding, tokens = texts[record.caption]
      self._writer.add(dataclasses.replace(record, text_ids_S=ids, text_SE=embedding))
    for file, entry in self._entries.items():
      self._writer.close_file(file, entry)
    self._writer.commit()
    self._begin()


def encode(source, items, encoder, writer, stop):
  """All items into the writer -> True; False if `stop()` said so in between: what was encoded by then is saved."""
  unit = Unit(encoder, writer)
  with cli.Bar("encoding", len(items)) as bar:
    for item in items:
      entry = {"stamp": stamp(item), "pieces": 0}
      try:
        for clip in source.read(item):
          video_THWC = clips.crop(clip.video_THWC, encoder.stride)
          if records.uid(clip.file, clip.start) not in writer.uids:
            unit.add(clip, video_THWC, source.name)
          describe(entry, clip, video_THWC)
          if unit.full:
            unit.save()
          if stop():
            unit.save()
            return False
      except clips.BadClip as e:
        entry["passed_over"] = f"from {entry['seconds']:.3f} s on: {e}" if entry["pieces"] else str(e)
      unit.close(item.file, entry)
      bar.advance()
    unit.save()
  return True


def describe(entry, clip, video_THWC):
  """Adds a piece to what the report says of its file."""
  frames, *size = clip.video_THWC.shape[:3]
  entry["pieces"] += 1
  entry["frames"] = entry.get("frames", 0) + len(video_THWC)
  entry["seconds"] = clip.start + frames / clip.fps
  entry["fps"], entry["size"] = clip.fps, list(video_THWC.shape[1:3])
  if entry["size"] != size:
    entry["cropped"] = {"from": size, "to": entry["size"]}
  left_out = entry.get("frames_left_out", 0) + getattr(clip, "left_out", 0) + frames - len(video_THWC)
  if left_out:
    entry["frames_left_out"] = left_out
  if getattr(clip, "notes", ()):
    entry["notes"] = list(clip.notes)


def write_report(path, source, items, writer):
  """What was taken, and what was passed over and why, by file -> the report.

  A damaged video whose beginning is good stands in both. `notes`: what the listing of the source found.
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
  report = {"format_version": 1, "source": SOURCE.value, "files": len(items), "records": len(writer.uids),
            "sizes": "height, width in pixels", "taken": taken, "passed_over": passed_over, "notes": notes}
  records.write_json(path, report)
  return report


def finish(writer, encoder, out):
  """Writes the index -> RecordIndex."""
  (null_ids, null_embedding, _), = encoder.texts([""])
  return writer.finish({
      "latent_channels": encoder.channels, "vae_stride": list(encoder.stride),
      "vae_fingerprint": checkpoint.fingerprint(out / "vae"), "text_fingerprint": checkpoint.fingerprint(out / "text"),
  }, null_ids, null_embedding)


if __name__ == "__main__":
  cli.run(main)
