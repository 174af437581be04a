"""What is given: a latent frame with all its pixel frames, a token with all its latents; in training as often
as asked.
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


def test_a_share_of_the_clips_begins_with_a_given_frame():
  uniform = np.random.default_rng(0).random(4000)
  given = np.array([masks.draw(u, 0.25, 5) for u in uniform])
  assert abs(given[:, 0].mean() - 0.25) < 0.03 and not given[:, 1:].any()
  assert not masks.draw(0.0, 1.0, 1).any()  # of an image nothing would be left to learn
  assert masks.draw(0.0, 1.0, 4, patch_frames=2).tolist() == [True, True, False, False]


def test_a_token_is_given_with_all_its_latents():
  given_THW = np.zeros((2, 4, 4), bool)
  given_THW[0, :2] = True
  given_THW[0, 2, 0] = True
  assert masks.tokens(given_THW, (1, 2, 2)).tolist() == [True, True, False, False] + 4 * [False]
  assert not masks.tokens(given_THW, (2, 2, 2)).any()
