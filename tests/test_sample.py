"""The sampling loop: results do not depend on packing, given tokens stay, rows mix all requests."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from sora_jax import layout, patches, sample, tasks, timeline
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.models import dit, t2v, text

TINY = dit.DiTConfig(depth=2, heads=2, head_size=16, mlp=64, channels=4, text_width=16, time_freqs=32)
MODEL = t2v.Model(TINY, text.TextConfig(vocab=300, width=16, depth=1, heads=2, head_size=8, mlp=32))
DEFAULTS = {
  "size": [32, 32],
  "frames": 5,
  "fps": 8.0,
  "steps": 4,
  "sampler": "unipc",
  "shift": 1.0,
  "guidance": 3.0,
}
STRIDE = (4, 16, 16)


@functools.cache
def weights():
  rng, params = np.random.default_rng(0), layout.unbox(jax.jit(MODEL.init)(jax.random.key(0)))
  return jax.tree.map(
    lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), jax.device_get(params)
  )


def tokenize(prompt):
  return np.asarray([*prompt.encode(), 1], np.int32)


def work(encode=None, **fields):
  request = tasks.parse_request({"id": "a", "prompt": "a ball", **fields}, DEFAULTS, SAMPLERS)
  images = types.SimpleNamespace(stride=STRIDE[0], image=lambda path: np.zeros((*request.size, 3), np.uint8))
  _, *grid = tasks.latent_size(request.frames, request.size, STRIDE, (1, 1, 1))
  codec = timeline.Codec(encode, None, STRIDE[0], (*grid, TINY.channels), STRIDE[1:])
  canvas = timeline.Work(tasks.TASKS[request.task].timeline(request, images), codec).canvas()
  return sample.prepare(request, canvas, tokenize, (1, 1, 1))


def share_rows(items, row_tokens):
  """Assigns prepared requests to rows by their sizes, as a job does."""
  text_tokens = [max(sum(map(len, item.clip.texts)), len(item.negative)) for item in items]
  return sample.share_rows([len(item.clip.tokens_LP) for item in items], text_tokens, row_tokens)


def run(items, sampler="unipc", row_tokens=64, **kwargs):
  rows, shape = share_rows(items, row_tokens)
  latents = sample.denoise(
    MODEL, weights(), [[items[i] for i in row] for row in rows], shape, sampler, **kwargs
  )
  if latents is None:
    return None
  by_item = {}
  for row, row_latents in zip(rows, latents, strict=True):
    by_item.update(zip(row, row_latents, strict=True))
  return [by_item[i] for i in range(len(items))]


def test_alone_equals_packed():
  """Five packed requests of different size, steps, guidance and prompt give what each gives alone.

  Another seed gives other latents.
  """
  items = [
    work(seed=1),
    work(seed=2, size=[48, 32], guidance=1.0),
    work(seed=3, frames=9, steps=6),
    work(seed=4, frames=1, prompt="two"),
    work(seed=5, guidance_interval=[0.2, 0.7], guidance_rescale=0.5, negative_prompt="a square"),
  ]
  rows, shape = share_rows(items, 96)
  assert len(rows) == 1

  def denoise(row):
    return sample.denoise(MODEL, weights(), [row], shape, "unipc")[0]

  def alone(item):
    return denoise([item])[0]  # a row of the same length runs the same program

  together = dict(zip(rows[0], denoise([items[i] for i in rows[0]]), strict=True))
  for i, item in enumerate(items):
    np.testing.assert_allclose(alone(item), together[i], atol=2e-4)
  assert np.abs(alone(work(seed=9)) - together[0]).max() > 0.1


def test_listed_times_and_new_noise():
  """A few-step request asks the model at its times alone, with noise that is its own, alone or packed."""
  items = [work(seed=1, times=[1000, 757, 522]), work(seed=2, times=[1000, 500], size=[48, 32])]
  assert [len(item.sigmas) for item in items] == [4, 3]
  np.testing.assert_allclose(items[0].times, [1, 0.757, 0.522])
  rows, shape = share_rows(items, 96)
  assert len(rows) == 1
  row = [items[i] for i in rows[0]]
  together = sample.denoise(MODEL, weights(), [row], shape, "renoise")[0]
  for item, latents in zip(row, together, strict=True):
    alone = sample.denoise(MODEL, weights(), [[item]], shape, "renoise")[0][0]
    np.testing.assert_allclose(alone, latents, atol=2e-4)
  other, euler = (
    run([work(seed=seed, times=[1000, 757, 522])], kind)[0] for seed, kind in ((9, "renoise"), (1, "euler"))
  )
  first = together[rows[0].index(0)]
  assert np.abs(other - first).max() > 0.1 and np.abs(euler - first).max() > 0.1


def test_every_setting_matters():
  """Prompt, guidance, its interval, rescaling, negative prompt, steps and shift each change the result."""
  base = run([work(seed=1)])[0]
  changes = (
    {"prompt": "a cube"},
    {"guidance": 1.5},
    {"guidance_interval": [0.5, 1.0]},
    {"guidance_rescale": 0.7},
    {"negative_prompt": "blue"},
    {"steps": 5},
    {"shift": 3.0},
  )
  for change in changes:
    assert np.abs(run([work(seed=1, **change)])[0] - base).max() > 1e-4, change


def test_a_given_image_stays_and_is_used():
  """image_to_video keeps the first latent frame bit for bit, and the others depend on it."""

  def given(value):
    def encode(frames):
      return np.full((1, 2, 2, 4), value, np.float32)

    return run([work(encode, task="image_to_video", image="x.png", frames=9)])[0]

  low, high = given(-1.0), given(2.0)
  np.testing.assert_array_equal(low[:4], np.full((4, 4), -1.0))
  assert np.abs(low[4:] - high[4:]).max() > 1e-3


def test_part_of_a_token_is_given():
  """Patches of 2 x 2 latents, of which a mask cuts some: what is given of them is in the result, and what is
  made beside it depends on it. Its neighbours in the row are as they are alone.
  """
  cfg = dataclasses.replace(TINY, patch=(1, 2, 2))
  model = dataclasses.replace(MODEL, dit=cfg)
  params = layout.unbox(jax.jit(model.init)(jax.random.key(0)))
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
  given_THW = np.zeros((2, 4, 4), bool)
  given_THW[:, :, :3] = True
  request = tasks.parse_request({"id": "a", "prompt": "a ball", "frames": 5}, DEFAULTS, SAMPLERS)

  def prepared(value, given_THW=given_THW):
    canvas = timeline.Canvas(np.full((2, 4, 4, 4), value, np.float32), given_THW, np.ones(2, int), ["a"])
    return sample.prepare(request, canvas, tokenize, cfg.patch)

  def denoise(*items):
    row = list(items)
    rows, shape = share_rows(row, 64)
    (made,) = sample.denoise(model, params, [[row[i] for i in rows[0]]], shape, "unipc")
    return [patches.unpatchify(made[rows[0].index(i)], (2, 4, 4), cfg.patch) for i in range(len(row))]

  plain = prepared(0.0, np.zeros((2, 4, 4), bool))
  (low, other), (high,), (alone,) = denoise(prepared(-1.0), plain), denoise(prepared(2.0)), denoise(plain)
  np.testing.assert_allclose(low[:, :, :3], -1.0, atol=1e-6)
  np.testing.assert_allclose(high[:, :, :3], 2.0, atol=1e-6)
  assert np.abs(low[:, :, 3] - high[:, :, 3]).max() > 1e-3
  np.testing.assert_allclose(other, alone, atol=2e-4)
  assert plain.held_LP is None and prepared(0.0).held_LP.any()


def test_rows_are_shared_and_large_canvases_fit():
  """Eight requests of 8 tokens share a row of 64; a request of more tokens than a row has a longer row."""
  rows, shape = share_rows([work(seed=i) for i in range(8)], 64)
  assert len(rows) == 1 and shape.length == 64 and shape.clips == 8
  rows, shape = share_rows([work(size=[160, 160])], 64)
  assert shape.length == 256 and rows == [[0]]
  assert sample.share_rows([75_600], [4], 64)[1].length == 75_776
  lengths = {sample.share_rows([n], [4], 64)[1].length for n in range(40_000, 80_001, 7)}
  assert len(lengths) < 40 and all(n % 1024 == 0 for n in lengths)


def test_it_can_be_stopped():
  steps = []
  stopped = run([work()], on_step=lambda done, of: steps.append((done, of)), stop=lambda: len(steps) == 2)
  assert stopped is None
  assert steps == [(1, 4), (2, 4)]


def test_noise_depends_only_on_the_seed():
  """Two requests with the same seed start from the same noise, whatever their prompts."""
  params = jax.tree.map(np.zeros_like, weights())  # the velocity is always 0, so the result is the noise
  items = [work(seed=7), work(seed=7, prompt="something else", frames=9)]
  rows, shape = share_rows(items, 64)
  tokens = sample.denoise(MODEL, params, [[items[i] for i in row] for row in rows], shape, "euler")[0]
  first = {i: t for i, t in zip(rows[0], tokens, strict=True)}
  np.testing.assert_array_equal(first[0], first[1][:8])
  assert np.std(first[0]) > 0.5


def test_rows_are_a_multiple_of_the_devices():
  """So that all of them share its tokens."""
  for devices, length in ((1, 128), (32, 128), (48, 192)):
    assert sample.share_rows([100], [4], 320, devices=devices)[1].length == length


def test_which_steps_compute_the_blocks():
  """The first two and the last; of the others so many that it is one of `cache` in all."""
  assert sample.computed_steps(6, 1.0).all() and sample.computed_steps(2, 9.0).all()
  for steps in (4, 30, 50):
    for cache in (1.5, 2.2, 3.0, 8.0):
      computed = sample.computed_steps(steps, cache)
      assert computed[[0, 1, -1]].all() and computed.sum() == max(3, int(steps / cache))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_changes_of_blocks_are_extrapolated(sampler):
  """Half of the steps computed gives nearly what all give; as given tokens, packed as alone."""

  def encode(frames):
    return np.full((1, 2, 2, 4), 1.5, np.float32)

  items = [work(seed=1, steps=16), work(encode, task="image_to_video", image="x", frames=9, steps=16)]
  whole, half, none = (run(items, sampler, cache=cache) for cache in (1.0, 2.0, 100.0))
  for i, one in enumerate(whole):
    error, worse = (np.sqrt(np.mean((other[i] - one) ** 2)) / one.std() for other in (half, none))
    assert 0 < error < worse / 5, (error, worse)
  np.testing.assert_array_equal(half[1][:4], np.full((4, 4), 1.5))
  np.testing.assert_allclose(run(items[1:], sampler, cache=2.0)[0], half[1], atol=1e-4)
