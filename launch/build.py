"""From configs and work directories to the dataclasses of the library: done once, at the edge, failing before anything compiles."""

import dataclasses
import os
import shutil

import jax
import ml_collections
from etils import epath

from data import plan
from launch import cli
from sora_jax import checkpoint, layout, optim
from sora_jax.batch import RowShape
from sora_jax.diffusion import flow
from sora_jax.errors import BadInput
from sora_jax.models import dit, lora, t2v, text, vae

MISFITS = "misfits.txt"         # in a work directory: clips of its data that fit in no row


def attributes(config):
  """The dict of W/config.json as a ConfigDict."""
  return ml_collections.ConfigDict(config)


def pick(table, name, what):
  """table[name]; BadInput lists the names there are."""
  if name not in table:
    raise BadInput(f"{what} is {name!r}; it must be one of {', '.join(table)}")
  return table[name]


def make_layout(config):
  """config.mesh -> Layout over all devices."""
  make = lambda: layout.make_mesh(fsdp=config.mesh.fsdp, context=config.mesh.context, tensor=config.mesh.tensor)  # noqa: E731
  return layout.Layout(cli.checked(make, "config.mesh (on one device: --config.mesh.fsdp=1)"))


def sampling_layout(config):
  """config.mesh where there is one that fits the devices; else weights are cut over all of them, as a job may run elsewhere than the training."""
  try:
    if "mesh" in config:
      return make_layout(config)
    return layout.Layout(layout.make_mesh(fsdp=jax.device_count()))
  except BadInput:
    return layout.Layout(layout.make_mesh(fsdp=jax.device_count()))


def adopt(config):
  """Fills in what a config (a ConfigDict) takes from config.init: the shape of the weights, and settings of `sample` that are None."""
  if config.init and "://" not in config.init:
    config.init = os.path.abspath(config.init)
  if config.model.size != "init":
    if config.lora.rank or config.model.expert:
      raise BadInput("config.lora.rank and config.model.expert are for weights of --config.init; give --config.model.size=init with it")
    return
  if not config.init:
    raise BadInput("config.model.size is 'init' and there is no --config.init; give the work directory of launch.import_weights")
  theirs = checkpoint.read_json(epath.Path(config.init) / "config.json")
  if "model" not in theirs or "sample" not in theirs:
    raise BadInput(f"--config.init={config.init} is no work directory of launch.import_weights or launch.train; name another")
  model, expert = theirs["model"], config.model.expert
  if expert not in (("high", "low") if model.get("boundary") else ("",)):
    raise BadInput(f"config.model.expert is {expert!r}; {config.init} holds " + ("two experts: train high or low" if model.get("boundary") else
                   "one model: leave it empty"))
  if model.get("expert") or theirs.get("lora", {}).get("rank"):
    raise BadInput(f"{config.init} holds one expert or adapters; export it (launch.export), which puts all together, and begin from that")
  with config.unlocked():
    config.model.dit = model["dit"] if "dit" in model else dataclasses.asdict(pick(dit.SIZES, model["size"], "model.size"))
    config.model.boundary = model.get("boundary", 0.0)
    if config.lora.rank or expert:
      config.model.base = checkpoint.identity(config.init)
    if config.get("sigma") and config.sigma.base_shift is None:
      config.sigma.base_shift = float(theirs["sample"]["shift"])
    for name, value in theirs["sample"].items():
      if config.sample.get(name) is None:
        config.sample[name] = tuple(value) if isinstance(value, list) else value


def make_model(config, text_dir, where):
  """config.model and the tokenizer in W/text -> Model on a Layout. An imported model brings its shape as config.model.dit."""
  if "dit" in config.model:
    size = cli.checked(lambda: dit.DiTConfig(**config.model.dit.to_dict()), "config.model.dit")
  else:
    size = pick(dit.SIZES, config.model.size, "config.model.size")
  cfg = cli.checked(lambda: dataclasses.replace(size, remat=config.model.remat, dtype=config.model.dtype), "config.model")
  encoder = None
  if config.model.text:
    tokenizer = text.Tokenizer(epath.Path(text_dir) / "tokenizer.model")
    encoder = dataclasses.replace(pick(text.SIZES, config.model.text, "config.model.text"), vocab=tokenizer.vocab)
    if encoder.width != cfg.text_width:
      raise BadInput(f"config.model.text {config.model.text!r} gives {encoder.width} values a token, {config.model.size!r} takes {cfg.text_width}")
  return t2v.Model(cfg, encoder, where, config.model.get("boundary", 0.0))


def trained_part(config, model):
  """The Model whose weights launch.train makes: all of `model`, one expert of it, or adapters."""
  if config.model.get("expert"):
    model = dataclasses.replace(model, boundary=0.0)
  if config.get("lora") and config.lora.rank:
    adapters = cli.checked(lambda: lora.LoRAConfig(**config.lora), "config.lora")
    model = dataclasses.replace(model, lora=adapters, dit=dataclasses.replace(model.dit, lora_scale=adapters.scale))
  return model


def targets(model, dtype=None):
  """What the weights of a Model are restored into: ShapeDtypeStructs, where they live; `dtype` instead of float32."""
  return layout.targets(jax.eval_shape(model.init, jax.random.key(0)), model.layout, dtype)


def load_weights(workdir, config, model, which="ema", dtype=None):
  """All weights of a Model in W -> (nested dict, step). Where W holds one expert or adapters, the rest is that of config.init, and
  adapters are added to it."""
  part = trained_part(config, model)
  own, step = checkpoint.load_weights(workdir, which, targets(part, None if part.lora else dtype), say=cli.say)
  if part == model:
    return own, step
  params = base_weights(config, model, dtype)
  key = trained_key(config)
  params[key] = lora.merge(params[key], own["lora"]["dit"], part.lora.scale) if part.lora else own["dit"]
  return params, step


def trained_key(config):
  """Which weights of the whole model launch.train trains, or adapts."""
  return f"dit_{config.model.expert}" if config.model.get("expert") else "dit"


def base_weights(config, model, dtype=None, only=()):
  """The weights of config.init that an expert or adapters go with, or `only` some of them by key, in `dtype` or as they are stored where that
  is None and `model` None; BadInput where they are not those any more."""
  if not (epath.Path(config.init) / "config.json").exists() or checkpoint.identity(config.init) != config.model.base:
    raise BadInput(f"the weights of {config.init} are missing, or others than were built upon; put them back, or where they are elsewhere now, "
                   "name that place as `init` in config.json of this work directory")
  if model is None:
    return checkpoint.load_weights(config.init, "ema", mapped=True, say=cli.say)[0]
  target = targets(model, dtype)
  target = {key: target[key] for key in only or target}
  return checkpoint.load_weights(config.init, "ema", target, only=bool(only), say=cli.say)[0]


def make_optimizer(config, boxed):
  """config.optim and the weights with their axes -> optax transformation, over config.steps."""
  return cli.checked(lambda: optim.optimizer(optim.OptimConfig(steps=config.steps, **config.optim), boxed), "config.optim")


def make_sigma(config):
  """config.sigma -> SigmaConfig."""
  return cli.checked(lambda: flow.SigmaConfig(**config.sigma), "config.sigma")


def load_vae(directory):
  """W/vae -> (VAEConfig, params on the default device)."""
  fields, params = checkpoint.load_part(directory)
  return cli.checked(lambda: vae.config_from_dict(fields), str(directory)), jax.device_put(params)


def text_config(directory, fields=None):
  """W/text of a frozen encoder -> TextConfig."""
  fields = fields or checkpoint.read_json(directory / "config.json")
  known = {field.name for field in dataclasses.fields(text.TextConfig)}
  return cli.checked(lambda: text.TextConfig(**{name: value for name, value in fields.items() if name in known}), directory / "config.json")


def copy_source(source, target):
  """W/source, what an import keeps for the export: into another work directory."""
  source, target = epath.Path(source) / "source", epath.Path(target) / "source"
  if source.exists() and not target.exists():
    partial = target.parent / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(target)


def fingerprint(part):
  """Of a part, what data made with it depend on: of a VAE the encoder, so that its decoder may be trained further."""
  return checkpoint.fingerprint(part, vae.ENCODER if epath.Path(part).name == "vae" else ())


def copy_part(source, target, link=False):
  """Copies a part (vae/ or text/) unless it is there already; BadInput when another one is. `link`: its weights become a hard link, where
  they are large (11 GB of a text encoder) and nobody writes to them."""
  source, target = epath.Path(source), epath.Path(target)
  if not source.exists():
    raise BadInput(f"there is no {source}; run launch.encode first, which puts it beside its records")
  if target.exists() and any(target.iterdir()):
    if fingerprint(source) != fingerprint(target):
      raise BadInput(f"{target} and {source} differ: this work directory was made with another one; give another --workdir")
    return
  partial = target.parent / (target.name + ".partial")
  if partial.exists():
    partial.rmtree()
  partial.mkdir(parents=True)
  for path in source.iterdir():
    try:
      if not link or path.name != checkpoint.WEIGHTS:
        raise OSError
      os.link(path, partial / path.name)
    except OSError:
      shutil.copyfile(path, partial / path.name)
  if target.exists():
    target.rmtree()
  partial.rename(target)


def plan_rows(config, index, model):
  """The plan of the rows, whether or not all clips fit."""
  shape = cli.checked(lambda: RowShape(config.data.row_tokens, config.data.row_clips, config.data.row_text), "config.data")
  null_ids, null_embedding = index.null_text
  if model.text is None and null_embedding is None:
    raise BadInput("the records hold no text embeddings, and config.model.text names no encoder to train; name one, or encode with a --workdir "
                   "that has a frozen text encoder")
  null = len(null_ids) if model.text is not None else len(null_embedding)
  return plan.Plan(index.rows, rows_per_step=config.data.rows, shape=shape, patch=model.dit.patch, seed=config.seed, null_text_tokens=null,
                   text_pad=model.dit.text_pad or None, weights=tuple(config.data.weights) or None)


def name_misfits(index, rows, directory):
  """Writes DIR/misfits.txt, a line for each clip that fits in no row: its name, a tab, and why."""
  with (epath.Path(directory) / MISFITS).open("wb") as f:
    for misfit in rows.misfits:
      f.write(f"{index.describe(misfit.position)}\t{misfit.reason}\n".encode("utf-8", "backslashreplace"))


def check_index(index, model, directory):
  """Records must be of the VAE beside them, with as many channels as the model takes."""
  channels = index.header["latent_channels"]
  wanted = model.dit.channels
  if channels != wanted:
    raise BadInput(f"the records have {channels} latent channels, the model takes {wanted}; encode with the VAE that it is for, or change "
                   "--config.model.size")
  beside = fingerprint(os.path.join(directory, "vae"))
  if index.header.get("vae_fingerprint") not in (None, beside):
    raise BadInput(f"the records were made with another VAE ({index.header['vae_fingerprint']}) than {directory}/vae ({beside}); encode again")
