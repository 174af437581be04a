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
# heads together; those of one head, above which larger tiles of keys are used, and above which two kernels.
FUSED_BYTES = 256 << 20, 1 << 30, 7 << 28
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
  of keys before it adds them up. Few heads at a time keep that near FUSED_BYTES[0]; larger tiles of keys,
  up to 4 of the forward pass together, below FUSED_BYTES[1]. Above FUSED_BYTES[2] two kernels run instead.
  """
  few, *limits = FUSED_BYTES

  def stored(tile):
    return -(-keys // tile) * queries * head_size * itemsize

  largest = LARGE_TILES.get(kind, LARGE_TILE) // head_size
  tiles = [n * tile for n in (1, 2, 4) if n == 1 or n * tile <= largest]
  key_tile = next((tile for limit in limits for tile in tiles if stored(tile) <= limit), None)
  if key_tile is None:
    return heads, tile, False
  divisors = [n for n in range(1, heads + 1) if heads % n == 0]
  return max(n for n in divisors if n == 1 or n * stored(key_tile) <= few), key_tile, True


def with_counts(query, key, log_count):
  """Adds log_count, which fits key.shape[:-1], to the scores by two more entries in every head.

  They are 1 in queries and log_count in keys, so the kernels need no change. There are two because bfloat16
  holds only half the digits of log_count.
  """
  high = log_count.astype(key.dtype)
  parts = jnp.stack([high, (log_count - high.astype(log_count.dtype)).astype(high.dtype)], -1)
  counts = jnp.broadcast_to(parts, (*key.shape[:-1], 2))
  return jnp.concatenate([query, jnp.ones_like(query[..., :2])], -1), jnp.concatenate([key, counts], -1)


def splash(
  query_BLNK,
  key_BMNK,
  value_BMNK,
  segment_BL,
  segment_BM,
  log_count_BM=None,
  *,
  scale,
  saved,
  kind,
  interpret=False,
):
  """The splash kernel row by row (a device of a pod holds one or two).

  Lengths are padded to a multiple of the tile, the head size to a multiple of 128. saved: whether remat
  policies may save output and logsumexp. kind: of the device.
  """
  (L, N, K), M = query_BLNK.shape[1:], key_BMNK.shape[1]
  tile_q, tile_k = tile_size(L), tile_size(M)
  size = value_BMNK.shape[-1]

  def padded(length, tile):
    return -(-length // tile) * tile

  queries, K = padded(L, tile_q), K + 2 * (log_count_BM is not None)
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
    x_NLK = jnp.pad(jnp.moveaxis(x_LNK, 1, 0), [(0, 0), (0, length - len(x_LNK)), (0, 0)])
    return x_NLK.reshape(N // at_a_time, at_a_time, length, -1)

  def row(args):
    query_LNK, key_MNK, value_MNK, segment_L, segment_M, *log_count_M = args
    counts_M = [jnp.pad(x_M, (0, keys - M)) for x_M in log_count_M]
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
      query, key, value = heads
      for count_M in counts_M:
        query, key = with_counts(query, key, count_M)
      query, key, value = (
        jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[-1] % LANES)]) for x in (query, key, value)
      )
      return kernel(query, key, value, splash_kernel.SegmentIds(ids_q, ids_k))[..., :size]

    out = run([x[0] for x in heads]) if at_a_time == N else lax.map(run, heads)
    out_LNK = jnp.moveaxis(out.reshape(N, queries, -1), 0, 1)[:L]
    nearest = jnp.sort(segment_M)
    nearest = nearest[jnp.clip(jnp.searchsorted(nearest, segment_L), max=M - 1)]
    has_key = (segment_L > 0) & (nearest == segment_L)
    # The kernel's output is arbitrary for queries without a key.
    return jnp.where(has_key[:, None, None], out_LNK, 0).astype(query_BLNK.dtype)

  args = query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM
  args += () if log_count_BM is None else (log_count_BM,)
  if query_BLNK.shape[0] == 1:
    return row(jax.tree.map(lambda x: x[0], args))[None]
  return lax.map(row, args)
