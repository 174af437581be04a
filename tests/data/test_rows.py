"""Laws of packing: each clip in one row, within three budgets; rows are full even with tight budgets."""

import itertools

import numpy as np
from hypothesis import given, settings, strategies as st

from data.rows import _best_fit, _deal, _Rows, _subset, fill_rows
from sora_jax.batch import RowShape


@given(
  clips=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 12)), max_size=120),
  most=st.integers(1, 9),
  spare=st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_each_clip_is_in_one_row_within_budgets(clips, most, spare):
  tokens, text = np.array(clips, int).reshape(-1, 2).T
  rows = fill_rows(tokens, text, RowShape(50, most, 14), spare)
  assert sorted(itertools.chain(*rows)) == list(range(len(clips)))
  for row in rows:
    assert row and tokens[row].sum() <= 50 and len(row) <= most and text[row].sum() <= 14


@given(sizes=st.lists(st.integers(1, 60), max_size=12), room=st.integers(0, 120))
@settings(max_examples=80, deadline=None)
def test_subset_is_the_best(sizes, room):
  sizes = sorted(sizes, reverse=True)
  best = max(
    sum(c) for k in range(len(sizes) + 1) for c in itertools.combinations(sizes, k) if sum(c) <= room
  )
  chosen = list(_subset(sizes, room))
  assert sum(sizes[i] for i in chosen) == best and len(set(chosen)) == len(chosen)


def test_few_sizes_and_tight_budgets():
  """Best-fit decreasing packs small clips into rows of their own, which reach the budget of clips first."""
  rng = np.random.default_rng(0)
  tokens = rng.choice([12, 15, 16, 24, 36, 45, 48, 60, 72, 75, 80, 120], 4000)
  text, shape = rng.integers(4, 12, 4000), RowShape(300, 12, 120)
  best_fit_decreasing = _Rows(tokens, text, shape)
  best_fit_decreasing.clips, best_fit_decreasing.room, best_fit_decreasing.text_room = [], [], []
  _best_fit(best_fit_decreasing, _deal(best_fit_decreasing, 1.0))
  bound = tokens.sum() / 300
  assert len(fill_rows(tokens, text, shape)) < 1.01 * bound
  assert len(best_fit_decreasing.clips) > 1.03 * bound


def test_rows_of_nothing():
  assert fill_rows(np.zeros(0, int), np.zeros(0, int), RowShape(8, 2, 2)) == []
