"""Goodput: every second is in one part; devices that compute do not wait; what is done again is lost."""

import pytest

from launch.common import goodput


class Clock:
  """time.monotonic and time.time, which tests set; the wall clock is 1000 s ahead."""

  def __init__(self):
    self.now = 0.0

  def monotonic(self):
    return self.now

  def time(self):
    return 1000.0 + self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(goodput, "time", clock)
  return clock


def act(account, clock, part, start, end):
  clock.now = start
  with account.doing(part):
    clock.now = end


def first_program(tmp_path, clock):
  """Three steps: waiting for the second batch costs nothing, for the third 3 s; a checkpoint after them."""
  account = goodput.Goodput(tmp_path, 0, began=0.0)
  act(account, clock, "data", 10, 12)
  act(account, clock, "data", 12.5, 13)  # the first step is under way until 20
  account.step(12, 20, "compile")
  act(account, clock, "data", 14, 25)  # the second until 22
  account.step(13, 22)
  account.step(25, 27)
  act(account, clock, "checkpoint", 27, 30)
  account.spend(30)
  account.checkpointed(3)
  return account


def spent(account):
  return {part: seconds for part, seconds in account.seconds.items() if seconds}


def test_devices_that_compute_do_not_wait(tmp_path, clock):
  account = first_program(tmp_path, clock)
  assert spent(account) == {"startup": 10, "data": 5, "compile": 8, "step": 4, "checkpoint": 3}
  assert account.values()["goodput"] == pytest.approx(4 / 30)
  assert account.summary().startswith("goodput 13.3 % of 30 s; the rest: startup 33.3 %, compile 26.7 %")


def test_steps_after_the_last_checkpoint_are_lost_by_a_kill(tmp_path, clock):
  """A program is killed after two more steps, and the next begins 100 s after its last record."""
  account = first_program(tmp_path, clock)
  account.step(30, 36)
  clock.now = 40
  account.spend(40)
  account.write()
  clock.now = 145
  again = goodput.Goodput(tmp_path, 3, began=140.0)
  again.spend(145)
  assert spent(again) == spent(account) | {"step": 4, "lost": 6, "down": 100, "startup": 15}
  assert sum(again.seconds.values()) == 145
  from_checkpoint = goodput.Goodput(tmp_path, 5, began=140.0)  # had the steps been saved, none were lost
  assert "lost" in spent(from_checkpoint)


def test_steps_before_a_checkpoint_are_not_lost(tmp_path, clock):
  account = first_program(tmp_path, clock)
  account.step(30, 36)
  account.checkpointed(5)
  account.step(36, 37)
  account.lose(5)
  assert account.seconds["step"] == 10 and account.seconds["lost"] == 1
  account.lose(3)  # the newer checkpoint was damaged
  assert account.seconds["step"] == 4 and account.seconds["lost"] == 7
