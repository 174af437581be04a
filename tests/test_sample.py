"""The sampling loop: a request gets the same latents alone or packed; what is given stays; rows hold requests of all kinds."""

import functools

import jax
import numpy as np

from sora_jax import layout, sample, tasks
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.models import dit, t2v, text

TINY = dit.DiTConfig(depth=2, heads=2, head_size=16, mlp=64, channels=4, text_width=16, time_freqs=32)
MODEL = t2v.Model(TINY, text.TextConfig(vocab=300, width=16, depth=1, heads=2, head_size=8, mlp=32))
DEFAULTS = {"size": [32, 32], "frames": 5, "fps": 8.0, "steps": 4, "sampler": "unipc", "shift": 1.0, "guidance": 3.0}
PARTS = {"stride": (4, 16, 16), "patch": (1, 1, 1), "channels": 4}


@functools.cache
def weights():
  rng, params = np.random.default_rng(0), layout.unbox(jax.jit(MODEL.init)(jax.random.key(0)))
  return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), jax.device_get(params))


def tokenize(prompt):
  return np.asarray([*prompt.encode(), 1], np.int32)


def work(encode=None, **fields):
  request = tasks.parse_request({"id": "a", "prompt": "a ball", **fields}, DEFAULTS, SAMPLERS)
  canvas = tasks.TASKS[request.task](request, encode=encode, **PARTS)
  return sample.prepare(request, canvas, tokenize, (1, 1, 1))


def share_rows(works, row_tokens):
  """As a job does, from sizes alone."""
  text_tokens = [max(sum(map(len, one.clip.texts)), len(one.negative)) for one in works]
  return sample.share_rows([len(one.clip.tokens_LP) for one in works], text_tokens, row_tokens)


def run(works, sampler="unipc", row_tokens=64, **how):
  rows, shape = share_rows(works, row_tokens)
  found = sample.denoise(MODEL, weights(), [[works[i] for i in row] for row in rows], shape, sampler, **how)
  if found is None:
    return None
  by_place = {i: tokens for row, each in zip(rows, found, strict=True) for i, tokens in zip(row, each, strict=True)}
  return [by_place[i] for i in range(len(works))]


def test_alone_equals_packed():
  """Of different size, steps, guidance and prompt, five requests packed give what each gives alone; another seed does not."""
  works = [work(seed=1), work(seed=2, size=[48, 32], guidance=1.0), work(seed=3, frames=9, steps=6), work(seed=4, frames=1, prompt="two"),
           work(seed=5, guidance_interval=[0.2, 0.7], guidance_rescale=0.5, negative_prompt="a square")]
  rows, shape = share_rows(works, 96)
  assert len(rows) == 1
  together = dict(zip(rows[0], sample.denoise(MODEL, weights(), [[works[i] for i in rows[0]]], shape, "unipc")[0], strict=True))
  alone = lambda one: sample.denoise(MODEL, weights(), [[one]], shape, "unipc")[0][0]     # in a row as long: the same program  # noqa: E731
  for i, one in enumerate(works):
    np.testing.assert_allclose(alone(one), together[i], atol=2e-4)
  assert np.abs(alone(work(seed=9)) - together[0]).max() > 0.1


def test_every_setting_counts():
  """Prompt, guidance, its interval, rescaling, negative prompt, steps and shift each change the result."""
  base = run([work(seed=1)])[0]
  changes = ({"prompt": "a cube"}, {"guidance": 1.5}, {"guidance_interval": [0.5, 1.0]}, {"guidance_rescale": 0.7},
             {"negative_prompt": "blue"}, {"steps": 5}, {"shift": 3.0})
  for change in changes:
    assert np.abs(run([work(seed=1, **change)])[0] - base).max() > 1e-4, change


def test_a_given_image_stays_and_is_seen():
  """image_to_video keeps the first latent frame to the bit, and the rest depends on it."""
  def given(value):
    one = work(lambda path, size, padded: np.full((1, 2, 2, 4), value, np.float32), task="image_to_video", image="x.png", frames=9)
    return run([one])[0]
  low, high = given(-1.0), given(2.0)
  np.testing.assert_array_equal(low[:4], np.full((4, 4), -1.0))
  assert np.abs(low[4:] - high[4:]).max() > 1e-3


def test_rows_are_shared_and_large_canvases_fit():
  """Eight requests of 8 tokens share one row of 64; one of more tokens than a row gets a longer one."""
  rows, shape = share_rows([work(seed=i) for i in range(8)], 64)
  assert len(rows) == 1 and shape.length == 64 and shape.clips == 8
  rows, shape = share_rows([work(size=[160, 160])], 64)
  assert shape.length == 256 and rows == [[0]]


def test_it_can_be_stopped():
  told = []
  assert run([work()], on_step=lambda done, of: told.append((done, of)), stop=lambda: len(told) == 2) is None
  assert told == [(1, 4), (2, 4)]


def test_noise_is_of_the_seed_alone():
  """Two requests with the same seed start from the same noise, whatever their prompts: the first tokens differ by the text only."""
  params = jax.tree.map(np.zeros_like, weights())       # a model that always says 0: what comes out is the noise
  works = [work(seed=7), work(seed=7, prompt="something else", frames=9)]
  rows, shape = share_rows(works, 64)
  tokens = sample.denoise(MODEL, params, [[works[i] for i in row] for row in rows], shape, "euler")[0]
  first = {i: t for i, t in zip(rows[0], tokens, strict=True)}
  np.testing.assert_array_equal(first[0], first[1][:8])
  assert np.std(first[0]) > 0.5
