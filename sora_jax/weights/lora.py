"""Adapters as PEFT and diffusers 0.42.1 keep them (`pytorch_lora_weights.safetensors`) <-> `models.lora`.

  transformer.blocks.0.attn1.to_q.lora_A.weight     [rank, inputs]     our "a", transposed
  transformer.blocks.0.attn1.to_q.lora_B.weight     [outputs, rank]    our "b", transposed

The heads of "b" are permuted as in the weight. Each of two experts has its own file, with these names
(`load_into_transformer_2=True` loads the other). weights/lora_files.py reads files in any notation.
"""

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.lora import LINEARS, LoRAConfig
from sora_jax.weights import lora_files, table, wan_dit, wan_original

NAMES = ("diffusers", "comfyui")


def rows(cfg, adapters):
  """The table of the adapters (a LoRAConfig) of a DiT: A and B of each layer, from the row of its weight."""
  weights = {row.name: row for row in wan_dit.rows(cfg)}
  return [
    one
    for name, _, _ in adapters.layers()
    for one in lora_files.pair_rows(weights[f"blocks.{{}}.{name}.weight"], adapters.rank)
  ]


def to_diffusers(params, cfg, adapters, names="diffusers"):
  """Adapters of a DiT -> iterator of (name in the file, float32 array). B includes alpha / rank.

  names: diffusers, or comfyui, which has those of the original release.
  """
  for name, value in table.to_diffusers(params, rows(cfg, adapters)):
    if name.endswith("lora_B.weight"):
      value = value * np.float32(adapters.scale)
    if names == "comfyui":
      module, half = name.rsplit(".lora_", 1)
      (original,) = wan_original.rename([f"{module}.weight"], "dit", layout="diffusers")
      yield f"diffusion_model.{original.removesuffix('.weight')}.lora_{half}", value
    else:
      yield f"transformer.{name}", value


def from_files(tensors, cfg, metadata=None):
  """Mapping of names to arrays, in any notation -> (LoRAConfig, adapters of a DiT of shape cfg).

  metadata: that of the file. Raises BadInput where the file changes more than LINEARS by pairs, which cannot
  be trained on.
  """
  deltas, _ = lora_files.read(tensors, cfg, metadata)
  if len(deltas) > 1:
    raise BadInput("LoRA: the file has adapters for two experts; give one for each")
  (deltas,) = deltas.values()
  layers = {}  # name of a layer, of LINEARS: {name of a weight: Delta}
  for name, delta in deltas.items():
    layer = ".".join(name.split(".")[2:]).removesuffix(".weight")
    if not name.startswith("blocks.") or layer not in LINEARS or delta.pair is None or delta.diff is not None:
      raise BadInput(
        f"LoRA: {name} is changed, too; only pairs for {', '.join(LINEARS)} of blocks can be trained on. "
        "Sample with the file (--lora), or merge it (launch.import_weights --lora)"
      )
    layers.setdefault(layer, {})[name] = delta
  scales, rank = (
    {delta.scale for delta in deltas.values()},
    max(len(delta.pair[0]) for delta in deltas.values()),
  )
  scale = scales.pop() if len(scales) == 1 else 1.0  # one for all, as training has it; else a factor of b
  adapters = LoRAConfig(rank, scale * rank, tuple(sorted(layers)))
  params = {}
  weights = {row.name: row for row in wan_dit.rows(cfg)}
  for name, (part, ours), _ in adapters.layers():
    row = weights[f"blocks.{{}}.{name}.weight"]
    some = [layers[name].get(one, lora_files.Delta()) for one in row.names]
    a, b = lora_files.stack(row, some, 1 / scale, rank)
    params.setdefault(part, {})[ours] = {"a": a, "b": b}
  return adapters, {"blocks": params}
