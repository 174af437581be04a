"""A folder of the Wan family as diffusers saves it (`WanPipeline`, `WanImageToVideoPipeline`, diffusers 0.42.1), or one part of it.

  model_index.json                  the class, `boundary_ratio` of two experts, `expand_timesteps` of TI2V-5B
  transformer/ transformer_2/       the DiT; of two experts that of high noise, and that of low noise
  vae/ text_encoder/ tokenizer/ scheduler/

Only headers and config files are read here. What is in a part: wan_dit.py, wan_vae.py, umt5.py.
"""

import dataclasses
import json
import pathlib

from sora_jax.errors import BadInput
from sora_jax.weights import files, table, umt5, wan_dit, wan_vae

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
# Class of a part: (what we call it, config.json -> our config, our config -> rows, names of tensors -> {name in rows: name there}).
PARTS = {
  "WanTransformer3DModel": ("dit", wan_dit.config_to_ours, wan_dit.rows, None),
  "AutoencoderKLWan": ("vae", wan_vae.config_to_ours, wan_vae.rows, None),
  "UMT5EncoderModel": ("text", umt5.config_to_ours, umt5.rows, umt5.names),
}
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
  if not source.is_dir():
    raise BadInput(f"weights: {source} is no directory; give the folder of a pipeline, with model_index.json, or of one part, with config.json")
  if not (source / "model_index.json").exists():
    return Pipeline([open_part(source)])
  index = read_json(source / "model_index.json")
  if index.get("_class_name") not in PIPELINES:
    raise BadInput(f"weights: {source} is a {index.get('_class_name')}; known are {', '.join(PIPELINES)}")
  there = [name for name in ("transformer", "transformer_2", "vae", "text_encoder") if (index.get(name) or [None])[0] is not None]
  for name in there:
    if not (source / name).is_dir():
      raise BadInput(f"weights: model_index.json of {source} names {name}, and there is no such folder; download it again")
  expand, boundary = bool(index.get("expand_timesteps")), index.get("boundary_ratio") or 0.0
  parts = [open_part(source / name, expand) for name in there]
  if "transformer_2" in there:
    high, low = (part for part in parts if part.key == "dit")
    if not boundary or high.cfg != low.cfg:
      raise BadInput(f"weights: {source} has two transformers; they must have one shape, and model_index.json a boundary_ratio, not {boundary}")
    high.key, low.key = "dit_high", "dit_low"
  elif boundary:
    raise BadInput(f"weights: {source} has boundary_ratio {boundary} and no transformer_2; import the whole pipeline, or set it to null")
  found = Pipeline(parts, source / "tokenizer" if (source / "tokenizer").is_dir() else None, boundary)
  dit = next((part.cfg for part in parts if part.key.startswith("dit")), None)
  if dit:
    family = "a timestep for each token" if expand else "two experts" if boundary else "one expert"
    family += ", from an image" if boundary and dit.cond_channels else ""
    found.sample = SETTINGS[family] | _schedule(source / "scheduler", found.notes)
  return found


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
  return {"sampler": sampler, "shift": float(config.get(shift, 1.0)), "schedule": "diffusers"}


def open_part(folder, expand_timesteps=False):
  """The folder of one part -> Part. Its tensors are there, with their shapes."""
  config = files.read_config(folder)
  kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
  if kind not in PARTS:
    raise BadInput(f"weights: {folder} is a {kind}, which is not known; known are {', '.join(PARTS)}, and {', '.join(PIPELINES)}")
  key, config_to_ours, rows, names = PARTS[kind]
  try:
    cfg = config_to_ours(config, expand_timesteps) if key == "dit" else config_to_ours(config)
  except (KeyError, TypeError, ValueError) as error:
    raise BadInput(f"weights: config.json of {folder} is not that of a {kind} ({error!r}); download it again") from None
  tensors = files.Tensors(folder)
  stored = {name: tensors.dtype(name) for name in tensors}
  if names:
    tensors = files.Renamed(tensors, names(tensors))
  part = Part(key, pathlib.Path(folder), cfg, rows(cfg), tensors, stored)
  try:
    table.check(part.tensors, part.rows)
  except BadInput as error:
    raise BadInput(f"{folder}: {error}") from None
  return part


def read_json(path):
  """A JSON object; BadInput where it is none."""
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError("it is no JSON object")
    return value
  except (OSError, ValueError) as error:
    raise BadInput(f"weights: {path} cannot be read ({error}); download it again") from None
