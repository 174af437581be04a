"""Attention among tokens of the same segment: `attend`, one function over two kernels.

  out_l = sum_m softmax_m(scale * q_l . k_m) v_m      over the keys m with segment_m == segment_l > 0

Rows are packed, so most pairs of tokens belong to different clips. Both kernels cut the row into tiles, and
skip the pairs of tiles that have no segment in common, judged by the range of segment ids of each tile.
Ascending ids skip the most; any order is correct.

  blocks   online softmax over tiles of keys, in plain JAX. The gradient is written by hand and uses the saved
           logsumexp, so memory is linear in length: Rabe and Staats, arXiv:2112.05682; FlashAttention-2,
           arXiv:2307.08691, Alg. 1 and 2. For CPU, GPU and tests.
  splash   JAX's own Pallas kernel for TPU (jax.experimental.pallas.ops.tpu.splash_attention), with a MaskInfo
           made at run time: its segment ids alone mask tiles but do not skip them.

Everything is computed in float32, whatever the dtype of the inputs. A query of segment 0, or whose segment
has no key, gets zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from sora_jax.layout import names_in
from sora_jax.models.splash import SAVED, splash, tiles_meet, with_counts

MASKED, LOWEST = -1e30, -1e20  # a masked score, and the initial running maximum: exp(MASKED - LOWEST) is 0
COARSE = 4096  # most keys in a tile of `blocks`


def attend(
  query_BLNK,
  key_BMNK,
  value_BMNK,
  segment_BL,
  segment_BM,
  *,
  scale=None,
  bias=None,
  log_count_BM=None,
  layout=None,
  kernel=None,
):
  """Each query attends to the keys of its own segment.

  query [B, L, N, K], key and value [B, M, N, K]. segment_BL and segment_BM are int32, 0 for padding. `scale`
  defaults to K ** -0.5. `bias` [N, L, M] is added to the scores of every row. Attention is then dense (for
  the short rows of text encoders). `log_count_BM`: each key counts as exp(log_count) equal keys; no gradient
  flows to it. `layout`: rows, tokens and heads are sharded by its rules, see `_over_devices`. `kernel`:
  "blocks" or "splash"; the default is splash where the devices are TPUs.

  Returns [B, L, N, K] in the query's dtype; zeros where a query has no key, with zero gradient.
  """
  scale = query_BLNK.shape[-1] ** -0.5 if scale is None else scale
  if bias is not None:
    return _dense(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale, bias)
  device = layout.mesh.devices.flat[0] if layout else jax.devices()[0]
  if kernel is None:
    kernel = "splash" if device.platform == "tpu" else "blocks"
  args = query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM
  if log_count_BM is not None:
    args += (lax.stop_gradient(log_count_BM),)

  saved = query_BLNK.shape[1] == key_BMNK.shape[1]  # attention to the text is cheap to repeat

  def run(*args):
    return KERNELS[kernel](*args, scale=scale, saved=saved, kind=device.device_kind)

  if layout is None or layout.mesh.size == 1:
    return run(*args)
  return _over_devices(run, args, layout)


def _over_devices(run, args, layout):
  """`run(query, key, value, segment_BL, segment_BM, ...)`, each device on its own rows, heads and queries.

  Keys of another length than the queries (text) are whole on every device. Where queries and keys are tokens
  of a row that is cut over devices, heads are exchanged for tokens, so that a device has whole rows of some
  heads (Ulysses, arXiv:2309.14509), over as many mesh axes as divide the heads. Over the axes that are left,
  keys and values are gathered, and each device keeps its own queries. All is sent in the dtype of the inputs.
  """
  query_BLNK, key_BMNK = args[:2]
  B, L, N, _ = query_BLNK.shape
  M = key_BMNK.shape[1]
  spec = layout.fitted(query_BLNK.shape, "act_batch", "act_length", "act_heads", None).spec
  batch, length, heads, _ = spec
  own = PartitionSpec(batch, length, heads, None)
  if M != L or length is None or len(args) > 5:
    whole, ids = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    specs = own, whole, whole, PartitionSpec(batch, length), *[ids] * len(args[4:])
    return jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=own, check_vma=False)(*args)
  exchanged, gathered = _exchange(N // layout.ways(heads), length, layout)

  def gather(x, names):
    return lax.all_gather(x, names, axis=1, tiled=True) if names else x

  def heads_for_tokens(x_BLNK):
    return lax.all_to_all(x_BLNK, exchanged, 2, 1, tiled=True) if exchanged else x_BLNK

  def local(query, key, value, segment_BL, segment_BM):
    query, key, value = map(heads_for_tokens, (query, key, value))
    key, value = gather(key, gathered), gather(value, gathered)
    segment_BL, segment_BM = gather(segment_BL, exchanged), gather(gather(segment_BM, exchanged), gathered)
    out = run(query, key, value, segment_BL, segment_BM)
    return lax.all_to_all(out, exchanged, 1, 2, tiled=True) if exchanged else out

  ids = PartitionSpec(batch, length)
  specs = own, own, own, ids, ids
  return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=own, check_vma=False)(*args)


def _exchange(heads, length, layout):
  """Number of heads a device has, and the mesh axes that cut its tokens -> (those over which heads are
  exchanged for tokens, those over which keys are gathered)."""
  exchanged, gathered = [], []
  for name in reversed(names_in(length)):
    fits = heads % layout.ways((*exchanged, name)) == 0
    (exchanged if fits else gathered).insert(0, name)
  return tuple(exchanged), tuple(gathered)


def _dense(query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, scale, bias_NLM):
  """Attention row by row, with all scores of a row in memory; the backward pass recomputes them."""

  @jax.checkpoint
  def row(args):
    query_LNK, key_MNK, value_MNK, segment_L, segment_M = args
    query_LNK = query_LNK * scale
    score_NLM = jnp.einsum("LNK,MNK->NLM", query_LNK, key_MNK, preferred_element_type=jnp.float32)
    score_NLM = score_NLM + bias_NLM
    same_LM = (segment_L[:, None] == segment_M[None]) & (segment_L[:, None] > 0)
    score_NLM = jnp.where(same_LM, score_NLM, MASKED)
    max_NL1 = jnp.maximum(score_NLM.max(-1, keepdims=True), LOWEST)
    weight_NLM = jnp.exp(score_NLM - lax.stop_gradient(max_NL1))
    total_NL1 = weight_NLM.sum(-1, keepdims=True)
    weight_NLM = weight_NLM / jnp.where(total_NL1 > 0, total_NL1, 1)
    return jnp.einsum("NLM,MNK->LNK", weight_NLM.astype(value_MNK.dtype), value_MNK)

  return lax.map(row, (query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM))


# -- blocks --------------------------------------------------------------------------------------------------


def _blocks(
  query_BLNK, key_BMNK, value_BMNK, segment_BL, segment_BM, log_count_BM=None, *, scale, saved, kind
):
  """Attention over tiles of one long row, which joins all rows. -> [B, L, N, K]

  Segment ids are made unique to their row first.

  Short rows have tiles of 64 with all heads together, long rows tiles of 128 head by head. Measured on two
  x86 cores: 20 rows of 320 tokens, 6 heads of 32, take 0.55 times the CPU time of dense attention row by row;
  for 16 clips of 48 to 640 tokens, 12 heads of 128, tiles of 256 take 1.5 times as long. See `_by_density`
  for rows of one long clip.
  """
  del saved, kind  # of the other kernel
  query_BLNK = query_BLNK * scale
  if log_count_BM is not None:
    query_BLNK, key_BMNK = with_counts(query_BLNK, key_BMNK, log_count_BM[:, :, None])
  B, L, N, _ = query_BLNK.shape
  M = key_BMNK.shape[1]
  ids = jnp.maximum(segment_BL.max(), segment_BM.max()) + 1
  known = jax.core.is_constant_dim(L * M)  # lengths are symbolic where a model is exported
  short = known and L * M <= 1024 * 1024
  tile = 64 if short else 128

  def tiles(x, tile):  # [B, L, ...] -> [n, tile, ...]; a long row is padded to a multiple of COARSE
    flat = x.reshape(-1, *x.shape[2:])
    coarse = not short and known and flat.shape[0] > COARSE
    multiple = COARSE if coarse else tile
    n = -(-flat.shape[0] // multiple) * multiple
    flat = jnp.pad(flat, [(0, n - flat.shape[0])] + [(0, 0)] * (flat.ndim - 1))
    return flat.reshape(n // tile, tile, *flat.shape[1:])

  def unique_ids(segment):
    return jnp.where(segment > 0, segment + ids * jnp.arange(B, dtype=segment.dtype)[:, None], 0)

  def one_head(head):
    return _flash(*(x[:, None] for x in head), segment_q, segment_k)[:, 0]

  segment_q, segment_k = tiles(unique_ids(segment_BL), tile), tiles(unique_ids(segment_BM), tile)
  arrays = (query_BLNK, key_BMNK, value_BMNK)
  heads = [jnp.moveaxis(tiles(x.astype(jnp.float32), tile), 2, 1) for x in arrays]  # each [n, N, tile, K]
  if short:
    out = _flash(*heads, segment_q, segment_k)
  else:
    out = lax.map(one_head, [jnp.moveaxis(x, 1, 0) for x in heads])
    out = jnp.moveaxis(out, 0, 1)
  out = jnp.moveaxis(out, 1, 2).reshape(-1, *value_BMNK.shape[2:])
  return out[: B * L].reshape(B, L, N, -1).astype(query_BLNK.dtype)


def _key_bounds(segment_q, segment_k):
  """[nq, bq], [nk, bk] -> for each query tile, the first key tile that it meets and one past the last.

  They are (0, 0) for a query tile that meets none.
  """
  meet = tiles_meet(segment_q, segment_k)
  at = jnp.arange(meet.shape[1])
  stop = jnp.where(meet, at + 1, 0).max(1)
  start = jnp.where(meet, at, meet.shape[1]).min(1)
  return jnp.where(stop > 0, start, 0), stop


def _scores(query, key, segment_q, segment_k):
  """[N, q, K], [N, m, K], ids [q], [m] -> scores [N, q, m], MASKED where the ids differ or are 0."""
  same = (segment_q[:, None] == segment_k[None]) & (segment_q[:, None] > 0)
  return jnp.where(same, jnp.einsum("NqK,NmK->Nqm", query, key), MASKED)


def _largest(x):
  """Maximum over the last axis, by halves. XLA on CPU vectorises this; `max` takes three times as long."""
  while x.shape[-1] > 8 and x.shape[-1] % 2 == 0:
    x = jnp.maximum(*jnp.split(x, 2, -1))
  return x.max(-1)


@jax.custom_vjp
def _flash(query, key, value, segment_q, segment_k):
  """Scaled query [nq, N, bq, K], key and value [nk, N, bk, K], ids [nq, bq], [nk, bk] -> [nq, N, bq, K].

  All are float32 but the ids.
  The head size of values may differ from that of queries and keys.
  """
  return _flash_forward(query, key, value, segment_q, segment_k)[0]


def _by_density(run, query, key, value, segment_q, segment_k, *rest):
  """run(...) on these tiles of keys, or, for a single head, on coarse tiles of up to COARSE keys.

  Coarse tiles are used where they visit less than 1.5 times as many keys: products are fewer and larger. For
  one clip of 1,280 tokens they take 0.65 times the time (two x86 cores, 12 heads of 128).
  """
  nk, N, bk, _ = key.shape
  if not jax.core.is_constant_dim(nk):
    return run(query, key, value, segment_q, segment_k, *rest)
  group = max(n for n in range(1, COARSE // bk + 1) if nk % n == 0)

  def fine():
    return list(run(query, key, value, segment_q, segment_k, *rest))

  if N > 1 or group == 1:
    return fine()
  shapes = jax.eval_shape(fine)

  def join(x):
    return x.reshape(nk // group, 1, group * bk, -1)

  def coarse():
    outputs = run(query, join(key), join(value), segment_q, segment_k.reshape(-1, group * bk), *rest)
    return [x.reshape(like.shape) for x, like in zip(outputs, shapes)]

  def visits(segment_k):
    start, stop = _key_bounds(segment_q, segment_k)
    return jnp.sum(stop - start)

  use_coarse = group * visits(segment_k.reshape(-1, group * bk)) < 1.5 * visits(segment_k)
  return lax.cond(use_coarse, coarse, fine)


def _flash_forward(query, key, value, segment_q, segment_k):
  outputs = _by_density(_forward_tiles, query, key, value, segment_q, segment_k)
  out, logsumexp = checkpoint_name(tuple(outputs), SAVED)
  return out, (query, key, value, segment_q, segment_k, out, logsumexp)


def _forward_tiles(query, key, value, segment_q, segment_k):
  """The forward pass over tiles -> (out, logsumexp [nq, N, bq])."""
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
    carry = (empty + LOWEST, empty, jnp.zeros((*query.shape[:2], value.shape[-1])))
    top, total, out = lax.fori_loop(start, stop, step, carry)
    total = jnp.where(total > 0, total, 1)
    return out / total[..., None], top + jnp.log(total)

  return lax.map(tile, (query, segment_q, *_key_bounds(segment_q, segment_k)))


def _flash_backward(saved, d_out):
  *args, out, logsumexp = saved
  delta = (out * d_out).sum(-1)
  return *_by_density(_backward_tiles, *args, logsumexp, d_out, delta), None, None


def _backward_tiles(query, key, value, segment_q, segment_k, logsumexp, d_out, delta):
  """The backward pass over tiles -> gradients of query, key and value."""
  at = functools.partial(lax.dynamic_index_in_dim, axis=0, keepdims=False)

  def tile(carry, args):
    query, ids, start, stop, logsumexp, d_out, delta = args

    def step(j, carry):
      d_query, d_key, d_value = carry
      weight = jnp.exp(_scores(query, at(key, j), ids, at(segment_k, j)) - logsumexp[..., None])
      d_weight = jnp.einsum("NqK,NmK->Nqm", d_out, at(value, j))
      d_score = weight * (d_weight - delta[..., None])

      def add(x, dx):
        return lax.dynamic_update_index_in_dim(x, at(x, j) + dx, j, 0)

      return (
        d_query + jnp.einsum("Nqm,NmK->NqK", d_score, at(key, j)),
        add(d_key, jnp.einsum("Nqm,NqK->NmK", d_score, query)),
        add(d_value, jnp.einsum("Nqm,NqK->NmK", weight, d_out)),
      )

    d_query, *carry = lax.fori_loop(start, stop, step, (jnp.zeros_like(query), *carry))
    return tuple(carry), d_query

  carry = (jnp.zeros_like(key), jnp.zeros_like(value))
  tiles = (query, segment_q, *_key_bounds(segment_q, segment_k), logsumexp, d_out, delta)
  (d_key, d_value), d_query = lax.scan(tile, carry, tiles)
  return d_query, d_key, d_value


_flash.defvjp(_flash_forward, _flash_backward)


KERNELS = {
  "blocks": _blocks,
  "splash": splash,
  "splash_interpret": functools.partial(splash, interpret=True),
}
