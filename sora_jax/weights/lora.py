"""Adapters of PEFT and diffusers 0.42.1 (`pytorch_lora_weights.safetensors`) <-> `models.lora`.

  transformer.blocks.0.attn1.to_q.lora_A.weight   [rank, inputs]     our "a", transposed
  transformer.blocks.0.attn1.to_q.lora_B.weight   [outputs, rank]    our "b", transposed
  transformer.blocks.0.attn1.to_q.alpha           a number; without it alpha = rank

The heads of "b" are permuted as in the weight. diffusers also keeps alpha in the metadata of the file. Each
of two experts has its own file, with these names (`load_into_transformer_2=True` loads the other).
"""

import json
import re

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.lora import LINEARS, LoRAConfig
from sora_jax.weights import table, wan_dit

FILE = "pytorch_lora_weights.safetensors"


def rows(cfg, adapters):
  """The table of the adapters (a LoRAConfig) of a DiT: A and B of each layer, from the row of its weight."""
  weights = {row.name: row for row in wan_dit.rows(cfg)}
  out = []
  for name, (part, ours), inputs in adapters.layers():
    row = weights[f"blocks.{{}}.{name}.weight"]
    their_out, their_in = row.theirs.split()
    axes, sizes = row.ours.split(), row.sizes | {"r": adapters.rank}
    path, prefix = ("blocks", part, ours), f"blocks.{{}}.{name}"
    axes_a, axes_b = " ".join([*axes[:inputs], "r"]), " ".join(["r", *axes[inputs:]])
    name_a, name_b = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
    out.append(table.Row((*path, "a"), name_a, f"r {their_in}", axes_a, sizes, cfg.depth))
    out.append(table.Row((*path, "b"), name_b, f"{their_out} r", axes_b, sizes, cfg.depth))
  return out


def to_diffusers(params, cfg, adapters):
  """Adapters of a DiT -> iterator of (name in diffusers, float32 array). B includes alpha / rank."""
  for name, value in table.to_diffusers(params, rows(cfg, adapters)):
    if name.endswith("lora_B.weight"):
      value = value * np.float32(adapters.scale)
    yield f"transformer.{name}", value


def from_diffusers(tensors, cfg, metadata=None):
  """Mapping of names to arrays -> (LoRAConfig, adapters of a DiT of shape cfg).

  metadata: that of the file. Raises BadInput, which names a layer that we do not adapt, ranks that differ, or
  a shape that does not fit.
  """
  alphas, matrices = {}, {}  # name without prefixes: name in the file
  for name in tensors:
    bare = re.sub(r"^(transformer\.)?(base_model\.model\.)?(?=blocks\.)", "", name)
    bare = bare.replace(".default.weight", ".weight")
    (alphas if bare.endswith(".alpha") else matrices)[bare] = name
  layers = _layers(matrices)
  if not layers or any(layer not in LINEARS for layer in layers):
    wrong = next((layer for layer in layers if layer not in LINEARS), next(iter(tensors), "nothing"))
    raise BadInput(
      f"LoRA: {wrong} is adapted there, which is not known here; known are adapters of {', '.join(LINEARS)} "
      "of blocks, in PEFT's layout"
    )
  rank = _rank({name: tensors[stored] for name, stored in matrices.items()})
  values = {np.asarray(tensors[name]).astype(np.float64).tobytes() for name in alphas.values()}
  incomplete = alphas and 2 * len(alphas) != len(matrices)
  if len(values) > 1 or incomplete or any(len(value) != 8 for value in values):
    raise BadInput(
      "LoRA: alphas differ in one file, or are not one number for each layer; all adapters must have one "
      "alpha"
    )
  alpha = float(np.frombuffer(values.pop())[0]) if values else None
  try:
    adapters = LoRAConfig(rank, _alpha(metadata, rank) if alpha is None else alpha, tuple(layers))
    renamed = {name: tensors[stored] for name, stored in matrices.items()}
    return adapters, table.from_diffusers(renamed, rows(cfg, adapters))
  except (ValueError, TypeError) as error:
    raise BadInput(f"LoRA: {error}") from None
  except BadInput as error:
    message = str(error).replace("is config.json of this model", "are they adapters to these weights")
    raise BadInput(f"LoRA: {message}") from None


def _layers(names):
  """Sorted names of the layers that have adapters."""
  matches = (re.fullmatch(r"blocks\.\d+\.(.+)\.lora_[AB]\.weight", name) for name in names)
  return sorted({match[1] for match in matches if match})


def _rank(matrices):
  """The one rank of all adapters. Raises BadInput where ranks differ."""
  shapes = {np.shape(matrix) for name, matrix in matrices.items() if name.endswith("lora_A.weight")}
  ranks = {shape[0] if len(shape) == 2 else shape for shape in shapes}
  if len(ranks) != 1:
    raise BadInput(f"LoRA: ranks {sorted(ranks, key=str)} in one file; all adapters must have one rank")
  return ranks.pop()


def _alpha(metadata, rank):
  """lora_alpha in the metadata that diffusers writes; without it the rank."""
  config = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
  for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
    value = config.get(f"transformer.{name}")
    if value:
      raise BadInput(f"LoRA: {name} is {value!r}; only plain adapters, all of one rank and alpha, are known")
  return float(config.get("transformer.lora_alpha", rank))
