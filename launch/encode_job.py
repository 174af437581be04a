"""The encoding job from end to end, for launch.encode and for a training run on raw clips: source -> OUT/ with records, index and report.

Several processes share the files of a source by a hash of their names. Each writes shards of its own; what all have finished, at whatever
number of processes, is what is done. The first lists the source, for all, prepares OUT, and writes report and index when all have come to
their ends.
"""

import importlib
import pkgutil

import jax
import ml_collections

from data import records, sources
from launch import build, cli, encoding, hosts
from sora_jax import checkpoint
from sora_jax.errors import BadInput
from sora_jax.models import text

GENERATED = 4096                # clips of a generated source, where no COUNT is given


def run(spec, out, parts, options, *, vocab=1000, limit=0):
  """Encodes a source into the directory `out` -> RecordIndex; None where it was asked to stop: what was done is safe.

  spec: what launch.encode takes as --source. parts: directory of vae/ and text/. options: what decides the contents of records: the fields of
  data.curation.Rules, `split`, `seed`, `square`. vocab: entries of a tokenizer that is trained on the captions, where parts/ has none. limit: so
  many files; 0: all.
  """
  source = hosts.from_first("files are listed", lambda: open_source(spec, options))
  settings = job_settings(source, parts, options, vocab)
  process, processes = jax.process_index(), jax.process_count()
  items = source.items()[:limit or None]
  if process:
    hosts.wait("OUT is prepared")
  with records.RecordWriter(out, settings, process=process) as writer:
    todo = unfinished(items, writer, out)
    if process:
      hosts.wait("all have looked what is done")         # nobody adds to it before, so that all see the same
    index = None if todo else finished(writer, out)
    if todo and not process:
      cli.say(f"encoding {len(todo)} of {len(items)} files of {spec}, with the VAE in {parts}, into {out}"
              + (f", by {processes} processes" if processes > 1 else ""))
      prepare_parts(parts, out, [item.caption for item in items], vocab)
    if not process:
      hosts.wait("OUT is prepared")
      hosts.wait("all have looked what is done")
    if index:
      hosts.wait("all is done")
      cli.say(f"{out} holds what there is in {spec} ({len(index)} clips); nothing to do")
      return index
    encoder = encoding.Encoder(out, conditions=takes_channels(parts))
    mine = [item for item in todo if records.uid(item.file, 0) % processes == process]
    encoding.encode(source, mine, encoder, writer, stop=cli.stop_requested, square=options["square"])
    hosts.wait("all came to their ends")
    writer.load()
    left = unfinished(items, writer, out)
    if not process:
      index = None if left or not writer.uids else encoding.finish(writer, encoder, out)
      report = encoding.write_report(out / "report.json", source, spec, items, writer, index)
      tell(spec, out, left, report, index, encoder, processes)
    hosts.wait("the index is written")
  return None if left else index or records.RecordIndex.open(out)


def tell(spec, out, left, report, index, encoder, processes):
  """The closing lines; BadInput where no file could be taken."""
  if left:
    cli.say(f"stopped on request; {report['records']} clips are safe in {out}; run the same command again")
  elif index is None:
    file, why = next(iter(report["passed_over"].items()))
    raise BadInput(f"{spec}: none of its {report['files']} files could be taken, such as {file}: {why}; {out}/report.json names all")
  else:
    count = lambda what: sum(what in entry for entry in report["taken"].values())  # noqa: E731
    cli.say(f"{len(index)} clips of {len(report['taken'])} files are in {out}; {count('cropped')} files were cropped, {count('scaled')} scaled, "
            f"{len(report['passed_over'])} passed over: {out}/report.json says which and why, {out}/report.html shows it")
    if encoder.programs:
      cli.say(f"{len(encoder.sizes)} sizes of frame on {len(encoder.canvases)} canvases: {len(encoder.programs)} programs compiled"
              + (" by the first process" if processes > 1 else ""))


def open_source(spec, options):
  """What launch.encode takes as --source -> a source (see data/clips.py)."""
  if sources.kind_of(spec):
    return sources.open_files(ml_collections.ConfigDict({**options, "path": spec}))
  name, _, count = spec.partition(":")
  modules = {name: importlib.import_module(f"data.sources.{name}")
             for name in {module.name for module in pkgutil.iter_modules(sources.__path__)} - set(sources.OF_FILES)}
  known = sorted(name for name, module in modules.items() if hasattr(module, "open_source"))
  if name not in known or not (count or "1").isdigit() or int(count or 1) < 1:
    raise BadInput(f"--source={spec}: neither files that are there nor a generated source; give a folder, or one of "
                   f"{', '.join(known)}, with a number of clips as {known[0]}:4000")
  config = ml_collections.ConfigDict({**options, "count": int(count or GENERATED)})
  return cli.checked(lambda: modules[name].open_source(config), "--source")


def unfinished(items, writer, out):
  """Those that no finished shard speaks of."""
  return [item for item in items if not encoding.is_done(item, writer, out)]


def finished(writer, out):
  """The index, if it holds all that was written; None if a run was killed before it was."""
  try:
    index = records.RecordIndex.open(out)
  except BadInput:
    return None
  return index if len(index) == len(writer.uids) else None


def job_settings(source, parts, options, vocab):
  """What decides the contents of records: a directory of records is of one kind."""
  if not (parts / "vae" / "config.json").exists():
    raise BadInput(f"{parts}: has no vae/config.json; train one (python -m launch.train_vae --workdir={parts}), or leave "
                   "out --workdir for the one that ships")
  own = (parts / "text" / "tokenizer.model").exists()
  more = {"conditions": True} if takes_channels(parts) else {}
  return {**more, "source": source.name, **options, "vae": build.fingerprint(parts / "vae"),
          "text": build.fingerprint(parts / "text") if own else f"trained here, {vocab} entries"}


def takes_channels(parts):
  """Does the model there take an image as channels (Wan I2V)? Its records hold them."""
  path = parts / "config.json"
  model = checkpoint.read_json(path).get("model") if path.exists() else None
  return isinstance(model, dict) and model.get("dit", {}).get("conditioning") == "channels"


def prepare_parts(parts, out, captions, vocab):
  """OUT/vae and OUT/text: copies, so that records are self-contained, or a tokenizer trained on the captions."""
  build.copy_part(parts / "vae", out / "vae")
  if (parts / "text" / "tokenizer.model").exists():
    build.copy_part(parts / "text", out / "text")
  elif not (out / "text" / "tokenizer.model").exists():
    if not any(captions):
      cli.say("no file has a caption: a model can be trained on these records, but not to follow prompts")
    text.train_tokenizer(captions, out / "text" / "tokenizer.model", vocab)
