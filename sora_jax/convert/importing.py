"""Importing open weights: a folder in a foreign layout in, a work directory out. Used by launch.import_weights.

Everything is checked before anything is written; weights pass through memory one tensor at a time, into files that programs then
read a device's part at a time (parts.put).
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable

import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from sora_jax import files, parts, workdir as workdirs
from sora_jax.errors import BadInput, unless_stopped
from sora_jax.models import dit, vae
from sora_jax.weights import files as foreign, lora, spiece, table, wan_pipeline

PROGRAM = "launch.import_weights"       # what W/config.json says that it is from


@dataclasses.dataclass
class Import:
  """What is to be done: `plan` has checked it all, `run` writes it.

  todo: directory in W -> the parts of the pipeline that go there, the experts into one. specs: of each the tensors, {name: (shape, dtype)}.
  num_bytes: to be written. memory: bytes that the largest tensor takes on its way. tensors: how many. notes: lines for the user.
  """

  source: pathlib.Path
  workdir: pathlib.Path
  dtype: str
  pipeline: wan_pipeline.Pipeline
  tokenizer: bytes | None
  todo: dict
  specs: dict

  @property
  def notes(self):
    return self.pipeline.notes

  @property
  def num_bytes(self):
    return sum(np.prod(shape) * kind.itemsize for specs in self.specs.values() for shape, kind in specs.values())

  @property
  def memory(self):
    shapes = (shape for part in self.pipeline.parts for shape in table.their_shapes(part.rows).values())
    return 4 * 4 * max(np.prod(shape) for shape in shapes)

  @property
  def tensors(self):
    return sum(len(part.stored) for of_directory in self.todo.values() for part in of_directory)

  def __str__(self):
    names = ", ".join(part.folder.name for part in self.pipeline.parts)
    millions = sum(map(count, self.pipeline.parts)) / 1e6
    return f"{names} of {self.source} into {self.workdir}: {millions:.2f} M parameters, {self.num_bytes / 1e9:.3f} GB to write"

  def run(self, progress: Callable = lambda done, note: None, stop: Callable = lambda: False):
    """Writes the work directory. progress(done, note): called after each tensor; raises Stopped once stop() is true."""
    for name, of_directory in self.todo.items():
      fields = part_config(of_directory, self.dtype)
      pieces = unless_stopped(our_tensors(of_directory, fields, progress), stop)
      parts.write_part(self.workdir / name, fields, self.specs[name], pieces)
    if self.tokenizer:
      files.write_bytes(self.workdir / "text" / "tokenizer.model", self.tokenizer)
    if self.pipeline.sample:
      files.write_json(self.workdir / "config.json", experiment(self.pipeline, self.dtype))
    keep_source(self.source, self.workdir / "source", self.pipeline)


def plan(source, workdir, dtype="source"):
  """Folder -> Import; None where W holds it all already. BadInput says what does not fit.

  dtype: of the transformer and the text encoder, "source" as they come.
  """
  source, workdir = pathlib.Path(source), pathlib.Path(workdir)
  pipeline = wan_pipeline.open_pipeline(source)
  tokenizer = spiece.from_folder(pipeline.tokenizer) if pipeline.tokenizer else None
  fit_together(pipeline, tokenizer)
  directories = {}
  for part in pipeline.parts:
    directories.setdefault("model" if part.key.startswith("dit") else part.key, []).append(part)
  todo = {name: of_directory for name, of_directory in directories.items() if not is_done(workdir / name, of_directory, dtype)}
  refuse_others(workdir, directories)
  if not todo and (workdir / "source" / "tensors.json").exists():
    return None
  specs = {name: {key: spec for part in of_directory for key, spec in part_specs(part, dtype).items()} for name, of_directory in todo.items()}
  return Import(source, workdir, dtype, pipeline, tokenizer, todo, specs)


def refuse_others(workdir, directories):
  """BadInput where W was made by another program: nothing there is written over."""
  config = workdir / "config.json"
  other = next((path for path in (workdir / "checkpoints", workdir / "manifests") if path.exists()), None)
  if "path" in files.read_json_if_exists(config).get("data", {}):
    other = config
  for name in directories:
    there = [path for path in (workdir / name).glob("*") if not path.name.endswith(".partial")]
    if there and "made_from" not in files.read_json_if_exists(workdir / name / "config.json"):
      other = other or workdir / name
  if other:
    raise BadInput(f"{workdir} belongs to another program (there is {other}); give a --workdir of its own")


@dataclasses.dataclass
class LoRAImport:
  """Adapters to be imported: `plan_lora` has checked them, `run` writes them."""

  base: epath.Path
  workdir: epath.Path
  adapters: lora.LoRAConfig
  config: ml_collections.ConfigDict
  params: dict
  stamp: str

  def run(self):
    """Writes the work directory, its config.json last."""
    for part in ("vae", "text"):
      parts.copy_part(self.base / part, self.workdir / part, link=part == "text")
    parts.copy_source(self.base, self.workdir)
    parts.save_part(self.workdir / "model", {"step": 0, "made_from": self.stamp}, {"lora": {"dit": self.params}})
    fields = {"format_version": parts.FORMAT_VERSION, "program": PROGRAM, **json.loads(self.config.to_json_best_effort())}
    files.write_json(self.workdir / "config.json", fields)


def plan_lora(source, base, workdir, expert=""):
  """A file of adapters in the layout of PEFT and diffusers, or its folder, to the weights in `base` -> LoRAImport.

  None where W holds them already. W needs `base` from then on. BadInput says what does not fit.
  """
  source, base, workdir = pathlib.Path(source), epath.Path(base), epath.Path(workdir)
  file = source
  if source.is_dir():
    files_there = sorted(source.glob("*.safetensors"))
    file = source / lora.FILE if len(files_there) != 1 else files_there[0]
  tensors = foreign.Tensors(file)
  stamp = f"{zlib.crc32(file.read_bytes()):08x}"
  theirs = files.read_json(base / "config.json")
  two = bool(theirs.get("model", {}).get("boundary"))
  if two != bool(expert):
    holds = "two experts; say which these adapt: --expert=high or low" if two else "one model; leave --expert out"
    raise BadInput(f"{base} holds {holds}")
  config = ml_collections.ConfigDict({
      "init": str(base), "model": {"size": "init", "expert": expert, "remat": "none", "dtype": "float32", "text": ""}, "sample": {},
      "data": {"base_fps": 0.0}, "lora": {"rank": 1, "alpha": 1.0, "targets": ("to_q",)}})
  workdirs.adopt(config)
  config.model.dtype = theirs["model"]["dtype"]
  adapters, params = lora.from_diffusers(tensors, dit.DiTConfig(**config.model.dit), tensors.metadata)
  config.lora = dataclasses.asdict(adapters)
  there = workdir / "model" / "config.json"            # W/config.json is written last: a kill between them is mended by a second run
  mine, whole = files.read_json_if_exists(there).get("made_from") == stamp, (workdir / "config.json").exists()
  if mine and whole:
    return None
  if whole or (there.exists() and not mine) or (workdir / "manifests").exists():
    raise BadInput(f"{workdir} holds a model already; give another --workdir")
  return LoRAImport(base, workdir, adapters, config, params, stamp)


def is_done(directory, of_directory, dtype):
  """Does it hold these parts? BadInput where it holds others."""
  path = directory / "config.json"
  if not path.exists() or not (directory / parts.WEIGHTS).exists():
    return False
  if files.read_json(path).get("made_from") != made_from(of_directory, dtype):
    raise BadInput(f"{directory} holds other weights, or these with another --dtype; give another --workdir")
  return True


def made_from(of_directory, dtype):
  """Changes when the files of the parts do."""
  stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for part in of_directory
           for path in (sorted(part.folder.iterdir()) if part.folder.is_dir() else [part.folder]) if path.suffix in (".safetensors", ".json")]
  return f"{zlib.crc32(repr((stats, dtype)).encode()):08x}"


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


def part_config(of_directory, dtype):
  """What config.json of the directory says; `our_tensors` adds a checksum of the weights."""
  part = of_directory[0]
  fields = {"made_from": made_from(of_directory, dtype)}
  if part.key == "vae":
    return fields | vae.config_to_dict(part.cfg)
  if part.key == "text":
    return fields | dataclasses.asdict(dataclasses.replace(part.cfg, dtype=compute_dtype(part, dtype)))
  return fields | {"step": 0, "dit": dataclasses.asdict(part.cfg)}


def compute_dtype(part, dtype):
  """What a part is computed in: bfloat16 where most of its weights are."""
  kinds = list(part.stored.values()) if dtype == "source" else [dtype]
  return "bfloat16" if 2 * kinds.count("bfloat16") > len(kinds) else "float32"


def our_tensors(of_directory, fields, progress):
  """All tensors in our layout -> iterator of (our name, array or one layer of it)."""
  crc = 0
  for part in of_directory:
    for row, array in table.stream(part.tensors, part.rows):
      array = np.ascontiguousarray(array)
      crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
      progress(1, part.folder.name)
      yield our_name(part, row), array
  fields["weights_crc32"] = f"{crc:08x}"


def fit_together(pipeline, tokenizer):
  """BadInput where the parts of a pipeline are not for each other."""
  cfg = {part.key.split("_")[0]: part.cfg for part in pipeline.parts}
  if {"dit", "text"} <= cfg.keys() and cfg["dit"].text_width != cfg["text"].width:
    raise BadInput(f"the text encoder gives {cfg['text'].width} values a token, the transformer takes {cfg['dit'].text_width}; are they one?")
  if {"dit", "vae"} <= cfg.keys() and cfg["dit"].channels != cfg["vae"].z_dim:
    raise BadInput(f"the VAE has {cfg['vae'].z_dim} latent channels, the transformer takes {cfg['dit'].channels}; is it of this pipeline?")
  if "text" in cfg and tokenizer and (most := len(ModelProto.FromString(tokenizer).pieces)) > cfg["text"].vocab:
    raise BadInput(f"the tokenizer has {most} ids, the text encoder knows {cfg['text'].vocab}; are they one pipeline?")
  if pipeline.sample and len(pipeline.parts) > 1 and not ({"vae", "text"} <= cfg.keys() and tokenizer):
    raise BadInput("a pipeline needs vae/, text_encoder/ and tokenizer/ beside its transformer; download it again, or import single parts")


def keep_source(source, target, pipeline):
  """What export needs to give the same folder back: all small files, and name and dtype of every tensor."""
  for path in sorted(source.rglob("*")) if (source / "model_index.json").exists() else []:
    if path.is_file() and (path.suffix in (".json", ".txt", ".md", ".model") or path.name.startswith("LICENSE")) and ".index." not in path.name:
      copy = target / path.relative_to(source)
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, copy)
  before = files.read_json_if_exists(target / "tensors.json")
  files.write_json(target / "tensors.json", before | {part.key: part.stored for part in pipeline.parts})


def experiment(pipeline, dtype):
  """W/config.json: what launch.sample reads, and launch.train where it begins from W."""
  part = next(part for part in pipeline.parts if part.key.startswith("dit"))
  return {
      "format_version": parts.FORMAT_VERSION, "program": PROGRAM,
      "model": {"kind": "wan", "size": "imported", "dit": dataclasses.asdict(part.cfg), "boundary": pipeline.boundary, "text": "", "remat": "none",
                "dtype": compute_dtype(part, dtype)},
      "data": {"base_fps": 0.0},
      "sample": {**pipeline.sample, "row_tokens": 1024, "rows": 1},
  }


def count(part):
  """Parameters of a part."""
  return sum(np.prod(row.our_shape) for row in part.rows)
