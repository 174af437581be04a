"""launch.drift: what is measured of a long video.  bash tests/run.sh -m slow -k drift: the program itself."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from data.sources import shapes
from launch import drift
from sora_jax.errors import BadInput


@pytest.fixture(scope="module", autouse=True)
def declared():
  if "seconds" not in flags.FLAGS:
    drift.define_flags()
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize("given", [["a"], [], ["10", "5"], ["1"], ["10", "10"], ["4000"], ["nan"]])
def test_lengths_are_rising_numbers(given):
  with (
    flagsaver.flagsaver(seconds=given),
    pytest.raises(BadInput, match="give rising numbers from 2 to 3600"),
  ):
    drift.seconds()
  with flagsaver.flagsaver(seconds=["2", "60.5"]):
    assert drift.seconds() == [2.0, 60.5]


def test_drift_is_between_the_ends():
  assert drift.drift([1.0] * 20 + [5.0] * 20) == 4.0
  assert drift.drift([3.0, np.nan, 9.0, 9.0, 3.0]) == 0.0


def test_measures_of_a_clip_that_fades():
  """A red ball on a plain ground, of which the second half is darker and larger: each measure sees what it is
  for, and nothing else.
  """
  (scene,) = drift.scenes(1)
  clip = shapes.render(scene, (64, 64), 16, 0)
  same = drift.measure(np.concatenate([clip[:8], clip[:8]]), scene)
  assert all(row.shape == (2,) and row[0] == row[1] for row in same.values())
  assert same["shape"][0] == 100 and same["colour"][0] < 40 and 5 < same["size"][0] < 20
  dark = drift.measure(np.concatenate([clip[:8], (clip[:8] * 0.8).astype(np.uint8)]), scene)
  assert dark["colour"][1] > dark["colour"][0] + 20 and dark["background"][1] < 0.85 * dark["background"][0]
  zoomed = clip[:8, 8:56, 8:56].repeat(2, 1).repeat(2, 2)
  assert drift.measure(zoomed, scene)["size"][0] > 1.4 * same["size"][0]
  gone = drift.measure(np.full((8, 64, 64, 3), 120, np.uint8), scene)
  assert np.isnan(gone["colour"][0]) and gone["size"][0] == 0 and gone["shape"][0] == 0


def test_prompts_over_time_fill_the_video():
  for length in (2, 9, 60):
    parts = drift.shots(length)
    assert sum(part["seconds"] for part in parts) == pytest.approx(length) and len(parts) >= 2


@pytest.mark.slow
def test_the_program(run_program, tmp_path):
  """Two short lengths: memory is flat, all is measured, a second run makes nothing again."""
  arguments = ("drift", f"--out={tmp_path}", "--seconds=6,12", "--prompts=1")
  assert run_program(*arguments).returncode == 0
  report = json.loads((tmp_path / "drift.json").read_text())
  short, long = report["lengths"].values()
  assert long["frames"] == 96 and long["peak_mb"] < 1.15 * short["peak_mb"]
  assert set(report["drift"]) == {"latents kept", "files extended"}
  assert (tmp_path / "drift.svg").read_text().startswith("<svg") and (tmp_path / "frames.png").exists()
  made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
  assert run_program(*arguments).returncode == 0
  assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
