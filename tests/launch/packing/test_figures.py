"""The packing benchmark: tiles as attention counts them, figures of hand-made rows, limits of peers."""

import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from launch.packing import figures as packing, peers, reference
from sora_jax.batch import RowShape
from sora_jax.models import splash

SHAPE = RowShape(40_960, clips=12, text=2000)


@given(clips=st.lists(st.integers(1, 5000), max_size=12))
@settings(max_examples=30, deadline=None)
def test_tiles_are_those_that_the_attention_runs(clips):
  segment = np.zeros(60 * packing.TILE, int)
  segment[: sum(clips)] = np.repeat(np.arange(len(clips)) + 1, clips)
  tiles = segment.reshape(-1, packing.TILE)
  assert packing.tiles(np.array(clips, int)) == int(np.sum(splash.tiles_meet(tiles, tiles)))


def test_figures_of_rows_that_are_worked_out_by_hand():
  """Two rows of 4096 tokens: one full, of one clip; one of 1024, then of nothing."""
  shape, tokens = RowShape(4096, 4, 9), np.array([4096, 1024])
  figures = packing.measure([[0], [1]], tokens, shape=shape, rows_per_step=2)
  useful = packing.LINEAR * 5120 + packing.ATTENTION * (4096**2 + 1024**2)
  issued = 2 * (packing.LINEAR * 4096 + packing.ATTENTION * 4096**2)
  assert figures == pytest.approx(
    {"padding": 3 / 8, "linear": 4096 / 2560, "attention": 2 * 16 / 17, "useful": useful / issued}
  )
  alone = packing.measure([[0]], tokens, shape=shape, rows_per_step=2)
  assert alone["padding"] == 0.5 and alone["attention"] == 2, "a short step counts its empty rows"
  assert packing.measure([[0]], tokens, shape=shape, rows_per_step=1) == {
    "padding": 0,
    "attention": 1,
    "linear": 1,
    "useful": 1,
  }
  assert packing.LINEAR == pytest.approx(5.977e8, rel=1e-3)


@pytest.fixture(scope="module")
def clips():
  index = reference.index(1500)
  return index, packing.tokens_of(index), index["text_tokens"].astype(int)


@pytest.mark.parametrize(
  "pack",
  [
    lambda tokens, text: peers.next_fit(tokens, text, SHAPE),
    lambda tokens, text: peers.grain_fit(grain.experimental.FirstFitPackIterDataset, tokens, text, SHAPE, 4),
    lambda tokens, text: peers.grain_fit(grain.experimental.BestFitPackIterDataset, tokens, text, SHAPE, 4),
  ],
)
def test_peers_place_every_clip_once_within_the_budgets(clips, pack):
  _, tokens, text = clips
  rows = pack(tokens, text)
  assert sorted(clip for row in rows for clip in row) == list(range(len(tokens)))
  for row in rows:
    assert tokens[row].sum() <= SHAPE.length and text[row].sum() <= SHAPE.text and len(row) <= SHAPE.clips
  assert len(rows) < 1.4 * tokens.sum() / SHAPE.length


def test_buckets_hold_clips_of_one_size(clips):
  index, _, _ = clips
  size_N3 = np.stack([index["t"], index["h"] // 2, index["w"] // 2], -1).astype(int)
  rows, bucket_N3 = peers.buckets(size_N3, SHAPE, 0)
  cut, tokens = (bucket_N3 != size_N3).any(1), bucket_N3.prod(1)
  placed = [clip for row in rows for clip in row]
  assert len(set(placed)) == len(placed) and 0.2 < len(placed) / len(index) < 1
  for row in rows:
    assert (
      len(np.unique(bucket_N3[row], axis=0)) == 1
      and 0 < tokens[row].sum() <= SHAPE.length
      and len(row) <= SHAPE.clips
    )
  assert 0.05 < cut.mean() < 0.99 and (bucket_N3[:, 0] <= size_N3[:, 0]).all(), "no clip is made longer"
  shapes = [grid for sizes in peers.bucket_shapes().values() for grid, _ in sizes]
  assert (45, 80) in shapes and (80, 45) in shapes and (16, 16) in shapes


def test_the_command(tmp_path, monkeypatch):
  """Prints a table for each setting, ours without loss; the numbers can be written as JSON."""
  monkeypatch.setattr(packing, "ROWS", (4,))
  monkeypatch.setattr(packing, "SHAPES", (SHAPE,))
  lines = packing.packing(3000)
  assert [line["method"] for line in lines] == [
    "next-fit (NaViT)",
    "first-fit (Grain)",
    "best-fit (Grain)",
    "buckets (Open-Sora)",
    "ours",
  ]
  ours, others = lines[-1], lines[:-1]
  assert (
    ours["lost"] == 0
    and ours["padding"] < min(row["padding"] for row in others[:3])
    and others[3]["lost"] > 0.1
  )
  assert ours["useful"] > max(row["useful"] for row in others) and ours["attention"] < min(
    row["attention"] for row in others
  )
  assert (
    packing.verdict(
      ours | {"padding": 0.004, "planning": 51.0, "useful": 0.94, "linear": 1.0, "attention": 1.03}, SHAPE
    )
    == "MISSED: attention, planning"
  )
  json.dumps(lines)


def test_loading(monkeypatch):
  monkeypatch.setattr(packing, "LOADED", 40)
  speed = packing.loading()
  assert speed["clips"] == 80 and speed["clips_per_cpu_second"] > 0
