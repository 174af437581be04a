"""Trains the video VAE on crops of clips and images. Run again, it goes on where it was.

  python -m launch.train_vae --config=configs/vae.py:tiny --workdir=W                                           # the embedded world
  python -m launch.train_vae --config=configs/vae.py:base --config.data.source=folder --config.data.path=CLIPS --workdir=W
"""

import functools
import importlib

import jax
import numpy as np
from absl import flags
from etils import epath

from data import crops
from launch import build, cli, loop
from sora_jax import checkpoint, metrics, optim, train_vae
from sora_jax.errors import BadInput
from sora_jax.models import vae

WORKDIR = flags.DEFINE_string("workdir", "", "where checkpoints, logs and the VAE go")
FREE = ("steps", "log_every", "checkpoint_every", "eval_every", "max_bad_steps", "data.path", "data.threads", "mesh.")
SOURCES = ("shapes", "folder")


def main():
  config, workdir = cli.get_config(), WORKDIR.value
  if not workdir:
    raise BadInput("no --workdir; give a directory for the checkpoints")
  cfg = build.pick(vae.SIZES, config.model, "config.model")
  where = build.make_layout(config)
  losses = cli.checked(lambda: train_vae.loss_config(config), "config")
  tx = build.make_optimizer(config)
  source = open_source(config, config.data.count, "train")
  held_out = open_source(config, 48, "held_out")
  cli.claim_workdir(workdir, config, FREE)
  checkpoints = checkpoint.Checkpoints(workdir, say=cli.say)
  target = train_vae.abstract_state(cfg, tx, losses, where)
  state, step = resume(checkpoints, target) or (train_vae.init_state(cfg, tx, losses, jax.random.key(config.seed), where), 0)
  if step >= config.steps:
    cli.say(f"{workdir} is already trained for {step} steps; nothing to do. Next: python -m launch.encode --source=DIR --workdir={workdir} --out=RECORDS")
    return cli.OK
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  cli.say(f"training VAE {config.model} ({size / 1e6:.2f} M parameters, stride {cfg.stride}, {cfg.z_dim} channels), steps {step + 1} to "
          f"{config.steps}, on {jax.device_count()} {jax.devices()[0].platform} devices; {workdir}")

  stream = crops.Crops(source, seed=config.seed, step=step, clips=config.data.clips, images=config.data.images, frames=config.data.frames,
                       size=config.data.crop, on_bad=cli.say)
  update = functools.partial(jax.jit(train_vae.train_step, static_argnames=("cfg", "tx", "losses", "ema_decay", "layout"), donate_argnums=0),
                             key=jax.random.key(config.seed), cfg=cfg, tx=tx, losses=losses, ema_decay=config.ema_decay, layout=where)
  batches = ((jax.tree.map(lambda x: jax.make_array_from_process_local_data(where.fitted(x.shape, "act_batch"), x), batch), number)
             for number, batch in enumerate(stream, step + 1))
  evaluate = functools.partial(held_out_quality, held_out, cfg, config)
  state, code = loop.run_steps(config, workdir, state, batches, update, first_step=step, checkpoints=checkpoints, items=items,
                               hooks=((config.eval_every, evaluate),))
  checkpoints.close()
  if code == cli.OK:
    finish(state, cfg, config, source, workdir)
  return code


def open_source(config, count, split):
  """The source that the config names; count and split are for the embedded world."""
  build.pick(dict.fromkeys(SOURCES), config.data.source, "config.data.source")
  module = importlib.import_module(f"data.sources.{config.data.source}")
  settings = config.data.copy_and_resolve_references()
  with settings.unlocked():
    settings.count, settings.split, settings.seed = count, split, config.seed
  return module.open_source(settings)


def items(state):
  """What a checkpoint holds, by name."""
  return {"params": state.params, "ema": state.ema, "rest": {f: getattr(state, f) for f in train_vae.REST}}


def resume(checkpoints, target):
  """-> (state, step) of the newest whole checkpoint, or None."""
  step = checkpoints.latest()
  if step is None:
    return None
  found = checkpoints.restore(step, items(target))
  cli.say(f"going on from the checkpoint of step {step}")
  return train_vae.VAETrainState(params=found["params"], ema=found["ema"], **found["rest"]), step


def clips_of(source, cfg, crop, count):
  """The first `count` clips of a source that hold one crop, as float [1 + 4n, H, W, 3] in [-1, 1], cut to whole strides."""
  found = []
  for item in source.items():
    for raw in source.read(item):
      t = 1 + (len(raw.video_THWC) - 1) // cfg.stride[0] * cfg.stride[0]
      h, w = (n // s * s for n, s in zip(raw.video_THWC.shape[1:3], cfg.stride[1:], strict=True))
      if min(h, w) > 0:
        found.append(raw.video_THWC[:t, :h, :w].astype(np.float32) / 127.5 - 1)
      if len(found) == count:
        return found
  return found


def held_out_quality(source, cfg, config, step, state):
  """PSNR and SSIM of the EMA weights on held-out clips."""
  del step
  scores = []
  for clip in clips_of(source, cfg, config.data.crop, 48):
    mean, _ = vae.encode(state.ema, clip[None], cfg)
    again = np.asarray(vae.decode(state.ema, mean, cfg))[0]
    a, b = (np.clip((x + 1) / 2, 0, 1) for x in (clip, again))
    scores.append((float(np.mean(metrics.psnr(a, b))), float(np.mean(metrics.ssim(a, b)))))
  return dict(zip(("held_out_psnr", "held_out_ssim"), np.mean(scores, 0).tolist(), strict=True))


def finish(state, cfg, config, source, workdir):
  """Measures the latents' mean and standard deviation once, and writes W/vae."""
  clips = clips_of(source, cfg, config.data.crop, 256)
  cfg = train_vae.with_statistics(state.ema, clips, cfg)
  checkpoint.save_part(epath.Path(workdir) / "vae", vae.config_to_dict(cfg, config.model), jax.device_get(state.ema))
  cli.say(f"done: {config.steps} steps; the VAE is in {workdir}/vae. Next: python -m launch.encode --source=DIR --workdir={workdir} --out=RECORDS")


if __name__ == "__main__":
  cli.define_config("configs/vae.py:tiny")
  cli.run(main)
