"""Attention on TPU: JAX's own Pallas kernel, told which tiles to skip.

The kernel is jax.experimental.pallas.ops.tpu.splash_attention. Its segment ids mask the tiles of a row but do
not skip them, so it gets a MaskInfo made at run time: a tile runs if the ranges of segment ids of its queries
and keys meet.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
  splash_attention_mask_info as splash_mask,
)

PAST = jnp.iinfo(jnp.int32).max
SAVED = "attention"  # name of the output and logsumexp, for remat policies that save them
LANES = 128  # splash needs lengths and head sizes that are multiples of it
# Bytes of gradients of queries, one for each tile of keys, that the backward pass stores: those of several
# heads together, and at most those of one head.
FUSED_BYTES = 256 << 20, 7 << 28
LARGE_TILE = 2048 * 256  # most values in a tile of keys that is larger than those of the forward pass
LARGE_TILES = {"TPU v5 lite": 2048 * 128}  # of devices with less vector memory


def tile_ranges(segment_tiles):
  """[n, b] ids -> lowest and highest nonzero id of each tile.

  For a tile of padding they are (PAST, 0), so that it meets no other tile.
  """
  return jnp.where(segment_tiles > 0, segment_tiles, PAST).min(-1), segment_tiles.max(-1)


def tiles_meet(segment_q, segment_k):
  """Ids in tiles, [nq, bq] and [nk, bk] -> [nq, nk] bool: whether the tiles may share a segment."""
  (low_q, high_q), (low_k, high_k) = tile_ranges(segment_q), tile_ranges(segment_k)
  return (low_q[:, None] <= high_k[None]) & (low_k[None] <= high_q[:, None])


def _tile_mask(meet, by_query):
  """[nq, nk] bool -> the kernel's MaskInfo.

  by_query: the kernel loops over key tiles for each query tile; otherwise over query tiles for each key tile.
  block_mask is 2 where a tile runs (segment ids mask its edges), 0 where it is skipped. data_next is the tile
  to fetch, which is the next that runs.
  """
  order = meet if by_query else meet.T
  flat, at = order.reshape(-1), jnp.arange(order.size)
  following = lax.cummin(jnp.where(flat, at, order.size), reverse=True)
  fetch = jnp.where(following < order.size, following % order.shape[1], 0)
  fetch = fetch.reshape(order.shape).astype(jnp.int16)
  return splash_mask.MaskInfo(
    data_next=(fetch if by_query else fetch.T)[None],
    mask_next=None,
    block_mask=jnp.where(meet, 2, 0).astype(jnp.int8)[None],
    partial_mask_blocks=None,
    q_sequence=None,
    is_dynamic_mask=True,
  )


def tile_size(length):
  """The largest of 1024, 512 and 256 of which the row fills 8 tiles; otherwise 128."""
  return next((tile for tile in (1024, 512, 256) if length >= 8 * tile), LANES)


def backward_plan(heads, queries, keys, tile, head_size, itemsize, kind=""):
  """How the backward pass runs -> (heads at a time, keys in its tiles, whether it is one kernel).

  One kernel needs 5 products of a tile where two need 7, but stores a gradient of all queries for each tile
  of keys before it adds them up. Few heads at a time keep that near FUSED_BYTES[0], and larger tiles of keys,
  up to 4 of the forward pass together, below FUSED_BYTES[1]; where they do not, two kernels run.
  """
  few, most = FUSED_BYTES

  def stored(tile):
    return -(-keys // tile) * queries * head_size * itemsize

  largest = LARGE_TILES.get(kind, LARGE_TILE) // head_size
  tiles = [n * tile for n in (1, 2, 4) if n == 1 or n * tile <= largest]
  key_tile = next((tile for tile in tiles if stored(tile) <= most), None)
  if key_tile is None:
    return heads, tile, False
  divisors = [n for n in range(1, heads + 1) if heads % n == 0]
  return max(n for n in divisors if n == 1 or n * stored(key_tile) <= few), key_tile, True


def splash(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale, saved, kind, interpret=False):
  """The splash kernel row by row (a device of a pod holds one or two).

  Lengths are padded to a multiple of the tile, the head size to a multiple of 128. saved: whether remat
  policies may save output and logsumexp. kind: of the device.
  """
  (L, N, K), M = query_BLNK.shape[1:], key_BMNK.shape[1]
  tile_q, tile_k = tile_size(L), tile_size(M)
  size = value_BMNK.shape[-1]

  def padded(length, tile):
    return -(-length // tile) * tile

  queries = padded(L, tile_q)
  at_a_time, tile_b, fused = backward_plan(
    N, queries, padded(M, tile_k), tile_k, padded(K, LANES), query_BLNK.dtype.itemsize, kind
  )
  keys = padded(M, tile_b)
  sizes = splash_kernel.BlockSizes(
    block_q=tile_q,
    block_kv=tile_k,
    block_kv_compute=tile_k,
    block_q_dkv=tile_q,
    block_kv_dkv=tile_b,
    block_kv_dkv_compute=tile_k,
    use_fused_bwd_kernel=fused,
    block_q_dq=None if fused else tile_q,
    block_kv_dq=None if fused else tile_k,
  )

  def heads_first(x_LNK, length):
    x_NLK = jnp.moveaxis(x_LNK, 1, 0)
    edges = [(0, 0), (0, length - x_NLK.shape[1]), (0, -x_NLK.shape[2] % LANES)]
    return jnp.pad(x_NLK, edges).reshape(N // at_a_time, at_a_time, length, -1)

  def row(args):
    query_LNK, key_MNK, value_MNK, segment_L, segment_M = args
    heads = (
      heads_first(query_LNK * scale, queries),
      heads_first(key_MNK, keys),
      heads_first(value_MNK, keys),
    )
    ids_q, ids_k = jnp.pad(segment_L, (0, queries - L)), jnp.pad(segment_M, (0, keys - M))

    def meet(tile):
      return tiles_meet(ids_q.reshape(-1, tile_q), ids_k.reshape(-1, tile))

    kernel = splash_kernel.SplashAttentionKernel(
      _tile_mask(meet(tile_k), True),
      None if fused else _tile_mask(meet(tile_k), True),
      _tile_mask(meet(tile_b), False),
      block_sizes=sizes,
      is_mqa=False,
      save_residuals=False,
      mask_value=splash_kernel.DEFAULT_MASK_VALUE,
      attn_logits_soft_cap=None,
      residual_checkpoint_name=SAVED if saved else None,
      mask_function=None,
      interpret=interpret,
    )

    def run(heads):
      return kernel(*heads, splash_kernel.SegmentIds(ids_q, ids_k))

    out = run([x[0] for x in heads]) if at_a_time == N else lax.map(run, heads)
    out_LNK = jnp.moveaxis(out.reshape(N, queries, -1), 0, 1)[:L, :, :size]
    nearest = jnp.sort(segment_M)
    nearest = nearest[jnp.clip(jnp.searchsorted(nearest, segment_L), max=M - 1)]
    has_key = (segment_L > 0) & (nearest == segment_L)
    # The kernel's output is arbitrary for queries without a key.
    return jnp.where(has_key[:, None, None], out_LNK, 0).astype(query_BLNK.dtype)

  args = query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM
  if query_BLNK.shape[0] == 1:
    return row(jax.tree.map(lambda x: x[0], args))[None]
  return lax.map(row, args)
