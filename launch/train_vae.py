"""Trains the video VAE on crops of clips and images. Run again, it goes on where it was.

  python -m launch.train_vae --config=configs/vae.py:tiny --workdir=W                                           # the embedded world
  python -m launch.train_vae --config=configs/vae.py:base --config.data.source=folder --config.data.path=CLIPS --workdir=W
"""

import dataclasses
import functools
import importlib
import zlib

import jax
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from data import clips, crops
from launch import build, cli, encoding, loop
from sora_jax import checkpoint, metrics, train_vae
from sora_jax.errors import BadInput
from sora_jax.models import vae
from sora_jax.weights import vgg16

WORKDIR = flags.DEFINE_string("workdir", "", "where checkpoints, logs and the VAE go")
FREE = ("steps", "log_every", "checkpoint_every", "eval_every", "max_bad_steps", "data.path", "data.threads", "mesh.", "init")
HELD_OUT, MOST = 48, (17, 256, 256)        # clips that measure quality, and how much of each: frames, height, width
SOURCES = ("shapes", "folder")


def main():
  config, workdir = cli.get_config(), WORKDIR.value
  if not workdir:
    raise BadInput("no --workdir; give a directory for the checkpoints")
  if config.decoder_only and not config.init:
    raise BadInput("config.decoder_only is set and config.init is empty; give the directory whose VAE it is about")
  cfg = build.pick(vae.SIZES, config.model, "config.model")
  where = build.make_layout(config)
  cli.checked(lambda: vae.check_size((1, config.data.frames, *config.data.crop, 3), cfg, first=True), "config.data.frames and crop")
  losses = cli.checked(lambda: train_vae.loss_config(config), "config")
  tx = build.make_optimizer(config, train_vae.boxed_weights(cfg))
  loop.check(config)
  features = load_features(config, losses)
  source, apart = open_sources(config)
  if config.init and not cli.is_begun(workdir):
    first_weights(config, cfg)
  cli.lock_workdir(workdir)
  cli.claim_workdir(workdir, config, FREE)
  checkpoints = checkpoint.Checkpoints(workdir, say=cli.say)
  target = train_vae.abstract_state(cfg, tx, losses, where)
  state, step = resume(checkpoints, target) or (begin(config, cfg, tx, losses, where, source), 0)
  if step >= config.steps:
    if not (epath.Path(workdir) / "vae" / "config.json").exists():       # killed between the last step and this
      finish(state, cfg, config, source, workdir)
    cli.say(f"{workdir} is already trained for {step} steps; nothing to do. "
            f"Next: python -m launch.encode --source=DIR --workdir={workdir} --out=RECORDS")
    return cli.OK
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  cli.say(f"training VAE {config.model} ({size / 1e6:.2f} M parameters, stride {cfg.stride}, {cfg.z_dim} channels), steps {step + 1} to "
          f"{config.steps}, on {jax.device_count()} {jax.devices()[0].platform} devices; {workdir}")

  stream = crops.Crops(source, seed=config.seed, step=step, clips=config.data.clips, images=config.data.images, frames=config.data.frames,
                       size=config.data.crop, on_bad=cli.say)
  settings = {"cfg": cfg, "tx": tx, "losses": losses, "ema_decay": config.ema_decay, "layout": where, "decoder_only": config.decoder_only}
  update = functools.partial(jax.jit(train_vae.train_step, static_argnames=tuple(settings), donate_argnums=0,
                                     out_shardings=(train_vae.shardings(cfg, tx, losses, where), None)),
                             key=jax.random.key(config.seed), features=features, **settings)
  batches = ((jax.tree.map(lambda x: jax.make_array_from_process_local_data(where.fitted(x.shape, "act_batch"), x), batch), number)
             for number, batch in enumerate(stream, step + 1))
  evaluate = functools.partial(held_out_quality, clips_of(apart, cfg, HELD_OUT), cfg)
  state, code = loop.run_steps(config, workdir, state, batches, update, first_step=step, checkpoints=checkpoints, items=items,
                               hooks=((config.eval_every, evaluate),))
  checkpoints.close()
  if code == cli.OK:
    finish(state, cfg, config, source, workdir)
  return code


def load_features(config, losses):
  """The weights of VGG16, or None without the perceptual term."""
  if not losses.perceptual_weight:
    return None
  if not config.perceptual.weights:
    raise BadInput("config.perceptual.weight is set and config.perceptual.weights is empty; give a safetensors file of VGG16")
  return vgg16.load(config.perceptual.weights)


def open_sources(config):
  """-> (what to train on, what is held out). Of a folder every twentieth file is held out, by its name; at least one is trained on."""
  build.pick(dict.fromkeys(SOURCES), config.data.source, "config.data.source")
  module = importlib.import_module(f"data.sources.{config.data.source}")
  settings = {"path": config.data.path, "max_seconds": config.data.max_seconds, "fps": 0.0, "seed": config.seed}
  if config.data.source == "shapes":
    return tuple(module.open_source(ml_collections.ConfigDict(settings | {"count": count, "split": split}))
                 for count, split in ((config.data.count, "train"), (HELD_OUT, "held_out")))
  if not config.data.path:
    raise BadInput("no --config.data.path; give the folder of clips")
  source = module.open_source(ml_collections.ConfigDict(settings))
  files = sorted(source.items(), key=lambda item: zlib.crc32(item.file.encode("utf-8", "backslashreplace")))
  apart = len(files) // 20 or min(1, len(files) - 1)
  return Some(source, files[apart:]), Some(source, files[:apart])


@dataclasses.dataclass(frozen=True)
class Some:
  """Some of the items of a source."""
  source: object
  chosen: list

  @property
  def name(self):
    return self.source.name

  def items(self):
    return sorted(self.chosen, key=lambda item: item.file)

  def read(self, item):
    return self.source.read(item)


def begin(config, cfg, tx, losses, where, source):
  """A new state: of the weights in config.init, or else of random ones."""
  key = jax.random.key(config.seed)
  if not config.init:
    return train_vae.init_state(cfg, tx, losses, key, where, look(source, config) if cfg.linear else None)
  cli.say(f"starting from the VAE of {config.init}{', whose encoder stays' if config.decoder_only else ''}")
  return train_vae.init_state(cfg, tx, losses, key, where, params=first_weights(config, cfg))


def first_weights(config, cfg):
  """Those of the VAE in config.init; BadInput where it is of another size."""
  found, weights = build.load_vae(epath.Path(config.init) / "vae")
  if len({dataclasses.replace(one, latents_mean=(), latents_std=()) for one in (found, cfg)}) > 1:
    raise BadInput(f"the VAE in {config.init} is not of size {config.model!r}; give the --config.model that it was trained with")
  return weights


def look(source, config):
  """A few crops, for the linear codec."""
  seen = crops.Crops(source, seed=config.seed + 1, clips=128, images=0, frames=config.data.frames, size=config.data.crop, on_bad=cli.say)
  return next(seen)["clips"]


def items(state):
  """What a checkpoint holds, by name."""
  return {"params": state.params, "ema": state.ema, "rest": {name: getattr(state, name) for name in train_vae.REST}}


def resume(checkpoints, target):
  """-> (state, step) of the newest whole checkpoint, or None."""
  step = checkpoints.latest()
  if step is None:
    return None
  found = checkpoints.restore(step, items(target))
  cli.say(f"going on from the checkpoint of step {step}")
  return train_vae.VAETrainState(params=found["params"], ema=found["ema"], **found["rest"]), step


def clips_of(source, cfg, count):
  """The first `count` clips of a source, uint8 [1 + 4n, H, W, 3]: their middle, at most MOST frames, height and width, in whole strides.
  One a file; files that cannot be read are passed over."""
  found = []
  for item in source.items()[:count]:
    try:
      raw = next(iter(source.read(item)))
      video_THWC = clips.crop(raw.video_THWC[:MOST[0]], cfg.stride)
    except (clips.BadClip, StopIteration):
      continue
    top, left = (max(0, have - most) // 2 // s * s for have, most, s in zip(video_THWC.shape[1:3], MOST[1:], cfg.stride[1:], strict=True))
    found.append(video_THWC[:, top:top + MOST[1], left:left + MOST[2]])
  return found


def held_out_quality(held_out, cfg, step, state):
  """Mean PSNR and SSIM of the EMA weights on held-out clips."""
  del step
  held_out = [clip_THWC for clip_THWC in held_out if min(clip_THWC.shape[1:3]) >= metrics.WINDOW]
  latents = encoding.encode_clips(cfg, state.ema, held_out)
  scores = []
  for clip_THWC, again_THWC in zip(held_out, encoding.decode_clips(cfg, state.ema, latents), strict=True):
    a, b = (x / 255 for x in (clip_THWC, again_THWC))
    scores.append((min(float(metrics.psnr(a, b)), 100.0), float(metrics.ssim(a, b))))
  return dict(zip(("held_out_psnr", "held_out_ssim"), np.mean(scores, 0).tolist(), strict=True)) if scores else {}


def finish(state, cfg, config, source, workdir):
  """Measures the latents' mean and standard deviation once (those of config.init stay where its encoder does), and writes W/vae."""
  if config.decoder_only:
    cfg, _ = build.load_vae(epath.Path(config.init) / "vae")
  else:
    cfg = train_vae.with_statistics(encoding.encode_clips(cfg, state.ema, clips_of(source, cfg, 256)), cfg)
  checkpoint.save_part(epath.Path(workdir) / "vae", vae.config_to_dict(cfg, config.model), jax.device_get(state.ema))
  cli.say(f"done: {config.steps} steps; the VAE is in {workdir}/vae. Next: python -m launch.encode --source=DIR --workdir={workdir} --out=RECORDS")


if __name__ == "__main__":
  cli.define_config("configs/vae.py:tiny")
  cli.run(main)
