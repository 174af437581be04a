"""Exporting: a work directory in, files for other programs out. Used by launch.export; each format is one entry in FORMATS."""

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
from sora_jax.weights import lora, wan_pipeline

SHARD = 5_000_000_000            # bytes of a file of diffusers at most


@dataclasses.dataclass
class Export:
  """What is to be written: `plan` has opened it, `run` writes it. What a format is given.

  config: W/config.json. weights: nested dict of arrays, read when they are looked at. which: "ema" or "params". dtype: a name, or "source".
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
  stop: Callable = lambda: False

  @property
  def num_bytes(self):
    """Of the weights, about; some formats need a little more."""
    weights = [self.workdir / part / parts.WEIGHTS for part in ("vae", "text")]
    stored = sum(path.stat().length for path in weights if path.exists())
    return stored + sum(leaf.nbytes for leaf in files.flatten(self.weights).values())

  def settings(self):
    """W/config.json as a ConfigDict."""
    return ml_collections.ConfigDict(self.config)

  def cast(self, stored):
    """What an array is written as that is stored as `stored`."""
    return np.dtype(stored if self.dtype == "source" else self.dtype)

  def part(self, name):
    """W/vae or W/text -> (config, weights)."""
    return parts.load_part(self.workdir / name, None)

  def run(self, stop: Callable = lambda: False):
    """Writes the folder, with its README.md -> the step that it is of. Raises Stopped once stop() is true.

    It is written beside `out` and renamed when it is whole; a kill leaves `.OUT.partial-...` there.
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
    about = {"format_version": parts.FORMAT_VERSION, "made_from": self.made_from, "step": self.step, "sha256": hashes}
    files.write_json(partial / "export.json", about)
    if self.out.exists():
      self.out.rmdir()
    partial.rename(self.out)
    return self.step


def plan(workdir, out, format, dtype="source", which="ema", say=lambda line: None):
  """W -> Export into the folder `out`; None where `out` holds this already. BadInput where `out` holds something else."""
  workdir, out = epath.Path(workdir), pathlib.Path(out)
  config = files.read_json(workdir / "config.json")
  if "model" not in config or "sample" not in config:
    raise BadInput(f"{workdir} is no work directory of launch.train or launch.import_weights; name another --workdir")
  made_from = f"{workdirs.identity(workdir, which)} {format} {dtype}"
  there = files.read_json_if_exists(out / "export.json")
  if there.get("made_from") == made_from and all((out / name).exists() for name in there["sha256"]):
    return None
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise BadInput(f"--out={out} is not empty; give another, or empty it")
  weights, step = load(workdir, config, which, alone=format == "lora", say=say)
  return Export(workdir, out, format, config, weights, step, which, dtype, made_from)


def load(workdir, config, which, alone=False, say=lambda line: None):
  """All weights of a model -> (nested dict, read when they are looked at where they can be, step); `alone`: adapters without what they adapt."""
  settings = ml_collections.ConfigDict(config)
  whole = workdirs.make_model(settings, workdir / "text", workdirs.sampling_layout(settings))
  part = workdirs.trained_part(settings, whole)
  mapped = (workdir / "model").exists() and not (workdir / "checkpoints").exists()
  own, step = workdirs.load_weights(workdir, which, None if mapped else workdirs.targets(part), say, mapped=mapped)
  if part == whole or alone:
    return own, step
  weights, key = dict(workdirs.base_weights(settings, None, say=say)), workdirs.trained_key(settings)
  weights[key] = lora_module.merge(weights[key], own["lora"]["dit"], part.lora.scale, lazy=True) if part.lora else own["dit"]
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
  own = {"init": "", "data": job.config["data"] | {"path": ""}}      # paths of the machine that it was trained on; nobody else has them
  if "lora" in job.config:
    own |= {"lora": job.config["lora"] | {"rank": 0}, "model": job.config["model"] | {"expert": ""}}      # they are merged
  files.write_json(out / "config.json", job.config | own)
  return "Any program of sora_jax takes this folder:\n\n```bash\npython -m launch.sample --workdir=THIS --prompt=TEXT --out=OUT\n```\n"


def export_numpy(job, out):
  """A file of arrays for each part, named as in our layout."""
  written = {"vae": job.part("vae")[1], **job.weights}
  if (job.workdir / "text" / parts.WEIGHTS).exists():
    written["text"] = job.part("text")[1]
  for name, params in written.items():
    flat = files.flatten(params)
    if job.dtype == "bfloat16" or any(job.cast(leaf.dtype) == ml_dtypes.bfloat16 for leaf in flat.values()):
      raise BadInput("numpy has no bfloat16; give --dtype=float32 or --dtype=float16, or another --format")
    np.savez(out / f"{name}.npz", **{key: np.asarray(leaf).astype(job.cast(leaf.dtype), copy=False) for key, leaf in flat.items()})
  own = {"init": "", "data": job.config["data"] | {"path": ""}, "vae": job.part("vae")[0]}
  files.write_json(out / "config.json", job.config | own)
  return ("Names are those of `sora_jax/models`: `blocks/self/query` is [layer, width, head, head size].\n\n"
          "```python\nweights = dict(numpy.load('THIS/dit.npz'))\n```\n")


def export_diffusers(job, out):
  """A pipeline as diffusers saves it; what was imported comes back under the names and with the files that it had."""
  source = job.workdir / "source"
  stored = files.read_json(source / "tensors.json") if source.exists() else {}
  model = workdirs.make_model(job.settings(), job.workdir / "text", None)
  if job.config["data"].get("base_fps"):
    raise BadInput("this model counts time in seconds (config.data.base_fps), which WanTransformer3DModel does not know; use another --format")
  whole = model.text is None and model.dit.text_pad > 0
  written = {key: (model.dit, params) for key, params in job.weights.items() if key.startswith("dit")}
  written["vae"] = workdirs.load_vae(job.workdir / "vae")[0], job.part("vae")[1]
  if whole:
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
    write_shards(out / folder, "model" if key == "text" else "diffusion_pytorch_model", specs, unless_stopped(pieces, job.stop))
  if not whole:
    return ("The parts of the model, without a pipeline around them: its text encoder was trained with it and reads prompts at their true length, "
            "which `WanPipeline` does not.\n\n```python\nfrom diffusers import AutoencoderKLWan, WanTransformer3DModel\n"
            "dit = WanTransformer3DModel.from_pretrained('THIS', subfolder='transformer')\n"
            "vae = AutoencoderKLWan.from_pretrained('THIS', subfolder='vae')\n```\n")
  for name, new in wan_pipeline.NEW.items():
    if (source / name).is_dir():
      shutil.copytree(source / name, out / name)
    elif (source / name).exists():
      shutil.copyfile(source / name, out / name)
    else:
      new(out / name, model, job.config["sample"], job.workdir)
  return ("```python\nfrom diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained('THIS')\n"
          "video = pipe(prompt='...', height=480, width=832, num_frames=81).frames[0]\n```\n")


def export_lora(job, out):
  """Adapters alone, as `pipe.load_lora_weights` takes them."""
  settings = job.settings()
  part = workdirs.trained_part(settings, workdirs.make_model(settings, job.workdir / "text", None))
  if part.lora is None:
    raise BadInput(f"{job.workdir} holds no adapters: it was trained without --config.lora.rank; export it as diffusers or safetensors")
  tensors = {name: value.astype(job.cast(np.float32)) for name, value in lora.to_diffusers(job.weights["lora"]["dit"], part.dit, part.lora)}
  specs = {name: (value.shape, value.dtype) for name, value in tensors.items()}
  files.write_safetensors(out / lora.FILE, specs, tensors.items(), {"format": "pt"})
  second = ", load_into_transformer_2=True" if settings.model.get("expert") == "low" else ""
  return ("```python\nfrom diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained('THE PIPELINE IT WAS TRAINED ON')\n"
          f"pipe.load_lora_weights('THIS'{second})\n```\n")


def write_shards(folder, stem, specs, pieces, most=SHARD):
  """STEM.safetensors; or STEM-00001-of-00003.safetensors and so on, of `most` bytes, and an index, as `save_pretrained` writes them."""
  size = lambda name: int(np.prod(specs[name][0])) * np.dtype(specs[name][1]).itemsize  # noqa: E731
  shards, room = [{}], most
  for name in specs:
    if size(name) > room and shards[-1]:
      shards.append({})
      room = most
    shards[-1][name] = specs[name]
    room -= size(name)
  file_of, pieces = {}, iter(pieces)
  for i, shard in enumerate(shards, 1):
    file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
    files.write_safetensors(folder / file, shard, (next(pieces) for _ in shard), {"format": "pt"})
    file_of |= dict.fromkeys(shard, file)
  if len(shards) > 1:
    files.write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": sum(map(size, specs))}, "weight_map": file_of})


FORMATS = {"safetensors": export_safetensors, "diffusers": export_diffusers, "numpy": export_numpy, "lora": export_lora,
           "stablehlo": graphs.export_stablehlo, "onnx": graphs.export_onnx}
