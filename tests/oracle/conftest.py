"""How near is near enough, and how near it was: the largest error of each test is told at the end."""

import jax
import numpy as np
import pytest

TOLERANCE = 2e-5  # of the largest value that theirs has; the project promises 1e-4
WORST = pytest.StashKey()


@pytest.fixture(scope="session")
def close(request):
  """close(what, ours, theirs): asserts that two trees of arrays have the same shapes, and the same values
  within TOLERANCE.
  """
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
    terminalreporter.write_line("largest error, of the largest value: " + ", ".join(f"{what} {error:.1e}" for what, error in worst.items()))
