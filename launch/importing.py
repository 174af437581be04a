"""Importing open weights: a folder in a foreign layout in, a work directory out. Used by launch.import_weights.

Everything is checked before anything is written; weights pass through memory one tensor at a time, into files that programs then
read a device's part at a time (checkpoint.place).
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import zlib

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from launch import build, cli
from sora_jax import checkpoint
from sora_jax.errors import BadInput
from sora_jax.models import dit, vae
from sora_jax.weights import files, lora, spiece, table, wan_pipeline


def import_weights(source, workdir, dtype="source"):
  """Folder -> W. dtype: of the transformer and the text encoder, "source" as they come. -> False where W holds it all already."""
  source, workdir = pathlib.Path(source), pathlib.Path(workdir)
  found = wan_pipeline.open_pipeline(source)
  tokenizer = spiece.from_folder(found.tokenizer) if found.tokenizer else None
  fit_together(found, tokenizer)
  parts = {}                                    # directory in W -> its parts: the experts share one
  for part in found.parts:
    parts.setdefault("model" if part.key.startswith("dit") else part.key, []).append(part)
  todo = {name: some for name, some in parts.items() if not is_done(workdir / name, some, dtype)}
  refuse_others(workdir, parts)
  if not todo and (workdir / "source" / "tensors.json").exists():
    return False
  specs = {name: {key: spec for part in some for key, spec in part_specs(part, dtype).items()} for name, some in todo.items()}
  size = sum(np.prod(shape) * kind.itemsize for some in specs.values() for shape, kind in some.values())
  cli.need_disk(workdir, size, "the weights")
  cli.need_memory(4 * 4 * max(np.prod(shape) for part in found.parts for shape in table.their_shapes(part.rows).values()), "the largest tensor")
  for note in found.notes:
    cli.say(note)
  cli.say(f"importing {', '.join(part.folder.name for part in found.parts)} of {source} into {workdir}: "
          f"{sum(map(count, found.parts)) / 1e6:.2f} M parameters, {size / 1e9:.3f} GB to write")
  total = sum(len(part.stored) for some in todo.values() for part in some)
  with cli.lock_workdir(workdir), cli.Bar("tensors", total) as bar:
    for name, some in todo.items():
      fields = part_config(some, dtype)
      checkpoint.write_part(workdir / name, fields, specs[name], cli.unless_stopped(pieces(some, fields, bar)))
    if tokenizer:
      (workdir / "text").mkdir(exist_ok=True)
      (workdir / "text" / "tokenizer.model").write_bytes(tokenizer)
    if found.sample:
      checkpoint.write_json(workdir / "config.json", experiment(found, dtype))
    keep_source(source, workdir / "source", found)
  return True


def refuse_others(workdir, parts):
  """BadInput where W was made by another program: nothing there is written over."""
  config = workdir / "config.json"
  other = next((path for path in (workdir / "checkpoints", workdir / "manifests") if path.exists()), None)
  if config.exists() and "data" in (found := checkpoint.read_json(config)) and "path" in found["data"]:
    other = config
  for name in parts:
    files_there = [path for path in (workdir / name).glob("*") if not path.name.endswith(".partial")]
    if files_there and "made_from" not in (checkpoint.read_json(workdir / name / "config.json") if (workdir / name / "config.json").exists() else {}):
      other = other or workdir / name
  if other:
    raise BadInput(f"{workdir} belongs to another program (there is {other}); give a --workdir of its own")


def import_lora(source, base, workdir, expert=""):
  """A file of adapters in the layout of PEFT and diffusers, or its folder, to the weights in `base` -> W, which needs `base` from then on."""
  source, base, workdir = pathlib.Path(source), epath.Path(base), epath.Path(workdir)
  file = source
  if source.is_dir():
    found = sorted(source.glob("*.safetensors"))
    file = source / lora.FILE if len(found) != 1 else found[0]
  tensors = files.Tensors(file)
  stamp = f"{zlib.crc32(file.read_bytes()):08x}"
  theirs = checkpoint.read_json(base / "config.json")
  two = bool(theirs.get("model", {}).get("boundary"))
  if two != bool(expert):
    raise BadInput(f"{base} holds " + ("two experts; say which these adapt: --expert=high or low" if two else "one model; leave --expert out"))
  config = ml_collections.ConfigDict({
      "init": str(base), "model": {"size": "init", "expert": expert, "remat": "none", "dtype": "float32", "text": ""}, "sample": {},
      "data": {"base_fps": 0.0}, "lora": {"rank": 1, "alpha": 1.0, "targets": ("to_q",)}})
  build.adopt(config)
  config.model.dtype = theirs["model"]["dtype"]
  adapters, params = lora.to_ours(tensors, dit.DiTConfig(**config.model.dit), tensors.metadata)
  config.lora = dataclasses.asdict(adapters)
  there = workdir / "model" / "config.json"            # that of W comes last: a kill between them is mended by a second run
  mine, whole = there.exists() and checkpoint.read_json(there).get("made_from") == stamp, (workdir / "config.json").exists()
  if mine and whole:
    return None
  if whole or (there.exists() and not mine) or (workdir / "manifests").exists():
    raise BadInput(f"{workdir} holds a model already; give another --workdir")
  with cli.lock_workdir(workdir):
    for part in ("vae", "text"):
      build.copy_part(base / part, workdir / part, link=part == "text")
    build.copy_source(base, workdir)
    fields = {"format_version": checkpoint.FORMAT_VERSION, "program": cli.program(), **json.loads(config.to_json_best_effort())}
    checkpoint.save_part(workdir / "model", {"step": 0, "made_from": stamp}, {"lora": {"dit": params}})
    checkpoint.write_json(workdir / "config.json", fields)
  return adapters


def is_done(directory, some, dtype):
  """Does it hold these parts? BadInput where it holds others."""
  path = directory / "config.json"
  if not path.exists() or not (directory / checkpoint.WEIGHTS).exists():
    return False
  if checkpoint.read_json(path).get("made_from") != made_from(some, dtype):
    raise BadInput(f"{directory} holds other weights, or these with another --dtype; give another --workdir")
  return True


def made_from(some, dtype):
  """Changes when the files of the parts do."""
  files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for part in some
           for path in (sorted(part.folder.iterdir()) if part.folder.is_dir() else [part.folder]) if path.suffix in (".safetensors", ".json")]
  return f"{zlib.crc32(repr((files, dtype)).encode()):08x}"


def part_specs(part, dtype):
  """{our name: (shape, dtype)}."""
  def kind(row):
    if dtype != "source" and part.key != "vae":
      return np.dtype(dtype)
    return np.dtype(functools.reduce(jnp.promote_types, {part.tensors.dtype(name) for name in row.names}))
  return {our_name(part, row): (row.our_shape, kind(row)) for row in part.rows}


def our_name(part, row):
  """As in W: model/ holds "dit/...", or "dit_high/..." and "dit_low/..."."""
  return "/".join([part.key] * part.key.startswith("dit") + list(row.path))


def part_config(some, dtype):
  """What config.json of the directory says; `pieces` adds a checksum of the weights."""
  part = some[0]
  fields = {"made_from": made_from(some, dtype)}
  if part.key == "vae":
    return fields | vae.config_to_dict(part.cfg)
  if part.key == "text":
    return fields | dataclasses.asdict(dataclasses.replace(part.cfg, dtype=compute_dtype(part, dtype)))
  return fields | {"step": 0, "dit": dataclasses.asdict(part.cfg)}


def compute_dtype(part, dtype):
  """What a part is computed in: bfloat16 where most of its weights are."""
  kinds = list(part.stored.values()) if dtype == "source" else [dtype]
  return "bfloat16" if 2 * kinds.count("bfloat16") > len(kinds) else "float32"


def pieces(some, fields, bar):
  """All tensors in our layout -> iterator of (our name, array or one layer of it)."""
  crc = 0
  for part in some:
    for row, array in table.stream(part.tensors, part.rows):
      array = np.ascontiguousarray(array)
      crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
      bar.advance(1, part.folder.name)
      yield our_name(part, row), array
  fields["weights_crc32"] = f"{crc:08x}"


def fit_together(found, tokenizer):
  """BadInput where the parts of a pipeline are not for each other."""
  cfg = {part.key.split("_")[0]: part.cfg for part in found.parts}
  if {"dit", "text"} <= cfg.keys() and cfg["dit"].text_width != cfg["text"].width:
    raise BadInput(f"the text encoder gives {cfg['text'].width} values a token, the transformer takes {cfg['dit'].text_width}; are they one?")
  if {"dit", "vae"} <= cfg.keys() and cfg["dit"].channels != cfg["vae"].z_dim:
    raise BadInput(f"the VAE has {cfg['vae'].z_dim} latent channels, the transformer takes {cfg['dit'].channels}; is it of this pipeline?")
  if "text" in cfg and tokenizer and (most := len(ModelProto.FromString(tokenizer).pieces)) > cfg["text"].vocab:
    raise BadInput(f"the tokenizer has {most} ids, the text encoder knows {cfg['text'].vocab}; are they one pipeline?")
  if found.sample and len(found.parts) > 1 and not ({"vae", "text"} <= cfg.keys() and tokenizer):
    raise BadInput("a pipeline needs vae/, text_encoder/ and tokenizer/ beside its transformer; download it again, or import single parts")


def keep_source(source, target, found):
  """What export needs to give the same folder back: all small files, and name and dtype of every tensor."""
  for path in sorted(source.rglob("*")) if (source / "model_index.json").exists() else []:
    if path.is_file() and (path.suffix in (".json", ".txt", ".md", ".model") or path.name.startswith("LICENSE")) and ".index." not in path.name:
      copy = target / path.relative_to(source)
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, copy)
  before = checkpoint.read_json(target / "tensors.json") if (target / "tensors.json").exists() else {}
  checkpoint.write_json(target / "tensors.json", before | {part.key: part.stored for part in found.parts})


def experiment(found, dtype):
  """W/config.json: what launch.sample reads, and launch.train where it begins from W."""
  part = next(part for part in found.parts if part.key.startswith("dit"))
  return {
      "format_version": checkpoint.FORMAT_VERSION, "program": cli.program(),
      "model": {"size": "imported", "dit": dataclasses.asdict(part.cfg), "boundary": found.boundary, "text": "", "remat": "none",
                "dtype": compute_dtype(part, dtype)},
      "data": {"base_fps": 0.0},
      "sample": {**found.sample, "row_tokens": 1024, "rows": 1},
  }


def count(part):
  """Parameters of a part."""
  return sum(np.prod(row.our_shape) for row in part.rows)
