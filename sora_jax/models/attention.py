"""Attention among tokens of the same segment: `attend`, one function over two kernels.

  out_l = sum_m softmax_m(scale * q_l . k_m) v_m      over the keys m with segment_m == segment_l > 0

Rows are packed, so most pairs of tokens are foreign to each other. Both kernels cut the row into tiles and pass over the tiles in
which no segment meets itself, from the ranges of segment ids of each tile; ids that ascend give the most to skip, any order is right.

  blocks   online softmax over tiles of keys, in plain JAX, its gradient by hand from the saved logsumexp, so memory is linear in
           length: Rabe and Staats, arXiv:2112.05682; FlashAttention-2, arXiv:2307.08691, Alg. 1 and 2. CPU, GPU and tests.
  splash   the stock Pallas kernel of TPU (jax.experimental.pallas.ops.tpu.splash_attention) under a MaskInfo made at run time. Its
           segment ids alone mask but do not skip.

Everything is computed in float32 inside, whatever the inputs are. A query of segment 0, or whose segment has no key, gets zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
  splash_attention_mask_info as splash_mask,
)
from jax.sharding import PartitionSpec

PAST = jnp.iinfo(jnp.int32).max
MASKED, LOWEST = -1e30, -1e20  # a masked score, and where the running maximum starts: exp(MASKED - LOWEST) is 0
SAVED = "attention"  # name of output and logsumexp, for remat policies that keep them
COARSE = 4096  # keys in a tile of `blocks`, at most
LANES = 128  # splash takes lengths and head sizes in multiples of it


def attend(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, *, scale=None, bias=None, log_count_BM=None, layout=None, kernel=None):
  """Each query attends to the keys of its own segment.

  query [B, L, N, K], key and value [B, M, N, K]; segment_BL, segment_BM int32, 0 for padding. `scale` defaults to K ** -0.5.
  `bias` [N, L, M] is added to the scores of every row; such attention is dense (for the short rows of text encoders).
  `log_count_BM`: a key counts for exp of it many equal ones; no gradient flows to it.
  `layout`: rows and heads are worked on where it says they are; see `_specs` for tokens that are cut over devices.
  `kernel`: "blocks" or "splash"; by default splash where the devices are TPUs.
  Returns [B, L, N, K] in the query's dtype; zeros where a query has no key, with zero gradient.
  """
  scale = query_BLNK.shape[-1] ** -0.5 if scale is None else scale
  if bias is not None:
    return _dense(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale, bias)
  if log_count_BM is not None:
    query_BLNK, key_BMNK, scale = *_counted(query_BLNK * scale, key_BMNK, lax.stop_gradient(log_count_BM)), 1.0
  platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
  one = KERNELS[kernel or ("splash" if platform == "tpu" else "blocks")]
  args = query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM
  run = lambda *args: one(*args, scale)  # noqa: E731
  if layout is None or layout.mesh.size == 1:
    return run(*args)
  query_spec, key_spec = _specs(query_BLNK.shape, key_BMNK.shape[1], layout)
  in_specs = (query_spec, key_spec, key_spec, PartitionSpec(*query_spec[:2]), PartitionSpec(*key_spec[:2]))
  return jax.shard_map(run, mesh=layout.mesh, in_specs=in_specs, out_specs=query_spec, check_vma=False)(*args)


def _counted(query_BLNK, key_BMNK, log_count_BM):
  """Two entries more in every head, 1 in queries, the logarithm in keys: the kernels need not know. Two, since bfloat16 holds a half of it."""
  high = log_count_BM.astype(key_BMNK.dtype)
  parts = jnp.stack([high, (log_count_BM - high.astype(log_count_BM.dtype)).astype(high.dtype)], -1)
  count = jnp.broadcast_to(parts[:, :, None], (*key_BMNK.shape[:3], 2))
  return jnp.concatenate([query_BLNK, jnp.ones_like(query_BLNK[..., :2])], -1), jnp.concatenate([key_BMNK, count], -1)


def _specs(query_shape, M, layout):
  """Where queries and keys lie while they meet: (spec of [B, L, N, K], spec of [B, M, N, K]).

  Few keys (text) come to the queries where those are. Otherwise heads are dealt over the axis that cut the tokens, so that each
  device has whole rows of some heads (Ulysses, arXiv:2309.14509); where the heads run out, whole rows of all its heads.
  """
  _, L, N, _ = query_shape
  batch, length, heads, _ = layout.fitted(query_shape, "act_batch", "act_length", "act_heads", None).spec
  if length is not None and M * layout.ways(length) <= L:
    return PartitionSpec(batch, length, heads, None), PartitionSpec(batch, None, heads, None)
  names = lambda cut: () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)  # noqa: E731
  both = names(heads) + names(length)
  if N % layout.ways(both) == 0:
    heads = both or None
  return (PartitionSpec(batch, None, heads, None),) * 2


def _dense(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale, bias_NLM):
  """Row by row with all scores of the row at once; the scores are recomputed in the backward pass."""

  @jax.checkpoint
  def row(args):
    query_LNK, key_MNK, value_MNK, segment_L, segment_M = args
    score_NLM = jnp.einsum("LNK,MNK->NLM", query_LNK * scale, key_MNK, preferred_element_type=jnp.float32) + bias_NLM
    same_LM = (segment_L[:, None] == segment_M[None]) & (segment_L[:, None] > 0)
    score_NLM = jnp.where(same_LM, score_NLM, MASKED)
    weight_NLM = jnp.exp(score_NLM - lax.stop_gradient(jnp.maximum(score_NLM.max(-1, keepdims=True), LOWEST)))
    total_NL1 = weight_NLM.sum(-1, keepdims=True)
    weight_NLM = weight_NLM / jnp.where(total_NL1 > 0, total_NL1, 1)
    return jnp.einsum("NLM,MNK->LNK", weight_NLM.astype(value_MNK.dtype), value_MNK)

  return lax.map(row, (query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM))


def tile_ranges(segment_tiles):
  """[n, b] ids -> lowest and highest nonzero id of each tile, (PAST, 0) where there is only padding, so that it meets nothing."""
  return jnp.where(segment_tiles > 0, segment_tiles, PAST).min(-1), segment_tiles.max(-1)


def tiles_meet(segment_q, segment_k):
  """Ids in tiles, [nq, bq] and [nk, bk] -> [nq, nk] bool: whether some segment may be in both."""
  (low_q, high_q), (low_k, high_k) = tile_ranges(segment_q), tile_ranges(segment_k)
  return (low_q[:, None] <= high_k[None]) & (low_k[None] <= high_q[:, None])


# -- blocks ------------------------------------------------------------------------------------------------------------------------


def _blocks(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale):
  """All rows as one long row whose segments are told apart by row; tiles of it. -> [B, L, N, K]

  Tiles of 64 with all heads together for short rows, of 128 head by head for long ones: measured on two x86 cores (20 rows of 320
  tokens, 6 heads of 32: 0.55 times the CPU time of dense attention row by row; 16 clips of 48 to 640 tokens, 12 heads of 128: tiles of
  256 take 1.5 times as long). See `_by_density` for rows of one long clip.
  """
  B, L, N, _ = query_BLNK.shape
  M = key_BMNK.shape[1]
  ids = jnp.maximum(segment_BL.max(), segment_BM.max()) + 1

  def tiles(x, tile):  # [B, L, ...] -> [n, tile, ...]; many are a multiple of COARSE
    flat = x.reshape(-1, *x.shape[2:])
    multiple = COARSE if not short and many(flat.shape[0]) else tile
    n = -(-flat.shape[0] // multiple) * multiple
    flat = jnp.pad(flat, [(0, n - flat.shape[0])] + [(0, 0)] * (flat.ndim - 1))
    return flat.reshape(n // tile, tile, *flat.shape[1:])

  def number(segment):
    return jnp.where(segment > 0, segment + ids * jnp.arange(B, dtype=segment.dtype)[:, None], 0)

  known = jax.core.is_constant_dim(L * M)  # lengths are symbols where a model is exported
  many = lambda n: known and n > COARSE  # noqa: E731
  short = known and L * M <= 1024 * 1024
  tile = 64 if short else 128
  segment_q, segment_k = tiles(number(segment_BL), tile), tiles(number(segment_BM), tile)
  heads = [jnp.moveaxis(tiles(x.astype(jnp.float32), tile), 2, 1) for x in (query_BLNK * scale, key_BMNK, value_BMNK)]  # [n, N, tile, K]
  if short:
    out = _flash(*heads, segment_q, segment_k)
  else:
    out = lax.map(lambda one: _flash(*(x[:, None] for x in one), segment_q, segment_k)[:, 0], [jnp.moveaxis(x, 1, 0) for x in heads])
    out = jnp.moveaxis(out, 0, 1)
  return jnp.moveaxis(out, 1, 2).reshape(-1, *value_BMNK.shape[2:])[: B * L].reshape(B, L, N, -1).astype(query_BLNK.dtype)


def _key_bounds(segment_q, segment_k):
  """[nq, bq], [nk, bk] -> for each query tile the first key tile that it meets and one past the last (0, 0 where none)."""
  meet = tiles_meet(segment_q, segment_k)
  at = jnp.arange(meet.shape[1])
  stop = jnp.where(meet, at + 1, 0).max(1)
  return jnp.where(stop > 0, jnp.where(meet, at, meet.shape[1]).min(1), 0), stop


def _scores(query, key, segment_q, segment_k):
  """[N, q, K], [N, m, K], ids [q], [m] -> scores [N, q, m], MASKED where the ids differ or are 0."""
  same = (segment_q[:, None] == segment_k[None]) & (segment_q[:, None] > 0)
  return jnp.where(same, jnp.einsum("NqK,NmK->Nqm", query, key), MASKED)


def _largest(x):
  """Of the last axis, by halves: XLA on CPU vectorises that, and takes three times as long for `max`."""
  while x.shape[-1] > 8 and x.shape[-1] % 2 == 0:
    x = jnp.maximum(*jnp.split(x, 2, -1))
  return x.max(-1)


@jax.custom_vjp
def _flash(query, key, value, segment_q, segment_k):
  """Scaled query [nq, N, bq, K], key and value [nk, N, bk, K], ids [nq, bq] and [nk, bk] -> [nq, N, bq, K]; all float32.

  Heads of values may be of another size than those of queries and keys.
  """
  return _flash_forward(query, key, value, segment_q, segment_k)[0]


def _by_density(run, query, key, value, segment_q, segment_k, *rest):
  """run(...) on these tiles of keys; or, for one head, on tiles of up to COARSE keys where that is not half as many again.

  Fewer and larger products and passes: 0.65 times the time for one clip of 1,280 tokens (two x86 cores, 12 heads of 128).
  """
  nk, N, bk, _ = key.shape
  if not jax.core.is_constant_dim(nk):
    return run(query, key, value, segment_q, segment_k, *rest)
  group = max(n for n in range(1, COARSE // bk + 1) if nk % n == 0)
  fine = lambda: run(query, key, value, segment_q, segment_k, *rest)  # noqa: E731
  if N > 1 or group == 1:
    return fine()
  join = lambda x: x.reshape(nk // group, 1, group * bk, -1)  # noqa: E731
  coarse = lambda: run(query, join(key), join(value), segment_q, segment_k.reshape(-1, group * bk), *rest)  # noqa: E731
  tiles = lambda segment_k: jnp.sum(jnp.subtract(*_key_bounds(segment_q, segment_k)[::-1]))  # noqa: E731
  fewer = group * tiles(segment_k.reshape(-1, group * bk)) < 1.5 * tiles(segment_k)
  like = jax.eval_shape(fine)
  return lax.cond(fewer, lambda: [x.reshape(y.shape) for x, y in zip(coarse(), like)], lambda: list(fine()))


def _flash_forward(query, key, value, segment_q, segment_k):
  out, logsumexp = checkpoint_name(tuple(_by_density(_forward_tiles, query, key, value, segment_q, segment_k)), SAVED)
  return out, (query, key, value, segment_q, segment_k, out, logsumexp)


def _forward_tiles(query, key, value, segment_q, segment_k):
  """-> (out, logsumexp [nq, N, bq])."""
  at = functools.partial(lax.dynamic_index_in_dim, axis=0, keepdims=False)

  def tile(args):
    query, ids, start, stop = args

    def step(j, carry):
      top, total, out = carry
      score = _scores(query, at(key, j), ids, at(segment_k, j))
      new_top = jnp.maximum(top, _largest(score))
      weight, shrink = jnp.exp(score - new_top[..., None]), jnp.exp(top - new_top)
      out = out * shrink[..., None] + jnp.einsum("Nqm,NmK->NqK", weight, at(value, j))
      return new_top, total * shrink + weight.sum(-1), out

    empty = jnp.zeros(query.shape[:2])
    top, total, out = lax.fori_loop(start, stop, step, (empty + LOWEST, empty, jnp.zeros((*query.shape[:2], value.shape[-1]))))
    total = jnp.where(total > 0, total, 1)
    return out / total[..., None], top + jnp.log(total)

  return lax.map(tile, (query, segment_q, *_key_bounds(segment_q, segment_k)))


def _flash_backward(saved, d_out):
  *args, out, logsumexp = saved
  return *_by_density(_backward_tiles, *args, logsumexp, d_out, (out * d_out).sum(-1)), None, None


def _backward_tiles(query, key, value, segment_q, segment_k, logsumexp, d_out, delta):
  at = functools.partial(lax.dynamic_index_in_dim, axis=0, keepdims=False)

  def tile(carry, args):
    query, ids, start, stop, logsumexp, d_out, delta = args

    def step(j, carry):
      d_query, d_key, d_value = carry
      weight = jnp.exp(_scores(query, at(key, j), ids, at(segment_k, j)) - logsumexp[..., None])
      d_weight = jnp.einsum("NqK,NmK->Nqm", d_out, at(value, j))
      d_score = weight * (d_weight - delta[..., None])
      add = lambda x, dx: lax.dynamic_update_index_in_dim(x, at(x, j) + dx, j, 0)  # noqa: E731
      return (
        d_query + jnp.einsum("Nqm,NmK->NqK", d_score, at(key, j)),
        add(d_key, jnp.einsum("Nqm,NqK->NmK", d_score, query)),
        add(d_value, jnp.einsum("Nqm,NqK->NmK", weight, d_out)),
      )

    d_query, *carry = lax.fori_loop(start, stop, step, (jnp.zeros_like(query), *carry))
    return tuple(carry), d_query

  (d_key, d_value), d_query = lax.scan(
    tile, (jnp.zeros_like(key), jnp.zeros_like(value)), (query, segment_q, *_key_bounds(segment_q, segment_k), logsumexp, d_out, delta)
  )
  return d_query, d_key, d_value


_flash.defvjp(_flash_forward, _flash_backward)


# -- splash ------------------------------------------------------------------------------------------------------------------------


def _tile_mask(meet, by_query):
  """[nq, nk] bool -> the kernel's MaskInfo; `by_query`: it walks over key tiles for each query tile, else the other way round.

  block_mask 2: run the tile (segment ids mask its edges), 0: skip it. data_next: the tile to fetch, the next that runs.
  """
  order = meet if by_query else meet.T
  flat, at = order.reshape(-1), jnp.arange(order.size)
  following = lax.cummin(jnp.where(flat, at, order.size), reverse=True)
  fetch = jnp.where(following < order.size, following % order.shape[1], 0).reshape(order.shape).astype(jnp.int16)
  return splash_mask.MaskInfo(
    data_next=(fetch if by_query else fetch.T)[None],
    mask_next=None,
    block_mask=jnp.where(meet, 2, 0).astype(jnp.int8)[None],
    partial_mask_blocks=None,
    q_sequence=None,
    is_dynamic_mask=True,
  )


def _tile_size(length):
  """Tiles of 1024 for rows long enough to fill 8 of them, down to one tile of the row padded to 128."""
  return next((tile for tile in (1024, 512, 256) if length >= 8 * tile), LANES)


def _splash(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale, interpret=False):
  """Row by row (a pod's device holds one or two); lengths padded to the tile, head size to 128."""
  K = value_BMNK.shape[-1]
  tile_q, tile_k = _tile_size(query_BLNK.shape[1]), _tile_size(key_BMNK.shape[1])
  pad = lambda x, tile: jnp.pad(x, [(0, -x.shape[0] % tile)] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
  sizes = splash_kernel.BlockSizes(
    block_q=tile_q,
    block_kv=tile_k,
    block_kv_compute=tile_k,
    block_q_dkv=tile_q,
    block_kv_dkv=tile_k,
    block_kv_dkv_compute=tile_k,
    block_q_dq=tile_q,
    block_kv_dq=tile_k,
  )  # no fused backward: it keeps one dq for each key tile

  def row(args):
    *heads, segment_L, segment_M = args
    query_NLK, key_NMK, value_NMK = (
      jnp.pad(jnp.moveaxis(pad(x, tile), 1, 0), [(0, 0), (0, 0), (0, -x.shape[-1] % LANES)])
      for x, tile in zip(heads, (tile_q, tile_k, tile_k), strict=True)
    )
    ids_q, ids_k = pad(segment_L, tile_q), pad(segment_M, tile_k)
    meet = tiles_meet(ids_q.reshape(-1, tile_q), ids_k.reshape(-1, tile_k))
    run = splash_kernel.SplashAttentionKernel(
      _tile_mask(meet, True),
      _tile_mask(meet, True),
      _tile_mask(meet, False),
      block_sizes=sizes,
      is_mqa=False,
      save_residuals=False,
      mask_value=splash_kernel.DEFAULT_MASK_VALUE,
      attn_logits_soft_cap=None,
      residual_checkpoint_name=SAVED,
      mask_function=None,
      interpret=interpret,
    )
    out_NLK = run(query_NLK * scale, key_NMK, value_NMK, splash_kernel.SegmentIds(ids_q, ids_k))
    out_LNK = jnp.moveaxis(out_NLK, 0, 1)[: segment_L.shape[0], :, :K]
    keys = jnp.sort(segment_M)
    has_key = (segment_L > 0) & (keys[jnp.clip(jnp.searchsorted(keys, segment_L), max=keys.size - 1)] == segment_L)
    return jnp.where(has_key[:, None, None], out_LNK, 0).astype(query_BLNK.dtype)  # the kernel gives such queries anything

  args = query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM
  if query_BLNK.shape[0] == 1:
    return row(jax.tree.map(lambda x: x[0], args))[None]
  return lax.map(row, args)


KERNELS = {"blocks": _blocks, "splash": _splash, "splash_interpret": functools.partial(_splash, interpret=True)}
