"""Tolerance of the comparisons; pytest prints the largest error of each at the end."""

import jax
import numpy as np
import pytest

TOLERANCE = 2e-5  # relative to the largest value of the reference; the project promises 1e-4
WORST = pytest.StashKey()


@pytest.fixture(scope="session")
def close(request):
  """close(what, ours, theirs): asserts that trees of arrays have equal shapes, and values to TOLERANCE."""
  worst = request.config.stash.setdefault(WORST, {})

  def compare(what, ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      a, b = np.asarray(a), np.asarray(b)
      assert a.shape == b.shape and np.isfinite(b).all()
      scale = np.abs(b).max()
      assert scale > 1e-2, "nothing to compare"
      error = float(np.abs(a - b).max() / scale)
      worst[what] = max(worst.get(what, 0), error)
      assert error <= TOLERANCE, f"{what}: {error:.1e} of the largest value"

  return compare


def pytest_terminal_summary(terminalreporter, config):
  worst = config.stash.get(WORST, {})
  if worst:
    errors = ", ".join(f"{what} {error:.1e}" for what, error in worst.items())
    terminalreporter.write_line(f"largest error, relative to the largest value: {errors}")
