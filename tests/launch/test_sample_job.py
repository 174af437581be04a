"""The sampling job in several processes: each makes its share; nothing is lost by kills, nothing made twice.

bash tests/run.sh faults -k test_sample_job            # a thousand requests, killed three times
"""

import json
import random
import signal

import numpy as np
import pytest

from launch.jobs import sample
from sora_jax import metrics, video
from tests import conftest
from tests.launch import test_hosts

PROMPTS = ("a red ball", "a blue square moves left", "a green triangle moves up", "a red ball moves down")
FRAMES = str(conftest.ROOT / "tests" / "launch" / "frames")


def write_requests(path, count):
  """Tiny requests: images, and a video among four; one guidance among three is none."""
  with open(path, "w") as f:
    for i in range(count):
      fields = {"prompt": PROMPTS[i % 4], "size": (16, 16 + 16 * (i % 2)), "frames": 1 if i % 4 else 5}
      fields |= {"id": f"r{i:04d}", "seed": i, "steps": 2, "guidance": (3.0, 1.0, 2.0)[i % 3]}
      f.write(json.dumps(fields) + "\n")


def pixels(out, line):
  """The frames of a result before they were encoded, in [0, 1]."""
  path = out / line["path"]
  frames = np.load(f"{path}.npy") if line["frames"] > 1 else video.load(path)[0]
  return frames / 255


def agree(one, many, count):
  """Both folders hold each result once, and the same frames to 60 dB."""
  lines, others = sample.read_manifest(one), sample.read_manifest(many)
  assert len(lines) == count and lines.keys() == others.keys()
  assert {line["status"] for line in others.values()} == {"ok"}
  assert not list(many.glob("manifest.part-*"))
  written = [line["id"] for line in map(json.loads, open(many / sample.MANIFEST))]
  assert len(set(written)) == count
  for name, line in lines.items():
    assert metrics.psnr(pixels(one, line), pixels(many, others[name])) >= 60, name


@pytest.mark.faults
def test_two_processes_make_what_one_does(tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", FRAMES)
  write_requests(tmp_path / "requests.jsonl", 24)
  job = ("sample", f"--requests={tmp_path / 'requests.jsonl'}")
  one, two, together = (tmp_path / name for name in ("one", "two", "together"))
  test_hosts.run(1, *job, f"--out={one}")
  said = test_hosts.run(2, *job, f"--out={two}").stdout
  assert "24 made" in said
  agree(one, two, 24)
  test_hosts.run(2, *job, f"--out={together}", "--together")
  agree(one, together, 24)
  assert "0 made, 24 were there already" in test_hosts.run(3, *job, f"--out={two}").stdout


@pytest.mark.faults
def test_a_thousand_requests_killed_three_times(tmp_path, monkeypatch):
  """Killed at random with 3, 1 and 4 processes, and ended with 2: a thousand results, those of a run that
  nothing disturbed.
  """
  monkeypatch.setenv("PYTHONPATH", FRAMES)
  count, rng = 1000, random.Random(15)
  write_requests(tmp_path / "requests.jsonl", count)
  job = ("sample", f"--requests={tmp_path / 'requests.jsonl'}")
  calm, killed = tmp_path / "calm", tmp_path / "killed"
  test_hosts.run(1, *job, f"--out={calm}", timeout=3000)
  for processes, least in ((3, 0.1), (1, 0.35), (4, 0.6)):
    wanted = int(count * (least + 0.15 * rng.random()))
    code = test_hosts.killed(
      processes, *job, f"--out={killed}", when=lambda: len(sample.read_manifest(killed)) >= wanted
    )
    assert code == -signal.SIGKILL
    assert wanted <= len(sample.read_manifest(killed)) < count
  test_hosts.run(2, *job, f"--out={killed}", timeout=3000)
  agree(calm, killed, count)
