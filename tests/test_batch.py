"""Packing: every clip is whole in its row, with its own segment, prompts and uid."""

import numpy as np
import pytest

from sora_jax import batch as batches, patches


def clip(uid, n, texts=((1, 2),), prompt_L=None, embed=None):
  rng = np.random.default_rng(uid)
  if embed is None:
    texts = [np.asarray(t, np.int32) for t in texts]
  else:
    texts = [rng.normal(size=(len(t), embed)).astype(np.float32) for t in texts]
  tokens, coords = rng.normal(size=(n, 6)).astype(np.float32), patches.coords((1, 1, n))
  return batches.Clip(tokens, coords, texts, uid=uid, size=(1, 1, n), fps=8.0, prompt_L=prompt_L)


SHAPE = batches.RowShape(length=10, clips=3, text=7)


def test_pack_places_clips_and_prompts():
  two = clip(2**40 + 3, 4, texts=((5, 6, 7), (8,)), prompt_L=np.asarray([1, 1, 2, 0]))
  packed = batches.pack([[clip(1, 3), two], []], SHAPE)
  np.testing.assert_array_equal(packed.segment_BL[0], [1, 1, 1, 2, 2, 2, 2, 0, 0, 0])
  np.testing.assert_array_equal(packed.prompt_BL[0], [1, 1, 1, 2, 2, 3, 0, 0, 0, 0])
  np.testing.assert_array_equal(packed.prompt_BS[0], [1, 1, 2, 2, 2, 3, 0])
  np.testing.assert_array_equal(packed.text_BS[0], [1, 2, 5, 6, 7, 8, 0])
  np.testing.assert_array_equal(packed.tokens_BLP[0, 3:7], two.tokens_LP)
  np.testing.assert_array_equal(packed.uid_BG2[0], [[0, 1], [2**8, 3], [0, 0]])
  assert not packed.segment_BL[1].any() and batches.fill(packed) == 7 / 20


def test_text_may_be_embeddings():
  packed = batches.pack([[clip(1, 3, embed=5)]], SHAPE)
  assert packed.text_BS is None and packed.text_BSE.shape == (1, 7, 5) and packed.text_BSE[0, :2].all()


@pytest.mark.parametrize(
  "row",
  [[clip(1, 6), clip(2, 5)], [clip(i, 1, texts=((1,),)) for i in range(4)], [clip(1, 2, texts=(range(8),))]],
)
def test_a_row_that_overflows_is_an_error(row):
  with pytest.raises(ValueError, match="row 0 overflows"):
    batches.pack([row], SHAPE)
