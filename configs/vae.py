"""The video VAE: causal, latents for the DiT of configs/t2v.py.

  python -m launch.train_vae --config=configs/vae.py:tiny --workdir=W

Variants, with the hardware that each was written for and what to expect:
  tiny   two CPU cores, a minute on the embedded world. What the quickstart trains.
  world  two CPU cores, a quarter of an hour on the embedded world: the VAE of the small model that ships.
  base   one TPU v5p-8 or larger, days: the residual 4x16x16 kind with 48 channels (the shape of Wan 2.2) on a
         folder of clips, with the adversarial and the perceptual term; give --config.data.path=CLIPS and
         --config.perceptual.weights=vgg16.safetensors

A step is `data.clips` crops of `data.frames` frames and `data.images` crops of one, over all hosts together.
"""

import ml_collections


def neutral():
  """What all variants share: every key, with a value that is right or harmless at any size. Not a variant."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.init = ""  # another directory whose VAE to start from
  config.decoder_only = False  # keep what latents depend on: records of config.init stay good
  config.model = "wan2.1"  # a key of sora_jax.models.vae.SIZES
  config.steps = 1000
  config.log_every = 20
  config.eval_every = 500  # PSNR and SSIM on held-out clips
  config.checkpoint_every = 500
  config.spike = 10.0  # skip an update of so many times the usual loss or gradient norm; 0: none
  config.max_bad_steps = 10  # so many more updates skipped than taken: back to the last checkpoint
  config.max_rollbacks = 2  # so often without a new checkpoint between; then the run ends
  config.ema_decay = 0.999

  config.kl_weight = 1e-6  # per pixel value; see sora_jax/train_vae.py
  config.square_weight = 4.0  # of the squared error, beside L1
  config.ssim_weight = 0.0  # of 1 - SSIM; 0: without
  config.adversarial = ml_collections.ConfigDict()
  config.adversarial.weight = 0.0  # 0: without
  config.adversarial.start = 0  # from this step on
  config.perceptual = ml_collections.ConfigDict()
  config.perceptual.weight = 0.0  # 0: without
  config.perceptual.weights = ""  # a safetensors file of VGG16: sora_jax/weights/vgg16.py

  config.data = ml_collections.ConfigDict()
  config.data.source = "folder"  # data/sources/NAME.py
  config.data.path = ""  # the folder of clips, for source "folder"
  config.data.count = 4000  # clips of the embedded world, for source "shapes"
  config.data.max_seconds = 2.0  # a folder's videos are read in pieces of so many seconds
  config.data.crop = (256, 256)  # height, width in pixels
  config.data.frames = 17  # as many as will be encoded at once, or later frames come out worse
  config.data.clips = 8
  config.data.images = 8
  config.data.threads = 8

  config.optim = ml_collections.ConfigDict()  # the fields of sora_jax.optim.OptimConfig
  config.optim.name = "adamw"
  config.optim.learning_rate = 1e-4
  config.optim.warmup = 100
  config.optim.final = 0.05
  config.optim.weight_decay = 0.0
  config.optim.clip = 1.0
  config.optim.b1 = 0.9
  config.optim.b2 = 0.99
  config.optim.moment_dtype = "float32"  # what moments are stored in; bfloat16 is rounded stochastically

  config.mesh = ml_collections.ConfigDict()  # data takes what the others leave
  config.mesh.fsdp = 1
  config.mesh.context = 1
  config.mesh.tensor = 1
  return config


def tiny():
  """Minutes on two CPU cores, on the embedded world."""
  config = neutral()
  config.model = "tiny"
  config.steps = 150
  config.eval_every = 150
  config.checkpoint_every = 75
  config.max_bad_steps = 5
  config.ema_decay = 0.99
  config.kl_weight = 1e-4
  config.data.source = "shapes"
  config.data.crop = (48, 48)
  config.data.clips = 2
  config.data.images = 4
  config.data.threads = 2
  config.optim.learning_rate = 2e-3
  config.optim.warmup = 30
  return config


def world():
  """The VAE of the small model that ships: as `tiny`, for longer."""
  config = tiny()
  config.steps = 3600
  config.eval_every = 900
  config.checkpoint_every = 250
  config.ema_decay = 0.999
  config.data.count = 40_000
  config.optim.name = "muon"
  config.optim.learning_rate = 3e-3
  config.optim.warmup = 100
  return config


def base():
  """The residual kind at its real size, on a folder of clips: what configs/t2v.py:base takes."""
  config = neutral()
  config.model = "wan2.2"
  config.steps = 300_000
  config.log_every = 50
  config.eval_every = 5000
  config.checkpoint_every = 1000
  config.ema_decay = 0.9999
  config.adversarial.weight = 0.5
  config.adversarial.start = 50_000
  config.perceptual.weight = 1.0
  config.data.clips = 64
  config.data.images = 64
  config.data.threads = 16
  config.optim.warmup = 2000
  config.mesh.fsdp = 4
  return config


VARIANTS = {"tiny": tiny, "world": world, "base": base}


def get_config(variant="tiny"):
  """The page of a variant."""
  if variant not in VARIANTS:
    raise ValueError(f"configs/vae.py has no variant {variant!r}; it has {', '.join(VARIANTS)}")
  return VARIANTS[variant]()
