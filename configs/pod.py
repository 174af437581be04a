"""Real runs on pods: our sizes in three stages, and fine-tuning of imported weights.

  python -m launch.preflight --config=configs/pod.py:xl-high-v5e --topology=v5e:16x16
  python -m launch.train --config=configs/pod.py:xl-high-v5e --config.data.path=RECORDS --workdir=W

SIZE-STAGE-SLICE, as l-images-v6e or xl-high-v5p. Sizes: l, xl. Slices: v5e (v5e:16x16), v5p (v5p:4x4x4), v6e
(v6e:16x16). Stages, each from the weights of the one before (--config.init=W):
  images  images up to 512 pixels, encoded with --frames of 1: many in a row of 40,960 tokens
  low     videos of 240p to 480p and images: rows of 40,960 tokens
  high    videos of up to 1080p and images: rows of 81,920 tokens
wan-1.3b, wan-5b, wan-14b fine-tune all weights that launch.import_weights wrote, one clip of 75,600 tokens
(720 x 1280, 81 frames) a row, on v5p:2x2x1; --config.init=W says where they are. wan-14b holds weights and
moments in bfloat16 and keeps no running mean, as MaxDiffusion does.

`python -m launch.preflight.table` compiles what is here and prints what each needs.
"""

from configs import t2v

STAGES = {  # tokens, clips and text tokens in a row, learning rate, steps
  "images": (40_960, 128, 8192, 2e-4, 100_000),
  "low": (40_960, 64, 4096, 2e-4, 150_000),
  "high": (81_920, 64, 4096, 1e-4, 50_000),
}
SLICES = {  # (fsdp, context, parts of a step's rows, remat) of l and xl; a step has 256 rows
  "v5e": {"l": (256, 1, 1, "attention"), "xl": (64, 4, 4, "attention")},
  "v5p": {"l": (64, 1, 4, "attention"), "xl": (64, 1, 4, "attention")},
  "v6e": {"l": (256, 1, 1, "attention"), "xl": (256, 1, 1, "attention")},
}
ROWS = 256


def ours(size, stage, chips):
  """A stage of one of our sizes on a slice."""
  config = t2v.base()
  tokens, clips, text, rate, steps = STAGES[stage]
  fsdp, context, parts, remat = SLICES[chips][size]
  config.steps = steps
  config.model.size = size.upper()
  config.model.remat = remat
  config.data.rows, config.data.row_tokens = ROWS, tokens
  config.data.row_clips, config.data.row_text = clips, text
  config.data.given.first = 0.0 if stage == "images" else 0.15
  config.optim.learning_rate = rate
  config.micro_steps = parts
  config.mesh.fsdp, config.mesh.context = fsdp, context
  return config


def wan(size):
  """Fine-tuning of all weights of an imported model on 4 chips of v5p."""
  config = t2v.finetune()
  config.model.remat = "attention"
  config.data.rows, config.data.row_clips = 1, 1
  config.data.row_tokens, config.data.row_text = 75_600, 512
  config.mesh.context = 4
  if size == "wan-5b":  # 16 x 16 pixels a latent: a quarter of the tokens, four clips a row
    config.data.row_clips = 4
    config.data.given.first = 0.15
    config.data.row_text = 2048
  if size == "wan-14b":
    config.model.scans = 4  # 3.3 GiB less
    config.model.param_dtype = config.optim.moment_dtype = "bfloat16"
    config.ema_decay = 0.0
  return config


VARIANTS = {
  f"{size}-{stage}-{chips}": (ours, size, stage, chips)
  for chips in SLICES
  for size in ("l", "xl")
  for stage in STAGES
} | {name: (wan, name) for name in ("wan-1.3b", "wan-5b", "wan-14b")}


def neutral():
  """Every key, as in configs/t2v.py."""
  return t2v.neutral()


def get_config(variant="xl-high-v5e"):
  """The page of a variant."""
  if variant not in VARIANTS:
    raise ValueError(f"configs/pod.py has no variant {variant!r}; it has {', '.join(VARIANTS)}")
  make, *arguments = VARIANTS[variant]
  return make(*arguments)
