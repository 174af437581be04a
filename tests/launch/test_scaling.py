"""Quality against compute: what is measured of the models, what is shown, and what is asked for first."""

import json
import xml.dom.minidom

import numpy as np
import pytest

from launch import scaling
from launch.reports import charts, page
from sora_jax import video

STEPS, SPEED = (100, 200), 4.0


@pytest.fixture
def homes(tmp_path):
  """Results of three models as the programs write them; each computes ten times as fast as the one before."""
  homes = {}
  for i, size in enumerate(scaling.SIZES):
    home = homes[size] = tmp_path / size
    for run in ("start", "dit"):
      (home / run).mkdir(parents=True)
      lines = [
        {"step": step, "steps_per_second": SPEED, "tflops": 10.0**i, "loss": 1 / step} for step in STEPS
      ]
      (home / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = {"right": 3 + i, "of": 6, "share": (3 + i) / 6, "chance": 0.25}
    report = {"loss_by_sigma": {"0.1": 9.0, "0.5": 0.3, "0.9": 0.1}, "scores": {"shape": score}}
    (home / "fresh.json").write_text(json.dumps(report))
    (home / "fresh").mkdir()
    video.write_png(home / "fresh" / "one.png", np.full((8, 8, 3), 80 * i, np.uint8))
  request = {"id": "one", "prompt": "a red ball", "frames": 1}
  (homes["quick"] / "requests.jsonl").write_text(json.dumps(request) + "\n")
  return homes


def test_compute_is_that_of_both_runs(homes):
  """FLOPs are steps times those of a step; the curve is of the second run, and begins after the first."""
  model = scaling.measured(homes["quick"])
  per_step = 10.0 * 1e12 / SPEED
  assert model["flops"] == 400 * per_step
  assert model["curve"] == [(300 * per_step, 0.01), (400 * per_step, 0.005)]
  assert model["loss"] == pytest.approx(0.2) and list(model["scores"]) == ["shape"]


def test_page_and_picture(homes, tmp_path, capsys):
  """All models are in the table, the picture and the page, and each prompt with its three videos."""
  models = {size: scaling.measured(home) for size, home in homes.items()}
  scaling.print_table(models)
  assert "4/6 67%" in capsys.readouterr().out
  svg = charts.sheet(*scaling.pictures(models))
  page.save(tmp_path / "scaling.svg", svg)
  xml.dom.minidom.parseString(svg)
  scaling.write_page(tmp_path, homes, models)
  text = (tmp_path / "index.html").read_text()
  for part in (svg, text):
    assert all(size in part for size in scaling.SIZES)
  assert "a red ball" in text and text.count("data:image/png") == 3


def test_needs_a_quickstart(tmp_path, run_program):
  done = run_program("scaling", f"--quickstart={tmp_path}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 2 and "holds no records; name the directory of a finished" in done.stderr
