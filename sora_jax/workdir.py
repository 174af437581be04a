"""A work directory W -> models, weights, VAE and text encoder; configs become dataclasses here, once, before
anything compiles.

  W/config.json                 the experiment: `model`, `sample`, `data`, ...
  W/checkpoints/ W/manifests/   of a training run (checkpoint.py)
  W/vae/ W/text/ W/model/       parts (parts.py); `model` is a model that was imported, exported or ships

A config is a ConfigDict: a page of configs/, or the dict of W/config.json.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import zlib

import jax
import ml_collections
import numpy as np
from etils import epath

from sora_jax import layout as layouts, parts
from sora_jax.checkpoint import Checkpoints
from sora_jax.errors import BadInput, checked, pick
from sora_jax.files import flatten, read_json
from sora_jax.models import dit, eight_bits, lora, t2v, text, vae

# What `kind` in a config on disk names; a config without it is of the first kind.
VAES = {"wan": vae.config_from_dict}
MODELS = {"wan": dit.DiTConfig}


def shipped():
  """The work directory of the small model that ships with the package."""
  return epath.Path(pathlib.Path(__file__).parent / "assets" / "world")


def read_config(workdir):
  """W/config.json as a ConfigDict; BadInput where W holds no text-to-video model."""
  config = read_json(epath.Path(workdir) / "config.json")
  if "sample" not in config:
    program = config.get("program", "another program")
    raise BadInput(
      f"{workdir} is no work directory of launch.train (its config.json is of {program}); name another "
      "--workdir"
    )
  return ml_collections.ConfigDict(config)


def identity(workdir, which="ema"):
  """A short checksum of what a work directory samples with: its newest checkpoint, or its model, and its VAE
  and text.
  """
  workdir, crc = epath.Path(workdir), zlib.crc32(which.encode())
  steps = sorted((workdir / "manifests").glob("*.json"), key=lambda path: int(path.stem))
  if steps:
    crc = zlib.crc32(steps[-1].read_bytes(), crc)
  for part in ("model", "vae", "text"):
    if (workdir / part).exists():
      crc = zlib.crc32(parts.checksum(workdir / part).encode(), crc)
  return f"{crc:08x}"


# --- configs to dataclasses


def make_layout(config, devices=None):
  """config.mesh -> Layout over these devices, or all; BadInput where it does not fit them."""
  sizes = {name: config.mesh[name] for name in ("fsdp", "context", "tensor")}
  remedy = " (on one device: --config.mesh.fsdp=1)" if devices is None else ""
  return layouts.Layout(checked(lambda: layouts.make_mesh(**sizes, devices=devices), f"config.mesh{remedy}"))


def sampling_layout(config, mesh=None, devices=None):
  """The Layout of a sampling job, over these devices, or all.

  mesh: {"fsdp": 2, "context": 2, "tensor": 1} or some of them; BadInput where it does not fit the devices.

  None: the rows that are denoised together, with and without their prompts, lie on fsdp as far as they go,
  and context cuts their tokens, so that no device computes what another does; as many devices as a power of
  two allows, since heads and widths rarely have other factors.
  """
  if mesh is not None:
    return layouts.Layout(checked(lambda: layouts.make_mesh(**mesh, devices=devices), "mesh"))
  count = jax.device_count() if devices is None else len(devices)
  count &= -count  # its largest factor that is a power of two
  fsdp = math.gcd(2 * config.sample.rows, count)
  return layouts.Layout(layouts.make_mesh(fsdp=fsdp, context=count // fsdp, devices=devices))


def adopt(config):
  """Fills in what a config takes from config.init: the shape of the weights, and the settings of `sample`
  that are None.
  """
  if config.init and "://" not in config.init:
    config.init = os.path.abspath(config.init)
  if config.model.size != "init":
    if config.lora.rank or config.model.expert:
      raise BadInput(
        "config.lora.rank and config.model.expert are for weights of --config.init; give "
        "--config.model.size=init with it"
      )
    return
  if not config.init:
    raise BadInput(
      "config.model.size is 'init' and there is no --config.init; give the work directory of "
      "launch.import_weights"
    )
  theirs = read_json(epath.Path(config.init) / "config.json")
  if "model" not in theirs or "sample" not in theirs:
    raise BadInput(
      f"--config.init={config.init} is no work directory of launch.import_weights or launch.train; name "
      "another"
    )
  model, expert = theirs["model"], config.model.expert
  two = bool(model.get("boundary"))
  if expert not in (("high", "low") if two else ("",)):
    holds = "two experts: train high or low" if two else "one model: leave it empty"
    raise BadInput(f"config.model.expert is {expert!r}; {config.init} holds {holds}")
  if model.get("expert") or theirs.get("lora", {}).get("rank"):
    raise BadInput(
      f"{config.init} holds one expert or adapters; export it (launch.export), which puts all together, and "
      "begin from that"
    )
  with config.unlocked():
    config.model.dit = (
      model["dit"] if "dit" in model else dataclasses.asdict(pick(dit.SIZES, model["size"], "model.size"))
    )
    config.model.boundary = model.get("boundary", 0.0)
    if config.lora.rank or expert:
      config.model.base = identity(config.init)
    if config.get("sigma") and config.sigma.base_shift is None:
      config.sigma.base_shift = float(theirs["sample"]["shift"])
    for name, value in ({"times": ()} | theirs["sample"]).items():
      if config.sample.get(name) is None:
        config.sample[name] = tuple(value) if isinstance(value, list) else value


def make_model(config, text_dir, layout):
  """config.model and the tokenizer in W/text -> Model on a Layout.

  An imported model brings its shape as config.model.dit.
  """
  make = pick(MODELS, config.model.get("kind", "wan"), "config.model.kind")
  if "dit" in config.model:
    size = checked(lambda: make(**config.model.dit.to_dict()), "config.model.dit")
  else:
    size = pick(dit.SIZES, config.model.size, "config.model.size")
  own = {"remat": config.model.remat, "scans": config.model.get("scans", 1), "dtype": config.model.dtype}
  cfg = checked(lambda: dataclasses.replace(size, **own), "config.model")
  encoder = None
  if config.model.text:
    tokenizer = text.Tokenizer(epath.Path(text_dir) / "tokenizer.model")
    encoder = dataclasses.replace(
      pick(text.SIZES, config.model.text, "config.model.text"), vocab=tokenizer.vocab
    )
    if encoder.width != cfg.text_width:
      raise BadInput(
        f"config.model.text {config.model.text!r} gives {encoder.width} values a token, "
        f"{config.model.size!r} takes {cfg.text_width}"
      )
  given = {
    name: config.model[name] for name in ("boundary", "param_dtype", "weights") if name in config.model
  }
  return checked(lambda: t2v.Model(cfg, encoder, layout, **given), "config.model")


def trained_part(config, model):
  """The Model whose weights launch.train makes: all of `model`, one expert of it, or adapters."""
  if config.model.get("expert"):
    model = dataclasses.replace(model, boundary=0.0)
  if config.get("lora") and config.lora.rank:
    adapters = checked(lambda: lora.LoRAConfig(**config.lora), "config.lora")
    model = dataclasses.replace(
      model, lora=adapters, dit=dataclasses.replace(model.dit, lora_scale=adapters.scale)
    )
  return model


def trained_key(config):
  """Which weights of the whole model launch.train trains or adapts, as a key of its params."""
  return f"dit_{config.model.expert}" if config.model.get("expert") else "dit"


# --- weights


def targets(model, dtype=None):
  """What the weights of a Model are restored into: ShapeDtypeStructs with shardings; `dtype` instead of
  float32. Those of 8 bits (model.weights) are so.
  """
  boxed = jax.eval_shape(model.init, jax.random.key(0))
  if not model.weights or model.lora:
    return layouts.targets(boxed, model.layout, dtype)
  boxed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), boxed)
  dits = {name: eight_bits.boxed(part, model.weights) for name, part in boxed.items() if name != "text"}
  return layouts.targets({**boxed, **dits}, model.layout)


def load_weights(workdir, which="ema", target=None, say=lambda line: None, *, mapped=False, partial=False):
  """Weights of a work directory, keyed as they were trained ("dit", "text") -> (tree, step).

  From its newest whole checkpoint, `which` being "ema", where it keeps one, or "params"; or, where there is
  none, from W/model.
  target: a tree of ShapeDtypeStructs with shardings. None: arrays on the first device, or with `mapped` those
  of W/model as they are stored, memory-mapped. partial: of W/model only what `target` names at the top. say:
  takes lines for the user.
  """
  workdir = epath.Path(workdir)
  if (workdir / "checkpoints").exists():
    with contextlib.closing(Checkpoints(workdir, say=say, read_only=True)) as checkpoints:
      step = checkpoints.latest()
      if step is not None:
        if which == "ema" and not (workdir / "checkpoints" / str(step) / "ema").exists():
          which = "params"  # no running mean is kept
        if target is not None:
          _check_shapes(workdir, checkpoints.shapes(step, which), target)
        return checkpoints.restore(step, {which: target})[which], step
  if (workdir / "model").exists():
    config, tree = parts.load_part(workdir / "model", None)
    if partial:
      tree = {name: tree.get(name, {}) for name in target}
    if target is not None:
      _check_shapes(workdir, tree, target)
      return parts.put(tree, target), config.get("step", 0)
    if not mapped:
      tree = jax.device_put(
        jax.tree.map(lambda leaf: np.array(leaf, np.float32), tree)
      )  # copies, as in parts.put
    return tree, config.get("step", 0)
  raise BadInput(
    f"{workdir} holds no checkpoint and no model; train one there (python -m launch.train) or name another "
    "--workdir"
  )


def _check_shapes(workdir, stored, target):
  """BadInput names the first weight that is missing, too many, or of another shape than the model's."""
  stored, target = (
    {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()} for tree in (stored, target)
  )
  for name in sorted(stored.keys() | target.keys()):
    if stored.get(name) != target.get(name):
      raise BadInput(
        f"{workdir} holds the weights of another model: {name} is {stored.get(name, 'missing')} there, and "
        f"{target.get(name, 'not a weight')} here; give the model that it was trained as, with its tokenizer"
      )


def load_model_weights(workdir, config, model, which="ema", dtype=None, say=lambda line: None):
  """All weights of a Model in W -> (nested dict, step).

  Where W holds one expert or adapters, the rest is that of config.init, and adapters are added to it.
  """
  part, plain = trained_part(config, model), dataclasses.replace(model, weights="")
  if part == model:
    return load_placed(workdir, which, targets(plain, dtype), model.weights, say=say)
  own, step = load_weights(workdir, which, targets(part, None if part.lora else dtype), say=say)
  params = base_weights(config, plain, dtype, say=say)
  key = trained_key(config)
  params[key] = lora.merge(params[key], own["lora"]["dit"], part.lora.scale) if part.lora else own["dit"]
  return in_eight_bits(params, targets(plain, dtype), model.weights), step


def load_placed(workdir, which, target, kind, partial=False, say=lambda line: None):
  """As `load_weights` into `target`, those of blocks in 8 bits where `kind` says so.

  Of W/model they are placed one after another: never are all of them on the devices in their own dtype.
  """
  workdir = epath.Path(workdir)
  if not kind or (workdir / "checkpoints").exists():
    params, step = load_weights(workdir, which, target, say, partial=partial)
  else:
    params, step = load_weights(workdir, which, say=say, mapped=True)
    params = {name: params.get(name, {}) for name in target} if partial else params
    _check_shapes(workdir, params, target)
  return in_eight_bits(params, target, kind), step


def in_eight_bits(params, target, kind):
  """{"dit": weights, mapped or on devices, ...} -> the same on devices, those of blocks in 8 bits if `kind`.

  target: of each, as from `targets`, before they have 8 bits.
  """
  if not kind:
    return params

  def put(leaf, like):
    return leaf if isinstance(leaf, jax.Array) else parts.put(leaf, like)

  return {
    key: jax.tree.map(put, value, target[key])
    if key == "text"
    else eight_bits.quantise(value, kind, target[key], put)
    for key, value in params.items()
  }


def base_weights(config, model, dtype=None, only=(), say=lambda line: None):
  """The weights of config.init that an expert or adapters go with -> nested dict; BadInput where they are
  others by now.

  only: some of them, by key. dtype: what they are cast to. model None: as they are stored, memory-mapped.
  """
  init = epath.Path(config.init)
  if not (init / "config.json").exists() or identity(init) != config.model.base:
    raise BadInput(
      f"the weights of {config.init} are missing, or others than were built upon; put them back, or where "
      "they are elsewhere now, name that place as `init` in config.json of this work directory"
    )
  if model is None:
    return load_weights(init, "ema", mapped=True, say=say)[0]
  target = targets(dataclasses.replace(model, weights=""), dtype)
  target = {key: target[key] for key in only or target}
  return load_placed(init, "ema", target, model.weights, partial=bool(only), say=say)[0]


# --- parts


def load_vae_config(directory, fields=None):
  """W/vae/config.json -> the config of the VAE. fields: its contents, where they were read already."""
  fields = fields or read_json(epath.Path(directory) / "config.json")
  parse = pick(VAES, fields.get("kind", "wan"), f"{directory}: kind")
  return checked(lambda: parse(fields), str(directory))


def load_vae(directory):
  """W/vae -> (its config, params on the default device)."""
  fields, params = parts.load_part(directory)
  # copies, as in parts.put
  return load_vae_config(directory, fields), jax.device_put(jax.tree.map(np.array, params))


def save_vae(directory, cfg, params, size=None):
  """Writes W/vae. size: the name of its config in vae.SIZES, where it has one."""
  parts.save_part(directory, vae.config_to_dict(cfg, size), params)


def text_config(directory):
  """W/text of a frozen encoder -> TextConfig."""
  fields = read_json(epath.Path(directory) / "config.json")
  known = {field.name for field in dataclasses.fields(text.TextConfig)}
  fields = {name: value for name, value in fields.items() if name in known}
  return checked(lambda: text.TextConfig(**fields), f"{directory}/config.json")
