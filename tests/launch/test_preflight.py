"""Preflight of the data: what it says is so, from the index alone, and what it advises helps."""

import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from configs import t2v
from data import records
from data.plan import Joined, Plan
from launch.common import settings
from launch.reports import packing as packings
from sora_jax import files, workdir as workdirs
from sora_jax.batch import RowShape
from tests.launch.reports.test_page import Reader

STRIDE = (4, 8, 8)


def make_rows(count=600, seed=0):
  """An index of images and clips of many sizes, the larger the rarer."""
  rng, rows = np.random.default_rng(seed), np.zeros(count, records.INDEX_DTYPE)
  rows["uid"], rows["fps"] = np.arange(count), rng.choice([8, 24], count)
  rows["t"], rows["h"], rows["w"] = (
    rng.choice([1, 1, 2, 5], count),
    rng.integers(2, 9, count),
    rng.integers(2, 9, count),
  )
  rows["text_tokens"] = rng.integers(2, 30, count)
  return rows


def make_plan(rows, length=400, clips=40, text=800, rows_per_step=8):
  return Plan(
    rows,
    rows_per_step=rows_per_step,
    shape=RowShape(length, clips, text),
    patch=(1, 2, 2),
    seed=0,
    window_clips=700,
  )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """Records of the VAE and tokenizer that ship, with emptied shards: only the index can be read."""
  out = tmp_path_factory.mktemp("records")
  for part in ("vae", "text"):
    shutil.copytree(workdirs.shipped() / part, out / part)
  with records.RecordWriter(out) as writer:
    for i, row in enumerate(make_rows(300)):
      latents = np.zeros((*(int(row[name]) for name in "thw"), 48), np.float32)
      writer.add(
        records.Record(
          latents, np.ones(row["text_tokens"], np.int32), "", f"{i:04d}.mp4", 0.0, float(row["fps"]), "many"
        )
      )
    writer.finish({"latent_channels": 48, "vae_stride": STRIDE, "vae_fingerprint": None}, null_text=[1])
  for shard in out.glob("*.array_record"):
    shard.write_bytes(bytes(shard.stat().st_size))
  return out


def arguments(directory, **data):
  given = {"path": directory, "rows": 4, "row_tokens": 100, "row_clips": 20, "row_text": 400} | data
  return (
    "preflight",
    "--config=configs/t2v.py:tiny",
    *(f"--config.data.{name}={value}" for name, value in given.items()),
  )


def test_the_program(directory, run_program, tmp_path):
  """--data-only reads no record. The drawings are in two files, which need no other file."""
  done = run_program(*arguments(directory), "--data-only", f"--out={tmp_path}/out")
  assert done.returncode == 0 and not done.stderr, done.stderr
  for words in (
    "300 in the index",
    "fill ",
    "balance",
    "clips a row",
    "text a row",
    f"config.steps = {t2v.get_config().steps}",
    "3.41 epochs",
    "image",
    "Next: python -m launch.train --config=configs/t2v.py:tiny",
  ):
    assert words in done.stdout, done.stdout
  svg, html = ((tmp_path / "out" / name).read_text() for name in ("rows.svg", "data.html"))
  assert len(svg) < 60_000 and len(ET.fromstring(svg).findall(".//{*}g")) == 4
  assert re.search(r"\d+ × \d+ × \d+", svg) and svg in html
  assert Reader(html).all("table") and not re.search(r"https?://(?!www.w3.org/2000/svg)| src=", html)


@pytest.mark.parametrize(
  ("flags", "header", "says"),
  [
    (
      ("--config.data.row_text=1",),
      {},
      "300 of 300 clips fit in no row; the first: record 0: 0000.mp4 at 0 s ",
    ),
    (("--config.data.weights=(0,)",), {}, "data weights: 0; a finite number above 0"),
    (("--config.data.weights=(1, -1)",), {}, "data weights: 2 of them for 1 datasets"),
    ((), {"vae_fingerprint": "another"}, "the records were made with another VAE (another) than "),
    ((), {"index_crc32": 1}, "does not belong to the index.json beside it"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_training_refuses(directory, run_program, tmp_path, flags, header, says):
  """What cannot be trained on, in one line, before anything compiles or is written."""
  if header:
    shutil.copytree(directory, tmp_path / "records")
    directory = tmp_path / "records"
    files.write_json(directory / "index.json", json.loads((directory / "index.json").read_text()) | header)
  done = run_program("train", *arguments(directory)[1:], *flags, f"--workdir={tmp_path / 'w'}")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
  assert not (tmp_path / "w").exists()


def test_what_it_advises_helps(directory, tmp_path):
  """Clips that fit no row are named, each on a line of a file; with the rows that are advised, all fit."""
  index = records.RecordIndex.open(directory)
  plan = make_plan(index.rows, 40, text=25)
  settings.name_misfits(index, plan, tmp_path)
  named = [line.split("\t") for line in (tmp_path / "misfits.txt").read_text().splitlines()]
  assert [(re.match(r"record (\d+): (\d+).mp4 at 0 s ", name)[2], why) for name, why in named] == [
    (f"{misfit.position:04d}", misfit.reason) for misfit in plan.misfits
  ]
  printed = "\n".join(packings.View(t2v.get_config(), index, plan).lines())
  assert re.search(r"fit in no row: \d+ of 300 clips; the first 10:", printed)
  assert (
    ".mp4 at 0 s" in printed
    and "tokens, a row holds 40" in printed
    and "text tokens, a row holds 25" in printed
  )
  advised = {
    name: int(value)
    for name, value in re.findall(r"--config\.data\.(row_tokens|row_text)=(\d+) or more", printed)
  }
  length, text = (advised[name] for name in ("row_tokens", "row_text"))
  assert not make_plan(index.rows, length, text=text).misfits
  assert (
    make_plan(index.rows, length - 1, text=text).misfits
    and make_plan(index.rows, length, text=text - 1).misfits
  )


def test_without_data_only(run_program):
  done = run_program("preflight")
  assert done.returncode == 2 and "give --data-only" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_numbers_are_those_of_the_steps():
  """Counted one by one over the steps that training gets first."""
  rows = make_rows()
  plan = make_plan(rows)
  packing = packings.look(plan)
  steps = [step for _, step in itertools.islice(plan.steps(), len(packing.clips_AR))]
  sizes = [
    [
      [int(rows[p]["t"]) * (int(rows[p]["h"]) // 2) * (int(rows[p]["w"]) // 2) for p, _ in row]
      for row in step.rows
    ]
    for step in steps
  ]
  assert packing.epochs == 700 / len(rows) and packing.clips_AR.sum() == sum(
    len(row) for step in sizes for row in step
  )
  assert packing.tokens_AR.tolist() == [[sum(row) for row in step] for step in sizes]
  assert packing.text_AR.tolist() == [
    [sum(int(rows[p]["text_tokens"]) for p, _ in row) for row in step.rows] for step in steps
  ]
  costs = [[sum(n * n for n in row) for row in step] for step in sizes]
  lost = sum(max(step) for step in costs) / sum(sum(step) / len(step) for step in costs)
  assert packings.max_over_mean(packing.costs_AR)[0] == pytest.approx(lost) and lost > 1


def test_a_big_index_is_looked_at_in_part():
  """A window, and it says so."""
  rows = make_rows(5000)
  packing = packings.look(make_plan(rows), most=1000)
  assert packing.epochs == 1400 / 5000 and 1000 <= packing.clips_AR.sum() <= 1400


def test_clips_by_class():
  """Each clip that fits is in one class, with its tokens; those that fit no row are in none."""
  rows = make_rows()
  plan = make_plan(rows, length=60)
  tokens, _, fits = plan.sizes(slice(None))
  classes = packings.by_class(plan, STRIDE)
  assert 0 < fits.sum() < len(rows)
  assert sum(row[2] for row in classes) == fits.sum()
  images = fits & (rows["t"] == 1)
  of_images = [sum(row[i] for row in classes if row[0] == "image") for i in (2, 3, 4)]
  np.testing.assert_allclose(
    of_images, [images.sum(), images.sum() / fits.sum(), tokens[images].sum() / tokens[fits].sum()]
  )


def test_a_mixture_is_counted_as_it_is_drawn():
  """If one of two datasets is drawn nine times as often as its size says, the shares say so as well."""
  few, many = make_rows(100), make_rows(900, seed=1)
  few["t"], many["t"] = 1, 5
  shape = RowShape(400, 40, 800)
  plan = Plan(
    Joined([few, many]),
    weights=(9, 1),
    rows_per_step=8,
    shape=shape,
    patch=(1, 2, 2),
    seed=0,
    window_clips=700,
  )
  packing, classes = packings.look(plan), packings.by_class(plan, STRIDE)
  images = [sum(row[i] for row in classes if row[0] == "image") for i in (2, 3, 4)]
  assert images[:2] == [100, pytest.approx(0.9, abs=1e-6)]
  steps = [step for _, step in itertools.islice(plan.steps(), len(packing.clips_AR))]
  drawn = np.array([position for step in steps for row in step.rows for position, _ in row])
  tokens = plan.sizes(drawn)[0]
  assert images[2] == pytest.approx(tokens[drawn < 100].sum() / tokens.sum(), abs=0.02) and images[2] < 0.7


@pytest.mark.parametrize(("cap", "name"), [({"clips": 12}, "row_clips"), ({"text": 200}, "row_text")])
def test_a_cap_that_binds(cap, name):
  """It is told, and a plan with the advised one fills its rows better; where none binds, nothing is said."""
  rows = make_rows(1500)
  tight, roomy = make_plan(rows, **cap), make_plan(rows, clips=400, text=8000)
  packing = packings.look(tight)
  (said,) = packings.advice(tight, packing)
  (better,) = re.findall(rf"{name}=(\d+)", said)
  after = packings.look(make_plan(rows, **{next(iter(cap)): int(better)}))
  assert packing.tokens_AR.mean() < 0.9 * 400 and after.tokens_AR.mean() > 0.95 * 400
  assert max(packings.stopped_short(tight, packing)) > 0.5 and packings.stopped_short(
    roomy, packings.look(roomy)
  ) == (0, 0)
  assert not packings.advice(roomy, packings.look(roomy))
