"""The video VAE. It is causal in time, and an image is a video of one frame.

  video [B, 1 + 4n, H, W, 3] in [-1, 1]  <->  latents [B, 1 + n, H / s, W / s, z]

The first frame has its own latent frame; after it, four frames share one. Later frames never change earlier
latents. The architecture is that of the public Wan VAEs, so that their weights load. One config describes two
kinds: the plain one (Wan 2.1: 4 x 8 x 8, 16 channels; arXiv:2503.20314 sec. 4.1) and the residual one, which
has shortcuts past each resampling and takes patches of pixels (Wan 2.2: 4 x 16 x 16, 48 channels). `SIZES`
holds both, and our own. Ours may keep height and width between levels, and have a linear codec beside the
convolutions (`fit_linear`).

`encode` and `decode` use raw latents, as the network computes them. Records and the DiT use
`normalise(latents, cfg)`, which has mean 0 and standard deviation 1 in each channel over a corpus.

Everything is computed in the dtype of the input array (norms and softmax in float32).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.layout import Layout, make_mesh, unbox
from sora_jax.models.vae_blocks import (
  Conv,
  Decoder,
  Encoder,
  LinearCodec,
  corner,
  fixed_cuts,
  sharded,
  to_blocks,
)

LOGVAR_RANGE = (-30.0, 20.0)  # as in the public VAEs
COMMON = (480, 720, 1088, 1920)  # sides of most videos; each is a canvas side


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Widths and strides of a VAE. Raises ValueError where they do not fit together.

  Level i of the encoder is base_dim * dim_mult[i] wide. Between levels i and i + 1, height and width halve
  where spatial_downsample[i] is True, and the number of frames halves where temporal_downsample[i] is True.
  The decoder mirrors the encoder, with decoder_base_dim (None: base_dim). The first operation turns
  patch_size x patch_size pixels into channels. The mean and standard deviation of latents default to 0 and 1.
  """

  base_dim: int = 96
  decoder_base_dim: int | None = None
  z_dim: int = 16
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  spatial_downsample: tuple[bool, ...] = ()  # (): between all levels, as in the public VAEs
  is_residual: bool = False
  patch_size: int = 1
  linear: bool = False  # whether there is a LinearCodec beside the convolutions
  latents_mean: tuple[float, ...] = ()
  latents_std: tuple[float, ...] = ()

  def __post_init__(self):
    put = functools.partial(object.__setattr__, self)
    put("dim_mult", tuple(self.dim_mult))
    put("temporal_downsample", tuple(bool(t) for t in self.temporal_downsample))
    spatial = tuple(bool(s) for s in self.spatial_downsample)
    put("spatial_downsample", spatial or (True,) * (len(self.dim_mult) - 1))
    put("latents_mean", tuple(self.latents_mean) or (0.0,) * self.z_dim)
    put("latents_std", tuple(self.latents_std) or (1.0,) * self.z_dim)
    for name in ("temporal_downsample", "spatial_downsample"):
      if len(getattr(self, name)) != len(self.dim_mult) - 1:
        raise ValueError(
          f"VAEConfig: {name} has {len(getattr(self, name))} entries; it needs {len(self.dim_mult) - 1}, one "
          f"between each two of the {len(self.dim_mult)} levels of dim_mult"
        )
    if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim:
      raise ValueError(
        f"VAEConfig: latents_mean and latents_std need {self.z_dim} values, one for each latent channel; got "
        f"{len(self.latents_mean)} and {len(self.latents_std)}"
      )

  @property
  def stride(self):
    """(frames, rows, columns) of pixels that one latent stands for, after the first frame."""
    space = self.patch_size * 2 ** sum(self.spatial_downsample)
    return 2 ** sum(self.temporal_downsample), space, space


def _published(mean, std):
  return dict(latents_mean=tuple(map(float, mean.split())), latents_std=tuple(map(float, std.split())))


SIZES = {
  # Ours: convolutions at an eighth of the resolution beside a linear codec. They train in minutes on two CPU
  # cores.
  "tiny": VAEConfig(
    base_dim=32, z_dim=48, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True),
    spatial_downsample=(False, False), is_residual=True, patch_size=8, linear=True,
  ),
  # The public VAEs. Latent statistics are those of their config.json (Wan-AI/Wan2.1-T2V-14B-Diffusers,
  # Wan-AI/Wan2.2-TI2V-5B-Diffusers).
  "wan2.1": VAEConfig(**_published(
    "-.7571 -.7089 -.9113 .1075 -.1745 .9653 -.1517 1.5508 .4134 -.0715 .5517 -.3632 -.1922 -.9497 .2503 "
    "-.2921",
    "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 "
    "2.8251 1.9160",
  )),
  "wan2.2": VAEConfig(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2,
    **_published(
      "-.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891 "
      ".1570 -.0098 .0375 -.1825 -.2246 -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502 "
      "-.2055 -.0322 .1109 .1567 -.0729 .0899 -.2799 -.1230 -.0313 -.1649 .0117 .0723 "
      "-.2839 -.2083 -.0520 .3748 .0152 .1957 .1433 -.2944 .3573 -.0548 -.1681 -.0667",
      ".4765 1.0364 .4514 1.1677 .5313 .4990 .4818 .5013 .8158 1.0344 .5894 1.0901 "
      ".6885 .6165 .8454 .4978 .5759 .3523 .7135 .6804 .5833 1.4146 .8986 .5659 "
      ".7069 .5338 .4889 .4917 .4069 .4999 .6866 .4093 .5709 .6065 .6415 .4944 "
      ".5726 1.2042 .5458 1.6887 .3971 1.0600 .3943 .5537 .5444 .4089 .7468 .7744",
    )),
}  # fmt: skip


ENCODER = ("encoder", "quant", "linear")  # the weights that latents depend on


class VAE(nn.Module):
  """The network, for `init` and for training; it does not clip. Elsewhere, use the functions below."""

  cfg: VAEConfig
  layout: Layout | None = None

  def setup(self):
    cfg, residual = self.cfg, self.cfg.is_residual
    down = (cfg.base_dim, *(cfg.base_dim * m for m in cfg.dim_mult))
    up = (cfg.dim_mult[-1], *reversed(cfg.dim_mult))
    up = tuple((cfg.decoder_base_dim or cfg.base_dim) * m for m in up)
    times, spaces = cfg.temporal_downsample, cfg.spatial_downsample
    self.encoder = Encoder(down, times, spaces, cfg.num_res_blocks, 2 * cfg.z_dim, residual, self.layout)
    pixels = 3 * cfg.patch_size**2
    self.decoder = Decoder(up, times[::-1], spaces[::-1], cfg.num_res_blocks, pixels, residual, self.layout)
    self.quant = Conv(2 * cfg.z_dim, (1, 1, 1))
    self.post_quant = Conv(cfg.z_dim, (1, 1, 1))
    self.linear = LinearCodec(cfg.stride, cfg.z_dim) if cfg.linear else None

  def encode(self, video_BTHWC, first=True, valid_B2=None):
    """A chunk of video -> (mean, log variance) of its latents. valid_B2: see `encode_chunk`."""
    patches = to_patches(sharded(self.layout, video_BTHWC), self.cfg.patch_size)
    inside_BHW = None
    if valid_B2 is not None:
      inside_BHW = corner(valid_B2 * (self.cfg.stride[1] // self.cfg.patch_size), *patches.shape[2:4])
    moments = self.quant(self.encoder(patches, first, inside_BHW))
    mean, logvar = jnp.split(moments, 2, -1)
    if self.cfg.linear:
      mean += self.linear.encode(video_BTHWC, first)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(self, latents_BTHWC, first=True):
    """A chunk of latents -> video, not clipped."""
    latents = self.post_quant(sharded(self.layout, latents_BTHWC))
    video = from_patches(self.decoder(latents, first), self.cfg.patch_size)
    return video + self.linear.decode(latents_BTHWC, first) if self.cfg.linear else video

  def __call__(self, video_BTHWC):
    return self.decode(self.encode(video_BTHWC)[0])


def to_patches(video_BTHWC, patch):
  """[B, T, H, W, 3] -> [B, T, H/p, W/p, 3 p p]; channel order (colour, column, row), as in the public VAE."""
  B, T, H, W, C = video_BTHWC.shape
  x = video_BTHWC.reshape(B, T, H // patch, patch, W // patch, patch, C)
  return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(B, T, H // patch, W // patch, C * patch * patch)


def from_patches(x_BTHWC, patch):
  """The inverse of `to_patches`."""
  B, T, H, W, C = x_BTHWC.shape
  x = x_BTHWC.reshape(B, T, H, W, C // patch**2, patch, patch)
  return x.transpose(0, 1, 2, 6, 3, 5, 4).reshape(B, T, H * patch, W * patch, C // patch**2)


def init(key, cfg):
  """Random weights, as plain arrays.

  All kernels are cut from one draw: `VAE(cfg).init` has the same distribution, but takes minutes to compile.
  Latents start with a log variance of about -6, not 0, so that they carry information before the decoder has
  learned to ignore them.
  """
  video = jax.ShapeDtypeStruct((1, 1, *cfg.stride[1:], 3), jnp.float32)
  shapes = unbox(jax.eval_shape(VAE(cfg).init, key, video))["params"]
  leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
  stops = np.cumsum([leaf.size if path[-1].key == "kernel" else 0 for path, leaf in leaves])
  draw = jax.random.normal(key, (stops[-1],))

  def weight(path, leaf, stop):
    if path[-1].key != "kernel":
      return jnp.full(leaf.shape, 1.0 if path[-1].key == "scale" else 0.0, jnp.float32)
    # Variance 1 / fan in, as KERNEL.
    return draw[stop - leaf.size : stop].reshape(leaf.shape) * math.prod(leaf.shape[:-1]) ** -0.5

  params = tree.unflatten(weight(path, leaf, stop) for (path, leaf), stop in zip(leaves, stops, strict=True))
  params["quant"]["bias"] = params["quant"]["bias"].at[cfg.z_dim :].set(-6.0)
  return params


def fit_linear(params, cfg, video_BTHWC):
  """params with a LinearCodec that holds the principal components of a video's blocks.

  The last convolutions become zero, so that they add nothing to it yet.
  The components are rotated so that all latent channels have the same power, 1 on average. No component is
  scaled by itself, so distances between latents are proportional to those between pixels. If each component
  were scaled to power 1 instead, the DiT would spend its capacity on details that nobody sees.
  """
  blocks = np.asarray(to_blocks(video_BTHWC, cfg.stride, True), np.float64)
  blocks_NP = blocks.reshape(-1, 3 * math.prod(cfg.stride))
  mean_P = blocks_NP.mean(0)
  power, basis = np.linalg.eigh(np.cov((blocks_NP - mean_P).T))
  power, basis = np.maximum(power[::-1][: cfg.z_dim], 1e-6), basis[:, ::-1][:, : cfg.z_dim]
  rotated, scale = basis @ equal_power(power), np.sqrt(power.mean())
  linear = {"mean": mean_P, "encode": rotated / scale, "decode": (rotated * scale).T}
  params = jax.tree.map(lambda x: x, params)  # new dicts, the same leaves
  params["linear"] = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), linear)
  for part in (params["quant"], params["decoder"]["conv_out"]):
    part["kernel"] = jnp.zeros_like(part["kernel"])
  return params


def equal_power(power):
  """Rotation that gives n uncorrelated variables equal power (Schur 1923, Horn 1954).

  power: their variances, [n]. -> orthogonal [n, n]. Planes are rotated one after another: each is that of the
  largest and the smallest power left, and the first of the two becomes the mean.
  """
  covariance, rotation, mean = np.diag(power), np.eye(len(power)), np.mean(power)
  for _ in range(len(power) - 1):
    i, j = np.argmax(np.diag(covariance)), np.argmin(np.diag(covariance))
    a, b, c = covariance[i, i] - mean, covariance[j, j] - mean, covariance[i, j]
    if a <= 1e-12 * mean or b >= 0:
      break
    angle = np.arctan((-c - np.sqrt(c * c - a * b)) / b)  # a cos^2 + b sin^2 + 2 c sin cos = 0
    plane = np.eye(len(power))
    plane[[i, j, i, j], [i, j, j, i]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
    covariance, rotation = plane.T @ covariance @ plane, rotation @ plane
  return rotation


def network(cfg, shape, layout=None):
  """The VAE for arrays of this shape, pixels [B, T, H, W, 3] or latents [B, t, h, w, z].

  On several devices clips are cut over them, and what clips leave cuts height and width.
  """
  B, _, H, W, channels = shape
  stride = cfg.stride[1:] if channels == 3 else (1, 1)
  return VAE(cfg, fixed_cuts(layout, (B, H // stride[0], W // stride[1])))


def frame_layout(devices, grid_HW):
  """The Layout in which devices share the frames of one clip, with latents of this height and width.

  Each side is cut over a power of two of devices, as many as divide it; weights are whole.
  """
  powers = [2**i for i in range(len(devices).bit_length()) if len(devices) % 2**i == 0]

  def fits(h, w):
    return len(devices) % (h * w) == grid_HW[0] % h == grid_HW[1] % w == 0

  cuts = [(h, w) for h in powers for w in powers if fits(h, w)]
  h, w = max(cuts, key=lambda cut: (cut[0] * cut[1], -abs(cut[0] - cut[1])))
  mesh = make_mesh(fsdp=h, context=w, devices=devices)
  return Layout(mesh).with_rules(act_height="fsdp", act_width="context", conv_in=None)


@functools.partial(jax.jit, static_argnames=("cfg", "layout"))
def encode(params, video_BTHWC, cfg, layout=None):
  """Whole video [B, 1 + 4n, H, W, 3] in [-1, 1] -> mean and log variance of raw latents, [B, 1 + n, h, w, z].

  Raises ValueError where the frames are not 1 + 4n, or the stride does not divide height and width: the
  caller crops, pads or repeats.
  """
  check_size(video_BTHWC.shape, cfg, first=True)
  return network(cfg, video_BTHWC.shape, layout).apply({"params": params}, video_BTHWC, method="encode")


@functools.partial(jax.jit, static_argnames=("cfg", "layout"))
def decode(params, latents_BTHWC, cfg, layout=None):
  """Raw latents [B, 1 + n, h, w, z] -> video [B, 1 + 4n, H, W, 3], clipped to [-1, 1]."""
  model = network(cfg, latents_BTHWC.shape, layout)
  return jnp.clip(model.apply({"params": params}, latents_BTHWC, method="decode"), -1, 1)


@functools.partial(jax.jit, static_argnames=("cfg", "layout", "first"), donate_argnames=("stream",))
def encode_chunk(params, stream, video_BTHWC, cfg, layout=None, *, first, valid=None):
  """One chunk of a video, 1 + 4n frames if `first` (stream None), else 4n -> (stream, mean, log variance).

  valid: int32 [B, 2], the numbers of rows and columns of latents that belong to each video; the same for all
  its chunks. The frames stand in the top-left corner of a `canvas`, and pixels outside change no latent
  inside. None: the video fills the canvas. `valid` is an array, so one compilation serves all sizes on a
  canvas.
  """
  check_size(video_BTHWC.shape, cfg, first)
  (mean, logvar), stream = _run(params, stream, video_BTHWC, cfg, layout, first, "encode", valid_B2=valid)
  return stream, mean, logvar


@functools.partial(jax.jit, static_argnames=("cfg", "layout", "first"), donate_argnames=("stream",))
def decode_chunk(params, stream, latents_BTHWC, cfg, layout=None, *, first):
  """One chunk of latents, 1 + n if `first` (stream None), else n -> (stream, video clipped to [-1, 1])."""
  video, stream = _run(params, stream, latents_BTHWC, cfg, layout, first, "decode")
  return stream, jnp.clip(video, -1, 1)


def _run(params, stream, x, cfg, layout, first, method, **kwargs):
  variables = {"params": params} if first else {"params": params, "stream": stream}
  model = network(cfg, x.shape, layout)
  out, updated = model.apply(variables, x, first=first, method=method, mutable=["stream"], **kwargs)
  return out, updated["stream"]


def encode_stream(params, chunks, cfg, layout=None, valid=None):
  """Encodes a video of any length in constant memory: yields the mean [B, 1, h, w, z] of each latent frame.

  chunks: iterable of frames [B, t, H, W, 3] in [-1, 1], of any t. One frame is encoded, then four at a time,
  so that there are two compilations for a size, or with `valid` (see `encode_chunk`) for a canvas. Raises
  ValueError at the end where the frames were not 1 + 4n in all: frames left over are never dropped silently.
  """
  stream = None
  for video in regroup(chunks, 1, cfg.stride[0]):
    stream, mean, _ = encode_chunk(params, stream, video, cfg, layout, first=stream is None, valid=valid)
    yield mean


def decode_stream(params, chunks, cfg, layout=None):
  """Decodes latents of any length in constant memory.

  Yields [B, 1, H, W, 3] for the first latent frame, then [B, 4, H, W, 3] for each other.
  chunks: iterable of raw latents [B, n, h, w, z], of any n.
  """
  stream = None
  for latents in regroup(chunks, 1, 1):
    stream, video = decode_chunk(params, stream, latents, cfg, layout, first=stream is None)
    yield video


def regroup(chunks, head, step):
  """Arrays [B, any, ...] -> the same frames as [B, head, ...], then [B, step, ...].

  Raises ValueError where frames are left over.
  """
  want, held = head, None
  for chunk in chunks:
    held = chunk if held is None or held.shape[1] == 0 else np.concatenate([held, chunk], 1)
    while held.shape[1] >= want:
      yield held[:, :want]
      held, want = held[:, want:], step
  if held is not None and held.shape[1]:
    raise ValueError(
      f"video: {held.shape[1]} frames left over; a video has {head} + {step} n frames; cut or extend it first"
    )


def check_size(shape, cfg, first):
  """Raises ValueError unless the strides divide a chunk of video of this shape."""
  frames, height, width = shape[1:4]
  t, h, w = cfg.stride
  if (frames - first) % t or frames < 1 or height % h or width % w or not height or not width:
    head = "1 + " if first else ""
    raise ValueError(
      f"video: {frames} frames of {height} x {width}; this VAE takes {head}{t} n frames, height a multiple "
      f"of {h}, width of {w}; crop or pad it first"
    )


def canvas(height, width, stride):
  """Size of a clip in pixels, multiples of the stride (t, y, x) -> (H, W) of the canvas for its encoding.

  There are few canvases. A side is a multiple of 16 up to 128, of 32 up to 256, of 64 up to 512 and so on, or
  one of COMMON, rounded up to a multiple of the stride. Up to 2048 pixels there are 28 sides, so at most 784
  canvases, where a stride of 8 allows 65,536 sizes. Each doubling adds four sides. Sizes drawn uniformly up
  to 2048 have 13 % more area on their canvases (videos of 480, 720 and 1080 rows: 6, 0 and 1 %). A canvas
  takes two compilations, one for first frames and one for later chunks, for each number of rows in a batch.
  """

  def side(pixels, multiple):
    step = 1 << max((pixels - 1).bit_length() - 3, 4)
    rounded = -(-pixels // step) * step
    best = min([rounded, *(common for common in COMMON if common >= pixels)])
    return -(-best // multiple) * multiple

  return side(height, stride[1]), side(width, stride[2])


def normalise(latents_BTHWC, cfg):
  """Raw latents -> latents of mean 0 and standard deviation 1 in each channel, by the config's statistics.

  Takes numpy or jax arrays.
  """
  dtype = latents_BTHWC.dtype
  return (latents_BTHWC - np.asarray(cfg.latents_mean, dtype)) / np.asarray(cfg.latents_std, dtype)


def denormalise(latents_BTHWC, cfg):
  """The inverse of `normalise`."""
  dtype = latents_BTHWC.dtype
  return latents_BTHWC * np.asarray(cfg.latents_std, dtype) + np.asarray(cfg.latents_mean, dtype)


def config_to_dict(cfg, size=None):
  """The content of `W/vae/config.json`."""
  return {"format_version": 1, "kind": "wan", "size": size, **dataclasses.asdict(cfg)}


def config_from_dict(fields):
  """The inverse of `config_to_dict`. Raises ValueError for a later format or unknown fields."""
  provenance = ("kind", "size", "made_from", "weights_crc32")  # these do not describe the shape
  fields = {name: value for name, value in fields.items() if name not in provenance}
  if fields.pop("format_version", 1) != 1:
    raise ValueError(
      "vae/config.json: format_version is not 1; it was written by a later version of this program"
    )
  known = {field.name for field in dataclasses.fields(VAEConfig)}
  if set(fields) - known:
    raise ValueError(f"vae/config.json: unknown fields {sorted(set(fields) - known)}; known: {sorted(known)}")
  return VAEConfig(**fields)
