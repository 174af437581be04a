"""The training loop on a problem of one weight: bad updates, going back, kills, what is logged."""

import dataclasses
import itertools
import json
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from launch.common import goodput, loop, profile, program, record
from sora_jax import checkpoint, chips, errors, optim

SPIKE = 10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  step: jax.Array
  weight: jax.Array
  bad: jax.Array
  history: jax.Array


def first_state():
  return State(jnp.int32(0), jnp.float32(0), jnp.int32(0), optim.no_history())


@jax.jit
def update(state, batch):
  """Descent on (weight - batch)^2 / 2."""
  slope = state.weight - batch
  loss, norm = slope**2 / 2, jnp.abs(slope)
  finite, spike, history = optim.judge(state.history, state.step, loss, norm, SPIKE)
  taken = finite & ~spike
  weight = optim.keep_if(taken, state.weight - 0.1 * slope, state.weight)
  bad = optim.count_bad(state.bad, taken)
  metrics = {"loss": loss, "grad_norm": norm, "bad": bad, "not_finite": (~finite).astype(int), "spike": spike}
  return State(state.step + 1, weight, bad, history), metrics


def value(number, bad=()):
  """Batch `number`."""
  return np.float32(np.nan if number in bad else 1 + np.sin(number))


def weight_after(numbers):
  """Of updates on these batches, all of which are good."""
  state = first_state()
  for number in numbers:
    state, _ = update(state, value(number))
  return state.weight


def items(state):
  return {
    "params": {"weight": state.weight},
    "rest": {"step": state.step, "bad": state.bad, "history": state.history},
  }


def train(workdir, bad=(), killed_at=None, make=value, traced=None, **settings):
  """Runs or resumes a training in W -> (its last state, exit code). killed_at: the batch that never comes."""
  defaults = {"steps": 20, "log_every": 1, "checkpoint_every": 5, "max_bad_steps": 3, "max_rollbacks": 2}
  config = ml_collections.ConfigDict({**defaults, "spike": SPIKE, **settings})
  loop.check(config)
  saved = checkpoint.Checkpoints(workdir)

  def resume():
    step = saved.latest()
    if step is None:
      return first_state(), 0, 0
    parts = loop.restore_items(saved, step, items(first_state()), "rest")
    return State(**parts["params"], **parts["rest"]), step, saved.meta(step)["cursor"]

  def batches(cursor):
    for number in itertools.count(cursor + 1):
      if number == killed_at:
        saved.manager.wait_until_finished()  # a thread of a killed process would write no more
        raise KeyboardInterrupt
      yield make(number, bad), number

  state, step, cursor = resume()
  state, code = loop.run_steps(
    config,
    str(workdir),
    state,
    batches(cursor),
    update,
    first_step=step,
    checkpoints=saved,
    items=items,
    restore=lambda: resume()[:2],
    traced=traced,
  )
  saved.close()
  return state, code


def lines(workdir):
  return [json.loads(line) for line in open(workdir / "metrics.jsonl")]


def steps_saved(workdir):
  return sorted(int(path.stem) for path in (workdir / "manifests").iterdir())


def test_a_bad_update_is_skipped_and_told(tmp_path):
  """The weights are as if its batch had not been; the log counts it, and its means leave it out."""
  state, _ = train(tmp_path, bad={7}, log_every=10)
  assert state.weight == weight_after([n for n in range(1, 21) if n != 7]) and int(state.bad) == 0
  assert [(line["step"], line["not_finite"], line["spikes"]) for line in lines(tmp_path)] == [
    (10, 1, 0),
    (20, 0, 0),
  ]
  assert all(np.isfinite(line["loss"]) for line in lines(tmp_path)) and lines(tmp_path)[-1]["rollbacks"] == 0


def test_a_spike_is_skipped(tmp_path):
  """Once 64 updates are known; before, none is one."""
  wild = {10: np.float32(50), 80: np.float32(50)}
  state, _ = train(tmp_path, make=lambda number, bad: wild.get(number, value(number)), steps=90, log_every=90)
  assert lines(tmp_path)[0]["spikes"] == 1
  quiet, _ = train(tmp_path / "quiet", make=lambda n, bad: wild[10] if n == 10 else value(n), steps=90)
  assert abs(float(state.weight - quiet.weight)) < 0.5  # a step of 0.1 towards 50 would leave more


@pytest.mark.parametrize(("log_every", "taken_up_at"), [(1, 9), (20, 10)])
def test_going_back(tmp_path, log_every, taken_up_at):
  """Three bad batches in a row: the weights are those of step 5 again, and go on with the batches after them.

  Where nothing waits for the devices, they are given one more batch, which is left out too.
  """
  bad = {6, 7, 8}
  state, code = train(tmp_path, bad=bad, log_every=log_every)
  assert code == program.OK and int(state.step) == 20
  numbers = [*range(1, 6), *itertools.islice(itertools.count(taken_up_at), 15)]
  assert state.weight == weight_after(numbers)
  assert [line["step"] for line in lines(tmp_path)] == list(range(log_every, 21, log_every))
  last = lines(tmp_path)[-1]
  assert last["rollbacks"] == 1 and last["time_lost"] > 0


def test_going_back_to_the_beginning(tmp_path):
  """Where there is no checkpoint yet."""
  state, _ = train(tmp_path, bad={1, 2, 3})
  assert state.weight == weight_after(range(4, 24))


def test_more_bad_than_good_is_bad_too(tmp_path):
  """Two of three batches are bad, never three in a row."""
  state, _ = train(tmp_path, bad={6, 7, 9, 10})
  assert state.weight == weight_after([*range(1, 6), *range(11, 26)])


def test_it_ends_where_going_back_does_not_help(tmp_path):
  with pytest.raises(
    errors.Failure, match="step 8: too many .* after going back to the last checkpoint 2 times"
  ):
    train(tmp_path, bad=range(6, 100))
  assert steps_saved(tmp_path) == [5]
  with pytest.raises(errors.Failure, match=r"max_bad_steps=3\); the last checkpoint is intact"):
    train(tmp_path, bad=range(6, 100), max_rollbacks=0)
  assert int(train(tmp_path)[0].step) == 20  # with other data it goes on


def test_a_new_checkpoint_renews_patience(tmp_path):
  """Three bad stretches, each past a new checkpoint, are no failure; without one between them they are."""
  state, _ = train(tmp_path / "far", bad={6, 7, 8, 16, 17, 18, 26, 27, 28}, steps=30)
  assert int(state.step) == 30 and lines(tmp_path / "far")[-1]["rollbacks"] == 3
  with pytest.raises(errors.Failure):
    train(tmp_path / "near", bad={6, 7, 8, 10, 11, 12, 14, 15, 16}, steps=30)


def test_no_checkpoint_amid_bad_steps(tmp_path):
  """It waits until as many good ones followed: else the weights that fail would be what one goes back to."""
  train(tmp_path, bad={9, 10}, steps=14, checkpoint_every=5)
  assert steps_saved(tmp_path) == [5, 12, 14]


@pytest.mark.parametrize("killed_at", [4, 9, 12, 75])
def test_a_kill_changes_nothing(tmp_path, killed_at):
  """Skipped updates, going back and the history of losses are the same to the bit."""
  bad = {8, 9, 10, 71}
  settings = {"bad": bad, "steps": 80, "log_every": 8}
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path / "killed", killed_at=killed_at, **settings)
  again, _ = train(tmp_path / "killed", **settings)
  alone, _ = train(tmp_path / "alone", **settings)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.isfinite(alone.history).sum() > optim.WINDOW
  killed, whole = ([line["step"] for line in lines(tmp_path / name)] for name in ("killed", "alone"))
  assert killed == whole == list(range(8, 81, 8))


def test_a_checkpoint_without_a_history(tmp_path):
  """Of an earlier version: it is restored, and gets an empty one."""
  saved, state = checkpoint.Checkpoints(tmp_path), first_state()
  held = items(dataclasses.replace(state, weight=jnp.float32(3)))
  del held["rest"]["history"]
  saved.save(5, held, {"step": 5, "cursor": 5})
  saved.close()
  saved = checkpoint.Checkpoints(tmp_path)
  restored = loop.restore_items(saved, 5, items(state), "rest")
  assert restored["params"]["weight"] == 3 and np.isnan(restored["rest"]["history"]).all()
  assert restored["rest"]["history"].shape == (2, optim.WINDOW)


def test_all_time_is_accounted_for(tmp_path):
  train(tmp_path)
  elapsed = time.monotonic() - program.BEGAN
  written = json.loads((tmp_path / "goodput.json").read_text())
  last = lines(tmp_path)[-1]
  assert sum(written["seconds"].values()) == pytest.approx(elapsed, abs=0.5)
  assert set(written["seconds"]) == set(goodput.PARTS) == {n[5:] for n in last if n.startswith("time_")}
  assert 0 < last["goodput"] < 1 and written["seconds"]["compile"] > 0


def window(seconds, **metrics):
  """Steps that took so long, the first of which compiled."""
  given = {"loss": 1.0, "grad_norm": 1.0, "bad": 0, "not_finite": 0, "spike": 0, **metrics}
  return [
    record.Step(i, 0.0, 0.0, given, None, compiled=i == 0, seconds=float(s)) for i, s in enumerate(seconds)
  ]


def test_percentiles_and_rates_leave_the_compilation_out():
  values = record.summary(window([500, *[1] * 98, 11]))
  assert values["step_seconds_p50"] == values["step_seconds_p90"] == 1 < values["step_seconds_p99"] < 11
  assert values["steps_per_second"] == pytest.approx(99 / 109)
  assert record.summary(window([500]))["step_seconds_p50"] == 500  # there is no other


def test_utilisation(monkeypatch):
  """Model FLOPs of all devices, for each device and second; its share of a peak, where that is known."""
  steps = window([9, 2, 2], flops=np.float32(8e12 * jax.device_count()))
  assert record.summary(steps)["tflops"] == pytest.approx(4) and "mfu" not in record.summary(steps)
  monkeypatch.setattr(chips, "chip_of", lambda kind: dataclasses.replace(chips.CHIPS["v4"], peak_flops=16e12))
  assert record.summary(steps)["mfu"] == pytest.approx(0.25)


def test_a_trace_of_chosen_steps(tmp_path):
  train(tmp_path / "traced", traced=(2, 3), steps=5)
  assert [path.stat().st_size > 0 for path in (tmp_path / "traced" / "profile").rglob("*.xplane.pb")] == [
    True
  ]
  train(tmp_path / "later", steps=5, max_bad_steps=9)
  train(tmp_path / "later", traced=(2, 3), steps=7, max_bad_steps=9)  # these steps were made before
  assert not (tmp_path / "later" / "profile").exists()


@pytest.mark.parametrize("flag", ["5", "5:2", "0:3", "a:b", "-1:2", "3:99", "3:", ":"])
def test_a_bad_profile_flag(flag):
  with pytest.raises(errors.BadInput, match=f"--profile={flag}: give the first and the last step"):
    profile.steps_of(flag, ml_collections.ConfigDict({"steps": 20}))


def test_profile_flags():
  config = ml_collections.ConfigDict({"steps": 20})
  assert profile.steps_of("", config) is None and profile.steps_of("3:20", config) == (3, 20)


@pytest.mark.parametrize(
  ("name", "wrong"), [("spike", 1.0), ("spike", -2.0), ("max_rollbacks", -1), ("max_bad_steps", 0)]
)
def test_settings_out_of_range(tmp_path, name, wrong):
  with pytest.raises(errors.BadInput, match=f"config.{name} is"):
    train(tmp_path, **{name: wrong})
