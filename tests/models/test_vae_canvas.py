"""Clips of different sizes on one canvas have the latents that they have alone; canvases are few."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from sora_jax.layout import unbox
from sora_jax.models import vae, vae_blocks

PLAIN = vae.VAEConfig(
  base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)
)
TWO = dataclasses.replace(
  PLAIN, dim_mult=(1, 1), temporal_downsample=(True,), spatial_downsample=(), is_residual=True
)
KINDS = {
  "wan2.1": PLAIN,
  "wan2.2": dataclasses.replace(TWO, patch_size=2),
  "tiny": dataclasses.replace(TWO, spatial_downsample=(False,), patch_size=8, linear=True),
}
SIZES = ((3, 4), (4, 1), (0, 0))  # in latents; the last is a row without a clip
CANVAS = (4, 5)


def weights(cfg):
  """Random weights, including biases and gains: with biases of 0 a canvas of zeros would stay zero."""
  video = jax.ShapeDtypeStruct((1, 1, *cfg.stride[1:], 3), np.float32)
  shapes = unbox(jax.eval_shape(vae.VAE(cfg).init, jax.random.key(0), video))
  rng = np.random.default_rng(0)

  def draw(leaf):
    return rng.normal(size=leaf.shape, scale=math.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)

  return jax.tree.map(draw, shapes["params"])


def clips(cfg):
  """A clip of three latent frames for each of SIZES that has pixels."""
  rng, (t, y, x) = np.random.default_rng(1), cfg.stride
  return [rng.uniform(-1, 1, (1, 1 + 2 * t, h * y, w * x, 3)).astype(np.float32) for h, w in SIZES if h]


def on_canvas(clips, cfg, outside):
  """The clips in the top-left corners of a batch with random values up to `outside` elsewhere."""
  shape = (len(SIZES), clips[0].shape[1], CANVAS[0] * cfg.stride[1], CANVAS[1] * cfg.stride[2], 3)
  video_BTHWC = np.random.default_rng(2).uniform(-outside, outside, shape).astype(np.float32)
  for row, clip in zip(video_BTHWC, clips):
    row[:, : clip.shape[2], : clip.shape[3]] = clip[0]
  return video_BTHWC


def assert_same(canvas_BTHWC, alone):
  """Asserts that the corners equal `alone`, to 1e-5 of its largest value."""
  for row, (h, w), wanted in zip(canvas_BTHWC, SIZES, alone):
    np.testing.assert_allclose(row[:, :h, :w], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)
def test_streamed_on_a_canvas_as_alone(cfg):
  """The values outside a clip do not matter. A row without a clip gives finite numbers, too."""
  params, videos, valid = weights(cfg), clips(cfg), np.array(SIZES, np.int32)
  count = 2 if cfg is PLAIN else 1  # each video takes a compilation
  alone = [np.asarray(vae.encode(params, video, cfg)[0])[0] for video in videos[:count]]

  def streamed(outside, valid):
    canvas_BTHWC = on_canvas(videos, cfg, outside)
    return np.concatenate(list(vae.encode_stream(params, [canvas_BTHWC], cfg, valid=valid)), 1)

  latents = streamed(1e3, valid)
  assert_same(latents, alone)
  assert np.isfinite(latents).all()
  for a, b, (h, w) in zip(latents, streamed(0, valid), SIZES):
    np.testing.assert_array_equal(a[:, :h, :w], b[:, :h, :w])
  unmasked = streamed(0, np.full_like(valid, CANVAS))  # the test can fail: zeros outside are not enough
  for row, (h, w), wanted in zip(unmasked, SIZES, alone):
    assert np.abs(row[:, :h, :w] - wanted).max() > 1e-3


def test_whole_on_a_canvas_as_alone():
  """In one pass: mean and log variance."""
  cfg = KINDS["wan2.1"]
  params, videos = weights(cfg), clips(cfg)
  alone = [[np.asarray(moment)[0] for moment in vae.encode(params, video, cfg)] for video in videos]
  canvas_BTHWC, valid = on_canvas(videos, cfg, 1e3), np.array(SIZES, np.int32)
  _, *moments = vae.encode_chunk(params, None, canvas_BTHWC, cfg, first=True, valid=valid)
  for moment_BTHWC, wanted in zip(moments, zip(*alone)):
    assert_same(moment_BTHWC, wanted)


def test_large_frames_on_a_canvas(monkeypatch):
  """The same where frames pass through the layers one by one, and for attention in blocks of queries."""
  cfg = KINDS["wan2.2"]
  params, videos, valid = weights(cfg), clips(cfg), np.array(SIZES, np.int32)
  alone = [np.asarray(vae.encode(params, video, cfg)[0])[0, 1:2] for video in videos[:1]]
  video_BTHWC, t = on_canvas(videos, cfg, 1.0), cfg.stride[0]
  stream, _, _ = vae.encode_chunk(params, None, video_BTHWC[:, :1], cfg, first=True, valid=valid)
  monkeypatch.setattr(vae_blocks, "LARGE", 0)
  monkeypatch.setattr(vae_blocks, "ATTENTION_SCORES", 3 * CANVAS[0] * CANVAS[1])
  chunk = functools.partial(vae.encode_chunk.__wrapped__, cfg=cfg, first=False)
  traced = jax.jit(chunk).trace(params, stream, video_BTHWC[:, 1 : 1 + t], valid=valid)
  assert str(traced.jaxpr).count("scan[") > 2
  compiled = traced.lower().compile()
  assert_same(compiled(params, stream, video_BTHWC[:, 1 : 1 + t], valid=valid)[1], alone)


def test_attention_ignores_masked_keys():
  rng = np.random.default_rng(0)
  query, key, value = rng.normal(size=(3, 2, 10, 8)).astype(np.float32)
  mask = np.arange(10) < np.array([[4], [0]])
  out = vae_blocks.attend_in_frames(query, key, value, mask)
  alone = vae_blocks.attend_in_frames(query[:1], key[:1, :4], value[:1, :4])
  np.testing.assert_allclose(out[0], alone[0], atol=1e-6)
  assert np.isfinite(out).all()


@pytest.mark.parametrize(("stride", "more"), [((4, 8, 8), 0.131), ((4, 16, 16), 0.123)])
def test_canvases_are_few(stride, more):
  """As the docstring says: 28 sides up to 2048 pixels, and the mean area.

  A canvas holds its clips, and is its own canvas.
  """
  pixels = range(stride[1], 2049, stride[1])
  sides = [vae.canvas(n, stride[2], stride)[0] for n in pixels]
  assert len(set(sides)) == 28
  for n, side in zip(pixels, sides):
    assert side >= n and side % stride[1] == 0 and vae.canvas(side, side, stride) == (side, side)
  assert (sum(sides) / sum(pixels)) ** 2 - 1 < more
  assert vae.canvas(720, 1280, stride) == (720, 1280) and vae.canvas(1072, 1920, stride) == (1088, 1920)
