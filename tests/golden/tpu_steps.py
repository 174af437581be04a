"""Compiles small steps for TPUs, on a machine without one, and keeps the compiler's texts as golden files.

  export JAX_PLATFORMS=cpu TPU_WORKER_HOSTNAMES=localhost ALLOW_MULTIPLE_LIBTPU_LOAD=1
  python -m tests.golden.tpu_steps [attention offload]

Needs jax[tpu] of the locked version. Writes tests/golden/tpu_steps/NAME.hlo.gz and sizes.json, which has the
compiler's own live peak and the bytes of the arguments of each. tests/launch/preflight/test_census.py says
what the programs do.
"""

import functools
import gzip
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
  splash_attention_mask as masks,
)

from sora_jax import layout as layouts
from sora_jax.models import attention

HERE = pathlib.Path(__file__).parent / "tpu_steps"
TOPOLOGY = "v5p:2x2x1"
LAYERS, WIDTH, HEADS, LENGTH, TEXT = 3, 2048, 16, 16_384, 512
OFFLOADED = 8192  # tokens of the second step


def layer(x_BLD, weights, text_BSD, segment_BL, segment_BS, layout):
  """Self-attention, attention to the text, and a MLP; each with a residual."""
  bf16 = {
    name: layout.constrain(w.astype(jnp.bfloat16)) for name, w in weights.items()
  }  # gathered, in bfloat16

  def heads(x_BLD, w_DNK):
    return layout.constrain(
      jnp.einsum("BLD,DNK->BLNK", x_BLD, w_DNK), "act_batch", "act_length", "act_heads", "act_head_dim"
    )

  def add(x_BLD, y_BLD):
    return layout.constrain(x_BLD + y_BLD, "act_batch", "act_length")

  query, key, value = (heads(x_BLD, w) for w in bf16["qkv"])
  out = attention.attend(query, key, value, segment_BL, segment_BL, layout=layout)
  x_BLD = add(x_BLD, jnp.einsum("BLNK,NKD->BLD", out, bf16["out"]))
  key, value = (jnp.einsum("BSD,DNK->BSNK", text_BSD, w) for w in bf16["text"])
  out = attention.attend(heads(x_BLD, bf16["query"]), key, value, segment_BL, segment_BS, layout=layout)
  x_BLD = add(x_BLD, jnp.einsum("BLNK,NKD->BLD", out, bf16["text_out"]))
  return add(x_BLD, jax.nn.gelu(x_BLD @ bf16["up"]) @ bf16["down"])


def attention_step(devices):
  """One step of SGD on LAYERS layers, context=2 x fsdp=2, everything recomputed in the backward pass."""
  layout = layouts.Layout(layouts.make_mesh(fsdp=2, context=2, devices=devices))
  D, N, K = WIDTH, HEADS, WIDTH // HEADS
  axes = {
    "qkv": ((3, D, N, K), (None, "embed", "heads", "head_dim")),
    "query": ((D, N, K), ("embed", "heads", "head_dim")),
    "text": ((2, D, N, K), (None, "embed", "heads", "head_dim")),
    "out": ((N, K, D), ("heads", "head_dim", "embed")),
    "text_out": ((N, K, D), ("heads", "head_dim", "embed")),
    "up": ((D, 4 * D), ("embed", "mlp")),
    "down": ((4 * D, D), ("mlp", "embed")),
  }

  def struct(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.fitted(shape, *axes))

  weights = {name: struct((LAYERS, *shape), jnp.float32, "layers", *a) for name, (shape, a) in axes.items()}
  arrays = (
    struct((2, LENGTH, D), jnp.bfloat16, "act_batch", "act_length"),
    struct((2, TEXT, D), jnp.bfloat16, "act_batch", "act_text"),
    struct((2, LENGTH), jnp.int32, "act_batch", "act_length"),
    struct((2, TEXT), jnp.int32, "act_batch", "act_text"),
  )

  def loss(weights, x_BLD, *rest):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def body(x_BLD, layer_weights):
      return layer(x_BLD, layer_weights, *rest, layout), None

    x_BLD, _ = lax.scan(body, x_BLD, weights)
    return jnp.mean(jnp.square(x_BLD.astype(jnp.float32)))

  def step(weights, *arrays):
    gradients = jax.grad(loss)(weights, *arrays)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)

  out = jax.tree.map(lambda w: w.sharding, weights)
  return jax.jit(step, donate_argnums=0, out_shardings=out), (weights, *arrays)


def offload_step(devices):
  """One step of SGD on one device: 4 layers of a fused splash kernel with keys of 256 and values of 128; the
  inputs of the layers wait on the host for the backward pass."""
  D, K, V, N, L = 1024, 256, 128, 8, OFFLOADED
  place = jax.sharding.NamedSharding(jax.sharding.Mesh(devices[:1], ("data",)), jax.sharding.PartitionSpec())
  tile = 1024
  names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute".split()
  sizes = kernels.BlockSizes(**dict.fromkeys(names, tile), use_fused_bwd_kernel=True)
  mask = masks.MultiHeadMask([masks.FullMask((L, L))] * N)
  splash = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["x"],
    offload_src="device",
    offload_dst="pinned_host",
  )

  def loss(weights, x_LD):
    @functools.partial(jax.checkpoint, policy=policy)
    def body(x_LD, w):
      x_LD = checkpoint_name(x_LD, "x")
      query, key, value = (jnp.einsum("LD,DNK->NLK", x_LD, w[name]) for name in ("query", "key", "value"))
      return x_LD + jnp.einsum("NLK,NKD->LD", splash(query, key, value), w["out"]), None

    x_LD, _ = lax.scan(body, x_LD, weights)
    return jnp.mean(jnp.square(x_LD.astype(jnp.float32)))

  def step(weights, x_LD):
    gradients = jax.grad(loss)(weights, x_LD)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)

  shapes = {"query": (D, N, K), "key": (D, N, K), "value": (D, N, V), "out": (N, V, D)}
  weights = {
    name: jax.ShapeDtypeStruct((4, *shape), jnp.bfloat16, sharding=place) for name, shape in shapes.items()
  }
  x_LD = jax.ShapeDtypeStruct((L, D), jnp.bfloat16, sharding=place)
  return jax.jit(step, donate_argnums=0), (weights, x_LD)


STEPS = {"attention": attention_step, "offload": offload_step}


def stripped(text):
  """The text without what no count needs: settings of the compiler, programs of kernels, source lines."""
  text = re.sub(r", backend_config=(?:\{.*\}|\S+)$", "", text, flags=re.M)
  text = re.sub(r"frontend_attributes=\{kernel_metadata=\{\n?.*?\n?\}\}", "", text, flags=re.S)
  text = re.sub(r" stack_frame_id=\d+", "", text)
  return re.sub(
    r"\n\n(?:FileNames|FunctionNames|FileLocations|StackFrames)\n.*?(?=\n\n)", "", text, flags=re.S
  )


def main(names):
  devices = topologies.get_topology_desc(TOPOLOGY, "tpu").devices
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  HERE.mkdir(exist_ok=True)
  path = HERE / "sizes.json"
  sizes = json.loads(path.read_text()) if path.exists() else {}
  for name in names or STEPS:
    step, arguments = STEPS[name](devices)
    compiled = step.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    with gzip.GzipFile(HERE / f"{name}.hlo.gz", "wb", mtime=0) as file:
      file.write(stripped(compiled.as_text()).encode())
    sizes[name] = {"peak": memory.peak_memory_in_bytes, "arguments": memory.argument_size_in_bytes}
  path.write_text(json.dumps(sizes, indent=1) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
