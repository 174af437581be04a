"""Laws of the video VAE: it is causal, streaming equals one pass, an image is a video of one frame."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.layout import Layout, make_mesh, shardings, unbox
from sora_jax.models import causal_conv, vae, vae_blocks
from sora_jax.weights import files, wan_vae

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
PLAIN = vae.VAEConfig(
  base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)
)
RESIDUAL = dataclasses.replace(PLAIN, is_residual=True, patch_size=2, decoder_base_dim=8)
LINEAR = vae.VAEConfig(
  base_dim=4,
  z_dim=4,
  dim_mult=(1, 1, 1),
  num_res_blocks=1,
  temporal_downsample=(True, True),
  spatial_downsample=(False, True),
  is_residual=True,
  patch_size=2,
  linear=True,
)
KINDS = pytest.mark.parametrize("cfg", [PLAIN, RESIDUAL, LINEAR], ids=["plain", "residual", "linear"])


def weights(cfg):
  """Random weights, including those of the linear codec."""
  params = vae.init(jax.random.key(0), cfg)
  if cfg.linear:
    params["linear"] = vae.fit_linear(params, cfg, video(cfg, batch=4, seed=5))["linear"]
  return params


def video(cfg, frames=9, batch=1, seed=0):
  _, h, w = cfg.stride
  return np.random.default_rng(seed).uniform(-1, 1, (batch, frames, h, 2 * w, 3)).astype(np.float32)


@pytest.mark.parametrize(("name", "millions"), [("wan2.1", 126.9), ("wan2.2", 704.7), ("tiny", None)])
def test_every_size_has_its_shapes(name, millions):
  """Strides, latents and, for the public VAEs, the published number of weights (126.9 M and 704.7 M)."""
  cfg = vae.SIZES[name]
  t, h, w = cfg.stride
  shape = jax.ShapeDtypeStruct((2, 1 + 2 * t, 2 * h, 3 * w, 3), jnp.float32)
  params = unbox(jax.eval_shape(vae.VAE(cfg).init, jax.random.key(0), shape))["params"]
  mean, logvar = jax.eval_shape(lambda p, v: vae.encode(p, v, cfg), params, shape)
  assert mean.shape == logvar.shape == (2, 3, 2, 3, cfg.z_dim)
  assert jax.eval_shape(lambda p, z: vae.decode(p, z, cfg), params, mean).shape == shape.shape
  count = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
  assert count < 1.7 if millions is None else round(count, 1) == millions
  if millions is None:
    assert cfg.stride == (4, 8, 8) and cfg.z_dim == 48


@KINDS
def test_streaming_equals_one_pass_and_is_causal(cfg):
  """1 + 4 + 4 frames give the latents, and 1 + 1 + 1 latents the frames, of a single pass.

  Later frames change nothing before them.
  """
  params, clip = weights(cfg), video(cfg)
  whole, _ = vae.encode(params, clip, cfg)
  pieces = list(vae.encode_stream(params, iter([clip[:, :3], clip[:, 3:8], clip[:, 8:]]), cfg))
  assert [p.shape[1] for p in pieces] == [1, 1, 1]
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)

  decoded = vae.decode(params, whole, cfg)
  pieces = list(vae.decode_stream(params, [whole], cfg))
  assert [p.shape[1] for p in pieces] == [1, 4, 4]
  np.testing.assert_allclose(np.concatenate(pieces, 1), decoded, atol=1e-5)

  other = clip.copy()
  other[:, 5:] = video(cfg, seed=1)[:, 5:]
  changed, _ = vae.encode(params, other, cfg)
  np.testing.assert_array_equal(changed[:, :2], whole[:, :2])
  assert np.abs(changed[:, 2] - whole[:, 2]).max() > 1e-3  # the test can fail
  changed = vae.decode(params, np.concatenate([whole[:, :2], -whole[:, 2:]], 1), cfg)
  np.testing.assert_array_equal(changed[:, :5], decoded[:, :5])
  assert np.abs(changed[:, 5:] - decoded[:, 5:]).max() > 1e-3


@KINDS
def test_an_image_is_a_video_of_one_frame(cfg):
  params, clip = weights(cfg), video(cfg)
  whole, _ = vae.encode(params, clip, cfg)
  image, _ = vae.encode(params, clip[:, :1], cfg)
  np.testing.assert_allclose(image, whole[:, :1], atol=1e-5)
  np.testing.assert_allclose(vae.decode(params, image, cfg), vae.decode(params, whole, cfg)[:, :1], atol=1e-5)


def test_a_linear_codec_begins_with_principal_components():
  """Its codes of clips are those of numpy's singular vectors of their blocks; it has no gradients."""
  rng = np.random.default_rng(0)
  basis = rng.normal(size=(6, 4, 4, 4, 3)).astype(np.float32) / 100
  factors = rng.normal(size=(8, 2, 3, 3, 6)) * [9, 8, 7, 6, 1, 0.5]
  clips = np.einsum("bnyxk,kthwc->bntyhxwc", factors, basis).reshape(8, 8, 12, 12, 3)
  middle = clips[:, 1:5].mean(1, keepdims=True).repeat(4, 1)
  clips = np.concatenate([clips[:, :1], middle, clips[:, 4:]], 1).astype(np.float32)
  params = vae.fit_linear(vae.init(jax.random.key(0), LINEAR), LINEAR, clips)
  blocks = np.concatenate([clips[:, :1].repeat(4, 1), clips[:, 1:]], 1)
  blocks = blocks.reshape(8, 3, 4, 3, 4, 3, 4, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 192)
  _, _, vectors = np.linalg.svd(blocks - blocks.mean(0), full_matrices=False)
  best = (blocks - blocks.mean(0)) @ vectors[:4].T @ vectors[:4] + blocks.mean(0)
  mean, logvar = vae.encode(params, clips, LINEAR)
  latents = np.asarray(mean).reshape(-1, 4)
  np.testing.assert_allclose(latents.std(0, ddof=1), 1, atol=1e-3)

  def distances(x):
    return np.linalg.norm(x[:50, None] - x[None, :50], axis=-1)[np.triu_indices(50, 1)]

  ratio = distances(best) / distances(latents)  # distances are proportional to those of pixels
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
  np.testing.assert_allclose(logvar, -6)
  wanted = vae_blocks.from_blocks(best.reshape(8, 3, 3, 3, 192), LINEAR.stride, True)
  assert np.abs(wanted).max() < 1 < 100 * np.abs(wanted).max()
  np.testing.assert_allclose(vae.decode(params, mean, LINEAR)[:, 1:], wanted[:, 1:], atol=1e-3)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(vae.VAE(LINEAR).apply({"params": p}, clips) ** 2)))(params)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["linear"]))
  assert np.any(grads["decoder"]["conv_out"]["kernel"])


def test_large_frames_go_one_by_one(monkeypatch):
  """Chunks whose frames pass through the layers one by one give the results of whole chunks."""
  params, clip = vae.init(jax.random.key(0), RESIDUAL), video(RESIDUAL)
  latents = jax.random.normal(jax.random.key(1), (1, 1, 1, 2, 4))
  encoded = vae.encode_chunk(params, None, clip[:, :1], RESIDUAL, first=True)[0]
  decoded = vae.decode_chunk(params, None, latents, RESIDUAL, first=True)[0]

  def chunk(f, stream, x):
    return jax.jit(functools.partial(f.__wrapped__, cfg=RESIDUAL, first=False))(params, stream, x)

  def loops(*args):
    return str(jax.make_jaxpr(lambda: chunk(*args))()).count("scan[")

  both = (vae.encode_chunk, encoded, clip[:, 1:5]), (vae.decode_chunk, decoded, latents)
  whole = [chunk(*args) for args in both]
  assert [loops(*args) for args in both] == [0, 0]
  monkeypatch.setattr(vae_blocks, "LARGE", 0)
  assert all(loops(*args) > 1 for args in both)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), [chunk(*args) for args in both], whole
  )


def test_streaming_has_constant_memory():
  """The shapes of a stream's state after 2 chunks are those after 3."""
  params, clip = vae.init(jax.random.key(0), PLAIN), video(PLAIN)
  stream, _, _ = vae.encode_chunk(params, None, clip[:, :1], PLAIN, first=True)
  shapes = []
  for start in (1, 5):
    stream, _, _ = vae.encode_chunk(params, stream, clip[:, start : start + 4], PLAIN, first=False)
    shapes.append(jax.tree.map(jnp.shape, stream))
  assert shapes[0] == shapes[1] and jax.tree.leaves(shapes[0])


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_both_forms_of_the_convolution_agree(frames, monkeypatch):
  """Values and gradients by taps (CPU) and by volume (elsewhere), with and without frames before."""
  rng = np.random.default_rng(0)
  x, before = (jnp.asarray(rng.normal(size=(2, t, 5, 6, 3)), jnp.float32) for t in (frames, 2))
  kernel, weight = (
    jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 3, 3, 4), (2, frames, 5, 6, 4))
  )

  def both(before):
    def loss(x, kernel):
      return jnp.sum(causal_conv.causal_conv(before, x, kernel) * weight)

    return causal_conv.causal_conv(before, x, kernel), jax.grad(loss, (0, 1))(x, kernel)

  by_taps = both(None), both(before)
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
  by_volume = both(None), both(before)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), by_taps, by_volume)
  assert np.abs(by_taps[0][0] - by_taps[1][0]).max() > 1  # the frames before matter


def test_attention_in_blocks_is_attention(monkeypatch):
  query, key, value = (jax.random.normal(k, (3, 10, 8)) for k in jax.random.split(jax.random.key(0), 3))
  direct = vae_blocks.attend_in_frames(query, key, value)
  monkeypatch.setattr(vae_blocks, "ATTENTION_SCORES", 40)  # blocks of 4 of the 10 queries
  np.testing.assert_allclose(vae_blocks.attend_in_frames(query, key, value), direct, atol=1e-6)


def test_patches_of_pixels_round_trip():
  clip = video(PLAIN)
  patches = vae.to_patches(clip, 2)
  assert patches.shape == (1, 9, 2, 4, 12)
  np.testing.assert_array_equal(vae.from_patches(patches, 2), clip)


@pytest.mark.parametrize("name", ["vae", "vae_residual"])
def test_golden(name):
  """Latents and videos are those of diffusers 0.42.1 `AutoencoderKLWan` (golden/make.py).

  Weights and config come back bit for bit.
  """
  folder = GOLDEN / name
  tensors, theirs = files.Tensors(folder), files.read_config(folder)
  golden = {key: np.moveaxis(value, 0, -1)[None] for key, value in np.load(folder / "golden.npz").items()}
  cfg = wan_vae.config_from_diffusers(theirs)
  params = wan_vae.from_diffusers(tensors, cfg)
  for i in range(2):
    latents = golden[f"latents{i}"]
    mean, _ = vae.encode(params, golden[f"video{i}"], cfg)
    np.testing.assert_allclose(mean, latents, atol=1e-5 * np.abs(latents).max())
    np.testing.assert_allclose(vae.decode(params, latents, cfg), golden[f"again{i}"], atol=1e-5)
  back = dict(wan_vae.to_diffusers(params, cfg))
  assert back.keys() == set(tensors) and all(np.array_equal(back[key], tensors[key]) for key in back)
  assert {
    key: value for key, value in wan_vae.config_to_diffusers(cfg).items() if theirs.get(key) != value
  } == {}


def test_weights_that_do_not_fit_are_named():
  cfg = wan_vae.config_from_diffusers(files.read_config(GOLDEN / "vae"))
  tensors = dict(files.Tensors(GOLDEN / "vae"))
  with pytest.raises(ValueError, match="encoder.conv_in.bias"):
    wan_vae.from_diffusers(
      {name: value for name, value in tensors.items() if name != "encoder.conv_in.bias"}, cfg
    )
  with pytest.raises(ValueError, match="encoder.conv_in.bias has shape"):
    wan_vae.from_diffusers(tensors | {"encoder.conv_in.bias": np.zeros(3)}, cfg)
  with pytest.raises(ValueError, match="attn_scales"):
    wan_vae.config_from_diffusers({"attn_scales": [0.5]})


def test_config_goes_through_json():
  cfg = vae.SIZES["wan2.2"]
  fields = json.loads(json.dumps(vae.config_to_dict(cfg, "wan2.2")))
  assert fields["format_version"] == 1 and fields["size"] == "wan2.2" and vae.config_from_dict(fields) == cfg
  with pytest.raises(ValueError, match="colour"):
    vae.config_from_dict(fields | {"colour": 1})
  with pytest.raises(ValueError, match="latents_mean"):
    vae.VAEConfig(latents_mean=(0.0,))


def test_sizes_that_do_not_fit_are_refused():
  params = vae.init(jax.random.key(0), PLAIN)
  for bad in (video(PLAIN, frames=4), video(PLAIN)[:, :, :3], video(PLAIN)[:, :, :0]):
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames"):
      vae.encode(params, bad, PLAIN)
  with pytest.raises(ValueError, match="2 frames left over"):
    list(vae.regroup([np.zeros((1, 7))], 1, 4))


def test_normalise_has_an_inverse():
  cfg = dataclasses.replace(PLAIN, latents_mean=(1.0, 2.0, 3.0, 4.0), latents_std=(0.5, 1.0, 2.0, 4.0))
  latents = np.random.default_rng(0).normal(size=(1, 2, 2, 2, 4)).astype(np.float32)
  np.testing.assert_allclose(vae.denormalise(vae.normalise(latents, cfg), cfg), latents, atol=1e-6)
  np.testing.assert_allclose(
    vae.normalise(np.full((1, 4), 5.0, np.float32), cfg)[0], [8, 3, 1, 0.25], atol=1e-6
  )


def test_sharded_is_unsharded():
  """On 2 x 2 x 1 x 2 devices, with weights sharded over fsdp, rows over data and fsdp: equal latents."""
  layout = Layout(make_mesh(data=2, fsdp=2, tensor=2))
  clip = video(PLAIN, frames=5, batch=4)
  boxed = jax.eval_shape(vae.VAE(PLAIN).init, jax.random.key(0), clip)["params"]
  params = vae.init(jax.random.key(0), PLAIN)
  alone, _ = vae.encode(params, clip, PLAIN)
  sharded = jax.device_put(params, shardings(boxed, layout))
  mean, _ = vae.encode(sharded, clip, PLAIN, layout)
  np.testing.assert_allclose(mean, alone, atol=1e-5)
  kernel = sharded["encoder"]["middle"]["block_0"]["conv_0"]["kernel"]
  # 8 input channels over fsdp; the output channels are whole on every device.
  assert kernel.addressable_shards[0].data.shape == (3, 3, 3, 4, 8)
  assert mean.sharding.shard_shape(mean.shape)[0] == 1  # 4 rows over data and fsdp


@pytest.mark.parametrize(
  ("mesh", "clips", "part"),
  [
    ({"data": 2, "context": 2, "tensor": 2}, 2, (1, 4, 8, 16, 3)),
    ({"fsdp": 2, "context": 4}, 1, (1, 4, 2 * 4, 4, 3)),
    ({"fsdp": 8}, 1, (1, 4, 16, 16, 3)),
    ({"data": 8}, 8, (1, 4, 16, 16, 3)),
  ],
  ids=["clips-and-height", "height-and-width", "more-devices-than-latents", "clips"],
)
def test_frames_are_cut_over_devices(mesh, clips, part):
  """Encoded and decoded in chunks as on one device; what clips leave cuts height and width of the latents.

  part: what a device holds of a decoded chunk.
  """
  layout = Layout(make_mesh(**{"data": 1, **mesh}))
  clip = np.random.default_rng(0).uniform(-1, 1, (clips, 9, 16, 16, 3)).astype(np.float32)
  params = vae.init(jax.random.key(0), PLAIN)

  def run(layout):
    means = list(vae.encode_stream(params, [clip], PLAIN, layout))
    return means, list(vae.decode_stream(params, means, PLAIN, layout))

  (means, frames), alone = run(layout), run(None)
  for a, b in zip(jax.tree.leaves((means, frames)), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-5)
  assert frames[1].sharding.shard_shape(frames[1].shape) == part


def test_how_devices_share_a_frame():
  """A power of two along each side, as many as divide it, in squares where there is a choice."""

  def cuts(count, grid):
    shape = vae.frame_layout(jax.devices()[:count], grid).mesh.shape
    return shape["fsdp"], shape["context"], shape["data"]

  assert cuts(8, (90, 160)) == (2, 4, 1)
  assert cuts(8, (67, 120)) == (1, 8, 1)
  assert cuts(8, (3, 5)) == (1, 1, 8)
  assert cuts(4, (16, 16)) == (2, 2, 1)
