"""Text to video: a DiT on packed rows of latent patches.

  python -m launch.train --config=configs/t2v.py:tiny --config.data.path=RECORDS --workdir=W

Variants, with the hardware that each was written for and what to expect:
  start  two CPU cores, three minutes on small clips of the embedded world (launch.encode
         --source=shapes_small:12000): colours, shapes and directions follow the prompt, at the sizes of these
         clips.
  tiny   two CPU cores, six minutes on the embedded world, with the weights of `start` as --config.init:
         colours, directions and more than half of the shapes follow, at all sizes. The quickstart trains it.
         From random weights, colours alone follow.
  world_start, world  two CPU cores, two hours on the embedded world: the small model that ships (commands and
         scores: sora_jax/assets/world/README.md).
  base   one TPU v5p-8 or larger: our size B, on records of a 4x16x16 VAE with 48 channels, with text
         embeddings in the records.
  finetune  starts from imported weights, --config.init=W: all of them (Wan 1.3B: a TPU v5p-8), or with
         --config.lora.rank=32 adapters alone (Wan 14B: the same). Records are encoded with --workdir=W, so
         that VAE and text encoder are those of the weights.

Steps are updates; a row is `row_tokens` tokens, a step is `rows` rows of all hosts together.
"""

import ml_collections


def neutral():
  """What all variants share: every key, with a value that is right or harmless at any size. Not a variant."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.init = ""  # another work directory to start the weights from
  config.steps = 1000
  config.log_every = 10
  config.checkpoint_every = 500
  config.spike = 10.0  # skip an update of so many times the usual loss or gradient norm; 0: none
  config.max_bad_steps = 10  # so many more updates skipped than taken: back to the last checkpoint
  config.max_rollbacks = 2  # so often without a new checkpoint between; then the run ends
  config.ema_decay = 0.999  # 0: no running mean of the weights is kept
  config.micro_steps = 1  # parts of a step's rows, one after another, whose gradients are added

  config.model = ml_collections.ConfigDict()
  config.model.kind = "wan"  # a key of sora_jax.workdir.MODELS
  config.model.size = "S"  # a key of sora_jax.models.dit_config.SIZES; "init": that of config.init
  config.model.expert = ""  # which of two experts in config.init to train: high or low (noise)
  config.model.remat = "full"  # a key of sora_jax.models.dit_config.REMAT: what the backward pass finds
  config.model.scans = 1  # over the layers, one after another; more: less memory for 14B, longer to compile
  config.model.dtype = "float32"  # of activations
  config.model.param_dtype = "float32"  # of weights; bfloat16 is rounded stochastically
  config.model.weights = ""  # int8 or fp8: of what adapters are trained on, and of sampling jobs
  config.model.text = ""  # a key of sora_jax.models.text.SIZES; "": embeddings of the records

  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 0  # > 0: train adapters of this rank to the weights of config.init
  config.lora.alpha = 32.0  # an adapter's product is scaled by alpha / rank
  config.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")  # layers: ends of their names in diffusers

  config.data = ml_collections.ConfigDict()
  config.data.path = ""  # what launch.encode wrote; several, mixed, with a comma between them
  config.data.weights = ()  # of several: shares of the clips drawn; (): each clip once an epoch
  config.data.held_out = ""  # records as in path, not trained on, for config.eval
  config.data.clips = ""  # instead of path: a folder of raw clips, encoded before the first step
  config.data.max_seconds = 5.0  # of these: longer videos become pieces
  config.data.rows = 8
  config.data.row_tokens = 4096
  config.data.row_clips = 16
  config.data.row_text = 1024
  config.data.caption_dropout = 0.1
  config.data.given = ml_collections.ConfigDict()  # shares of the clips of which a part is given, and which
  config.data.given.first = 0.15  # the first frame
  config.data.given.start = 0.0
  config.data.given.end = 0.0
  config.data.given.ends = 0.0  # start and end
  config.data.given.frames = 0.0  # any
  config.data.given.region = 0.0  # all frames around a box
  config.data.base_fps = 0.0  # > 0: time coordinates count frames at this rate, whatever the clip's
  config.data.max_damaged = 10
  config.data.threads = 8

  config.optim = ml_collections.ConfigDict()  # the fields of sora_jax.optim.OptimConfig
  config.optim.name = "adamw"
  config.optim.learning_rate = 1e-4
  config.optim.warmup = 100
  config.optim.final = 0.05
  config.optim.weight_decay = 0.01
  config.optim.clip = 1.0
  config.optim.b1 = 0.9
  config.optim.b2 = 0.99
  config.optim.moment_dtype = "float32"  # what moments are stored in; bfloat16 is rounded stochastically

  config.sigma = ml_collections.ConfigDict()
  config.sigma.mean = 0.0
  config.sigma.std = 1.0
  config.sigma.base_shift = 3.0
  config.sigma.base_tokens = 4096
  config.sigma.shift_power = 0.5
  config.sigma.uniform = 0.1
  config.sigma.light = 0.0  # > 0: errors at smaller sigma count less

  config.eval = ml_collections.ConfigDict()
  config.eval.every = 0  # steps between measurements of the loss on data.held_out; 0: never

  config.sample = ml_collections.ConfigDict()  # what launch.sample does where a request does not say
  config.sample.every = 0  # 0: draw no samples during training
  config.sample.prompts = ()  # of those samples
  config.sample.size = (480, 832)
  config.sample.frames = 17
  config.sample.fps = 16.0
  config.sample.window = 0  # frames that are made at a time, of longer videos; 0: all
  config.sample.steps = 40
  config.sample.times = ()  # instead of steps and shift, for few-step models: (1000, 757, 522)
  config.sample.sampler = "unipc"
  config.sample.shift = 3.0
  config.sample.guidance = 5.0
  config.sample.row_tokens = 4096  # a row of a sampling job
  config.sample.rows = 1  # rows denoised together

  config.mesh = ml_collections.ConfigDict()  # data takes what the others leave
  config.mesh.fsdp = 1
  config.mesh.context = 1
  config.mesh.tensor = 1
  return config


def tiny():
  """Minutes on two CPU cores."""
  config = neutral()
  config.steps = 1300
  config.checkpoint_every = 200
  config.spike = 0.0  # two rows a step: 8 updates of 336 were above 10 times the usual, and did no harm
  config.max_bad_steps = 5
  config.ema_decay = 0.99
  config.model.size = "quick"
  config.model.remat = "dots"  # an eighth less CPU time than "none"
  config.model.text = "tiny"
  config.data.rows = 2  # many small updates: 290 of 2 rows leave 0.92 of the loss of 160 of 5
  config.data.row_tokens = 320
  config.data.row_clips = 12
  config.data.row_text = 80
  config.data.given.first = 0.0
  config.data.threads = 2
  config.optim.name = "muon"
  config.optim.learning_rate = 2e-3  # after `start`; with its 4e-3 a sixth fewer shapes are right
  config.optim.warmup = 20
  # Latents of the linear codec are like pixels; sigma 0.8 to 0.95 decides shape and place
  config.sigma.base_shift = 6.0
  config.sigma.light = 0.5
  config.sigma.base_tokens = 64
  config.sample.prompts = ("a red ball moves left", "a blue square moves up")
  config.sample.size = (64, 64)
  config.sample.fps = 8.0
  config.sample.steps = 30
  config.sample.shift = 2.0
  config.sample.guidance = 4.0
  config.sample.row_tokens = 320
  config.sample.rows = 8
  return config


def start():
  """The first of two runs: small clips, of which a row holds many."""
  config = tiny()
  config.steps = 700
  config.optim.learning_rate = 4e-3
  config.data.row_clips = 40
  config.data.row_text = 240
  return config


def world_start():
  """As `start`, for the small model that ships."""
  config = start()
  config.model.size = "world"
  config.model.text = "small"
  config.steps = 1500
  config.optim.learning_rate = 3e-3
  return config


def world():
  """The small model that ships, after `world_start`: all kinds of scenes, and all that may be given."""
  config = tiny()
  config.model.size = "world"
  config.model.text = "small"
  config.data.rows = 4
  config.data.row_clips = 16
  config.data.row_text = 160
  config.data.given = {"first": 0.1, "start": 0.07, "end": 0.07, "ends": 0.1, "frames": 0.05, "region": 0.06}
  config.steps = 11_000
  config.checkpoint_every = 250
  config.ema_decay = 0.999
  config.sample.window = 25
  config.sample.guidance = 1.5
  return config


def base():
  """Size B on records of a 4x16x16 VAE with 48 channels and text embeddings."""
  config = neutral()
  config.model.size = "B"
  config.model.dtype = "bfloat16"
  config.steps = 200_000
  config.log_every = 50
  config.checkpoint_every = 1000
  config.ema_decay = 0.9999
  config.data.rows = 64
  config.data.row_tokens = 40_960
  config.data.row_clips = 64
  config.data.row_text = 8192
  config.optim.learning_rate = 2e-4
  config.optim.warmup = 2000
  config.sample.frames = 49
  config.sample.row_tokens = 40_960
  config.mesh.fsdp = 4
  return config


def finetune():
  """From imported weights. What is None is taken from config.init."""
  config = base()
  config.model.size = "init"
  config.steps = 2000
  config.checkpoint_every = 250
  config.ema_decay = 0.999
  config.data.rows = 8
  config.data.row_clips = 16
  config.data.given.first = 0.0  # for weights that take given tokens at sigma 0 (Wan 2.2 TI2V-5B) alone
  config.optim.learning_rate = 1e-5  # adapters bear ten times as much
  config.optim.warmup = 50
  config.sigma.base_shift = ml_collections.config_dict.placeholder(float)  # None: config.init's
  config.sigma.shift_power = 0.0
  config.mesh.fsdp = 1  # devices that weights and optimiser are cut over
  theirs = {
    "size": tuple,
    "frames": int,
    "fps": float,
    "steps": int,
    "times": tuple,
    "sampler": str,
    "shift": float,
    "guidance": float,
  }
  for name, kind in theirs.items():
    config.sample[name] = ml_collections.config_dict.placeholder(kind)
  return config


VARIANTS = {
  "start": start,
  "tiny": tiny,
  "world_start": world_start,
  "world": world,
  "base": base,
  "finetune": finetune,
}


def get_config(variant="tiny"):
  """The page of a variant."""
  if variant not in VARIANTS:
    raise ValueError(f"configs/t2v.py has no variant {variant!r}; it has {', '.join(VARIANTS)}")
  return VARIANTS[variant]()
