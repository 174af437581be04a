"""The census of a compiled step equals counts by hand, for CPUs and in texts of the TPU compiler.

The texts in tests/golden/tpu_steps are what libtpu 0.0.42.1 made of the programs in
tests/golden/tpu_steps.py for v5p:2x2x1 (jax 0.10.2, November 2026; settings and kernels' programs stripped).
"""

import collections
import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from launch.preflight import census, hlo
from sora_jax import layout as layouts

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "tpu_steps"
MESH = {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
ONE = {"data": 1}
N, D = 16, 32


def text_of(fn, *args):
  return jax.jit(fn).lower(*args).compile().as_text()


@functools.cache
def golden(name):
  return gzip.open(GOLDEN / f"{name}.hlo.gz", "rt").read()


def near(value):
  return pytest.approx(value, rel=1e-12)


# -- programs of CPUs ----------------------------------------------------------------------------------------


def scan_of_products(x, weights, remat=False):
  def layer(x, w):
    return jnp.tanh(x @ w), None

  return lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()


def test_a_loop_counts_every_turn():
  text = text_of(scan_of_products, jnp.ones((N, D)), jnp.ones((7, D, D)))
  counted = census.count(text, ONE)
  assert counted.dense_flops == 7 * 2 * N * D * D and counted.flops == counted.dense_flops
  assert [turns for _, turns in counted.loops] == [7] and not counted.unknown
  ((flops, runs, shape, op),) = counted.products
  assert (flops, runs, shape) == (counted.dense_flops, 7, f"f32[{N},{D}]") and "dot_general" in op


@pytest.mark.parametrize(("remat", "products"), [(False, 3), (True, 4)])
def test_what_is_computed_again_counts_again(remat, products):
  """Forward, then the gradients of inputs and weights; and forward once more, if its tanh is not kept."""
  grad = jax.grad(functools.partial(scan_of_products, remat=remat), argnums=(0, 1))
  counted = census.count(text_of(grad, jnp.ones((N, D)), jnp.ones((7, D, D))), ONE)
  assert counted.dense_flops == products * 7 * 2 * N * D * D


def test_a_condition_with_a_constant():
  """As the TPU compiler writes it: no known_trip_count."""
  text = text_of(scan_of_products, jnp.ones((N, D)), jnp.ones((7, D, D)))
  text = text.replace('"known_trip_count":{"n":"7"}', "")
  assert "known_trip_count" not in text
  assert census.count(text, ONE).dense_flops == 7 * 2 * N * D * D


def test_a_loop_of_unknown_length_is_reported():
  def fn(x, w, n):
    return lax.fori_loop(0, n, lambda _, x: x @ w, x)

  counted = census.count(text_of(fn, jnp.ones((N, D)), jnp.ones((D, D)), 5), ONE)
  assert counted.dense_flops == 2 * N * D * D
  (line,) = counted.unknown
  assert "how often the loop" in line and counted.loops[0][0] in line


def test_of_a_conditional_the_dearest_branch():
  def fn(x, w, flag):
    return lax.cond(flag, lambda: x @ w, lambda: x @ w @ jnp.cos(w))

  counted = census.count(text_of(fn, jnp.ones((N, D)), jnp.ones((D, D)), True), ONE)
  assert counted.dense_flops == 2 * 2 * N * D * D


BYTES = 64 * 32 * 4  # of a device's block, [64, 32] float32
COLLECTIVES = {  # how to make one; its bytes and the bytes sent, in blocks, for n devices
  "all-gather": (lambda x, axes: lax.all_gather(x, axes), lambda n: n, lambda n: n - 1),
  "all-reduce": (lambda x, axes: lax.psum(x, axes), lambda n: 1, lambda n: 2 * (n - 1) / n),
  "reduce-scatter": (lambda x, axes: lax.psum_scatter(x, axes), lambda n: 1, lambda n: (n - 1) / n),
  "all-to-all": (lambda x, axes: lax.all_to_all(x, axes, 0, 0), lambda n: 1, lambda n: (n - 1) / n),
  "collective-permute": (
    lambda x, axes: lax.ppermute(x, axes, [(0, 1), (1, 0)]),
    lambda n: 1,
    lambda n: 1,
  ),
}


@pytest.mark.parametrize("axes", [("fsdp",), ("context",), ("fsdp", "context")], ids="-".join)
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives(kind, axes):
  run, payload, wire = COLLECTIVES[kind]
  n = int(np.prod([MESH[axis] for axis in axes]))
  mesh = layouts.make_mesh(fsdp=2, context=4)

  def block(x):
    x = x.reshape(n, -1) if kind in ("reduce-scatter", "all-to-all") else x
    return lax.fori_loop(0, 3, lambda i, y: run(y + i, axes if len(axes) > 1 else axes[0]).sum() + y, x)

  everywhere = P(("fsdp", "context"))
  fn = jax.shard_map(block, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
  shape = jax.ShapeDtypeStruct(
    (8 * 64, 32), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, everywhere)
  )
  counted = census.count(text_of(fn, shape), MESH)
  (found,) = counted.collectives
  along = axes[-1:] if kind == "collective-permute" else axes  # 0 and 1 are neighbours along the last
  assert (found.kind, found.axes, found.runs) == (kind, along, 3)
  assert found.payload_bytes == near(3 * payload(n) * BYTES)
  assert found.wire_bytes == near(3 * wire(n) * BYTES)


def test_another_mesh_is_refused():
  with pytest.raises(ValueError, match="not one of the 1 devices"):
    census.count(text_of(jnp.sin, jnp.ones(3)), MESH)


@pytest.mark.parametrize(
  ("notation", "axes"),
  [
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("fsdp",)),
    ("replica_groups=[2,4]<=[8]", ("context",)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("fsdp",)),
    ("replica_groups={}", ("fsdp", "context")),
    ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("fsdp",)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ("fsdp", "context")),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("context",)),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("fsdp",)),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ("fsdp", "context")),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", ("fsdp",)),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", ("context",)),
    ("source_target_pairs={{0,0},{1,4},{4,1},{2,2}}", ("fsdp", "context")),
    ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ("context",)),
  ],
)
def test_notations_of_groups(notation, axes):
  attributes = f", channel_id=1, {notation}, dimensions={{0}}"
  ins = hlo.Instruction("x", "all-gather", hlo.Array("f32"), (), "", attributes, False)
  assert census.axes_of(hlo.groups(ins, 8), MESH) == axes


def test_a_convolution_counts_what_is_not_padding():
  """Against sums of ones: with an image and a kernel of ones, the output counts its multiplications."""
  image, kernel = jnp.ones((2, 9, 8, 3)), jnp.ones((3, 2, 3, 5))
  fn = functools.partial(
    lax.conv_general_dilated,
    window_strides=(2, 1),
    padding=((2, 1), (1, 3)),
    lhs_dilation=(1, 2),
    rhs_dilation=(2, 1),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  counted = census.count(text_of(fn, image, kernel), ONE)
  assert counted.dense_flops == 2 * int(fn(image, kernel).sum())


# -- texts of the TPU compiler -------------------------------------------------------------------------------

LAYERS, WIDTH, HEADS, LENGTH, TEXT = 3, 2048, 16, 16_384, 512  # as in tests/golden/tpu_steps.py
FOUR = {"data": 1, "fsdp": 2, "context": 2, "tensor": 1}
WEIGHTS = 16 * WIDTH**2 * 2  # bytes of a layer in bfloat16: 3 + 1 + 2 + 1 + 1 + 4 + 4 squares


def test_products_of_the_attention_step():
  """A device has one row and half of its tokens, and all of the text."""
  own = LENGTH // 2
  square, text = 2 * own * WIDTH**2, 2 * TEXT * WIDTH**2
  forward = (3 + 1 + 1 + 1 + 8) * square
  again = forward - 4 * square  # the last product of a layer is not needed again
  whole = square  # the gradient of one weight is made from whole rows, on both devices
  layer = forward + again + 2 * forward + whole + (2 + 2 + 2) * text  # no gradient of the text itself
  counted = census.count(golden("attention"), FOUR)
  assert counted.dense_flops == LAYERS * layer
  assert collections.Counter(turns for _, turns in counted.loops)[LAYERS] == 2 and not counted.unknown


def test_kernels_of_the_attention_step():
  """Over context, heads are divided in self-attention, tokens in attention to the text."""
  counted = census.count(golden("attention"), FOUR)
  own, pair = (HEADS // 2, LENGTH, LENGTH, "128/128"), 2 * HEADS // 2 * LENGTH**2 * 128
  text, pair_text = (HEADS, LENGTH // 2, TEXT, "128/128"), 2 * HEADS * LENGTH // 2 * TEXT * 128
  flops, runs = collections.Counter(), collections.Counter()
  for kernel in counted.kernels:
    flops[kernel.kind, kernel.shape] += kernel.flops
    runs[kernel.kind, kernel.shape] += kernel.runs
  parts = {"splash fwd": (2, 2), "splash dq": (1, 3), "splash dkv": (1, 4)}  # runs a layer, products
  for shape, of_one in ((own, pair), (text, pair_text)):
    for kind, (times, products) in parts.items():
      assert runs.pop((kind, shape)) == LAYERS * times
      assert flops.pop((kind, shape)) == LAYERS * times * products * of_one
  assert not runs and not flops and counted.kernel_flops == LAYERS * 11 * (pair + pair_text)


def test_tiles_that_do_not_run_count_not():
  def share(queries, keys):
    return 0.25 if queries == keys else 0.5

  dense = sum(kernel.flops for kernel in census.count(golden("attention"), FOUR).kernels)
  counted = census.count(golden("attention"), FOUR, share)
  whole = {kernel.name: kernel for kernel in census.count(golden("attention"), FOUR).kernels}
  for kernel in counted.kernels:
    assert kernel.flops == share(*kernel.shape[1:3]) * whole[kernel.name].flops
  assert counted.kernel_flops < 0.3 * dense


def test_collectives_of_the_attention_step():
  """Weights are gathered twice. Their gradients are reduced: those of two scattered, those of others whole.

  Tokens turn into heads and back, in bfloat16: q, k, v and the output, forward and again; three gradients.
  """
  counted = census.count(golden("attention"), FOUR)
  payload = collections.Counter()
  for item in counted.collectives:
    payload[item.kind, item.axes] += item.payload_bytes
    ring = {"all-reduce": 2}.get(item.kind, 1) * (1 - 1 / np.prod([FOUR[axis] for axis in item.axes]))
    assert item.wire_bytes == near(item.payload_bytes * ring) and not item.is_async
  tokens = LENGTH // 2 * WIDTH * 2
  assert payload["all-gather", ("fsdp",)] == LAYERS * 2 * WEIGHTS
  assert payload["all-reduce", ("fsdp", "context")] == LAYERS * WEIGHTS * 13 / 16
  assert payload["reduce-scatter", ("fsdp",)] == LAYERS * WEIGHTS * 3 / 16
  assert payload["all-to-all", ("context",)] == LAYERS * (4 + 4 + 3) * tokens
  assert (
    payload["all-reduce", ("context",)] == LAYERS * 2 * TEXT * WIDTH * 2
  )  # of keys and values of the text
  ids = 4 * LENGTH * 2  # segments, for the forward pass and again
  assert payload["all-gather", ("context",)] == pytest.approx(LAYERS * 2 * 2 * tokens, abs=4 * ids)
  assert len(payload) == 6


def test_offloaded_inputs_and_a_fused_kernel():
  """Each of 4 layers sends its input [8192, 1024] to the host and fetches it; keys of 256, values of 128."""
  counted = census.count(golden("offload"), ONE)
  heads, length, width, layers = 8, 8192, 1024, 4
  assert counted.host_bytes == 2 * layers * length * width * 2
  assert {kernel.shape for kernel in counted.kernels} == {(heads, length, length, "256/128")}
  runs, flops = collections.Counter(), collections.Counter()
  for kernel in counted.kernels:
    runs[kernel.kind] += kernel.runs
    flops[kernel.kind] += kernel.flops
  pairs = 2 * heads * length**2
  assert runs == {"splash fwd": 2 * layers, "splash dkv+dq": layers}
  assert flops == {
    "splash fwd": 2 * layers * pairs * (256 + 128),
    "splash dkv+dq": layers * pairs * (3 * 256 + 2 * 128),
  }
  product = 2 * length * width * heads * 128  # of the values, or the output; of queries and keys it is double
  again = 2 + 2 + 1  # without the output
  assert counted.dense_flops == layers * product * (6 + again + 2 * 6)


@pytest.mark.parametrize(("name", "above"), [("attention", 0.10), ("offload", 0.04)])
def test_live_peak(name, above):
  """A little above the compiler's own, which also reuses operands that are not read again."""
  sizes = json.loads((GOLDEN / "sizes.json").read_text())[name]
  peak, live = census.live_peak(golden(name), most=200)
  own = sizes["peak"] - sizes["arguments"]
  assert own <= peak < (1 + above) * own
  assert [row[0] for row in live] == sorted((row[0] for row in live), reverse=True)
  assert 0.98 * peak < sum(row[0] for row in live) <= peak


def test_padding_to_tiles():
  parts = hlo.parse(golden("attention")).computations.values()
  arrays = [array for part in parts for ins in part.values() for array in hlo.arrays(ins.shape)]
  assert all(array.padded_bytes >= array.num_bytes for array in arrays)
  assert hlo.Array("bf16", (3, 40), (1, 0), (8, 128)).padded_bytes == 8 * 128 * 2
  assert hlo.Array("s4", (3, 40)).padded_bytes == 60


ASYNC = """HloModule step, entry_computation_layout={(bf16[4,8]{1,0})->bf16[16,8]{1,0}}, num_partitions=4

%fused_computation (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion (q: bf16[4,8]) -> bf16[16,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %h = bf16[16,8]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%fused_computation.1 (r: bf16[4,8]) -> bf16[16,8] {
  %r = bf16[4,8]{1,0} parameter(0)
  ROOT %i = bf16[16,8]{1,0} all-gather(%r), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %async-collective-start = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation
  %fusion.7 = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion
  ROOT %async-collective-done = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused_computation.1
}
"""

SPARSECORE = """HloModule step, entry_computation_layout={(bf16[4,8]{1,0})->bf16[4,8]{1,0}}, num_partitions=4

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%x, %y)
}, execution_thread="sparsecore"

%called_computation (p: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %r = bf16[4,8]{1,0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=4] {'a'}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %start = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called_computation
  ROOT %done = bf16[4,8]{1,0} call-done(%start)
}
"""  # noqa: E501


def test_collectives_of_the_sparsecore():
  """On TPU7x and v6e a thread of its own runs them: they are counted, as asynchronous."""
  (one,) = census.count(SPARSECORE, {"data": 1, "fsdp": 4}).collectives
  assert (one.kind, one.axes, one.is_async) == ("all-reduce", ("fsdp",), True)
  assert one.wire_bytes == 2 * 64 * 3 / 4


def test_an_asynchronous_collective_counts_once():
  """In the fusion that starts it, not in those that run beside it and end it."""
  (gather,) = census.count(ASYNC, {"data": 4}).collectives
  assert gather.is_async and gather.runs == 1 and gather.payload_bytes == 16 * 8 * 2
  plain = ASYNC.replace("async-collective-done", "other.1").replace("async_collective_fusion", "other")
  assert len(census.count(plain, {"data": 4}).collectives) == 3
