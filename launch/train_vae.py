"""Trains the video VAE on crops of clips and images. Run again, it goes on where it was.

python -m launch.train_vae --config=configs/vae.py:tiny --workdir=W          # the embedded world
python -m launch.train_vae --config=configs/vae.py:base --workdir=W --config.data.path=CLIPS

On the hosts of a pod, or in several processes of one machine (launch.hosts), each reads its crops of a step;
the loss is that of one process.
"""

import dataclasses
import functools
import importlib
import itertools
import zlib

import jax
import ml_collections
import numpy as np
import optax
from absl import flags
from etils import epath

from data import clips, crops
from launch.common import claims, loop, processes, profile, program, progress, settings
from launch.common.progress import say
from sora_jax import (
  checkpoint,
  codec,
  layout as layouts,
  metrics,
  multihost,
  train,
  train_vae,
  workdir as workdirs,
)
from sora_jax.errors import BadInput, checked, pick
from sora_jax.models import vae
from sora_jax.weights import vgg16

FLAGS = flags.FLAGS
FREE = (
  "steps",
  "log_every",
  "checkpoint_every",
  "eval_every",
  "max_bad_steps",
  "max_rollbacks",
  "spike",
  "data.path",
  "data.threads",
  "mesh.",
  "init",
)
# clips that measure quality, and how much of each: frames, height, width
HELD_OUT, MOST = 48, (17, 256, 256)
SOURCES = ("shapes", "folder")


def define_flags():
  flags.DEFINE_string("workdir", "", "where checkpoints, logs and the VAE go")
  program.define_config("configs/vae.py:tiny")
  profile.define_flag()


@dataclasses.dataclass
class Run:
  """A training run that `prepare` has checked: nothing of it was compiled or written yet."""

  config: ml_collections.ConfigDict
  workdir: str
  cfg: vae.VAEConfig
  layout: layouts.Layout
  losses: train_vae.LossConfig
  tx: optax.GradientTransformation
  features: dict | None  # weights of VGG16, for the perceptual term
  source: object  # clips to train on
  held_out: object


def main():
  config = program.get_config()
  traced = profile.steps_of(FLAGS.profile, config)
  if not processes.join():
    progress.mute()
  return train_on(prepare(config, FLAGS.workdir), traced)


def prepare(config, workdir):
  """A config -> Run. BadInput where something in it does not fit the data or the devices."""
  if not workdir:
    raise BadInput("no --workdir; give a directory for the checkpoints")
  if config.decoder_only and not config.init:
    raise BadInput(
      "config.decoder_only is set and config.init is empty; give the directory whose VAE it is about"
    )
  cfg = pick(vae.SIZES, config.model, "config.model")
  layout = workdirs.make_layout(config)
  checked(
    lambda: vae.check_size((1, config.data.frames, *config.data.crop, 3), cfg, first=True),
    "config.data.frames and crop",
  )
  losses = checked(lambda: train_vae.loss_config(config), "config")
  tx = settings.make_optimizer(config, train_vae.boxed_weights(cfg))
  loop.check(config)
  features = load_features(config, losses)
  source, held_out = open_sources(config, cfg)
  if config.init and not claims.has_model(workdir):
    first_weights(config, cfg)
  return Run(config, workdir, cfg, layout, losses, tx, features, source, held_out)


def train_on(run, traced=None):
  """Takes W, resumes or begins, trains, and writes W/vae -> exit code.

  traced: first and last step of a profile.
  """
  config, workdir, cfg = run.config, run.workdir, run.cfg
  if not jax.process_index():
    claims.lock_workdir(workdir)
    claims.claim_workdir(workdir, config, FREE)
  processes.wait("W is prepared")
  checkpoints = checkpoint.Checkpoints(workdir, say=say)
  target = train_vae.abstract_state(cfg, run.tx, run.losses, run.layout)
  state, step, cursor = resume(checkpoints, target) or (begin(run), 0, 0)
  if step >= config.steps:
    done = (epath.Path(workdir) / "vae" / "config.json").exists()
    if not processes.from_first("is W/vae written", lambda: done):  # killed between the last step and this
      finish(run, state)
    say(
      f"{workdir} is already trained for {step} steps; nothing to do. "
      f"Next: python -m launch.encode --source=DIR --workdir={workdir} --out=RECORDS"
    )
    return program.OK
  for line in layouts.uncut_weights(train_vae.boxed_weights(cfg), run.layout):
    say(line)
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  say(
    f"training VAE {config.model} ({size / 1e6:.2f} M parameters, stride {cfg.stride}, {cfg.z_dim} "
    f"channels), steps {step + 1} to "
    f"{config.steps}, on {jax.device_count()} {jax.devices()[0].platform} devices; {workdir}"
  )
  compiled = train_vae.jit_step(
    cfg,
    run.tx,
    run.losses,
    ema_decay=config.ema_decay,
    spike=config.spike,
    layout=run.layout,
    decoder_only=config.decoder_only,
  )
  key = jax.random.key(config.seed)

  def update(state, batch):
    return compiled(state, batch, key, run.features)

  def restore():
    state, step, _ = resume(checkpoints, target) or (begin(run), 0, 0)
    return state, step

  mine = jax.process_index(), jax.process_count()
  evaluate = functools.partial(held_out_quality, clips_of(run.held_out, cfg, HELD_OUT, *mine), cfg)
  state, code = loop.run_steps(
    config,
    workdir,
    state,
    batches(run, cursor),
    update,
    first_step=step,
    checkpoints=checkpoints,
    items=items,
    restore=restore,
    hooks=((config.eval_every, evaluate),),
    traced=traced,
  )
  checkpoints.close()
  if code == program.OK:
    finish(run, state)
  return code


def batches(run, before):
  """Yields (batch on the devices, its number) from the one after number `before` on."""
  data = run.config.data
  shares = {train.part_of_rows(run.layout, count) for count in (data.clips, data.images) if count}
  part, parts = shares.pop() if len(shares) == 1 else (0, 1)  # else all read all
  stream = crops.Crops(
    run.source,
    seed=run.config.seed,
    step=before,
    clips=data.clips,
    images=data.images,
    frames=data.frames,
    size=data.crop,
    part=part,
    parts=parts,
    threads=data.threads,
    on_bad=say if parts == 1 else program.warn,
  )

  def place(video):
    return multihost.place_rows(video, lambda shape: train_vae.batch_sharding(shape, run.layout), part, parts)

  for number, batch in enumerate(stream, before + 1):
    yield jax.tree.map(place, batch), number


def load_features(config, losses):
  """The weights of VGG16, or None without the perceptual term."""
  if not losses.perceptual_weight:
    return None
  if not config.perceptual.weights:
    raise BadInput(
      "config.perceptual.weight is set and config.perceptual.weights is empty; give a safetensors file of "
      "VGG16"
    )
  return vgg16.load(config.perceptual.weights)


def open_sources(config, cfg):
  """-> (what to train on, what is held out).

  Of a folder every twentieth file is held out, by its name; at least one is trained on.
  """
  pick(dict.fromkeys(SOURCES), config.data.source, "config.data.source")
  module = importlib.import_module(f"data.sources.{config.data.source}")
  options = {
    "path": config.data.path,
    "max_seconds": config.data.max_seconds,
    "seed": config.seed,
    "temporal_stride": cfg.stride[0],
  }
  if config.data.source == "shapes":
    return tuple(
      module.open_source(ml_collections.ConfigDict(options | {"count": count, "split": split}))
      for count, split in ((config.data.count, "train"), (HELD_OUT, "held_out"))
    )
  if not config.data.path:
    raise BadInput("no --config.data.path; give the folder of clips")
  source = module.open_source(ml_collections.ConfigDict(options))
  files = sorted(source.items(), key=lambda item: zlib.crc32(item.file.encode("utf-8", "backslashreplace")))
  held_out = len(files) // 20 or min(1, len(files) - 1)
  return Subset(source, files[held_out:]), Subset(source, files[:held_out])


@dataclasses.dataclass(frozen=True)
class Subset:
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


def begin(run):
  """A new state: of the weights in config.init, or else of random ones."""
  config, key = run.config, jax.random.key(run.config.seed)
  if not config.init:
    video_BTHWC = some_crops(run) if run.cfg.linear else None
    return train_vae.init_state(run.cfg, run.tx, run.losses, key, run.layout, video_BTHWC)
  say(f"starting from the VAE of {config.init}{', whose encoder stays' if config.decoder_only else ''}")
  return train_vae.init_state(
    run.cfg, run.tx, run.losses, key, run.layout, params=first_weights(config, run.cfg)
  )


def first_weights(config, cfg):
  """Those of the VAE in config.init; BadInput where it is of another size."""
  there, weights = workdirs.load_vae(epath.Path(config.init) / "vae")
  if len({dataclasses.replace(one, latents_mean=(), latents_std=()) for one in (there, cfg)}) > 1:
    raise BadInput(
      f"the VAE in {config.init} is not of size {config.model!r}; give the --config.model that it was "
      "trained with"
    )
  return weights


def some_crops(run):
  """Crops of clips, for the linear codec to begin with."""
  data = run.config.data
  stream = crops.Crops(
    run.source, seed=run.config.seed + 1, clips=128, images=0, frames=data.frames, size=data.crop, on_bad=say
  )
  return next(stream)["clips"]


def items(state):
  """What a checkpoint holds, by name."""
  return {
    "params": state.params,
    "ema": state.ema,
    "rest": {name: getattr(state, name) for name in train_vae.REST},
  }


def resume(checkpoints, target):
  """-> (state, step, number of the last batch) of the newest whole checkpoint, or None."""
  step = checkpoints.latest()
  if step is None:
    return None
  saved = loop.restore_items(checkpoints, step, items(target), "rest")
  say(f"going on from the checkpoint of step {step}")
  state = train_vae.VAETrainState(params=saved["params"], ema=saved["ema"], **saved["rest"])
  return state, step, checkpoints.meta(step)["cursor"]


def clips_of(source, cfg, count, part=0, parts=1):
  """The first `count` clips of a source, uint8 [1 + s n, H, W, 3]: their middle, at most MOST frames, height
  and width, in whole strides.

  One a file, of every `parts`-th file from the part-th on; files that cannot be read are left out.
  """
  videos = []
  for item in source.items()[:count][part::parts]:
    try:
      raw = next(iter(source.read(item)))
      video_THWC = clips.crop(raw.video_THWC[: MOST[0]], cfg.stride)
    except (clips.BadClip, StopIteration):
      continue
    top, left = (
      max(0, have - most) // 2 // s * s
      for have, most, s in zip(video_THWC.shape[1:3], MOST[1:], cfg.stride[1:], strict=True)
    )
    videos.append(video_THWC[:, top : top + MOST[1], left : left + MOST[2]])
  return videos


def held_out_quality(held_out, cfg, step, state):
  """Mean PSNR and SSIM of the EMA weights on held-out clips; each process measures its own."""
  del step
  weights = multihost.to_own_device(state.ema)
  held_out = [clip_THWC for clip_THWC in held_out if min(clip_THWC.shape[1:3]) >= metrics.WINDOW]
  latents = codec.encode_clips(cfg, weights, held_out)
  scores = []
  for clip_THWC, decoded_THWC in zip(held_out, codec.decode_clips(cfg, weights, latents), strict=True):
    a, b = (x / 255 for x in (clip_THWC, decoded_THWC))
    scores.append((min(float(metrics.psnr(a, b)), 100.0), float(metrics.ssim(a, b))))
  scores = list(itertools.chain(*multihost.from_all(scores)))
  return (
    dict(zip(("held_out_psnr", "held_out_ssim"), np.mean(scores, 0).tolist(), strict=True)) if scores else {}
  )


def finish(run, state):
  """Measures the latents' mean and standard deviation once (those of config.init stay where its encoder
  does), and writes W/vae.
  """
  config, workdir, cfg = run.config, run.workdir, run.cfg
  weights = multihost.to_own_device(state.ema)
  if not jax.process_index():
    if config.decoder_only:
      cfg, _ = workdirs.load_vae(epath.Path(config.init) / "vae")
    else:
      cfg = train_vae.with_statistics(codec.encode_clips(cfg, weights, clips_of(run.source, cfg, 256)), cfg)
    workdirs.save_vae(epath.Path(workdir) / "vae", cfg, jax.device_get(weights), config.model)
  processes.wait("W/vae is written")
  say(
    f"done: {config.steps} steps; the VAE is in {workdir}/vae. Next: python -m launch.encode --source=DIR "
    f"--workdir={workdir} --out=RECORDS"
  )


if __name__ == "__main__":
  program.run(main, define_flags)
