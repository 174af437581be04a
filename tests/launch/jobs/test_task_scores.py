"""Judges of tasks: what is ideal is right, what does nothing is wrong."""

import numpy as np
import pytest

from launch.jobs import task_scores
from sora_jax import tasks, video
from tests.test_tasks import DEFAULTS, SAMPLERS

FRAMES = {"first and last image": 17, "loop": 17, "connect": 26, "shots": 24}


@pytest.mark.parametrize("name", task_scores.MAKERS)
def test_cases(name, tmp_path):
  """Requests are taken as they are; of ten cases nine ideal videos are right, and at most two idle ones."""
  cases = [getattr(task_scores.Maker(tmp_path, number), name)() for number in range(10)]
  for case in cases:
    request = tasks.parse_request({"task": name, **case.fields, "id": "a"}, DEFAULTS, (*SAMPLERS,), probe)
    frames = len(case.ideal) if case.ideal is not None else 9
    assert request.frames == FRAMES.get(case.task, frames) and (
      case.ideal is None or frames == request.frames
    )
    for field in tasks.FILES:
      assert getattr(request, field) is None or video.load(getattr(request, field))[0].shape[1] > 40
  ideal = [case.right(case.ideal) for case in cases if case.ideal is not None]
  idle = [case.right(case.idle) for case in cases if case.idle is not None]
  assert not ideal or np.mean(ideal) >= 0.9, ideal
  assert not idle or np.mean(idle) <= 0.2, idle


def probe(path):
  reader = video.Reader(path)
  return reader.count, reader.fps, next(iter(reader)).image_HWC.shape[:2]
