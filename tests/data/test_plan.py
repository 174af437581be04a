"""Laws of the plan: every clip once an epoch, within budgets, the same from any cursor."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import plan as plan_module
from data.plan import Cursor, Joined, Plan, deal, mix64, shuffle
from data.records import INDEX_DTYPE
from launch.packing import reference
from sora_jax.batch import RowShape
from sora_jax.errors import BadInput


def make_index(sizes, text_tokens=8):
  """An index of latent sizes [N, 3]."""
  index = np.zeros(len(sizes), INDEX_DTYPE)
  index["t"], index["h"], index["w"] = np.asarray(sizes).T
  index["text_tokens"], index["uid"], index["fps"] = text_tokens, np.arange(len(sizes)) + 1, 8
  return index


def world_index(n, seed=0):
  """Sizes of the embedded world at strides (4, 16, 16): 12 to 120 tokens."""
  rng = np.random.default_rng(seed)
  frames = np.array([(4, 4), (3, 4), (4, 3), (3, 5), (5, 3), (4, 6)])[rng.integers(6, size=n)]
  return make_index(
    np.column_stack([rng.choice([1, 3, 5], n, p=(0.2, 0.46, 0.34)), frames]), rng.integers(4, 16, n)
  )


def make_plan(index, rows_per_step=4, length=64, clips=6, text=64, patch=(1, 1, 1), seed=0, **options):
  shape = RowShape(length, clips, text)
  return Plan(index, rows_per_step=rows_per_step, shape=shape, patch=patch, seed=seed, **options)


def clips_of(steps):
  return [clip for _, step in steps for row in step.rows for clip in row]


sides = st.integers(1, 4)
indexes = st.lists(st.tuples(st.integers(1, 5), sides, sides, st.integers(0, 20)), min_size=1, max_size=80)


@given(
  sizes=indexes,
  rows_per_step=st.integers(1, 5),
  window=st.integers(1, 90),
  seed=st.integers(-5, 2**40),
  epochs=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_every_clip_exactly_once_an_epoch(sizes, rows_per_step, window, seed, epochs):
  """For any sizes: no clip is dropped or repeated, and all rows are within their three budgets."""
  sizes = np.array(sizes)
  index = make_index(sizes[:, :3], sizes[:, 3])
  plan = make_plan(
    index, rows_per_step, 80, clips=4, text=40, seed=seed, null_text_tokens=2, window_clips=window
  )
  steps = list(plan.steps(epochs=epochs))
  assert sorted(clips_of(steps)) == sorted(itertools.product(range(len(index)), range(epochs)))
  tokens, text, _ = plan.sizes(slice(None))
  assert text.min() >= 2
  for _, step in steps:
    assert len(step.rows) == rows_per_step
    for row, load, cost in zip(step.rows, step.tokens, step.costs, strict=True):
      positions = [position for position, _ in row]
      assert load == tokens[positions].sum() <= 80 and len(row) <= 4 and text[positions].sum() <= 40
      assert cost == (tokens[positions] ** 2).sum()
  assert all(all(step.rows) for _, step in steps[:-1])  # only the last step has empty rows


@given(n=st.integers(1, 60), rows_per_step=st.integers(1, 4), window=st.integers(8, 60), data=st.data())
@settings(max_examples=15, deadline=None)
def test_resumes_from_any_cursor(n, rows_per_step, window, data):
  """The steps after a cursor depend on it alone; it survives JSON; no clip is lost between windows."""
  index, weights = data.draw(st.sampled_from([(world_index(n), None), (mixture(n, 17), (1, 2))]))

  def make():
    return make_plan(index, rows_per_step, length=130, seed=5, window_clips=window, weights=weights)

  steps = list(itertools.islice(make().steps(), 30))
  at = data.draw(st.integers(0, 28))
  cursor = Cursor.from_json(json.loads(json.dumps(steps[at][0].to_json())))
  assert cursor == steps[at][0]
  assert list(itertools.islice(make().steps(cursor), 29 - at)) == steps[at + 1 :]
  seen = clips_of(steps)
  assert len(set(seen)) == len(seen)
  for k, (cursor, _) in enumerate(steps):
    if cursor.step == 0:  # at the end of a window, all clips drawn are used or carried over
      drawn = range(cursor.window * window)
      positions, epochs = make().clips([d for d in drawn if d not in cursor.carried])
      assert sorted(zip(positions.tolist(), epochs.tolist(), strict=True)) == sorted(clips_of(steps[: k + 1]))


def test_nothing_waits_for_ever():
  """A clip that shares its row with no other is always in the emptiest row.

  It is carried over once, not for ever.
  """
  index = make_index([(1, 1, 20)] + [(1, 1, 64)] * 200)
  plan = make_plan(index, rows_per_step=3, window_clips=50)
  waits, carried_twice = {}, set()
  for cursor, _ in itertools.islice(plan.steps(), 400):
    if cursor.step == 0:
      carried_twice |= {draw for draw in cursor.carried if draw < (cursor.window - 1) * 50}
      waits.update(dict.fromkeys(cursor.carried, cursor.window))
  assert waits and not carried_twice


def test_a_cursor_of_another_plan_is_refused():
  index = world_index(50)
  cursor, _ = next(make_plan(index, length=130).steps())
  next(make_plan(index, length=130).steps(cursor))
  other = index.copy()
  other["t"][7] += 1
  for plan in (
    make_plan(index, length=131),
    make_plan(index, 5, length=130),
    make_plan(index, length=130, seed=1),
    make_plan(other, length=130),
  ):
    with pytest.raises(BadInput, match="cursor: it belongs to another"):
      next(plan.steps(cursor))
  with pytest.raises(BadInput, match="format_version 0"):
    Cursor.from_json({**cursor.to_json(), "format_version": 0})


def test_misfits_are_named_and_left_out():
  index = make_index([(1, 4, 4), (5, 4, 4), (1, 1, 4), (1, 4, 4), (1, 3, 2)], [3, 3, 3, 99, 0])
  plan = make_plan(index, length=19, patch=(1, 2, 2), text=20, null_text_tokens=4)
  assert [(m.position, m.tokens, m.reason) for m in plan.misfits] == [
    (1, 20, "20 tokens, a row holds 19"),
    (2, 0, "latent size (1, 1, 4) is less than one patch (1, 2, 2)"),
    (3, 4, "99 text tokens, a row holds 20"),
  ]
  assert sorted(clips_of(plan.steps(epochs=2))) == [(0, 0), (0, 1), (4, 0), (4, 1)]
  assert plan.trimmed == 2 and plan.sizes([4])[0] == 1


@pytest.mark.parametrize(
  "index, match",
  [
    (
      make_index([(9, 9, 9)] * 3),
      "none of its 3 clips fits a row; the first: 729 tokens, a row holds 64; raise what",
    ),
    (make_index(np.zeros((0, 3), int)), "holds no clips"),
  ],
)
def test_bad_indexes(index, match):
  with pytest.raises(BadInput, match=match):
    next(make_plan(index).steps())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17, 100, 4097])
def test_shuffle_is_a_permutation_and_another_one_each_epoch(n):
  orders = [shuffle(np.arange(n), n, 7, 1, epoch) for epoch in range(3)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
  if n > 10:
    assert (orders[0] != orders[1]).mean() > 0.5 and (orders[1] != orders[2]).mean() > 0.5


def test_shuffle_is_fair():
  """Over 4,000 epochs, 5 clips are at each position about equally often; neighbours do not stay together."""
  epochs = np.repeat(np.arange(4000), 5)
  order = shuffle(np.tile(np.arange(5), 4000), 5, 0, 1, epochs).reshape(4000, 5)
  counts = np.array([np.bincount(order[:, position], minlength=5) for position in range(5)])
  assert ((counts - 800) ** 2 / 800).sum() < 45  # chi-squared, 16 degrees of freedom: 39 at one in a thousand
  large = shuffle(np.arange(100_000), 100_000, 0, 1, 0)
  assert abs(np.corrcoef(large, np.arange(100_000))[0, 1]) < 0.02
  assert (np.abs(np.diff(large)) < 100).mean() < 0.005


def test_a_thousand_million_clips():
  """No array of that size is made: no permutation, no copy of the index (here one clip, 10^9 times)."""
  positions = shuffle(np.arange(999_990_000, 1_000_000_000), 10**9, 3, 1, 0)
  assert len(np.unique(positions)) == 10_000 and positions.min() >= 0 and positions.max() < 10**9
  index = np.broadcast_to(make_index([(2, 3, 4)]), 10**9)
  first = list(itertools.islice(make_plan(index).steps(), 2))
  assert len(set(clips_of(first))) == 2 * 4 * 2
  later = make_plan(index).steps(Cursor(window=900_000, plan=first[0][0].plan))
  assert len(set(clips_of(itertools.islice(later, 2)))) == 2 * 4 * 2


def test_hash_depends_on_every_word():
  hashes = {int(mix64(*words)[0]) for words in itertools.product(range(8), repeat=3)}
  assert len(hashes) == 512
  assert mix64(-1, 2**63) == mix64(2**64 - 1, 2**63)


@pytest.mark.parametrize(
  "index, length, clips, text, patch, rows, padding, balance",
  [
    (world_index(3000), 300, 12, 160, (1, 1, 1), 20, 0.01, 1.02),  # goal of the quickstart: 0.02
    (world_index(3000), 256, 12, 128, (1, 1, 1), 20, 0.015, 1.02),
    (reference.index(20000), 81920, 64, 8192, (1, 2, 2), 32, 0.005, 1.02),
  ],
)
def test_rows_are_full_and_ranks_finish_together(index, length, clips, text, patch, rows, padding, balance):
  """Padding, and max / mean cost of a step's rows, on the embedded world and on a mixture like the web's."""
  plan = make_plan(index, rows, length, clips, text, patch, seed=1)
  steps = [step for _, step in itertools.islice(plan.steps(), 60)]
  costs_BR = np.array([step.costs for step in steps])
  assert 1 - np.mean([step.tokens for step in steps]) / length < padding
  assert imbalance(costs_BR) < balance
  not_grouped_BR = np.random.default_rng(0).permuted(costs_BR.ravel()).reshape(costs_BR.shape)
  assert imbalance(not_grouped_BR) > 1.05


def imbalance(costs_BR):
  """The mean over steps of max / mean cost."""
  return np.mean(costs_BR.max(axis=1) / costs_BR.mean(axis=1))


def test_a_small_dataset_fills_its_rows():
  """Three clips, rows for eight steps' worth of them: a window runs over many epochs."""
  plan = make_plan(make_index([(1, 4, 4), (3, 4, 4), (5, 4, 3)]), rows_per_step=8, length=128, clips=8)
  for _, step in itertools.islice(plan.steps(), 40):
    assert np.mean(step.tokens) > 0.95 * 128


def mixture(*counts):
  return Joined([world_index(n, seed) for seed, n in enumerate(counts)])


weight_lists = st.lists(st.one_of(st.integers(1, 2**30), st.integers(1, 9)), min_size=1, max_size=5)


@given(weights=weight_lists, start=st.integers(0, 2**40), count=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_shares_of_a_mixture_are_right_in_every_stretch(weights, start, count):
  """Within one clip for two datasets, two for more; own draws are consecutive; any can be dealt alone."""
  which, own = deal(np.arange(start, start + count), weights)
  for dataset, weight in enumerate(weights):
    mine = own[which == dataset]
    assert abs(len(mine) - count * weight / sum(weights)) < (1 if len(weights) <= 2 else 2)
    assert (np.diff(mine) == 1).all()
    if len(mine):
      assert abs(mine[0] - start * weight / sum(weights)) < 2
  order = np.random.default_rng(0).permutation(count)
  for in_order, permuted in zip((which, own), deal(start + order, weights), strict=True):
    np.testing.assert_array_equal(in_order[order], permuted)
  total = sum(weights)
  if total < 2000:
    assert np.bincount(deal(np.arange(3 * total), weights)[0]).tolist() == [3 * weight for weight in weights]


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=4), data=st.data(), window=st.integers(8, 60))
@settings(max_examples=15, deadline=None)
def test_every_clip_of_a_mixture_once_an_epoch_of_its_dataset(counts, data, window):
  """For any weights. Without weights, an epoch of the mixture is an epoch of each dataset."""
  weights = data.draw(st.none() | st.tuples(*[st.floats(0.05, 20) for _ in counts]))
  index = mixture(*counts)
  plan = make_plan(index, 3, length=130, window_clips=window, weights=weights, seed=7)
  drawn = clips_of(plan.steps(epochs=3))
  assert len(set(drawn)) == len(drawn) == 3 * len(index)
  if weights is None:
    assert sorted(drawn) == sorted(itertools.product(range(len(index)), range(3)))
  for dataset, count in enumerate(counts):
    first = sum(counts[:dataset])
    mine = sorted((epoch, position - first) for position, epoch in drawn if first <= position < first + count)
    assert mine[: len(mine) // count * count] == list(
      itertools.product(range(len(mine) // count), range(count))
    )
    if weights:
      assert abs(len(mine) - len(drawn) * weights[dataset] / sum(weights)) < 2


def test_a_mixture_of_one_is_the_dataset():
  """The draws of a single dataset never change, so that runs can resume.

  (Numbers from this code, 2026-11.)
  """
  index = world_index(50)
  alone, joined = make_plan(index, length=130), make_plan(Joined([index]), length=130, weights=(2.5,))
  assert alone.name == joined.name
  assert [step for _, step in itertools.islice(alone.steps(), 20)] == [
    step for _, step in itertools.islice(joined.steps(), 20)
  ]
  assert alone.clips(np.arange(48, 52))[0].tolist() == [20, 39, 37, 27] and alone.name == "f2bd5100593eff3d"
  assert len({make_plan(mixture(20, 30), length=130, weights=w).name for w in (None, (1, 1), (1, 2))}) == 3


@pytest.mark.parametrize(
  "weights, match",
  [
    ((1,), "1 of them for 2 datasets"),
    ((1, 0), "weights: 0; a finite number above 0"),
    ((1, -2.0), "-2.0"),
    ((float("nan"), 1), "nan"),
    ((1, float("inf")), "inf"),
    (("a", 1), "weights: a; a finite"),
  ],
)
def test_invalid_weights(weights, match):
  with pytest.raises(BadInput, match=match):
    make_plan(mixture(5, 6), weights=weights)
  with pytest.raises(BadInput, match="holds no clips"):
    make_plan(mixture(5, 0))


def test_memory_does_not_grow_with_the_index(tmp_path):
  """A window of 10^9 clips takes no more than one of 10^5; an index is read from the disk in pieces."""

  def peak(run):
    tracemalloc.start()
    run()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most

  one = make_index([(2, 3, 4)])

  def alone(n):
    return np.broadcast_to(one, n)

  def mixed(n):
    return Joined([alone(n), alone(n // 10)])

  def peak_of_window(make, n):
    return peak(lambda: make_plan(make(n), window_clips=500).window(n // 500))

  def peak_of_reading(index):
    return peak(lambda: (make_plan(index, patch=(1, 2, 2)).trimmed, make_plan(index).misfits))

  for make in (alone, mixed):
    peak_of_window(make, 10**5)  # the first call also imports modules
    assert peak_of_window(make, 10**9) < 1.3 * peak_of_window(make, 10**5)
  index = np.lib.format.open_memmap(tmp_path / "index.npy", "w+", INDEX_DTYPE, (3 * plan_module.CHUNK,))
  index["t"] = index["h"] = index["w"] = 3
  index["h"][-1] = 0
  assert make_plan(index, patch=(1, 2, 2)).trimmed == len(index)
  assert [m.position for m in make_plan(index).misfits] == [len(index) - 1]
  assert peak_of_reading(index) < 1.3 * peak_of_reading(index[: plan_module.CHUNK])
