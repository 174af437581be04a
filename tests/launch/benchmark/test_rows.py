"""launch.benchmark without the libraries that it compares with. With them: tests/oracle/test_benchmark.py."""

import importlib.util

import numpy as np
import pytest

from launch.benchmark import rows
from launch.common import program
from sora_jax.errors import BadInput, Failure


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed here")
def test_without_torch_it_says_what_to_install(run_program):
  done = run_program("benchmark", "--only=dit")
  assert (
    done.returncode == program.BAD_INPUT
    and "pip install '.[oracle]'" in done.stderr
    and "Traceback" not in done.stderr
  )


def test_rows_are_chosen_by_name():
  assert [row.name for row in rows.chosen(["vae", "dit"])] == ["dit", "vae encode", "vae decode"]
  assert rows.chosen([]) == list(rows.ROWS)
  with pytest.raises(BadInput, match="known: .*train"):
    rows.chosen(["dti"])


def test_outputs_are_compared(tmp_path):
  outputs = np.linspace(-4, 2, 5)
  for side, error in (("ours", 0.02), ("theirs", 0)):
    np.savez(tmp_path / f"{side}.npz", a=outputs + error, b=outputs)
  assert abs(rows.compare(tmp_path) - 0.02 / 4) < 1e-9
  np.savez(tmp_path / "ours.npz", a=outputs)
  with pytest.raises(Failure, match="not have the same names and shapes"):
    rows.compare(tmp_path)


def test_a_missed_goal_is_marked():
  memory = {side: {"work": 50, "all": 90} for side in ("ours", "theirs")}
  result = {
    "name": "vae",
    "ours_s": 1.0,
    "theirs_s": 0.9,
    "time": 1.11,
    "time_goal": 1.0,
    "memory_mb": memory,
    "memory": 0.4,
    "memory_goal": 0.5,
    "counts": "work",
    "compile_s": 3.0,
    "difference": 1e-6,
  }
  line = rows.table([result])[1]
  assert "1.11 <= 1 MISSED" in line and "0.40 <= 0.5 ok" in line
