"""Clips with captions -> records of latents and text, at native size. Run again, it goes on where it was.

  python -m launch.encode --source=DIR --out=OUT [--workdir=W]
  python -m launch.encode --source=shapes:4000 --out=OUT --workdir=W

The VAE and the text encoder come from W (without --workdir: those of the small model that ships) and are copied into
OUT, which is then all that launch.train needs. Where W has no tokenizer, one is trained on the captions.
OUT/report.json says, file by file, what was taken, what was cropped, and what was passed over and why.
"""

import importlib
import pathlib
import pkgutil

import ml_collections
from absl import flags

import data.sources
from data import records
from data.sources import folder
from launch import build, cli, encoding
from sora_jax import checkpoint
from sora_jax.errors import BadInput
from sora_jax.models import text

SOURCE = flags.DEFINE_string("source", "", "folder of clips and captions, or NAME[:COUNT] of data/sources")
OUT = flags.DEFINE_string("out", "", "where the records go")
WORKDIR = flags.DEFINE_string("workdir", "", "where vae/ and text/ are; empty: the small ones that ship")
MAX_SECONDS = flags.DEFINE_float("max_seconds", 5.0, "longer videos become pieces; 0: never", lower_bound=0)
FPS = flags.DEFINE_float("fps", 0.0, "frames a second of all clips; 0: each video's own", lower_bound=0)
VOCAB = flags.DEFINE_integer("captions_vocab", 1000, "entries of a tokenizer trained on the captions", lower_bound=300)
LIMIT = flags.DEFINE_integer("limit", 0, "take so many files of the source, the first; 0: all", lower_bound=0)
SPLIT = flags.DEFINE_string("split", "train", "part of a generated source")
SEED = flags.DEFINE_integer("seed", 0, "seed of a generated source")

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
    todo = [item for item in items if not encoding.is_done(item, writer, out)]
    index = None if todo else finished(writer, out)
    if index:
      cli.say(f"{out} holds what there is in {SOURCE.value} ({len(index)} clips); nothing to do. {next_step(out)}")
      return cli.OK
    cli.say(f"encoding {len(todo)} of {len(items)} files of {SOURCE.value}, with the VAE in {parts}, into {out}")
    prepare_parts(parts, out, [item.caption for item in items])
    encoder = encoding.Encoder(out, conditions=takes_channels(parts))
    done = encoding.encode(source, todo, encoder, writer, stop=cli.stop_requested)
    report = encoding.write_report(out / "report.json", source, SOURCE.value, items, writer)
    if not done:
      cli.say(f"stopped on request; {len(writer.uids)} clips are safe in {out}; run the same command again")
      return cli.STOPPED
    if not writer.uids:
      file, why = next(iter(report["passed_over"].items()))
      raise BadInput(f"{SOURCE.value}: none of its {len(items)} files could be taken, such as {file}: {why}; "
                     f"{out}/report.json names all")
    index = encoding.finish(writer, encoder, out)
  cropped = sum("cropped" in entry for entry in report["taken"].values())
  cli.say(f"{len(index)} clips of {len(report['taken'])} files are in {out}; {cropped} files were cropped, "
          f"{len(report['passed_over'])} passed over: {out}/report.json says which and why. {next_step(out)}")
  return cli.OK


def finished(writer, out):
  """The index, if it holds all that was written; None if a run was killed before it was."""
  try:
    index = records.RecordIndex.open(out)
  except BadInput:
    return None
  return index if len(index) == len(writer.uids) else None


def next_step(out):
  config = pathlib.Path(WORKDIR.value or checkpoint.shipped()) / "config.json"
  imported = config.exists() and "dit" in checkpoint.read_json(config).get("model", {})
  page = f"configs/t2v.py:finetune --config.init={WORKDIR.value}" if imported else "configs/t2v.py:tiny"
  return f"Next: python -m launch.train --config={page} --config.data.path={out} --workdir=W"


def open_source(spec):
  """--source -> a source (see data/clips.py)."""
  name, _, count = spec.partition(":")
  if pathlib.Path(spec).exists() or not name.isidentifier():
    return folder.open_source(ml_collections.ConfigDict(
        {"path": spec, "max_seconds": MAX_SECONDS.value, "fps": FPS.value}))
  names = [module.name for module in pkgutil.iter_modules(data.sources.__path__)]
  modules = {name: importlib.import_module(f"data.sources.{name}") for name in names}
  known = sorted(m for m in modules if hasattr(modules[m], "open_source") and m != "folder")
  if name not in known or not (count or "1").isdigit():
    raise BadInput(f"--source={spec}: neither a folder that is there nor a generated source; give a folder, or one of "
                   f"{', '.join(known)}, with a number of clips as {known[0]}:4000")
  config = ml_collections.ConfigDict({"count": int(count or GENERATED), "split": SPLIT.value, "seed": SEED.value})
  return cli.checked(lambda: modules[name].open_source(config), "--source")


def settings(source, parts):
  """What decides the contents of records: a directory of records is of one kind."""
  if not (parts / "vae" / "config.json").exists():
    raise BadInput(f"{parts}: has no vae/config.json; train one (python -m launch.train_vae --workdir={parts}), or leave "
                   "out --workdir for the one that ships")
  own = (parts / "text" / "tokenizer.model").exists()
  more = {"conditions": True} if takes_channels(parts) else {}
  return {**more, "source": source.name, "max_seconds": MAX_SECONDS.value, "fps": FPS.value, "split": SPLIT.value,
          "seed": SEED.value, "vae": build.fingerprint(parts / "vae"),
          "text": build.fingerprint(parts / "text") if own else f"trained here, {VOCAB.value} entries"}


def takes_channels(parts):
  """Does the model there take an image as channels (Wan I2V)? Its records hold them."""
  path = parts / "config.json"
  model = checkpoint.read_json(path).get("model") if path.exists() else None
  return isinstance(model, dict) and model.get("dit", {}).get("conditioning") == "channels"


def prepare_parts(parts, out, captions):
  """OUT/vae and OUT/text: copies, so that records are self-contained, or a tokenizer trained on the captions."""
  build.copy_part(parts / "vae", out / "vae")
  if (parts / "text" / "tokenizer.model").exists():
    build.copy_part(parts / "text", out / "text")
  elif not (out / "text" / "tokenizer.model").exists():
    if not any(captions):
      cli.say("no file has a caption: a model can be trained on these records, but not to follow prompts")
    text.train_tokenizer(captions, out / "text" / "tokenizer.model", VOCAB.value)


if __name__ == "__main__":
  cli.run(main)
