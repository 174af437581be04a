"""The encoding job: a source of clips -> OUT/ with records, index and report. For launch.encode, and for
training on raw clips.

Several processes share the files of a source by a hash of their names. Each writes shards of its own; what
all have finished, at whatever number of processes, is what is done. The first lists the source for all,
prepares OUT, and writes report and index when all have finished.
"""

import importlib
import pkgutil

import jax
import ml_collections

from data import records, sources
from launch.common import processes, program
from launch.common.progress import say
from launch.jobs import encode_unit
from sora_jax import files, parts, workdir as workdirs
from sora_jax.errors import BadInput, checked
from sora_jax.models import text

GENERATED = 4096  # clips of a generated source, where no COUNT is given


def run(spec, out, model, options, *, vocab=1000, limit=0):
  """Encodes a source into the directory `out` -> RecordIndex; None where it was asked to stop: what was done
  is safe.

  spec: what launch.encode takes as --source. model: directory of vae/ and text/. options: what decides the
  contents of records: the fields of data.curation.Rules, `split`, `seed`. vocab: entries of a tokenizer that
  is trained on the captions, where the model has none. limit: so many files; 0: all.
  """
  check_vae(model)
  options = {**options, "temporal_stride": workdirs.load_vae_config(model / "vae").stride[0]}
  source = processes.from_first("files are listed", lambda: open_source(spec, options))
  settings = job_settings(source, model, options, vocab)
  first, count = jax.process_index() == 0, jax.process_count()
  items = source.items()[: limit or None]
  if not first:
    processes.wait("OUT is prepared")
  with records.RecordWriter(out, settings, process=jax.process_index()) as writer:
    todo = unfinished(items, writer, out)
    if not first:
      processes.wait("all have listed what is done")  # nobody adds to it before, so that all see the same
    index = None if todo else finished(writer, out)
    if todo and first:
      by = f", by {count} processes" if count > 1 else ""
      say(f"encoding {len(todo)} of {len(items)} files of {spec}, with the VAE in {model}, into {out}{by}")
      prepare_parts(model, out, [item.caption for item in items], vocab)
    if first:
      processes.wait("OUT is prepared")
      processes.wait("all have listed what is done")
    if index:
      processes.wait("all is done")
      say(f"{out} holds what there is in {spec} ({len(index)} clips); nothing to do")
      return index
    encoder = encode_unit.Encoder(out, conditions=takes_channels(model))
    mine = [item for item in todo if records.uid(item.file, 0) % count == jax.process_index()]
    encode_unit.encode(source, mine, encoder, writer, stop=program.stop_requested)
    processes.wait("all have finished")
    writer.load()
    left = unfinished(items, writer, out)
    if first:
      index = None if left or not writer.uids else encode_unit.finish(writer, encoder, out)
      report = encode_unit.write_report(out / "report.json", source, spec, items, writer, index)
      closing_lines(spec, out, left, report, index, encoder, count)
    processes.wait("the index is written")
  return None if left else index or records.RecordIndex.open(out)


def closing_lines(spec, out, left, report, index, encoder, processes_count):
  """Says what was done; BadInput where no file could be taken."""
  if left:
    say(f"stopped on request; {report['records']} clips are safe in {out}; run the same command again")
    return
  if index is None:
    file, why = next(iter(report["passed_over"].items()))
    raise BadInput(
      f"{spec}: none of its {report['files']} files could be taken, such as {file}: {why}; {out}/report.json "
      "names all"
    )
  cropped, scaled = (
    sum(what in entry for entry in report["taken"].values()) for what in ("cropped", "scaled")
  )
  say(
    f"{len(index)} clips of {len(report['taken'])} files are in {out}; {cropped} files were cropped, "
    f"{scaled} scaled, "
    f"{len(report['passed_over'])} skipped: {out}/report.json says which and why, {out}/report.html shows it"
  )
  if encoder.programs:
    by = " by the first process" if processes_count > 1 else ""
    say(
      f"{len(encoder.sizes)} sizes of frame on {len(encoder.canvases)} canvases: "
      f"{len(encoder.programs)} programs compiled{by}"
    )


def open_source(spec, options):
  """What launch.encode takes as --source -> a source (see data/clips.py)."""
  if sources.kind_of(spec):
    return sources.open_files(ml_collections.ConfigDict({**options, "path": spec}))
  name, _, count = spec.partition(":")
  names = {module.name for module in pkgutil.iter_modules(sources.__path__)} - set(sources.OF_FILES)
  modules = {name: importlib.import_module(f"data.sources.{name}") for name in names}
  known = sorted(name for name, module in modules.items() if hasattr(module, "open_source"))
  if name not in known or not (count or "1").isdigit() or int(count or 1) < 1:
    raise BadInput(
      f"--source={spec}: neither files that are there nor a generated source; give a folder, or one of "
      f"{', '.join(known)}, with a number of clips as {known[0]}:4000"
    )
  config = ml_collections.ConfigDict({**options, "count": int(count or GENERATED)})
  return checked(lambda: modules[name].open_source(config), "--source")


def unfinished(items, writer, out):
  """Those that no finished shard holds."""
  return [item for item in items if not encode_unit.is_done(item, writer, out)]


def finished(writer, out):
  """The index, if it holds all that was written; None if a run was killed before it was."""
  try:
    index = records.RecordIndex.open(out)
  except BadInput:
    return None
  return index if len(index) == len(writer.uids) else None


def check_vae(model):
  """BadInput where the directory of a model holds no VAE."""
  if not (model / "vae" / "config.json").exists():
    raise BadInput(
      f"{model}: has no vae/config.json; train one (python -m launch.train_vae --workdir={model}), or leave "
      "out --workdir for the one that ships"
    )


def job_settings(source, model, options, vocab):
  """What decides the contents of records: a directory of records is of one kind."""
  own = (model / "text" / "tokenizer.model").exists()
  more = {"conditions": True} if takes_channels(model) else {}
  return {
    **more,
    "source": source.name,
    **{name: value for name, value in options.items() if name != "temporal_stride"},  # that of the VAE
    "vae": parts.fingerprint(model / "vae"),
    "text": parts.fingerprint(model / "text") if own else f"trained here, {vocab} entries",
  }


def takes_channels(model):
  """Does the model there take an image as channels (Wan I2V)? Its records hold them."""
  config = files.read_json_if_exists(model / "config.json").get("model")
  return isinstance(config, dict) and config.get("dit", {}).get("conditioning") == "channels"


def prepare_parts(model, out, captions, vocab):
  """Copies vae/ and text/ into OUT, which then needs no other folder; or trains a tokenizer on captions."""
  parts.copy_part(model / "vae", out / "vae")
  if (model / "text" / "tokenizer.model").exists():
    parts.copy_part(model / "text", out / "text")
  elif not (out / "text" / "tokenizer.model").exists():
    if not any(captions):
      say("no file has a caption: a model can be trained on these records, but not to follow prompts")
    text.train_tokenizer(captions, out / "text" / "tokenizer.model", vocab)
