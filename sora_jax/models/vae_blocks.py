"""Layers of the video VAE: causal convolutions with a memory, resampling in space and time, residual blocks.

Layers are causal in time. A video is processed in chunks. The first chunk holds 1 + s n frames, later chunks
s n (s: the temporal stride; after each temporal down-sampling 1 + n, then n). A layer that reads earlier
frames stores the last frames of its input in the linen collection "stream", if the caller makes that mutable,
and reads them there for the next chunk (`first=False`). A whole video is a single first chunk. It gives the
same sums as the video in several chunks, without a loop over chunks.

The first frame is treated as in the public Wan VAEs (arXiv:2503.20314 sec. 4.1; diffusers
`AutoencoderKLWan`), so that their weights load here:
  convolution       zeros before the first frame
  down-sampling     frame 0 passes through; frame k sees 2k-2, 2k-1, 2k
  up-sampling       frame 0 passes through, once; frame 1 sees zeros before it, not frame 0
  shortcuts         averages are padded in front; of the repeats of frame 0 only the last is kept

A frame may stand in the top-left corner of a larger canvas. Pixels outside the frame then change nothing
inside it. `inside_BHW` is True for the pixels of the frame, at the resolution of the input (None: all).
Spatial convolutions see zeros outside it, as they do past an edge, and attention masks those pixels. All
other layers work on single pixels, or on blocks that are wholly inside or wholly outside.

Weights are (time, height, width, in, out). Arrays are BTHWC.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.layout import Layout, param
from sora_jax.models.causal_conv import SAME, causal_conv, in_front, plane_conv

KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
ATTENTION_SCORES = 2**24  # most scores in memory at once; above that, frame by frame in blocks of queries
# If a layer's input has more values than this, the frames of a later chunk pass through the layer one by one.
LARGE = 2**20
MASKED = -1e30  # a masked score; finite, so that a frame with no pixel inside gives no NaN


def recall(module, x_BTHWC, n, first):
  """Returns the n frames before this chunk (None for the first), and stores the last n for the next chunk."""
  before = None if first else module.get_variable("stream", "tail")
  if module.is_mutable_collection("stream"):
    missing = max(n - x_BTHWC.shape[1], 0)
    if first:
      joined = jnp.pad(x_BTHWC, in_front(missing))
    else:
      joined = jnp.concatenate([before, x_BTHWC], 1)
    module.put_variable("stream", "tail", joined[:, joined.shape[1] - n :])
  return before


def by_frames(module, layers, x_BTHWC, first):
  """layers(module, x, first), for layers that keep the number of frames.

  The frames of a later chunk, if large, pass through the layers one by one, so that memory is that of one
  frame.
  """
  T = x_BTHWC.shape[1]
  if first or T == 1 or not jax.core.is_constant_dim(x_BTHWC.size) or x_BTHWC.size <= LARGE:
    return layers(module, x_BTHWC, first)

  def one_frame(module, _, x_BHWC):
    return None, layers(module, x_BHWC[:, None], False)[:, 0]

  scan = nn.scan(one_frame, variable_broadcast="params", variable_carry="stream", in_axes=1, out_axes=1)
  return scan(module, None, x_BTHWC)[1]


def corner(valid_B2, height, width):
  """[B, height, width] bool: True in the first valid_B2 rows and columns of each frame."""
  rows_BH, columns_BW = jnp.arange(height) < valid_B2[:, :1], jnp.arange(width) < valid_B2[:, 1:]
  return rows_BH[:, :, None] & columns_BW[:, None]


def mask_outside(x_BTHWC, inside_BHW):
  """x with zeros outside `inside_BHW` (None: x)."""
  return x_BTHWC if inside_BHW is None else jnp.where(inside_BHW[:, None, :, :, None], x_BTHWC, 0)


def double(x_BTHWC):
  """Nearest-neighbour up-sampling to twice the height and width."""
  return jnp.repeat(jnp.repeat(x_BTHWC, 2, 2), 2, 3)


def average_down(x_BTHWC, features, time, space):
  """Shortcut past a down-sampling, [..., C] -> [..., features].

  The pixels of a block become channels, which are averaged in groups.
  """
  x = jnp.pad(x_BTHWC, in_front(-x_BTHWC.shape[1] % time))
  B, T, H, W, C = x.shape
  x = x.reshape(B, T // time, time, H // space, space, W // space, space, C)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # the pixels of a channel are neighbours
  return x.reshape(*x.shape[:4], features, -1).mean(-1)


def duplicate_up(x_BTHWC, features, time, space, first):
  """Shortcut past an up-sampling: channels, repeated as needed, become the pixels of a block.

  The layout is the inverse of `average_down`'s.
  """
  B, T, H, W, C = x_BTHWC.shape
  x = jnp.repeat(x_BTHWC, features * time * space * space // C, -1)
  x = x.reshape(B, T, H, W, features, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
  x = x.reshape(B, T * time, H * space, W * space, features)
  return x[:, time - 1 :] if first else x


class Norm(nn.Module):
  """Root mean square norm over channels, no bias; float32 inside."""

  @nn.compact
  def __call__(self, x):
    gamma = param(self, "scale", nn.initializers.ones, (x.shape[-1],), (None,))
    x32 = x.astype(jnp.float32)
    # As torch's normalize, with eps 1e-12 on the norm.
    power = jnp.maximum(jnp.mean(x32 * x32, -1, keepdims=True), 1e-24 / x.shape[-1])
    return (x32 * jax.lax.rsqrt(power) * gamma).astype(x.dtype)


class Conv(nn.Module):
  """A convolution with bias.

  size: (3, 3, 3) is causal and stores frames for the next chunk; (3, 3) works frame by frame; all ones mixes
  channels.
  """

  features: int
  size: tuple[int, ...] = (3, 3, 3)

  @nn.compact
  def __call__(self, x_BTHWC, first=True, inside_BHW=None, stride=1, padding=SAME):
    kernel = _weight(self, "kernel", self.size, x_BTHWC, self.features)
    bias = _bias(self, x_BTHWC, self.features)
    if set(self.size) == {1}:
      return x_BTHWC @ kernel.reshape(kernel.shape[-2:]) + bias
    x_BTHWC = mask_outside(x_BTHWC, inside_BHW)
    if self.size == (3, 3, 3):
      return causal_conv(recall(self, x_BTHWC, 2, first), x_BTHWC, kernel) + bias
    return plane_conv(x_BTHWC, kernel, stride, padding) + bias


def _weight(module, name, size, x, features):
  """A kernel (*size, in, out), in the dtype of x."""
  axes = (*[None] * len(size), "conv_in", "conv_out")
  return param(module, name, KERNEL, (*size, x.shape[-1], features), axes).astype(x.dtype)


def _bias(module, x, features):
  return param(module, "bias", nn.initializers.zeros, (features,), ("conv_out",)).astype(x.dtype)


class TimeDown(nn.Module):
  """Half the frames: 1 + 2n -> 1 + n in a first chunk, 2n -> n after it."""

  @nn.compact
  def __call__(self, x_BTHWC, first):
    features = x_BTHWC.shape[-1]
    kernel = _weight(self, "kernel", (3, 1, 1), x_BTHWC, features)[:, 0, 0]
    bias = _bias(self, x_BTHWC, features)
    before = recall(self, x_BTHWC, 1, first)
    x = x_BTHWC if first else jnp.concatenate([before, x_BTHWC], 1)
    half = (x.shape[1] - 1) // 2
    y = sum(x[:, tap : tap + 2 * half : 2] @ kernel[tap] for tap in range(3)) + bias
    return jnp.concatenate([x[:, :1], y], 1) if first else y


class TimeUp(nn.Module):
  """Twice the frames: 1 + n -> 1 + 2n in a first chunk, n -> 2n after it.

  Frame 0 passes through; the convolution does not see it.
  """

  @nn.compact
  def __call__(self, x_BTHWC, first):
    features = x_BTHWC.shape[-1]
    kernel = _weight(self, "kernel", (3, 1, 1), x_BTHWC, 2 * features)[:, 0, 0]
    bias = _bias(self, x_BTHWC, 2 * features)
    late = x_BTHWC[:, 1:] if first else x_BTHWC
    before = recall(self, late, 2, first)
    x = jnp.pad(late, in_front(2)) if first else jnp.concatenate([before, late], 1)
    B, T, H, W, C = late.shape
    y = sum(x[:, tap : tap + T] @ kernel[tap] for tap in range(3)) + bias
    y = y.reshape(B, T, H, W, 2, C).transpose(0, 1, 4, 2, 3, 5).reshape(B, 2 * T, H, W, C)
    return jnp.concatenate([x_BTHWC[:, :1], y], 1) if first else y


class ResBlock(nn.Module):
  """Norm, silu and convolution, twice, plus a shortcut (1 x 1 x 1 convolution where the width changes)."""

  features: int

  @nn.compact
  def __call__(self, x_BTHWC, first, inside_BHW=None):
    h = Conv(self.features, name="conv_0")(nn.silu(Norm(name="norm_0")(x_BTHWC)), first, inside_BHW)
    h = Conv(self.features, name="conv_1")(nn.silu(Norm(name="norm_1")(h)), first, inside_BHW)
    if x_BTHWC.shape[-1] != self.features:
      x_BTHWC = Conv(self.features, (1, 1, 1), name="shortcut")(x_BTHWC)
    return x_BTHWC + h


class FrameAttention(nn.Module):
  """Self-attention with one head among the pixels of one frame."""

  @nn.compact
  def __call__(self, x_BTHWC, inside_BHW=None):
    B, T, H, W, C = x_BTHWC.shape
    qkv = Conv(3 * C, (1, 1), name="qkv")(Norm(name="norm")(x_BTHWC))
    query, key, value = jnp.split(qkv.reshape(B * T, H * W, 3 * C), 3, -1)
    mask = None if inside_BHW is None else jnp.repeat(inside_BHW.reshape(B, H * W), T, 0)
    out = attend_in_frames(query, key, value, mask).reshape(x_BTHWC.shape)
    return x_BTHWC + Conv(C, (1, 1), name="out")(out)


def attend_in_frames(query, key, value, mask=None):
  """Softmax attention of [frames, pixels, C] within each frame, in blocks of queries where pixels are many.

  mask: [frames, pixels] bool, True for the keys that are attended to (None: all).
  """
  frames, pixels, C = query.shape

  def attend(query, key, value, mask):
    scores = jnp.einsum("...qc,...kc->...qk", query, key, preferred_element_type=jnp.float32) * C**-0.5
    if mask is not None:
      scores = jnp.where(mask[..., None, :], scores, MASKED)
    return jnp.einsum("...qk,...kc->...qc", jax.nn.softmax(scores).astype(value.dtype), value)

  if not jax.core.is_constant_dim(frames * pixels):  # symbolic sizes, where a model is exported
    return jax.lax.map(lambda frame: attend(*frame), (query, key, value, mask))
  if frames * pixels * pixels <= ATTENTION_SCORES:
    return attend(query, key, value, mask)
  block = max(ATTENTION_SCORES // pixels, 1)

  @jax.checkpoint
  def one_frame(args):
    query, key, value, mask = args
    return jax.lax.map(lambda q: attend(q[None], key, value, mask)[0], query, batch_size=min(block, pixels))

  return jax.lax.map(one_frame, (query, key, value, mask))


class Middle(nn.Module):
  """The blocks at the lowest resolution."""

  @nn.compact
  def __call__(self, x_BTHWC, first, inside_BHW=None):
    x = ResBlock(x_BTHWC.shape[-1], name="block_0")(x_BTHWC, first, inside_BHW)
    x = FrameAttention(name="attention")(x, inside_BHW)
    return ResBlock(x_BTHWC.shape[-1], name="block_1")(x, first, inside_BHW)


class Down(nn.Module):
  """A level of the encoder: residual blocks, then down-sampling.

  It halves the height and width if `space`, and the frames if `time`; at the last level neither.
  """

  features: int
  blocks: int
  space: bool
  time: bool
  residual: bool

  @nn.compact
  def __call__(self, x_BTHWC, first, inside_BHW=None):
    def layers(module, x, first):
      for i in range(self.blocks):
        x = ResBlock(self.features, name=f"block_{i}", parent=module)(x, first, inside_BHW)
      if self.space:
        conv = Conv(self.features, (3, 3), name="resample", parent=module)
        x = conv(x, first, inside_BHW, stride=2, padding=((0, 1), (0, 1)))
      return x

    x = by_frames(self, layers, x_BTHWC, first)
    if self.time:
      x = TimeDown(name="time")(x, first)
    if self.residual:
      x += average_down(x_BTHWC, self.features, 1 + self.time, 1 + self.space)
    return x


class Up(nn.Module):
  """A level of the decoder: residual blocks, then up-sampling.

  It doubles the frames if `time`, and the height and width if `space`; at the last level neither.
  """

  features: int
  blocks: int
  space: bool
  time: bool
  residual: bool

  @nn.compact
  def __call__(self, x_BTHWC, first):
    def blocks(module, x, first):
      for i in range(self.blocks + 1):
        x = ResBlock(self.features, name=f"block_{i}", parent=module)(x, first)
      return x

    def resample(module, x, first):
      del first
      features = self.features if self.residual else self.features // 2
      return Conv(features, (3, 3), name="resample", parent=module)(double(x))

    x = by_frames(self, blocks, x_BTHWC, first)
    if self.time:
      x = TimeUp(name="time")(x, first)
    if self.space:
      x = by_frames(self, resample, x, first)
    if self.residual and (self.space or self.time):
      x += duplicate_up(x_BTHWC, self.features, 1 + self.time, 1 + self.space, first)
    return x


class Encoder(nn.Module):
  """Patches of pixels -> 2 z channels. `widths`, `times` and `spaces` have an entry for each level."""

  widths: tuple[int, ...]
  times: tuple[bool, ...]
  spaces: tuple[bool, ...]
  blocks: int
  features: int
  residual: bool
  layout: Layout | None = None

  @nn.compact
  def __call__(self, x_BTHWC, first, inside_BHW=None):
    x = Conv(self.widths[0], name="conv_in")(x_BTHWC, first, inside_BHW)
    last = len(self.widths) - 2
    for i, width in enumerate(self.widths[1:]):
      space, time = i < last and self.spaces[i], i < last and self.times[i]
      x = Down(width, self.blocks, space, time, self.residual, name=f"down_{i}")(x, first, inside_BHW)
      if space and inside_BHW is not None:
        inside_BHW = inside_BHW[:, ::2, ::2]
      x = sharded(self.layout, x)
    x = Middle(name="middle")(x, first, inside_BHW)
    return Conv(self.features, name="conv_out")(nn.silu(Norm(name="norm_out")(x)), first, inside_BHW)


class Decoder(nn.Module):
  """z channels -> patches of pixels."""

  widths: tuple[int, ...]
  times: tuple[bool, ...]
  spaces: tuple[bool, ...]
  blocks: int
  features: int
  residual: bool
  layout: Layout | None = None

  @nn.compact
  def __call__(self, z_BTHWC, first):
    x = Conv(self.widths[0], name="conv_in")(z_BTHWC, first)
    x = Middle(name="middle")(x, first)
    last = len(self.widths) - 2
    for i, width in enumerate(self.widths[1:]):
      space, time = i < last and self.spaces[i], i < last and self.times[i]
      x = Up(width, self.blocks, space, time, self.residual, name=f"up_{i}")(x, first)
      x = sharded(self.layout, x)

    def out(module, x, first):
      x = nn.silu(Norm(name="norm_out", parent=module)(x))
      return Conv(self.features, name="conv_out", parent=module)(x, first)

    return by_frames(self, out, x, first)


class LinearCodec(nn.Module):
  """The linear part of a VAE: the best projection of single blocks of pixels. Convolutions learn the rest.

  It maps blocks of stride pixels to z numbers, and back; a first frame stands for a block of equal frames. It
  is not trained: `vae.fit_linear` sets it to the principal components of a few clips, as other networks fix a
  whitening first layer.
  """

  stride: tuple[int, int, int]
  features: int

  def setup(self):
    values = 3 * math.prod(self.stride)
    shapes = {"mean": (values,), "encode": (values, self.features), "decode": (self.features, values)}
    weights = {
      name: param(self, name, nn.initializers.zeros, shape, (None,) * len(shape))
      for name, shape in shapes.items()
    }
    self.weights = jax.lax.stop_gradient(weights)

  def encode(self, video_BTHWC, first):
    w = jax.tree.map(lambda leaf: leaf.astype(video_BTHWC.dtype), self.weights)
    return (to_blocks(video_BTHWC, self.stride, first) - w["mean"]) @ w["encode"]

  def decode(self, z_BTHWC, first):
    w = jax.tree.map(lambda leaf: leaf.astype(z_BTHWC.dtype), self.weights)
    return from_blocks(z_BTHWC @ w["decode"] + w["mean"], self.stride, first)


def to_blocks(video_BTHWC, stride, first):
  """[B, T, H, W, 3] -> [B, n, H/h, W/w, 3 t h w]; frame 0 of a first chunk is repeated t times."""
  t, h, w = stride
  x = video_BTHWC
  if first:
    x = jnp.concatenate([jnp.repeat(video_BTHWC[:, :1], t, 1), video_BTHWC[:, 1:]], 1)
  B, T, H, W, C = x.shape
  x = x.reshape(B, T // t, t, H // h, h, W // w, w, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(B, T // t, H // h, W // w, -1)


def from_blocks(x_BTHWC, stride, first):
  """The inverse of `to_blocks`; frame 0 of a first chunk is the mean of its block."""
  t, h, w = stride
  B, T, H, W, C = x_BTHWC.shape
  x = x_BTHWC.reshape(B, T, H, W, t, h, w, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7)
  x = x.reshape(B, T * t, H * h, W * w, 3)
  return jnp.concatenate([x[:, :t].mean(1, keepdims=True), x[:, t:]], 1) if first else x


def sharded(layout, x):
  """x, kept inside jit where the layout puts it: clips over devices, and height and width over those left.

  x: [B, T, H, W, C], or anything with a batch.
  """
  if layout is None:
    return x
  axes = ("act_batch", None, "act_height", "act_width", None) if x.ndim == 5 else ("act_batch",)
  return layout.constrain(x, *axes)


def fixed_cuts(layout, grid_BHW):
  """The layout in which frames of all resolutions are cut as those of latents are, `grid_BHW` of them.

  A level may have more factors than the next; what is cut another way must be sent.
  """
  if layout is None:
    return None
  batch, height, width = layout.fitted(grid_BHW, "act_batch", "act_height", "act_width").spec
  return layout.with_rules(act_batch=batch, act_height=height, act_width=width)


def clips_alone(layout):
  """The layout that cuts clips, not frames: where frames are cut and a mesh axis is left over, XLA's
  partitioner gives wrong gradients of convolutions (jax 0.10.2; tests/test_train_vae.py tells).
  """
  return layout and layout.with_rules(act_height=None, act_width=None)
