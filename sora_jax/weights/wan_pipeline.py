"""Opens and writes folders of the Wan family: a pipeline of diffusers, an original release, or one part.

A pipeline (`WanPipeline`, `WanImageToVideoPipeline`, diffusers 0.42.1) has

  model_index.json                  the class, `boundary_ratio` of two experts, `expand_timesteps` of TI2V-5B
  transformer/ transformer_2/       the DiT; of two experts the one of high noise, and the one of low noise
  vae/ text_encoder/ tokenizer/ scheduler/

An original release (Wan-AI/Wan2.1-T2V-1.3B and so on) holds the DiT as config.json and
diffusion_pytorch_model*.safetensors, those of two experts in high_noise_model/ and low_noise_model/; the
tokenizer in google/umt5-xxl/; and the VAE and the text encoder as pickles, which are read where PyTorch is
installed, and otherwise converted to .safetensors files in the same folder first.

A folder of single files, as people collect them for ComfyUI, has a file for the transformer, or two with
`high` and `low` in their names, one for the VAE, and one for the text encoder, which holds the tokenizer,
too. Names and shapes tell what is what.

This module reads only headers and config files. The weights of a part are in wan_dit.py, wan_vae.py and
umt5.py.
"""

import dataclasses
import functools
import json
import pathlib
import re

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.vae import SIZES
from sora_jax.weights import files, table, umt5, wan_dit, wan_original, wan_vae

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanDMDPipeline")
# Class of a part: our name for it.
PARTS = {"WanTransformer3DModel": "dit", "AutoencoderKLWan": "vae", "UMT5EncoderModel": "text"}
MODULES = {"dit": wan_dit, "vae": wan_vae, "text": umt5}
FOLDERS = {
  "dit": "transformer",
  "dit_high": "transformer",
  "dit_low": "transformer_2",
  "vae": "vae",
  "text": "text_encoder",
}
# Fields that a scheduler must have for its trajectories to be those of our samplers with the "diffusers"
# schedule. Fields that it leaves out have these values.
SCHEDULERS = {
  "UniPCMultistepScheduler": ("unipc", "flow_shift", {
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "bh2",
    "predict_x0": True, "final_sigmas_type": "zero", "lower_order_final": True, "thresholding": False,
    "disable_corrector": [], "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "use_dynamic_shifting": False, "shift_terminal": None,
    "num_train_timesteps": 1000,
  }),
  "FlowMatchEulerDiscreteScheduler": ("euler", "shift", {
    "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False,
    "stochastic_sampling": False, "use_karras_sigmas": False, "use_exponential_sigmas": False,
    "use_beta_sigmas": False, "num_train_timesteps": 1000,
  }),
}  # fmt: skip
# The authors' settings for each family (Wan-Video/Wan2.1 and Wan2.2 on GitHub, wan/configs). guidance_low is
# that of the low-noise expert.
SETTINGS = {
  "one expert": dict(size=(480, 832), frames=81, fps=16.0, steps=50, guidance=5.0),
  "two experts": dict(size=(720, 1280), frames=81, fps=16.0, steps=40, guidance=4.0, guidance_low=3.0),
  "two experts, from an image": dict(
    size=(720, 1280), frames=81, fps=16.0, steps=40, guidance=3.5, guidance_low=3.5
  ),
  "a timestep for each token": dict(size=(704, 1280), frames=121, fps=24.0, steps=50, guidance=5.0),
}
# Of those that were distilled to three steps (FastVideo, WanDMDPipeline).
DISTILLED = dict(steps=3, times=(1000, 757, 522), sampler="renoise", guidance=1.0)
# Boundary of the experts and shift of the original releases, whose files hold neither.
BOUNDARY = {"two experts": 0.875, "two experts, from an image": 0.9}
SHIFT = {
  "one expert": 5.0,
  "two experts": 12.0,
  "two experts, from an image": 5.0,
  "a timestep for each token": 5.0,
}
PICKLES = ("Wan2", "models_t5")  # the VAE and the text encoder of a release; its CLIP is another
LEFT_OUT = re.compile(r"blocks\.\d+\.to_gate_compress\..+")  # of FastWan: gates of its sparse attention


@dataclasses.dataclass
class Part:
  """One model of a folder.

  key: "dit", "dit_high", "dit_low", "vae" or "text". tensors: with the names in `rows`.
  """

  key: str
  folder: pathlib.Path
  cfg: object
  rows: list
  tensors: object
  stored: dict  # {name in the folder: dtype}


@dataclasses.dataclass
class Pipeline:
  """The content of a folder.

  tokenizer: its folder, or the bytes of a sentencepiece model. sample: settings of a sampling job. boundary:
  the sigma that divides the two experts, 0 for one expert. notes: messages for the user.
  """

  parts: list
  tokenizer: pathlib.Path | bytes | None = None
  boundary: float = 0.0
  sample: dict | None = None
  notes: list = dataclasses.field(default_factory=list)


def open_pipeline(source):
  """Folder of a pipeline or of one part, or a file -> Pipeline.

  Every tensor is checked to exist with its shape. Raises BadInput, which names what is wrong.
  """
  source = pathlib.Path(source)
  if source.is_file():
    return _loose_files(source, [source])
  if not source.is_dir():
    raise BadInput(
      f"weights: {source} does not exist; give the folder of a pipeline, with model_index.json, or of one "
      "part, with config.json"
    )
  original = (source,)
  if (source / "high_noise_model").is_dir():
    original = (source / "high_noise_model", source / "low_noise_model")
  if (original[0] / "config.json").exists():
    if files.read_config(original[0]).get("_class_name") == "WanModel":
      return open_original(source, original)
  if not (source / "model_index.json").exists():
    if not (source / "config.json").exists() and (loose := sorted(source.glob("*.safetensors"))):
      return _loose_files(source, loose)
    return _single_part(source)
  index = read_json(source / "model_index.json")
  if index.get("_class_name") not in PIPELINES:
    raise BadInput(f"weights: {source} is a {index.get('_class_name')}; known are {', '.join(PIPELINES)}")
  names = [name for name in ("transformer", "transformer_2", "vae", "text_encoder") if _has_part(index, name)]
  for name in names:
    if not (source / name).is_dir():
      raise BadInput(
        f"weights: model_index.json of {source} names {name}, and there is no such folder; download it again"
      )
  expand, boundary = bool(index.get("expand_timesteps")), index.get("boundary_ratio") or 0.0
  parts = [open_part(source / name, expand) for name in names]
  _name_experts(source, parts)
  if ("transformer_2" in names) != bool(boundary):
    count = "one transformer" if boundary else "two transformers"
    raise BadInput(
      f"weights: {source} has {count} and boundary_ratio {boundary} in model_index.json; two transformers "
      "need a boundary, one needs none; download it again"
    )
  tokenizer = source / "tokenizer"
  pipeline = Pipeline(parts, tokenizer if tokenizer.is_dir() else None, boundary)
  for part in parts:
    if left := [name for name in part.stored if LEFT_OUT.fullmatch(name)]:
      pipeline.notes.append(
        f"{part.folder}: {len(left)} tensors of sparse attention, as {left[0]}, are left out"
      )
  for part in parts:
    if left := len(part.stored) - len(part.tensors):
      pipeline.notes.append(
        f"{part.folder}: {left} tensors of sparse attention (to_gate_compress) are left out"
      )
  if any(part.key.startswith("dit") for part in parts):
    distilled = index["_class_name"] == "WanDMDPipeline"
    schedule = DISTILLED | {"shift": 8.0} if distilled else _schedule(source / "scheduler", pipeline.notes)
    pipeline.sample = SETTINGS[_family(parts)] | schedule
  return pipeline


def _loose_files(source, paths):
  """Single files, each of one part -> Pipeline."""
  parts = []
  for path in paths:
    part = open_file(path)
    if part.key in [one.key for one in parts if one.key != "dit"]:
      raise BadInput(f"weights: {path} and another file of {source} are both a {part.key}; keep one of them")
    parts.append(part)
  dits = [part for part in parts if part.key == "dit"]
  if len(dits) > 1:
    marks = [[word for word in ("high", "low") if word in part.folder.name.lower()] for part in dits]
    if sorted(marks) != [["high"], ["low"]]:
      raise BadInput(
        f"weights: {source} holds {len(dits)} transformers; two experts have `high` and `low` in their "
        "names: keep these two, or one, in the folder"
      )
    dits.sort(key=lambda part: "low" in part.folder.name.lower())
    parts = dits + [part for part in parts if part.key != "dit"]
    _name_experts(source, parts)
  pipeline = Pipeline(parts)
  text = next((part for part in parts if part.key == "text"), None)
  if text and "spiece_model" in (tensors := _tensors(text.folder)):
    pipeline.tokenizer = np.asarray(tensors["spiece_model"]).tobytes()
  if dits:
    _sample_as_released(pipeline)
  return pipeline


def _sample_as_released(pipeline):
  """Sets what the files of a release do not hold: the boundary of two experts, and how to sample."""
  family = _family(pipeline.parts)
  pipeline.boundary = BOUNDARY.get(family, 0.0)
  pipeline.sample = SETTINGS[family] | {"sampler": "unipc", "shift": SHIFT[family], "schedule": "diffusers"}


def _single_part(source):
  """The folder of one part, without model_index.json -> Pipeline."""
  part = open_part(source)
  pipeline = Pipeline([part])
  sibling = source.resolve().parent / "tokenizer"
  if part.key == "text" and sibling.is_dir():
    pipeline.tokenizer = sibling
  if part.key == "dit":
    pipeline.sample = SETTINGS["one expert"] | {"sampler": "unipc", "shift": 3.0, "schedule": "diffusers"}
  return pipeline


def _has_part(index, name):
  """Whether model_index.json names a class for a part; [null, null] means that there is none."""
  entry = index.get(name)
  return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _name_experts(source, parts):
  """Sets the keys of two DiTs to dit_high and dit_low; the one of high noise comes first."""
  dits = [part for part in parts if part.key == "dit"]
  if len(dits) == 2:
    if dits[0].cfg != dits[1].cfg:
      raise BadInput(
        f"weights: the two transformers of {source} have different shapes ({dits[0].cfg} and {dits[1].cfg}); "
        "download it again"
      )
    dits[0].key, dits[1].key = "dit_high", "dit_low"


def _family(parts):
  """The key in SETTINGS of a pipeline's family."""
  dit = next(part.cfg for part in parts if part.key.startswith("dit"))
  if dit.conditioning == "token_sigma":
    return "a timestep for each token"
  if not any(part.key == "dit_low" for part in parts):
    return "one expert"
  return "two experts, from an image" if dit.cond_channels else "two experts"


def open_original(source, folders):
  """An original release -> Pipeline. folders: those of its DiTs.

  It has the VAE and the text encoder where they are there as safetensors.
  """
  parts = []
  for folder in folders:
    config = files.read_config(folder)
    tensors = files.Tensors(folder, "diffusion_pytorch_model*")
    names = wan_original.rename(tensors, "dit")
    cfg = _checked(folder, "WanModel", functools.partial(_original_config, config, names.values()))
    parts.append(_part("dit", folder, cfg, files.Renamed(tensors, names), tensors))
  _name_experts(source, parts)
  for path in sorted(source.glob("*.safetensors")):
    if not path.name.startswith("diffusion_pytorch_model"):
      parts.append(open_file(path))
  tokenizer = source / "google" / "umt5-xxl"
  pipeline = Pipeline(parts, tokenizer if tokenizer.is_dir() else None)
  for path in sorted(source.glob("*.pth")):
    if path.stem.startswith(PICKLES) and not path.with_suffix(".safetensors").exists():
      try:
        parts.append(open_file(path))
      except BadInput as error:  # without PyTorch: the rest is imported, and this said
        pipeline.notes.append(f"{str(error).removeprefix('weights: ')}; then run the same command again")
  if {part.key for part in parts} >= {"vae", "text"} and pipeline.tokenizer:
    _sample_as_released(pipeline)
  return pipeline


def _original_config(config, names):
  """config.json and names of weights of an original DiT -> DiTConfig."""
  theirs = wan_original.config_to_diffusers(config, names)
  return wan_dit.config_from_diffusers(theirs, config.get("model_type") == "ti2v")


def _tensors(path):
  """A file of weights, safetensors or a pickle -> its tensors."""
  return (files.Pickle if path.suffix in (".pth", ".pt", ".bin", ".ckpt") else files.Tensors)(path)


def open_file(path):
  """One file of one part -> Part. Names and shapes tell its kind and config."""
  tensors = files.Plain(_tensors(path))
  key, layout = wan_original.recognise(tensors)
  named = tensors
  if layout == "original":
    residual = any(name.startswith("decoder.upsamples.0.upsamples.") for name in tensors)
    size = SIZES["wan2.2" if residual else "wan2.1"]  # of a VAE
    named = files.Renamed(tensors, wan_original.rename(tensors, key, size))
  elif key == "text":
    named = files.Renamed(tensors, umt5.names(tensors))
  cfg = _checked(path, key, lambda: MODULES[key].config_of(named))
  return _part(key, path, cfg, named, tensors)


def _schedule(folder, notes):
  """scheduler/ -> {sampler, shift, schedule} of a sampling job. A note is added where it is not supported."""
  config, path = {}, folder / "scheduler_config.json"
  if path.exists():
    config = read_json(path)
  name = config.get("_class_name")
  reasons = ["it is not known"]
  if name in SCHEDULERS:
    needed = SCHEDULERS[name][2]
    reasons = [
      f"{key} is {config[key]!r}" for key, value in needed.items() if config.get(key, value) != value
    ]
  if reasons:
    notes.append(f"scheduler {name} is not supported ({reasons[0]}): sampling will use unipc with shift 3")
    return {"sampler": "unipc", "shift": 3.0, "schedule": "diffusers"}
  sampler, shift, _ = SCHEDULERS[name]
  return {"sampler": sampler, "shift": float(config.get(shift) or 1.0), "schedule": "diffusers"}


def open_part(folder, expand_timesteps=False):
  """The folder of one part -> Part. Its tensors are checked to exist with their shapes."""
  config = files.read_config(folder)
  kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
  if kind not in PARTS:
    known = f"{', '.join(PARTS)}, and {', '.join(PIPELINES)}"
    raise BadInput(f"weights: {folder} is a {kind}, which is not known; known are {known}")
  key = PARTS[kind]
  extra = (expand_timesteps,) if key == "dit" else ()
  cfg = _checked(folder, kind, lambda: MODULES[key].config_from_diffusers(config, *extra))
  tensors = files.Tensors(folder)
  named = files.Renamed(tensors, umt5.names(tensors)) if key == "text" else tensors
  if key == "dit" and any(map(LEFT_OUT.fullmatch, tensors)):
    named = files.Renamed(tensors, {name: name for name in tensors if not LEFT_OUT.fullmatch(name)})
  return _part(key, folder, cfg, named, tensors)


def _checked(folder, kind, build):
  """build(), which makes a config from theirs. Raises BadInput where it fails."""
  try:
    return build()
  except (KeyError, TypeError, ValueError) as error:
    raise BadInput(
      f"weights: config.json of {folder} is not that of a {kind} ({error!r}); download it again"
    ) from None


def _part(key, folder, cfg, named, tensors):
  """A Part, after its tensors are checked against its rows."""
  rows = MODULES[key].rows(cfg)
  try:
    table.check(named, rows)
  except BadInput as error:
    raise BadInput(f"{folder}: {error}") from None
  stored = {name: tensors.dtype(name) for name in tensors}
  return Part(key, pathlib.Path(folder), cfg, rows, named, stored)


def read_json(path):
  """Reads a JSON object. Raises BadInput where the file holds none."""
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError("it is not a JSON object")
    return value
  except (OSError, ValueError) as error:
    raise BadInput(f"weights: {path} cannot be read ({error}); download it again") from None


def part_to_diffusers(key, cfg, params, stored, to_dtype):
  """Params of one part -> (its config.json, {their name: (shape, dtype)}, iterator of (their name, array)).

  stored: {name: dtype} of an imported part, whose embedding keeps its name; else None. to_dtype: our dtype ->
  dtype in the file.
  """
  module = MODULES[key.split("_")[0]]
  rows = module.rows(cfg)
  leaves = {name: row.of(params).dtype for row in rows for name in row.names}
  names = {name: [name] for name in leaves}
  if stored and key == "text":
    names[umt5.EMBEDDINGS[0]] = [name for name in umt5.EMBEDDINGS if name in stored]
  shapes = table.their_shapes(rows)
  specs = {}
  for name, shape in shapes.items():
    for theirs in names[name]:
      specs[theirs] = (shape, to_dtype((stored or {}).get(theirs, leaves[name])))
  arrays = ((theirs, array) for name, array in table.to_diffusers(params, rows) for theirs in names[name])
  return module.config_to_diffusers(cfg), specs, arrays


def _new_index(path, model, settings, workdir):
  """Writes model_index.json."""
  del settings, workdir
  index = {
    "_class_name": "WanImageToVideoPipeline" if model.dit.cond_channels else "WanPipeline",
    "_diffusers_version": "0.42.1",
    "boundary_ratio": model.boundary or None,
    "expand_timesteps": model.dit.conditioning == "token_sigma",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"] if model.boundary else [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
  }
  if model.dit.cond_channels:
    index |= {"image_encoder": [None, None], "image_processor": [None, None]}
  path.write_text(json.dumps(index, indent=2))


def _new_scheduler(path, model, settings, workdir):
  """Writes scheduler/: UniPC, with the shift of the model."""
  del model, workdir
  path.mkdir()
  name = "UniPCMultistepScheduler"
  config = {"_class_name": name, "_diffusers_version": "0.42.1", **SCHEDULERS[name][2]}
  config["flow_shift"] = settings["shift"]
  (path / "scheduler_config.json").write_text(json.dumps(config, indent=2))


def _new_tokenizer(path, model, settings, workdir):
  """Writes tokenizer/: the sentencepiece model."""
  del model, settings
  path.mkdir()
  (path / "spiece.model").write_bytes((workdir / "text" / "tokenizer.model").read_bytes())
  config = {
    "tokenizer_class": "T5Tokenizer",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_ids": 0,
    "model_max_length": 512,
  }
  (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


# Writers of what an export needs and no import has kept.
NEW = {"model_index.json": _new_index, "scheduler": _new_scheduler, "tokenizer": _new_tokenizer}
