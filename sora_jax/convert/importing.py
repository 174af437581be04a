"""Imports open weights: a folder in a foreign layout in, a work directory out. Used by launch.import_weights.

Everything is checked before anything is written. Weights pass through memory one tensor at a time; programs
read the files that are written for one device's part at a time (parts.put).
"""

import collections
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

from sora_jax import adapters, files, parts, workdir as workdirs
from sora_jax.errors import BadInput, unless_stopped
from sora_jax.models import dit, vae
from sora_jax.weights import files as foreign, lora, lora_files, spiece, table, wan_pipeline

PROGRAM = "launch.import_weights"  # the program that W/config.json names


@dataclasses.dataclass
class Import:
  """An import: `plan` has checked it, `run` writes it.

  todo: {directory in W: parts of the pipeline to write there}; two experts go to one directory.
  specs: {directory in W: {name of a tensor: (shape, dtype)}}.
  deltas: {key of a transformer: what adapters add to it, as `models.lora.merge` takes it}.
  num_bytes: bytes to write.  memory: bytes of memory that the largest tensor needs.
  tensors: number of tensors to read.  notes: lines for the user.
  """

  source: pathlib.Path
  workdir: pathlib.Path
  dtype: str
  pipeline: wan_pipeline.Pipeline
  tokenizer: bytes | None
  todo: dict
  specs: dict
  deltas: dict
  loras: list  # of lora_files.LoRA

  @property
  def notes(self):
    return self.pipeline.notes

  @property
  def num_bytes(self):
    return sum(
      np.prod(shape) * kind.itemsize for specs in self.specs.values() for shape, kind in specs.values()
    )

  @property
  def memory(self):
    shapes = (shape for part in self.pipeline.parts for shape in table.their_shapes(part.rows).values())
    return 4 * 4 * max(np.prod(shape) for shape in shapes)

  @property
  def tensors(self):
    return sum(len(part.stored) for group in self.todo.values() for part in group)

  def __str__(self):
    names = ", ".join(part.folder.name for part in self.pipeline.parts)
    millions = sum(map(count, self.pipeline.parts)) / 1e6
    size = f"{millions:.2f} M parameters, {self.num_bytes / 1e9:.3f} GB to write"
    return f"{names} of {self.source} into {self.workdir}: {size}"

  def run(self, progress: Callable = lambda done, note: None, stop: Callable = lambda: False):
    """Writes the work directory. progress(done, note): called after each tensor. Raises Stopped if stop()."""
    for name, group in self.todo.items():
      fields = part_config(group, self.dtype, self.loras)
      pieces = unless_stopped(our_tensors(group, fields, progress, self.deltas), stop)
      parts.write_part(self.workdir / name, fields, self.specs[name], pieces)
    if self.tokenizer:
      files.write_bytes(self.workdir / "text" / "tokenizer.model", self.tokenizer)
    if self.pipeline.sample:
      files.write_json(self.workdir / "config.json", experiment(self.pipeline, self.dtype))
    keep_source(self.source, self.workdir / "source", self.pipeline)


def plan(source, workdir, dtype="source", loras=(), lora_ignore=False, say=lambda line: None):
  """Folder -> Import; None if W holds all of it already. Raises BadInput, which names what does not fit.

  dtype: of the transformer and the text encoder; "source" keeps theirs. loras, lora_ignore: files of
  adapters that are added to the transformer, as `lora` of `Pipeline.open`.
  """
  source, workdir = pathlib.Path(source), pathlib.Path(workdir)
  pipeline = wan_pipeline.open_pipeline(source)
  tokenizer = pipeline.tokenizer
  if isinstance(tokenizer, pathlib.Path):
    tokenizer = spiece.from_folder(tokenizer)
  elif tokenizer:
    spiece.checked(tokenizer, f"the tokenizer in {source}")
  fit_together(pipeline, tokenizer)
  groups = {}
  for part in pipeline.parts:
    directory = "model" if part.key.startswith("dit") else part.key
    groups.setdefault(directory, []).append(part)
  loras = adapters.open_all(loras)
  todo = {name: group for name, group in groups.items() if not is_done(workdir / name, group, dtype, loras)}
  check_ownership(workdir, groups)
  if not todo and (workdir / "source" / "tensors.json").exists():
    return None
  specs = {}
  for name, group in todo.items():
    specs[name] = {}
    for part in group:
      specs[name] |= part_specs(part, dtype)
  transformers = {part.key: part for part in pipeline.parts if part.key.startswith("dit")}
  deltas = {}
  if loras:
    if not transformers:
      raise BadInput(f"--lora is for a transformer, and {source} has none")
    cfg = next(iter(transformers.values())).cfg
    deltas = adapters.deltas(loras, cfg, list(transformers), lora_ignore, say)
  return Import(source, workdir, dtype, pipeline, tokenizer, todo, specs, deltas, loras)


def check_ownership(workdir, directories):
  """Raises BadInput if W was made by another program, whose files would be overwritten."""
  config = workdir / "config.json"
  foreign = next((path for path in (workdir / "checkpoints", workdir / "manifests") if path.exists()), None)
  if "path" in files.read_json_if_exists(config).get("data", {}):
    foreign = config
  for name in directories:
    existing = [path for path in (workdir / name).glob("*") if not path.name.endswith(".partial")]
    if existing and "made_from" not in files.read_json_if_exists(workdir / name / "config.json"):
      foreign = foreign or workdir / name
  if foreign:
    raise BadInput(f"{workdir} belongs to another program (there is {foreign}); give a --workdir of its own")


@dataclasses.dataclass
class LoRAImport:
  """An import of adapters: `plan_lora` has checked them, `run` writes them."""

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
    parts.save_part(
      self.workdir / "model", {"step": 0, "made_from": self.stamp}, {"lora": {"dit": self.params}}
    )
    fields = {
      "format_version": parts.FORMAT_VERSION,
      "program": PROGRAM,
      **json.loads(self.config.to_json_best_effort()),
    }
    files.write_json(self.workdir / "config.json", fields)


def plan_lora(source, base, workdir, expert=""):
  """A file of adapters for the weights in `base`, or its folder -> LoRAImport; None if W holds them already.

  The names in the file may be of any trainer (weights/lora_files.py). W needs `base` from then on. Raises
  BadInput, which names what does not fit.
  """
  source, base, workdir = pathlib.Path(source), epath.Path(base), epath.Path(workdir)
  file = source
  if source.is_dir():
    candidates = sorted(source.glob("*.safetensors"))
    file = candidates[0] if len(candidates) == 1 else source / lora_files.FILE
  tensors = foreign.Tensors(file)
  stamp = f"{zlib.crc32(file.read_bytes()):08x}"
  theirs = files.read_json(base / "config.json")
  has_experts = bool(theirs.get("model", {}).get("boundary"))
  if has_experts and not expert:
    raise BadInput(f"{base} holds two experts; say which these adapt: --expert=high or low")
  if expert and not has_experts:
    raise BadInput(f"{base} holds one model; leave --expert out")
  config = ml_collections.ConfigDict(
    {
      "init": str(base),
      "model": {"size": "init", "expert": expert, "remat": "none", "dtype": "float32", "text": ""},
      "sample": {},
      "data": {"base_fps": 0.0},
      "lora": {"rank": 1, "alpha": 1.0, "targets": ("to_q",)},
    }
  )
  workdirs.adopt(config)
  config.model.dtype = theirs["model"]["dtype"]
  shape = dit.DiTConfig(**config.model.dit)
  lora_config, params = lora.from_files(tensors, shape, tensors.metadata)
  config.lora = dataclasses.asdict(lora_config)
  # W/config.json is written last, so a second run completes one that was killed.
  existing, complete = workdir / "model" / "config.json", (workdir / "config.json").exists()
  same = files.read_json_if_exists(existing).get("made_from") == stamp
  if same and complete:
    return None
  if complete or (existing.exists() and not same) or (workdir / "manifests").exists():
    raise BadInput(f"{workdir} holds a model already; give another --workdir")
  return LoRAImport(base, workdir, lora_config, config, params, stamp)


def is_done(directory, group, dtype, loras=()):
  """True if the directory holds this group of parts. Raises BadInput if it holds others."""
  path = directory / "config.json"
  if not path.exists() or not (directory / parts.WEIGHTS).exists():
    return False
  if files.read_json(path).get("made_from") != made_from(group, dtype, loras):
    raise BadInput(
      f"{directory} holds other weights, or these with another --dtype or --lora; give another --workdir"
    )
  return True


def made_from(group, dtype, loras=()):
  """A text that changes when the files of a group of parts do, or the adapters that are added to them."""
  stats = []
  for part in group:
    paths = sorted(part.folder.iterdir()) if part.folder.is_dir() else [part.folder]
    for path in paths:
      if path.suffix in (".safetensors", ".json"):
        stats.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
  added = adapters.identity(loras) if group[0].key.startswith("dit") else ""
  return f"{zlib.crc32(repr((stats, dtype)).encode()):08x}{added}"


def part_specs(part, dtype):
  """The tensors to write: {our name: (shape, dtype)}."""

  def target_dtype(row):
    if dtype != "source" and part.key != "vae":
      return np.dtype(dtype)
    return np.dtype(functools.reduce(jnp.promote_types, {part.tensors.dtype(name) for name in row.names}))

  return {our_name(part, row): (row.our_shape, target_dtype(row)) for row in part.rows}


def our_name(part, row):
  """The name of a tensor in W: model/ holds "dit/...", or "dit_high/..." and "dit_low/..."."""
  prefix = [part.key] if part.key.startswith("dit") else []
  return "/".join([*prefix, *row.path])


def part_config(group, dtype, loras=()):
  """The contents of config.json of a group's directory; `our_tensors` adds a checksum of the weights."""
  part = group[0]
  fields = {"made_from": made_from(group, dtype, loras)}
  if part.key == "vae":
    return fields | vae.config_to_dict(part.cfg)
  if part.key == "text":
    return fields | dataclasses.asdict(dataclasses.replace(part.cfg, dtype=compute_dtype(part, dtype)))
  added = {"adapters": [one.name for one in loras]} if loras else {}
  return fields | added | {"step": 0, "dit": dataclasses.asdict(part.cfg)}


def compute_dtype(part, dtype):
  """The dtype of a part's computations: bfloat16 if most of its weights are, else float32."""
  dtypes = list(part.stored.values()) if dtype == "source" else [dtype]
  return "bfloat16" if 2 * dtypes.count("bfloat16") > len(dtypes) else "float32"


def our_tensors(group, fields, progress, deltas):
  """Yields (our name, array or one layer of it) of all tensors; then adds their checksum to `fields`.

  deltas: {key of a part: what is added to its weights, as `models.lora.merge` takes it}.
  """
  crc = 0
  for part in group:
    layers = collections.Counter()
    for row, array in table.stream(part.tensors, part.rows):
      change = lora_files.delta_of(deltas.get(part.key, {}), row, layers[row.path])
      layers[row.path] += 1
      if change is not None:
        array = array.astype(np.float32) + change
      array = np.ascontiguousarray(array)
      crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
      progress(1, part.folder.name)
      yield our_name(part, row), array
  fields["weights_crc32"] = f"{crc:08x}"


def fit_together(pipeline, tokenizer):
  """Raises BadInput if the parts of a pipeline do not belong together."""
  cfg = {part.key.split("_")[0]: part.cfg for part in pipeline.parts}
  dit_cfg, vae_cfg, text_cfg = (cfg.get(name) for name in ("dit", "vae", "text"))
  if dit_cfg and text_cfg and dit_cfg.text_width != text_cfg.width:
    raise BadInput(
      f"the text encoder gives {text_cfg.width} values a token, the transformer takes {dit_cfg.text_width}; "
      "are they of one pipeline?"
    )
  if dit_cfg and vae_cfg and dit_cfg.channels != vae_cfg.z_dim:
    raise BadInput(
      f"the VAE has {vae_cfg.z_dim} latent channels, the transformer takes {dit_cfg.channels}; "
      "are they of one pipeline?"
    )
  if text_cfg and tokenizer:
    ids = len(ModelProto.FromString(tokenizer).pieces)
    if ids > text_cfg.vocab:
      raise BadInput(
        f"the tokenizer has {ids} ids, the text encoder takes {text_cfg.vocab}; are they of one pipeline?"
      )
  is_pipeline = pipeline.sample and len(pipeline.parts) > 1
  if is_pipeline and not (vae_cfg and text_cfg and tokenizer):
    raise BadInput(
      "a pipeline needs vae/, text_encoder/ and tokenizer/ beside its transformer; "
      "download it again, or import single parts"
    )


def keep_source(source, target, pipeline):
  """Keeps what an export needs to write the same folder: small files, and names and dtypes of tensors."""
  if (source / "model_index.json").exists():
    for path in sorted(source.rglob("*")):
      if path.is_file() and is_small_file(path):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
  previous = files.read_json_if_exists(target / "tensors.json")
  files.write_json(target / "tensors.json", previous | {part.key: part.stored for part in pipeline.parts})


def is_small_file(path):
  """True for configs, tokenizers, licences and texts; not for weights and their indexes."""
  if ".index." in path.name:
    return False
  return path.suffix in (".json", ".txt", ".md", ".model") or path.name.startswith("LICENSE")


def experiment(pipeline, dtype):
  """The contents of W/config.json, which launch.sample reads, and launch.train if it starts from W."""
  part = next(part for part in pipeline.parts if part.key.startswith("dit"))
  model = {
    "kind": "wan",
    "size": "imported",
    "dit": dataclasses.asdict(part.cfg),
    "boundary": pipeline.boundary,
    "text": "",
    "remat": "none",
    "dtype": compute_dtype(part, dtype),
  }
  return {
    "format_version": parts.FORMAT_VERSION,
    "program": PROGRAM,
    "model": model,
    "data": {"base_fps": 0.0},
    "sample": {**pipeline.sample, "row_tokens": 1024, "rows": 1},
  }


def count(part):
  """The number of parameters of a part."""
  return sum(np.prod(row.our_shape) for row in part.rows)
