"""Pixels <-> latents by a VAE: clips of many sizes on few canvases, in batches whose shape depends on a
clip's own size alone.

So a clip gives the same latents whatever else is in its batch, and few programs are compiled. Videos are
uint8 [T, H, W, 3] or float32 in [-1, 1]; latents are as the network has them ("raw"), float32 [t, h, w, C],
unless said otherwise.
"""

import itertools
import math

import numpy as np

from sora_jax.models import vae

BATCH = 16  # clips encoded at a time, if they are small
SMALL = 17 * 96 * 96  # pixels of a small clip; a larger one is encoded by itself, a chunk at a time


def to_float(video):
  """uint8 pixels -> float32 in [-1, 1]."""
  return video / np.float32(127.5) - 1


def to_uint8(video):
  """Pixels in [-1, 1] -> uint8; what lies outside is clipped."""
  return np.clip((video + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def shape_on_canvas(video_THWC, stride):
  """(T, H, W) of the frames of a clip and its canvas: clips of one shape are encoded together."""
  return len(video_THWC), *vae.canvas(*video_THWC.shape[1:3], stride)


def batch_size(shape):
  """How many clips are encoded together, by their `shape_on_canvas` alone."""
  return BATCH if math.prod(shape) <= SMALL else 1


def encode_batch(cfg, params, videos):
  """uint8 videos of one `shape_on_canvas`, at most `batch_size` of them -> raw latents of each."""
  rows, t = batch_size(shape_on_canvas(videos[0], cfg.stride)), cfg.stride[0]
  chunks = ([to_float(video[i : i + t]) for video in videos] for i in range(0, len(videos[0]), t))
  return encode_on_canvas(cfg, params, chunks, [video.shape[1:3] for video in videos], rows)


def encode_on_canvas(cfg, params, chunks, sizes, rows):
  """Clips of unlike sizes on one canvas, streamed in time -> raw latents of each: those it gives alone, at
  its own size.

  chunks: iterable of lists, the next frames [n, h, w, 3] of each clip, in [-1, 1]. sizes: (h, w) of each
  clip, of one `vae.canvas`. rows: of the batch; those without a clip stay empty.
  """
  canvas, valid_B2 = vae.canvas(*sizes[0], cfg.stride), np.zeros((rows, 2), np.int32)
  valid_B2[: len(sizes)] = np.array(sizes) // cfg.stride[1:]

  def on_canvas(frames):
    video_BTHWC = np.zeros((rows, len(frames[0]), *canvas, 3), np.float32)
    for row, (h, w), clip in zip(video_BTHWC, sizes, frames, strict=False):
      row[:, :h, :w] = clip
    return video_BTHWC

  means = [
    np.asarray(mean) for mean in vae.encode_stream(params, map(on_canvas, chunks), cfg, valid=valid_B2)
  ]
  return [
    row[:, :h, :w] for row, (h, w) in zip(np.concatenate(means, 1), valid_B2[: len(sizes)], strict=False)
  ]


def encode_clips(cfg, params, videos, progress=lambda done: None):
  """uint8 videos of any sizes -> raw latents of each. progress: called with how many more are done."""
  latents, groups = [None] * len(videos), {}
  for i, video in enumerate(videos):
    groups.setdefault(shape_on_canvas(video, cfg.stride), []).append(i)
  for shape, members in groups.items():
    size = batch_size(shape)
    for batch in (members[i : i + size] for i in range(0, len(members), size)):
      for i, mean_THWC in zip(batch, encode_batch(cfg, params, [videos[i] for i in batch]), strict=True):
        latents[i] = mean_THWC
      progress(len(batch))
  return latents


def encode_image_video(cfg, params, image_1HWC, latent_frames):
  """An image in [-1, 1] -> raw latents of a video of so many latent frames: the image, then grey."""
  return encode_images_video(cfg, params, {0: image_1HWC[0]}, latent_frames)


def encode_images_video(cfg, params, images, latent_frames):
  """Images in [-1, 1], {frame: [H, W, 3]} -> raw latents of a video of so many latent frames: these images,
  all else grey; streamed in time.
  """
  stride, size = cfg.stride[0], next(iter(images.values())).shape[:2]

  def frames(first, count):
    grey = np.zeros((*size, 3), np.float32)
    return [np.stack([images.get(f, grey) for f in range(first, first + count)])]

  rest = (frames(1 + stride * i, stride) for i in range(latent_frames - 1))
  return encode_on_canvas(cfg, params, itertools.chain([frames(0, 1)], rest), [size], 1)[0]


def decode_frames(cfg, params, latents_THWC, layout=None):
  """Raw latents -> iterator of frames [H, W, 3] in [-1, 1], not clipped; streamed, so that memory does not
  grow with length. layout: of devices that share each frame.
  """
  chunks = (latents_THWC[None, t : t + 1] for t in range(len(latents_THWC)))
  for chunk_1THWC in vae.decode_stream(params, chunks, cfg, layout):
    yield from np.asarray(chunk_1THWC)[0]


def decode_clips(cfg, params, latents, progress=lambda done: None):
  """Raw latents of clips -> uint8 videos, decoded one by one as a sampling job does, so that one compilation
  serves both.
  """
  videos = []
  for latents_THWC in latents:
    videos.append(to_uint8(np.stack(list(decode_frames(cfg, params, latents_THWC)))))
    progress(1)
  return videos
