"""A step of the VAE's training: it learns, a bad update changes nothing, the critics do what they say,
sharded equals unsharded.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from sora_jax import layout, optim, train_vae
from sora_jax.models import critics, vae
from sora_jax.weights import vgg16

TINY = vae.VAEConfig(
  base_dim=8,
  z_dim=4,
  dim_mult=(1, 1),
  num_res_blocks=0,
  temporal_downsample=(True,),
  is_residual=True,
  patch_size=4,
)
PLAIN = train_vae.LossConfig()
JUDGED = train_vae.LossConfig(adversarial_weight=0.5, adversarial_start=2)


def batch(*, rows=4, images=True):
  """Smooth clips and images: the law is that they can be learnt, not that the world can.

  Without images a step compiles in half the time.
  """
  rng = np.random.default_rng(0)
  coarse = rng.uniform(-0.9, 0.9, (2 * rows, 1, 2, 2, 3))
  fine = np.repeat(np.repeat(coarse, 8, 2), 8, 3).astype(np.float32)
  return {"clips": np.repeat(fine[:rows], 3, 1), **({"images": fine[rows:]} if images else {})}


@functools.cache
def setting(losses, where=None, tx=None, decoder_only=False):
  """(new state, step) of one kind, by default with AdamW on one device; few compilations serve all tests."""
  adamw = optim.OptimConfig(steps=60, warmup=0, learning_rate=5e-3)
  tx = tx or optim.optimizer(adamw, train_vae.boxed_weights(TINY))
  step = train_vae.jit_step(TINY, tx, losses, ema_decay=0.9, layout=where, decoder_only=decoder_only)
  state = train_vae.init_state(TINY, tx, losses, jax.random.key(0), where)
  key = jax.random.key(1)

  def run(state, batch, features=None):
    return step(jax.tree.map(jnp.copy, state), batch, key, features)  # it donates the state

  return state, run


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def distance(a, b):
  return sum(
    np.abs(np.asarray(x) - np.asarray(y)).sum()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_it_learns_and_repeats():
  """Sixty steps on one batch halve the error; the same steps give the same weights; the mean follows the
  weights.
  """
  state, step = setting(PLAIN)
  first = None
  for _ in range(60):
    state, metrics = step(state, batch())
    first = first or metrics
  assert float(metrics["l1"]) < 0.5 * float(first["l1"]) and float(metrics["psnr"]) > float(first["psnr"]) + 5
  assert int(state.step) == 60 and int(state.bad) == 0
  again, _ = setting(PLAIN)
  for _ in range(60):
    again, _ = step(again, batch())
  assert same(again.params, state.params)
  assert 0 < distance(state.ema, state.params) < distance(setting(PLAIN)[0].params, state.params)


@pytest.mark.parametrize("losses", [PLAIN, JUDGED], ids=["plain", "adversarial"])
def test_a_bad_update_changes_nothing(losses):
  state, step = setting(losses)
  spoilt = batch(images=losses == PLAIN)
  spoilt["clips"] = spoilt["clips"].copy()
  spoilt["clips"][0, 0, 0, 0, 0] = np.nan
  after, metrics = step(state, spoilt)
  assert int(metrics["bad"]) == 1 and int(after.bad) == 1 and int(after.step) == 1
  kept = ("params", "ema", "opt", "critic", "critic_opt")
  assert all(same(getattr(after, name), getattr(state, name)) for name in kept)
  assert int(metrics["not_finite"]) == 1
  good, metrics = step(state, batch(images=losses == PLAIN))
  assert int(metrics["bad"]) == 0 and not same(good.params, state.params)  # the test can fail


def test_the_critic_waits_for_its_step():
  """Before `adversarial_start` the weights are those of training without it, and the critic's stand; from
  then on both change.
  """
  (alone, plain_step), (state, step) = setting(PLAIN), setting(JUDGED)
  start, critic, apart = state.params, state.critic, []
  for number in range(4):
    alone, _ = plain_step(alone, batch(images=False))
    state, metrics = step(state, batch(images=False))
    apart.append(distance(alone.params, state.params) / distance(alone.params, start))
    waiting = number < JUDGED.adversarial_start
    assert waiting == same(state.critic, critic) == (float(metrics["adversarial_share"]) == 0)
  assert max(apart[:2]) < 0.02 < apart[2], apart  # two programs: rounding differs


@pytest.mark.slow
def test_the_critic_learns_to_tell():
  """The hinge loss of the discriminator falls while the autoencoder still blurs."""
  state, step = setting(dataclasses.replace(JUDGED, adversarial_start=0, adversarial_weight=1e-6))
  losses = []
  for _ in range(25):
    state, metrics = step(state, batch(images=False))
    losses.append(float(metrics["critic_loss"]))
  assert losses[-1] < losses[0] - 0.05


def vgg_tensors(scale=1.0):
  rng, tensors, inner = np.random.default_rng(0), {"classifier.0.weight": np.zeros((1, 1), np.float32)}, 3
  for stage, width in zip(critics.VGG_STAGES, critics.VGG_WIDTHS, strict=True):
    for n in stage:
      tensors[f"features.{n}.weight"] = (
        scale * rng.normal(size=(width, inner, 3, 3)) * (2 / 9 / inner) ** 0.5
      ).astype(np.float32)
      tensors[f"features.{n}.bias"] = np.zeros(width, np.float32)
      inner = width
  return tensors


def test_perceptual_distance(tmp_path):
  """Zero for the same video, more for one that differs more; its weights come from a file of the user's,
  which must fit.
  """
  save_file(vgg_tensors(), tmp_path / "vgg16.safetensors")
  weights = vgg16.load(tmp_path / "vgg16.safetensors")
  video = batch()["clips"][:1]
  noise = np.random.default_rng(1).normal(size=video.shape).astype(np.float32)
  far_from = jax.jit(
    jax.value_and_grad(lambda other, weights: critics.perceptual_distance(weights, video, other))
  )
  (none, _), (near, _), (far, slope) = (
    far_from(video + amount * noise, weights) for amount in (0, 0.05, 0.5)
  )
  assert float(none) < 1e-6 < float(near) < float(far)
  assert np.isfinite(slope).all() and np.abs(slope).max() > 0
  features = jax.jit(critics.vgg_features)(weights, video)
  assert [f.shape[2:] for f in features] == [(16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512), (1, 1, 512)]
  save_file(
    {name: value for name, value in vgg_tensors().items() if name != "features.10.bias"},
    tmp_path / "cut.safetensors",
  )
  with pytest.raises(ValueError, match="features.10.bias is missing"):
    vgg16.load(tmp_path / "cut.safetensors")


def test_the_perceptual_term_is_in_the_loss():
  """It pulls on the weights through the real step, and asks for its features."""
  losses = dataclasses.replace(PLAIN, perceptual_weight=1.0)
  weights = vgg16.from_diffusers(vgg_tensors())
  state, step = setting(losses)
  with pytest.raises(ValueError, match="features"):
    step(state, batch())
  after, metrics = step(state, {"clips": batch()["clips"][:1]}, features=weights)
  assert (
    float(metrics["loss"]) > float(metrics["l1"]) + float(metrics["perceptual"]) - 1e-6
    and float(metrics["perceptual"]) > 0
  )
  assert not same(after.params, state.params)


def test_the_decoder_alone_towards_structure():
  """With decoder_only nothing that latents depend on changes, not by a bit, while SSIM, which the loss now
  holds, rises.
  """
  losses = dataclasses.replace(PLAIN, ssim_weight=1.0)
  start, step = setting(losses, decoder_only=True)
  state, ssims = start, []
  for _ in range(12):
    state, metrics = step(state, batch(images=False))
    ssims.append(float(metrics["ssim"]))
  assert ssims[-1] > ssims[0] + 0.02
  for tree in (state.params, state.ema):
    assert all(same(tree[name], start.params[name]) for name in vae.ENCODER if name in tree)
    assert not same(tree["decoder"], start.params["decoder"]) and not same(
      tree["post_quant"], start.params["post_quant"]
    )


def test_every_value_counts_the_same():
  """Clips and images together: the mean over all values, not the mean of two means."""
  a, b = (
    batch(),
    {name: video + shift for (name, video), shift in zip(batch().items(), (0.1, 0.5), strict=True)},
  )
  mean = train_vae.mean_over(lambda x, y: jnp.mean(jnp.abs(x - y)), a, b)
  np.testing.assert_allclose(mean, (0.1 * 3 + 0.5 * 1) / 4, rtol=1e-4)


def test_kl_is_that_of_gaussians():
  """Zero at the prior; against a sum over many draws elsewhere."""
  zero = jnp.zeros((1, 1, 1, 1, 3))
  assert float(train_vae.gaussian_kl(zero, zero)) == 0
  mean, logvar = jnp.array([0.5, -1.0, 2.0]), jnp.array([-1.0, 0.3, -2.0])
  draws = mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(0), (400_000, 3))

  def density(x, mean, logvar):
    return -0.5 * ((x - mean) ** 2 / jnp.exp(logvar) + logvar)

  drawn = jnp.mean(jnp.sum(density(draws, mean, logvar) - density(draws, 0.0, 0.0), -1))
  np.testing.assert_allclose(train_vae.gaussian_kl(mean, logvar), drawn, rtol=1e-2)


def test_statistics_make_latents_standard():
  latents = [
    np.random.default_rng(i).normal((1, -2, 0, 5), (0.5, 2, 1, 3), (2, 3, 4 + i, 4)) for i in range(3)
  ]
  cfg = train_vae.with_statistics(latents, TINY)
  normal = np.concatenate([vae.normalise(one, cfg).reshape(-1, 4) for one in latents])
  np.testing.assert_allclose(normal.mean(0), 0, atol=1e-9)
  np.testing.assert_allclose(normal.std(0), 1, atol=1e-9)
  with pytest.raises(ValueError, match="no latents"):
    train_vae.with_statistics([], TINY)


def keep(grads, state, params=None):
  """The update of KEEP: none; the gradient is the new state."""
  del state, params
  return jax.tree.map(jnp.zeros_like, grads), grads


KEEP = optax.GradientTransformation(init=functools.partial(jax.tree.map, jnp.zeros_like), update=keep)


@functools.cache
def gradient(where=None):
  """(gradient of a step, weights). In float64, as rounding in float32 is up to 1e-4 of a leaf's maximum."""
  with jax.enable_x64(True):
    _, step = setting(PLAIN, where, KEEP)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), vae.init(jax.random.key(0), TINY))
    state = train_vae.init_state(TINY, KEEP, PLAIN, jax.random.key(0), where, params=params)
    clips = batch(images=False)["clips"].astype(np.float64)
    return jax.device_get(step(state, {"clips": clips})[0].opt), state.params


def assert_same(grads, reference):
  """Leaf by leaf, within 1e-5 of the leaf's maximum; a leaf of zeros would show nothing."""
  for leaf, (path, wanted) in zip(jax.tree.leaves(grads), jax.tree.leaves_with_path(reference), strict=True):
    largest = np.abs(wanted).max()
    assert largest > 0, path
    np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  ("axes", "kernel"),
  [
    ({"data": 2}, (3, 3, 3, 4, 8)),
    ({"fsdp": 2}, (3, 3, 3, 2, 8)),
    ({"context": 2, "tensor": 2}, (3, 3, 3, 2, 8)),
    ({"data": 2, "context": 4}, (3, 3, 3, 1, 8)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (3, 3, 3, 2, 8)),
  ],
  ids=["data", "fsdp", "context-tensor", "data-context", "data-fsdp-tensor"],
)
def test_sharded_equals_unsharded(axes, kernel):
  """The gradient of a step with clips and weights cut over a mesh is that of one device.

  kernel: what a device holds of a weight. context cuts no clips, and must change nothing; nor does tensor.
  """
  devices = jax.devices()[: math.prod(axes.values())]
  grads, params = gradient(layout.Layout(layout.make_mesh(**{"data": 1, **axes}, devices=devices)))
  assert_same(grads, gradient()[0])
  assert params["decoder"]["conv_in"]["kernel"].addressable_shards[0].data.shape == kernel


def test_a_wrong_gradient_is_not_the_same():
  """The comparison above sees a leaf that is off by 1e-4."""
  reference, _ = gradient()
  assert_same(reference, reference)
  wrong = jax.tree.map(np.copy, reference)
  wrong["decoder"]["conv_in"]["kernel"] *= 1.0001
  with pytest.raises(AssertionError, match="Not equal to tolerance"):
    assert_same(wrong, reference)


def test_what_is_checked_beforehand_is_what_runs():
  """batch_shapes has the shapes and shardings of a batch; a step lowers from shapes alone."""
  on_mesh = layout.Layout(layout.make_mesh(data=2, devices=jax.devices()[:2]))
  videos = batch()
  clips, images = videos["clips"], videos["images"]
  shapes = train_vae.batch_shapes(len(clips), len(images), clips.shape[1], clips.shape[2:4], on_mesh)
  assert {name: shape.shape for name, shape in shapes.items()} == {
    name: video.shape for name, video in videos.items()
  }
  assert all(shape.sharding.shard_shape(shape.shape)[0] == shape.shape[0] // 2 for shape in shapes.values())
  tx = optax.sgd(0.1)
  step = train_vae.jit_step(TINY, tx, PLAIN, ema_decay=0.9, layout=on_mesh)
  state = train_vae.abstract_state(TINY, tx, PLAIN, on_mesh)
  after, metrics = step.lower(state, shapes, jax.random.key(0)).out_info
  assert metrics["loss"].shape == () and after.step.shape == ()
