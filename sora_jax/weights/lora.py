"""Adapters in the layout of PEFT and diffusers (`pytorch_lora_weights.safetensors`, diffusers 0.42.1) <-> `models.lora`.

  transformer.blocks.0.attn1.to_q.lora_A.weight   [rank, inputs]     our "a", transposed
  transformer.blocks.0.attn1.to_q.lora_B.weight   [outputs, rank]    our "b", transposed; its heads turned as the weight's
  transformer.blocks.0.attn1.to_q.alpha           a number; without it alpha = rank. diffusers also keeps it in the file's metadata.

Of two experts each has a file of its own, with these names (`load_into_transformer_2=True` loads the other).
"""

import json
import re

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models.lora import LINEARS, LoRAConfig
from sora_jax.weights import table, wan_dit

FILE = "pytorch_lora_weights.safetensors"


def rows(cfg, adapters):
  """The table of adapters (a LoRAConfig) to a DiTConfig: of each layer A and B, from the rows of their weights."""
  of = {row.name: row for row in wan_dit.rows(cfg)}
  found = []
  for name, (part, ours), inputs in adapters.layers():
    row = of[f"blocks.{{}}.{name}.weight"]
    their_out, their_in = row.theirs.split()
    axes, sizes = row.ours.split(), row.sizes | {"r": adapters.rank}
    path, their = ("blocks", part, ours), f"blocks.{{}}.{name}"
    found.append(table.Row((*path, "a"), f"{their}.lora_A.weight", f"r {their_in}", " ".join([*axes[:inputs], "r"]), sizes, cfg.depth))
    found.append(table.Row((*path, "b"), f"{their}.lora_B.weight", f"{their_out} r", " ".join(["r", *axes[inputs:]]), sizes, cfg.depth))
  return found


def to_diffusers(params, cfg, adapters):
  """Adapters of a DiT -> iterator of (their name, float32 array). alpha / rank is in B, so that it needs no saying."""
  for name, value in table.to_diffusers(params, rows(cfg, adapters)):
    yield f"transformer.{name}", value * np.float32(adapters.scale) if name.endswith("lora_B.weight") else value


def from_diffusers(tensors, cfg, metadata=None):
  """Mapping of their names to arrays (and the metadata of their file) -> (LoRAConfig, adapters of a DiT of shape cfg).

  BadInput names a layer that we do not adapt, ranks that differ, or a shape that does not fit.
  """
  alphas, plain = {}, {}
  for name in tensors:
    bare = re.sub(r"^(transformer\.)?(base_model\.model\.)?(?=blocks\.)", "", name).replace(".default.weight", ".weight")
    (alphas if bare.endswith(".alpha") else plain)[bare] = name
  layers = sorted({match[1] for name in plain if (match := re.fullmatch(r"blocks\.\d+\.(.+)\.lora_[AB]\.weight", name))})
  if not layers or any(layer not in LINEARS for layer in layers):
    wrong = next((layer for layer in layers if layer not in LINEARS), next(iter(tensors), "nothing"))
    raise BadInput(f"LoRA: {wrong} is adapted there, which is not known here; adapters of {', '.join(LINEARS)} of blocks are, in PEFT's layout")
  ranks = {shape[0] if len(shape := np.shape(tensors[plain[name]])) == 2 else shape for name in plain if name.endswith("lora_A.weight")}
  if len(ranks) != 1:
    raise BadInput(f"LoRA: ranks {sorted(ranks, key=str)} in one file; all adapters must have one rank")
  rank = ranks.pop()
  values = {np.asarray(tensors[name]).astype(np.float64).tobytes() for name in alphas.values()}
  if len(values) > 1 or alphas and 2 * len(alphas) != len(plain) or any(len(value) != 8 for value in values):
    raise BadInput("LoRA: alphas differ in one file, or are not one number for each layer; all adapters must have one alpha")
  try:
    adapters = LoRAConfig(rank, float(np.frombuffer(values.pop())[0]) if values else _alpha(metadata, rank), tuple(layers))
    return adapters, table.from_diffusers({name: tensors[there] for name, there in plain.items()}, rows(cfg, adapters))
  except (ValueError, TypeError) as error:
    raise BadInput(f"LoRA: {error}") from None
  except BadInput as error:
    raise BadInput(f"LoRA: {str(error).replace('is config.json of this model', 'are they adapters to these weights')}") from None


def _alpha(metadata, rank):
  """lora_alpha of the metadata that diffusers writes; without it the rank."""
  said = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
  for name in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
    if said.get(f"transformer.{name}"):
      raise BadInput(f"LoRA: {name} is {said[f'transformer.{name}']!r}; only plain adapters, all of one rank and alpha, are known")
  return float(said.get("transformer.lora_alpha", rank))
