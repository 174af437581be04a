"""The reference mixture: a frozen list of clip sizes, on which every packing figure is quoted.

`index(count)` is what an encoded dataset of `count` clips would have as its index, drawn from tables by a hash in integer arithmetic
(plan.mix64): the same on every machine, entry i the same for every count. Sizes are those of a VAE of strides (4, 8, 8), a token a patch
of (1, 2, 2). It is a model of a training set, not a sample of one. What is known of published sets, and what is assumed:

  seconds     1 to 20, mean 6.2. Mean of HowTo100M 3.6, of Panda-70M 8.5, of ACAV 10.0 (Panda-70M, arXiv:2402.19479, tab. 1).
  pixels      of clips: 240p to 1080p; Panda-70M is of 720p, HowTo100M of 240p, 433 K of the 1 M clips of OpenVid-1M of 1080p
              (arXiv:2407.02371). No clip is of more than 40,960 tokens: so the longer a clip, the fewer pixels or frames a second, drawn
              together from what fits, by the weights below; a set for training is scaled so. Nothing is drawn twice.
  images      35 % (assumed). Their sides, in pixels as the root of the area: 256 to 2048, half of them below 512, 15 % above 1024; of
              LAION-5B 3 % are above 1024 x 1024, before filters (170 M of 5.85 G, laion.ai/blog/laion-5b).
  shapes      wide, tall and square; 16:9 leads among clips, 3:2 and 1:1 among images, which are up to 3 % wider or narrower at random
              (assumed; the ratios are those of Open-Sora's buckets, github.com/hpcaitech/Open-Sora, opensora/datasets/aspect.py).
  frame rate  16, 24, 25 or 30 (assumed).
  captions    4 to 512 tokens: half short, a sentence, as of Panda-70M; half long, as of Koala-36M (mean 200 words,
              arXiv:2410.08260).
"""

import numpy as np

from data.plan import mix64
from data.records import INDEX_DTYPE

SEED = 20_240_215
MOST_TOKENS = 40_960
PATCH = (1, 2, 2)
STRIDE = (4, 8, 8)
IMAGES, CLIPS = 0, 1                                # sources

IMAGE_SHARE = 35                                    # percent

KIND, SIDE, SHAPE, JITTER, SECONDS, FORMAT, TEXT, UID = range(8)       # salts: what a hash is for

# Percentiles 0, 10, ..., 100; linear between them.
SIDES = (256, 288, 328, 376, 432, 504, 600, 720, 880, 1200, 2048)                        # of images, pixels
MILLISECONDS = (1000, 1600, 2200, 3000, 3800, 4800, 6000, 7600, 10_000, 13_500, 20_000)
TEXT_TOKENS = (4, 10, 14, 19, 26, 48, 120, 190, 250, 320, 513)

# (width, height) in thousandths: of the side of an image; of the height of a 16:9 clip, whose frame holds the others
IMAGE_SHAPES = {(1000, 1000): 24, (1155, 866): 16, (866, 1155): 10, (1225, 816): 18, (816, 1225): 14, (1333, 750): 8, (750, 1333): 6,
                (1414, 707): 2, (707, 1414): 2}
CLIP_SHAPES = {(1778, 1000): 62, (1000, 1778): 16, (1333, 1000): 9, (1000, 1333): 2, (1000, 1000): 7, (1778, 744): 4}
FRAME_RATES = {16: 6, 24: 26, 25: 20, 30: 48}
HEIGHTS = {240: 30, 360: 30, 480: 20, 720: 14, 1080: 6}


def index(count):
  """The first `count` clips -> INDEX_DTYPE [count]; uids are unique, shard 0, fps of images 1."""
  rows = np.zeros(count, INDEX_DTYPE)
  for start in range(0, count, 1 << 16):
    _fill(rows[start:start + (1 << 16)], start)
  return rows


def _fill(rows, start):
  clip = np.arange(start, start + len(rows), dtype=np.uint64)
  luck = lambda purpose: mix64(SEED, purpose, clip) >> np.uint64(32)  # noqa: E731    32 random bits a clip
  image = luck(KIND) * np.uint64(100) >> np.uint64(32) < IMAGE_SHARE
  rows["uid"], rows["position"] = mix64(SEED, UID, clip), clip
  rows["source"] = np.where(image, IMAGES, CLIPS)
  rows["text_tokens"] = _percentile(luck(TEXT), TEXT_TOKENS)
  for name, of_image, of_clip in zip(("t", "h", "w", "fps"), _images(luck), _clips(luck), strict=True):
    rows[name] = np.where(image, of_image, of_clip)


def _images(luck):
  """-> latent t, h, w and frame rate, of images [N]."""
  side, wide = _percentile(luck(SIDE), SIDES), 970 + _percentile(luck(JITTER), (0, 61))
  width, height = np.array(list(IMAGE_SHAPES))[_pick(luck(SHAPE), list(IMAGE_SHAPES.values()))].T
  return 1, side * height // wide // 16 * 2, side * width * wide // 16_000_000 * 2, 1


def _clips(luck):
  """-> latent t, h, w and frame rate, of clips [N]: of the pairs of frame rate and height that fit, one by weight."""
  rates, heights = np.array(list(FRAME_RATES.items())).T, np.array(list(HEIGHTS.items())).T
  width, height = np.array(list(CLIP_SHAPES))[_pick(luck(SHAPE), list(CLIP_SHAPES.values()))].T[..., None] * heights[0] // 16_000      # [N, K] tokens
  t_NF = 1 + _percentile(luck(SECONDS), MILLISECONDS)[:, None] * rates[0] // 4000
  fits_NFK = t_NF[:, :, None] * (height * width)[:, None] <= MOST_TOKENS
  weights_NFK = np.where(fits_NFK, rates[1][:, None] * heights[1], 0)
  rate, k = np.divmod(_pick(luck(FORMAT), weights_NFK.reshape(len(t_NF), -1)), len(HEIGHTS))
  clip = np.arange(len(t_NF))
  return t_NF[clip, rate], height[clip, k] * 2, width[clip, k] * 2, rates[0][rate]


def _percentile(luck, knots):
  """32 random bits [N] -> int64 [N] in [knots[0], knots[-1]): each stretch between two knots as likely, uniform within."""
  place, knots = luck * np.uint64(len(knots) - 1), np.array(knots, np.uint64)
  stretch, within = (place >> np.uint64(32)).astype(np.int64), place & np.uint64(0xFFFFFFFF)
  return (knots[stretch] + ((knots[stretch + 1] - knots[stretch]) * within >> np.uint64(32))).astype(np.int64)


def _pick(luck, weights):
  """32 random bits [N], integer weights [K] or [N, K] -> which of K, int64 [N]."""
  ends = np.cumsum(np.asarray(weights, np.uint64), -1)
  return (luck[:, None] * ends[..., -1:] >> np.uint64(32) >= ends).sum(-1)
