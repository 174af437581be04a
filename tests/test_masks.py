"""What is given: a latent frame with all its pixel frames, a token with all its latents; in training what is
asked for, as often.
"""

import numpy as np
import pytest

from sora_jax import masks


@pytest.mark.parametrize(
  ("ranges", "given"),
  [
    ([(0, 0)], [1, 0, 0, 0]),
    ([(0, 4)], [1, 1, 0, 0]),
    ([(0, 3)], [1, 0, 0, 0]),  # frame 4 belongs to the second latent, too
    ([(2, 8)], [0, 0, 1, 0]),
    ([(9, 12)], [0, 0, 0, 1]),
    ([(9, 10), (11, 12)], [0, 0, 0, 1]),
    ([(0, 0), (9, 12)], [1, 0, 0, 1]),
    ([], [0, 0, 0, 0]),
  ],
)
def test_a_latent_frame_is_given_with_all_its_frames(ranges, given):
  """Temporal stride 4: latent 0 stands for frame 0, latent n for frames 4 n - 3 to 4 n."""
  assert masks.from_ranges(ranges, 4, stride=4).tolist() == [bool(g) for g in given]


def test_another_stride():
  """Nothing is said of 4: with stride 8 frames 1 to 8 are one latent."""
  assert masks.pixel_frames(3, 8) == 17
  assert masks.from_ranges([(1, 8)], 3, stride=8).tolist() == [False, True, False]


def drawn(kind, size, patch=(1, 1, 1), count=400):
  """Masks of clips of which all have something of this kind given, [count, T, H, W]."""
  rng = np.random.default_rng(0)
  return np.stack([masks.draw(rng, {kind: 1.0}, size, patch) for _ in range(count)])


@pytest.mark.parametrize("kind", masks.IN_TIME)
def test_what_is_given_in_time(kind):
  """Whole frames, in any number but all, on the sides that the kind names."""
  given = drawn(kind, (5, 2, 3))
  assert (given == given[:, :, :1, :1]).all()
  steps = given[:, :, 0, 0]
  assert steps.any(0)[0] == (kind != "end") and not steps.all(1).any()
  changes = np.abs(np.diff(steps.astype(int), axis=1)).sum(1)
  if kind in ("first", "start", "end", "ends"):
    assert set(changes) == {2 if kind == "ends" else 1}
    counts = {"first": {1}, "start": {1, 2, 3, 4}, "end": {1, 2, 3, 4}, "ends": {2, 3, 4}}[kind]
    assert set(steps.sum(1)) == counts
    assert (steps[:, 0] == (kind != "end")).all() and (steps[:, -1] == (kind in ("end", "ends"))).all()
  else:
    assert len(np.unique(steps, axis=0)) == 2**5 - 1
  assert not drawn(kind, (1, 2, 3)).any()  # of an image nothing would be left to learn
  wide = drawn(kind, (4, 2, 2), (2, 1, 1))[:, :, 0, 0]
  assert (wide[:, ::2] == wide[:, 1::2]).all()


def test_a_region():
  """All but a box of whole tokens, the same in all frames; boxes of all sizes and places."""
  left = ~drawn("region", (2, 4, 6), (1, 2, 2))
  assert (left == left[:, :1]).all()
  seen = set()
  for box in left[:, 0]:
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    (top, bottom), (first, last) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    assert box[top:bottom, first:last].all() and not (top % 2 or bottom % 2 or first % 2 or last % 2)
    seen.add((top, bottom, first, last))
  assert seen == {(t, t + 2, x, x + w) for t in (0, 2) for w in (2, 4) for x in range(0, 7 - w, 2)}
  assert not drawn("region", (3, 2, 4), (1, 2, 2)).any()  # one token high


def test_shares():
  """Each kind has its share, of the others nothing is given."""
  rng, shares = np.random.default_rng(0), {"first": 0.25, "region": 0.5}
  clips = [masks.draw(rng, shares, (3, 2, 2), (1, 1, 1)) for _ in range(4000)]
  kinds = np.array([int(clip.any()) + int(clip.sum() > 4) for clip in clips])
  np.testing.assert_allclose(np.bincount(kinds) / 4000, [0.25, 0.25, 0.5], atol=0.03)


def test_latent_of_frame():
  """Latent n stands for frames 4 n - 3 to 4 n; it belongs to a shot that most of them belong to."""
  assert [masks.latent_of_frame(n, 4) for n in range(-1, 13)] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]
  assert [masks.latent_of_frame(n, 1) for n in range(4)] == [0, 1, 2, 3]


def test_a_token_is_given_with_all_its_latents():
  given_THW = np.zeros((2, 4, 4), bool)
  given_THW[0, :2] = True
  given_THW[0, 2, 0] = True
  assert masks.tokens(given_THW, (1, 2, 2)).tolist() == [True, True, False, False] + 4 * [False]
  assert not masks.tokens(given_THW, (2, 2, 2)).any()
