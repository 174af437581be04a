"""The reference mixture: a frozen list of clip sizes, on which every packing figure is quoted.

`index(count)` is the index that an encoded dataset of `count` clips would have. It is drawn from tables by a
hash in integer arithmetic (plan.mix64), so it is the same on every machine, and entry i is the same for every
count. Sizes are those of a VAE of strides (4, 8, 8) with one token for each patch of (1, 2, 2). The mixture
is a model of a training set, not a sample of one. What is known of published sets, and what is assumed:

  seconds     1 to 20, mean 6.2. The mean of HowTo100M is 3.6, of Panda-70M 8.5, of ACAV 10.0 (Panda-70M,
              arXiv:2402.19479, tab. 1).
  pixels      clips are 240p to 1080p. Panda-70M is 720p, HowTo100M 240p, and 433 K of the 1 M clips of
              OpenVid-1M are 1080p (arXiv:2407.02371). No clip has more than 40,960 tokens, so a longer clip
              has fewer pixels or frames a second. Frame rate and height are drawn together from the pairs
              that fit, by the weights below; a training set is scaled in the same way. Nothing is drawn
              twice.
  images      35 % of the clips (assumed). Their sides, as the root of the area, are 256 to 2048 pixels; half
              of them are below 512, 15 % above 1024. Of LAION-5B, 3 % are above 1024 x 1024 before filtering
              (170 M of 5.85 G, laion.ai/blog/laion-5b).
  shapes      wide, tall and square. 16:9 is the most frequent ratio of clips, 3:2 and 1:1 of images, which
              are up to 3 % wider or narrower at random (assumed; the ratios are those of Open-Sora's buckets,
              github.com/hpcaitech/Open-Sora, opensora/datasets/aspect.py).
  frame rate  16, 24, 25 or 30 (assumed).
  captions    4 to 512 tokens: half are short, one sentence, as in Panda-70M; half are long, as in Koala-36M
              (mean 200 words, arXiv:2410.08260).
"""

import numpy as np

from data.plan import mix64
from data.records import INDEX_DTYPE

SEED = 20_240_215
MOST_TOKENS = 40_960
PATCH = (1, 2, 2)
STRIDE = (4, 8, 8)
IMAGES, CLIPS = 0, 1  # sources

IMAGE_SHARE = 35  # percent

KIND, SIDE, SHAPE, JITTER, SECONDS, FORMAT, TEXT, UID = range(8)  # salts of the hash, one for each purpose

# Percentiles 0, 10, ..., 100; linear between them.
SIDES = (256, 288, 328, 376, 432, 504, 600, 720, 880, 1200, 2048)  # of images, pixels
MILLISECONDS = (1000, 1600, 2200, 3000, 3800, 4800, 6000, 7600, 10_000, 13_500, 20_000)
TEXT_TOKENS = (4, 10, 14, 19, 26, 48, 120, 190, 250, 320, 513)

# {(width, height): weight}. Of images: in thousandths of the side. Of clips: in thousandths of the height of
# a 16:9 clip, whose frame holds the others.
# fmt: off
IMAGE_SHAPES = {
  (1000, 1000): 24, (1155, 866): 16, (866, 1155): 10, (1225, 816): 18, (816, 1225): 14,
  (1333, 750): 8, (750, 1333): 6, (1414, 707): 2, (707, 1414): 2,
}
CLIP_SHAPES = {
  (1778, 1000): 62, (1000, 1778): 16, (1333, 1000): 9, (1000, 1333): 2, (1000, 1000): 7, (1778, 744): 4,
}
# fmt: on
FRAME_RATES = {16: 6, 24: 26, 25: 20, 30: 48}
HEIGHTS = {240: 30, 360: 30, 480: 20, 720: 14, 1080: 6}


def index(count):
  """The first `count` clips -> INDEX_DTYPE [count]; uids are unique, shard 0, fps of images 1."""
  rows = np.zeros(count, INDEX_DTYPE)
  for start in range(0, count, 1 << 16):
    _fill(rows[start : start + (1 << 16)], start)
  return rows


def _fill(rows, start):
  clip = np.arange(start, start + len(rows), dtype=np.uint64)

  def bits(purpose):
    """32 random bits for each clip, uint64 [N]."""
    return mix64(SEED, purpose, clip) >> np.uint64(32)

  is_image = bits(KIND) * np.uint64(100) >> np.uint64(32) < IMAGE_SHARE
  rows["uid"], rows["position"] = mix64(SEED, UID, clip), clip
  rows["source"] = np.where(is_image, IMAGES, CLIPS)
  rows["text_tokens"] = _percentile(bits(TEXT), TEXT_TOKENS)
  for name, of_image, of_clip in zip(("t", "h", "w", "fps"), _images(bits), _clips(bits), strict=True):
    rows[name] = np.where(is_image, of_image, of_clip)


def _images(bits):
  """bits(purpose): random bits -> latent t, h, w and frame rate of images [N]."""
  side, aspect = _percentile(bits(SIDE), SIDES), 970 + _percentile(bits(JITTER), (0, 61))
  width, height = _pick_key(bits(SHAPE), IMAGE_SHAPES).T
  return 1, side * height // aspect // 16 * 2, side * width * aspect // 16_000_000 * 2, 1


def _clips(bits):
  """bits(purpose): random bits -> latent t, h, w and frame rate of clips [N].

  Draws one of the pairs of frame rate (F) and height (K) that fit, by weight.
  """
  rate_F, rate_weight_F = np.array(list(FRAME_RATES.items())).T
  height_K, height_weight_K = np.array(list(HEIGHTS.items())).T
  shape_2N1 = _pick_key(bits(SHAPE), CLIP_SHAPES).T[..., None]
  width_NK, height_NK = shape_2N1 * height_K // 16_000  # tokens
  t_NF = 1 + _percentile(bits(SECONDS), MILLISECONDS)[:, None] * rate_F // 4000
  fits_NFK = t_NF[:, :, None] * (height_NK * width_NK)[:, None] <= MOST_TOKENS
  weights_NFK = np.where(fits_NFK, rate_weight_F[:, None] * height_weight_K, 0)
  pair = _pick(bits(FORMAT), weights_NFK.reshape(len(t_NF), -1))
  rate, k = np.divmod(pair, len(HEIGHTS))
  clip = np.arange(len(t_NF))
  return t_NF[clip, rate], height_NK[clip, k] * 2, width_NK[clip, k] * 2, rate_F[rate]


def _percentile(bits, knots):
  """32 random bits [N] -> int64 [N] in [knots[0], knots[-1]).

  Each interval between two knots is equally likely; the distribution within it is uniform.
  """
  scaled, knots = bits * np.uint64(len(knots) - 1), np.array(knots, np.uint64)
  interval, within = (scaled >> np.uint64(32)).astype(np.int64), scaled & np.uint64(0xFFFFFFFF)
  width = knots[interval + 1] - knots[interval]
  return (knots[interval] + (width * within >> np.uint64(32))).astype(np.int64)


def _pick_key(bits, weights):
  """32 random bits [N], {key: integer weight} -> a key for each, as an array."""
  return np.array(list(weights))[_pick(bits, list(weights.values()))]


def _pick(bits, weights):
  """32 random bits [N], integer weights [K] or [N, K] -> an index in [0, K) for each, int64 [N]."""
  ends = np.cumsum(np.asarray(weights, np.uint64), -1)
  return (bits[:, None] * ends[..., -1:] >> np.uint64(32) >= ends).sum(-1)
