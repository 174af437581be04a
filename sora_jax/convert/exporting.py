"""Exports a work directory to files for other programs. For launch.export; FORMATS has all formats."""

import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import ml_collections
import ml_dtypes
import numpy as np
from etils import epath

from sora_jax import files, parts, workdir as workdirs
from sora_jax.convert import card, graphs
from sora_jax.errors import BadInput, unless_stopped
from sora_jax.models import lora as lora_module
from sora_jax.weights import lora, lora_files, wan_pipeline

SHARD = 5_000_000_000  # the most bytes of one file of diffusers


@dataclasses.dataclass
class Export:
  """An export: `plan` has opened the weights, `run` writes them. Functions of FORMATS take it as `job`.

  config: W/config.json.  weights: nested dict of arrays, which are read when they are used.
  which: "ema" or "params".  dtype: a name, or "source".
  """

  workdir: epath.Path
  out: pathlib.Path
  format: str
  config: dict
  weights: dict
  step: int
  which: str
  dtype: str
  made_from: str
  names: str = "diffusers"  # of adapters, a key of lora.NAMES
  stop: Callable = lambda: False

  @property
  def num_bytes(self):
    """The approximate size of the weights; some formats need a little more."""
    weights = [self.workdir / part / parts.WEIGHTS for part in ("vae", "text")]
    stored = sum(path.stat().length for path in weights if path.exists())
    return stored + sum(leaf.nbytes for leaf in files.flatten(self.weights).values())

  def settings(self):
    """W/config.json as a ConfigDict."""
    return ml_collections.ConfigDict(self.config)

  def cast(self, stored):
    """The dtype in which an array is written; stored: the dtype in which it is stored."""
    return np.dtype(stored if self.dtype == "source" else self.dtype)

  def part(self, name):
    """W/vae or W/text -> (config, weights)."""
    return parts.load_part(self.workdir / name, None)

  def run(self, stop: Callable = lambda: False):
    """Writes the folder, with its README.md -> the step of the weights. Raises Stopped once stop() is true.

    The folder is written beside `out` and renamed when it is complete. If the program is killed,
    `.OUT.partial-...` remains.
    """
    self.stop = stop
    self.out.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=self.out.parent))
    try:
      loading = FORMATS[self.format](self, partial)
      hashes = card.write(partial, self, self.format, loading)
    except BaseException:
      shutil.rmtree(partial)
      raise
    partial.chmod(0o755)
    about = {
      "format_version": parts.FORMAT_VERSION,
      "made_from": self.made_from,
      "step": self.step,
      "sha256": hashes,
    }
    files.write_json(partial / "export.json", about)
    if self.out.exists():
      self.out.rmdir()
    partial.rename(self.out)
    return self.step


def plan(workdir, out, format, dtype="source", which="ema", say=lambda line: None, names="diffusers"):
  """W -> Export to the folder `out`; None if `out` holds this export already.

  names: of adapters, one of lora.NAMES. Raises BadInput if `out` holds something else.
  """
  workdir, out = epath.Path(workdir), pathlib.Path(out)
  config = files.read_json(workdir / "config.json")
  if "model" not in config or "sample" not in config:
    raise BadInput(
      f"{workdir} is no work directory of launch.train or launch.import_weights; name another --workdir"
    )
  made_from = f"{workdirs.identity(workdir, which)} {format} {dtype}"
  if names != "diffusers":
    if format != "lora":
      raise BadInput(f"--names={names} is of adapters: give --format=lora, or leave it out")
    made_from += f" {names}"
  existing = files.read_json_if_exists(out / "export.json")
  if existing.get("made_from") == made_from and all((out / name).exists() for name in existing["sha256"]):
    return None
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise BadInput(f"--out={out} is not empty; give another, or empty it")
  weights, step = load(workdir, config, which, alone=format == "lora", say=say)
  return Export(workdir, out, format, config, weights, step, which, dtype, made_from, names)


def load(workdir, config, which, alone=False, say=lambda line: None):
  """All weights of a model -> (nested dict, step). Where possible, arrays are read when they are used.

  alone: only the weights that were trained, such as adapters without the weights that they adapt.
  """
  settings = ml_collections.ConfigDict(config)
  model = workdirs.make_model(settings, workdir / "text", workdirs.sampling_layout(settings))
  part = workdirs.trained_part(settings, model)
  mapped = (workdir / "model").exists() and not (workdir / "checkpoints").exists()
  targets = None if mapped else workdirs.targets(part)
  trained, step = workdirs.load_weights(workdir, which, targets, say, mapped=mapped)
  if part == model or alone:
    return trained, step
  weights, key = dict(workdirs.base_weights(settings, None, say=say)), workdirs.trained_key(settings)
  if part.lora:
    weights[key] = lora_module.merge(weights[key], trained["lora"]["dit"], part.lora.scale, lazy=True)
  else:
    weights[key] = trained["dit"]
  return weights, step


def export_safetensors(job, out):
  """Our own layout: a directory that our programs take as --workdir."""
  written = {"vae": job.part("vae"), "model": ({"step": job.step, "weights": job.which}, job.weights)}
  parts.copy_part(job.workdir / "text", out / "text", link=job.dtype != "source")
  if job.dtype != "source" and (out / "text" / parts.WEIGHTS).exists():
    written["text"] = job.part("text")
  for name, (fields, params) in written.items():
    flat = files.flatten(params)
    specs = {key: (leaf.shape, job.cast(leaf.dtype)) for key, leaf in flat.items()}
    fields = {key: value for key, value in fields.items() if key not in ("made_from", "weights_crc32")}
    parts.write_part(out / name, fields, specs, ((key, np.asarray(leaf)) for key, leaf in flat.items()))
  parts.copy_source(job.workdir, out)
  changes = without_paths(job.config)
  if "lora" in job.config:  # the adapters are merged
    changes |= {"lora": job.config["lora"] | {"rank": 0}, "model": job.config["model"] | {"expert": ""}}
  files.write_json(out / "config.json", job.config | changes)
  command = "python -m launch.sample --workdir=THIS --prompt=TEXT --out=OUT"
  return f"Any program of sora_jax takes this folder:\n\n```bash\n{command}\n```\n"


def without_paths(config):
  """Replacements for the fields of a config that hold paths of the machine of the training run."""
  return {"init": "", "data": config["data"] | {"path": ""}}


def export_numpy(job, out):
  """A file of arrays for each part, named as in our layout."""
  written = {"vae": job.part("vae")[1], **job.weights}
  if (job.workdir / "text" / parts.WEIGHTS).exists():
    written["text"] = job.part("text")[1]
  for name, params in written.items():
    flat = files.flatten(params)
    if job.dtype == "bfloat16" or any(job.cast(leaf.dtype) == ml_dtypes.bfloat16 for leaf in flat.values()):
      raise BadInput("numpy has no bfloat16; give --dtype=float32 or --dtype=float16, or another --format")
    arrays = {key: np.asarray(leaf).astype(job.cast(leaf.dtype), copy=False) for key, leaf in flat.items()}
    np.savez(out / f"{name}.npz", **arrays)
  files.write_json(out / "config.json", job.config | without_paths(job.config) | {"vae": job.part("vae")[0]})
  return (
    "Names are those of `sora_jax/models`: `blocks/self/query` is [layer, width, head, head size].\n\n"
    "```python\nweights = dict(numpy.load('THIS/dit.npz'))\n```\n"
  )


def export_diffusers(job, out):
  """A pipeline as diffusers saves it. An imported pipeline keeps its names of tensors and its other files."""
  source = job.workdir / "source"
  stored = files.read_json(source / "tensors.json") if source.exists() else {}
  model = workdirs.make_model(job.settings(), job.workdir / "text", None)
  if job.config["data"].get("base_fps"):
    raise BadInput(
      "this model counts time in seconds (config.data.base_fps), which WanTransformer3DModel cannot do; "
      "use another --format"
    )
  is_pipeline = model.text is None and model.dit.text_pad > 0
  written = {key: (model.dit, params) for key, params in job.weights.items() if key.startswith("dit")}
  written["vae"] = workdirs.load_vae(job.workdir / "vae")[0], job.part("vae")[1]
  if is_pipeline:
    written["text"] = workdirs.text_config(job.workdir / "text"), job.part("text")[1]
  for key, (cfg, params) in written.items():
    folder = wan_pipeline.FOLDERS[key]
    fields, specs, pieces = wan_pipeline.part_to_diffusers(key, cfg, params, stored.get(key), job.cast)
    if (source / folder / "config.json").exists():
      fields = files.read_json(source / folder / "config.json")
    if key == "text" and job.dtype != "source":
      fields["dtype"] = job.dtype
    (out / folder).mkdir()
    files.write_json(out / folder / "config.json", fields)
    stem = "model" if key == "text" else "diffusion_pytorch_model"
    write_shards(out / folder, stem, specs, unless_stopped(pieces, job.stop))
  if not is_pipeline:
    return (
      "These are the parts of the model, without a pipeline: its text encoder was trained with it and reads "
      "prompts at their true length, which `WanPipeline` does not.\n\n"
      "```python\nfrom diffusers import AutoencoderKLWan, WanTransformer3DModel\n"
      "dit = WanTransformer3DModel.from_pretrained('THIS', subfolder='transformer')\n"
      "vae = AutoencoderKLWan.from_pretrained('THIS', subfolder='vae')\n```\n"
    )
  for name, new in wan_pipeline.NEW.items():
    if (source / name).is_dir():
      shutil.copytree(source / name, out / name)
    elif (source / name).exists():
      shutil.copyfile(source / name, out / name)
    else:
      new(out / name, model, job.config["sample"], job.workdir)
  return (
    "```python\nfrom diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained('THIS')\n"
    "video = pipe(prompt='...', height=480, width=832, num_frames=81).frames[0]\n```\n"
  )


def export_lora(job, out):
  """The adapters alone, as `pipe.load_lora_weights` takes them, or in the names of ComfyUI."""
  settings = job.settings()
  part = workdirs.trained_part(settings, workdirs.make_model(settings, job.workdir / "text", None))
  if part.lora is None:
    raise BadInput(
      f"{job.workdir} holds no adapters: it was trained without --config.lora.rank; "
      "export it as diffusers or safetensors"
    )
  adapters = lora.to_diffusers(job.weights["lora"]["dit"], part.dit, part.lora, job.names)
  tensors = {name: value.astype(job.cast(np.float32)) for name, value in adapters}
  specs = {name: (value.shape, value.dtype) for name, value in tensors.items()}
  files.write_safetensors(out / lora_files.FILE, specs, tensors.items(), {"format": "pt"})
  if job.names == "comfyui":
    return "Put the file into `models/loras` of ComfyUI. diffusers takes it, too.\n"
  second = ", load_into_transformer_2=True" if settings.model.get("expert") == "low" else ""
  return (
    "```python\nfrom diffusers import DiffusionPipeline\n"
    "pipe = DiffusionPipeline.from_pretrained('THE PIPELINE IT WAS TRAINED ON')\n"
    f"pipe.load_lora_weights('THIS'{second})\n```\n"
  )


def write_shards(folder, stem, specs, pieces, most=SHARD):
  """Writes tensors as `save_pretrained` does: STEM.safetensors, or shards of `most` bytes and an index.

  Shards are named STEM-00001-of-00003.safetensors and so on.
  specs: {name: (shape, dtype)}.  pieces: iterable of (name, array) in the same order.
  """
  sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in specs.items()}
  shards, room = [{}], most
  for name in specs:
    if sizes[name] > room and shards[-1]:
      shards.append({})
      room = most
    shards[-1][name] = specs[name]
    room -= sizes[name]
  file_of, pieces = {}, iter(pieces)
  for i, shard in enumerate(shards, 1):
    file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
    files.write_safetensors(folder / file, shard, (next(pieces) for _ in shard), {"format": "pt"})
    file_of |= dict.fromkeys(shard, file)
  if len(shards) > 1:
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
    files.write_json(folder / f"{stem}.safetensors.index.json", index)


FORMATS = {
  "safetensors": export_safetensors,
  "diffusers": export_diffusers,
  "numpy": export_numpy,
  "lora": export_lora,
  "stablehlo": graphs.export_stablehlo,
  "onnx": graphs.export_onnx,
}
