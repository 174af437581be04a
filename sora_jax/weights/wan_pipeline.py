"""A folder of the Wan family as diffusers saves it (`WanPipeline`, `WanImageToVideoPipeline`, diffusers 0.42.1), as its authors released
it, or one part of it.

  model_index.json                  the class, `boundary_ratio` of two experts, `expand_timesteps` of TI2V-5B
  transformer/ transformer_2/       the DiT; of two experts that of high noise, and that of low noise
  vae/ text_encoder/ tokenizer/ scheduler/

The original releases (Wan-AI/Wan2.1-T2V-1.3B and so on) hold the DiT as config.json and diffusion_pytorch_model*.safetensors, of two
experts in high_noise_model/ and low_noise_model/, the tokenizer in google/umt5-xxl/, and the VAE and the text encoder as pickles, to be
made into .safetensors files beside them first.

Only headers and config files are read here. What is in a part: wan_dit.py, wan_vae.py, umt5.py.
"""

import dataclasses
import json
import pathlib

from sora_jax.errors import BadInput
from sora_jax.models.vae import SIZES
from sora_jax.weights import files, table, umt5, wan_dit, wan_original, wan_vae

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
PARTS = {"WanTransformer3DModel": "dit", "AutoencoderKLWan": "vae", "UMT5EncoderModel": "text"}  # class of a part: what we call it
MODULES = {"dit": wan_dit, "vae": wan_vae, "text": umt5}
FOLDERS = {"dit": "transformer", "dit_high": "transformer", "dit_low": "transformer_2", "vae": "vae", "text": "text_encoder"}
# What a scheduler must say for its trajectories to be those of our samplers with the "diffusers" schedule; what it leaves out is right.
SCHEDULERS = {
  "UniPCMultistepScheduler": ("unipc", "flow_shift", {
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "solver_type": "bh2", "predict_x0": True,
    "final_sigmas_type": "zero", "lower_order_final": True, "thresholding": False, "disable_corrector": [], "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_dynamic_shifting": False, "shift_terminal": None,
    "num_train_timesteps": 1000,
  }),
  "FlowMatchEulerDiscreteScheduler": ("euler", "shift", {
    "use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False, "stochastic_sampling": False, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "num_train_timesteps": 1000,
  }),
}  # fmt: skip
# As the authors sample each family (Wan-Video/Wan2.1 and Wan2.2 on GitHub, wan/configs): size, frames, fps, steps, guidance, of low noise.
SETTINGS = {
  "one expert": dict(size=(480, 832), frames=81, fps=16.0, steps=50, guidance=5.0),
  "two experts": dict(size=(720, 1280), frames=81, fps=16.0, steps=40, guidance=4.0, guidance_low=3.0),
  "two experts, from an image": dict(size=(720, 1280), frames=81, fps=16.0, steps=40, guidance=3.5, guidance_low=3.5),
  "a timestep for each token": dict(size=(704, 1280), frames=121, fps=24.0, steps=50, guidance=5.0),
}
# Of the original releases, which say neither: where experts change over, and the shift.
BOUNDARY = {"two experts": 0.875, "two experts, from an image": 0.9}
SHIFT = {"one expert": 5.0, "two experts": 12.0, "two experts, from an image": 5.0, "a timestep for each token": 5.0}
CONVERT = "safetensors.torch.save_file(torch.load('{0}', weights_only=True), '{1}.safetensors')"


@dataclasses.dataclass
class Part:
  """One model of a folder: `key` is "dit", "dit_high", "dit_low", "vae" or "text"; `tensors` has the names that `rows` know."""

  key: str
  folder: pathlib.Path
  cfg: object
  rows: list
  tensors: object
  stored: dict  # {name in the folder: dtype}


@dataclasses.dataclass
class Pipeline:
  """What a folder holds. `sample`: settings of a sampling job; `boundary`: where experts change over, 0 for one; `notes`: to be told."""

  parts: list
  tokenizer: pathlib.Path | None = None
  boundary: float = 0.0
  sample: dict | None = None
  notes: list = dataclasses.field(default_factory=list)


def open_pipeline(source):
  """A pipeline's folder, or one part's -> Pipeline, checked: every tensor is there with its shape. Raises BadInput that names what is wrong."""
  source = pathlib.Path(source)
  if source.is_file():
    return Pipeline([open_file(source)])
  if not source.is_dir():
    raise BadInput(f"weights: {source} does not exist; give the folder of a pipeline, with model_index.json, or of one part, with config.json")
  original = (source / "high_noise_model", source / "low_noise_model") if (source / "high_noise_model").is_dir() else (source,)
  if (original[0] / "config.json").exists() and files.read_config(original[0]).get("_class_name") == "WanModel":
    return open_original(source, original)
  if not (source / "model_index.json").exists():
    part, sibling = open_part(source), source.resolve().parent / "tokenizer"
    settings = SETTINGS["one expert"] | {"sampler": "unipc", "shift": 3.0, "schedule": "diffusers"}
    return Pipeline([part], sibling if part.key == "text" and sibling.is_dir() else None, sample=settings if part.key == "dit" else None)
  index = read_json(source / "model_index.json")
  if index.get("_class_name") not in PIPELINES:
    raise BadInput(f"weights: {source} is a {index.get('_class_name')}; known are {', '.join(PIPELINES)}")
  has = lambda name: isinstance(index.get(name), list) and index[name][:1] not in ([], [None])  # noqa: E731
  there = list(filter(has, ("transformer", "transformer_2", "vae", "text_encoder")))
  for name in there:
    if not (source / name).is_dir():
      raise BadInput(f"weights: model_index.json of {source} names {name}, and there is no such folder; download it again")
  expand, boundary = bool(index.get("expand_timesteps")), index.get("boundary_ratio") or 0.0
  parts = [open_part(source / name, expand) for name in there]
  _name_experts(source, parts)
  if ("transformer_2" in there) != bool(boundary):
    raise BadInput(f"weights: {source} has {'two transformers' if not boundary else 'one transformer'} and boundary_ratio {boundary} in "
                   "model_index.json; two need one, and one none: download it again")
  found = Pipeline(parts, source / "tokenizer" if (source / "tokenizer").is_dir() else None, boundary)
  if any(part.key.startswith("dit") for part in parts):
    found.sample = SETTINGS[_family(parts)] | _schedule(source / "scheduler", found.notes)
  return found


def _name_experts(source, parts):
  """Two DiTs, that of high noise first, become dit_high and dit_low."""
  dits = [part for part in parts if part.key == "dit"]
  if len(dits) == 2:
    if dits[0].cfg != dits[1].cfg:
      raise BadInput(f"weights: the two transformers of {source} have other shapes ({dits[0].cfg} and {dits[1].cfg}); download it again")
    dits[0].key, dits[1].key = "dit_high", "dit_low"


def _family(parts):
  """A key of SETTINGS."""
  dit, two = next(part.cfg for part in parts if part.key.startswith("dit")), any(part.key == "dit_low" for part in parts)
  if dit.conditioning == "token_sigma":
    return "a timestep for each token"
  return ("two experts, from an image" if dit.cond_channels else "two experts") if two else "one expert"


def open_original(source, folders):
  """An original release -> Pipeline; `folders` hold its DiTs. Without VAE and text encoder as safetensors, the DiTs alone."""
  parts = []
  for folder in folders:
    config = files.read_config(folder)
    tensors = files.Tensors(folder, "diffusion_pytorch_model*")
    names = wan_original.rename(tensors, "dit")
    cfg = _checked(folder, "WanModel", lambda config=config, names=names: wan_dit.config_from_diffusers(
      wan_original.config_to_diffusers(config, names.values()), config.get("model_type") == "ti2v"))
    parts.append(_part("dit", folder, cfg, files.Renamed(tensors, names), tensors))
  _name_experts(source, parts)
  parts += [open_file(path) for path in sorted(source.glob("*.safetensors")) if not path.name.startswith("diffusion_pytorch_model")]
  tokenizer = source / "google" / "umt5-xxl"
  found = Pipeline(parts, tokenizer if tokenizer.is_dir() else None)
  pickles = [path for path in sorted(source.glob("*.pth")) if not path.with_suffix(".safetensors").exists()]
  found.notes += [f"{path.name} is a pickle of PyTorch, which is not read here; where torch is, {CONVERT.format(path.name, path.stem)} makes a "
                  "file that is, and the same command then takes it too" for path in pickles]
  if {part.key for part in parts} >= {"vae", "text"} and found.tokenizer:
    family = _family(parts)
    found.boundary = BOUNDARY.get(family, 0.0)
    found.sample = SETTINGS[family] | {"sampler": "unipc", "shift": SHIFT[family], "schedule": "diffusers"}
  return found


def open_file(path):
  """One safetensors file of a VAE or a text encoder, which say by their names and shapes what they are -> Part."""
  tensors = files.Tensors(path)
  key, layout = wan_original.recognise(tensors)
  if key == "dit":
    raise BadInput(f"weights: {path} is a transformer, which needs its config.json; give the folder that holds both")
  named = tensors
  if layout == "original":
    residual = any(name.startswith("decoder.upsamples.0.upsamples.") for name in tensors)
    named = files.Renamed(tensors, wan_original.rename(tensors, key, SIZES["wan2.2" if residual else "wan2.1"]))
  elif key == "text":
    named = files.Renamed(tensors, umt5.names(tensors))
  return _part(key, path, _checked(path, key, lambda: MODULES[key].config_of(named)), named, tensors)


def _schedule(folder, notes):
  """scheduler/ -> {sampler, shift, schedule} of a sampling job."""
  config = read_json(folder / "scheduler_config.json") if (folder / "scheduler_config.json").exists() else {}
  name = config.get("_class_name")
  wrong = "it is not known" if name not in SCHEDULERS else next(
    (f"{key} is {config[key]!r}" for key, value in SCHEDULERS[name][2].items() if config.get(key, value) != value), None)
  if wrong:
    notes.append(f"scheduler {name} cannot be followed ({wrong}): sampling will use unipc with shift 3")
    return {"sampler": "unipc", "shift": 3.0, "schedule": "diffusers"}
  sampler, shift, _ = SCHEDULERS[name]
  return {"sampler": sampler, "shift": float(config.get(shift) or 1.0), "schedule": "diffusers"}


def open_part(folder, expand_timesteps=False):
  """The folder of one part -> Part. Its tensors are there, with their shapes."""
  config = files.read_config(folder)
  kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
  if kind not in PARTS:
    raise BadInput(f"weights: {folder} is a {kind}, which is not known; known are {', '.join(PARTS)}, and {', '.join(PIPELINES)}")
  key = PARTS[kind]
  extra = (expand_timesteps,) if key == "dit" else ()
  cfg = _checked(folder, kind, lambda: MODULES[key].config_from_diffusers(config, *extra))
  tensors = files.Tensors(folder)
  return _part(key, folder, cfg, files.Renamed(tensors, umt5.names(tensors)) if key == "text" else tensors, tensors)


def _checked(folder, kind, build):
  """build(), a config from theirs."""
  try:
    return build()
  except (KeyError, TypeError, ValueError) as error:
    raise BadInput(f"weights: config.json of {folder} is not that of a {kind} ({error!r}); download it again") from None


def _part(key, folder, cfg, named, tensors):
  """A Part whose tensors have been checked against its rows."""
  rows = MODULES[key].rows(cfg)
  try:
    table.check(named, rows)
  except BadInput as error:
    raise BadInput(f"{folder}: {error}") from None
  return Part(key, pathlib.Path(folder), cfg, rows, named, {name: tensors.dtype(name) for name in tensors})


def read_json(path):
  """A JSON object; BadInput where it is none."""
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError("it is no JSON object")
    return value
  except (OSError, ValueError) as error:
    raise BadInput(f"weights: {path} cannot be read ({error}); download it again") from None


def part_to_diffusers(key, cfg, params, stored, to_dtype):
  """Params of one part -> (its config.json, {their name: (shape, dtype)}, iterator of (their name, array)).

  stored: {name: dtype} where it was imported, which names an embedding as it was named there; to_dtype: dtype -> dtype that is wanted.
  """
  module = MODULES[key.split("_")[0]]
  rows = module.rows(cfg)
  leaves = {name: row.of(params).dtype for row in rows for name in row.names}
  names = {name: [name] for name in leaves}
  if stored and key == "text":
    names[umt5.EMBEDDINGS[0]] = [name for name in umt5.EMBEDDINGS if name in stored]
  shapes = table.their_shapes(rows)
  specs = {theirs: (shapes[name], to_dtype((stored or {}).get(theirs, leaves[name]))) for name in shapes for theirs in names[name]}
  pieces = ((theirs, array) for name, array in table.to_diffusers(params, rows) for theirs in names[name])
  return module.config_to_diffusers(cfg), specs, pieces


def _new_index(path, model, settings, workdir):
  """model_index.json."""
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
  """scheduler/: UniPC, with the shift of the model."""
  del model, workdir
  path.mkdir()
  config = {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.42.1", **SCHEDULERS["UniPCMultistepScheduler"][2]}
  (path / "scheduler_config.json").write_text(json.dumps(config | {"flow_shift": settings["shift"]}, indent=2))


def _new_tokenizer(path, model, settings, workdir):
  """tokenizer/: the sentencepiece model."""
  del model, settings
  path.mkdir()
  (path / "spiece.model").write_bytes((workdir / "text" / "tokenizer.model").read_bytes())
  special = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
  (path / "tokenizer_config.json").write_text(json.dumps(special | {"model_max_length": 512}, indent=2))


NEW = {"model_index.json": _new_index, "scheduler": _new_scheduler, "tokenizer": _new_tokenizer}  # where there is none to give back
