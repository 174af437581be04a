"""LoRA as people have it: files of adapters for the weights of a model, several at once, with strengths."""

import zlib

from sora_jax.errors import BadInput
from sora_jax.models import lora
from sora_jax.weights import lora_files


def open_all(texts):
  """["[high=|low=]FILE[:STRENGTH]", ...] -> [lora_files.LoRA]. Raises BadInput."""
  return [one if isinstance(one, lora_files.LoRA) else lora_files.LoRA.parse(one) for one in texts]


def identity(loras):
  """A text that changes with the files, their strengths and their experts; "" of none."""
  crc = 0
  for one in loras:
    crc = zlib.crc32(f"{one.strength!r} {one.expert}".encode(), crc)
    crc = zlib.crc32(one.file().read_bytes(), crc)
  return f"-{crc:08x}" if loras else ""


def deltas(loras, cfg, keys, ignore=False, say=lambda line: None):
  """What files add to the weights of DiTs of one shape -> {key of the weights: tree for `lora.merge`}.

  cfg: DiTConfig. keys: of the weights, "dit", or "dit_high" and "dit_low"; a file that names no expert is for
  both. ignore: names that fit no layer are left out, and said. Raises BadInput.
  """
  experts = {key.removeprefix("dit").removeprefix("_"): key for key in keys}
  parts = {key: [] for key in keys}
  for one in loras:
    tensors = one.tensors()
    found, unknown = lora_files.read(tensors, cfg, tensors.metadata, ignore)
    named = {one.expert} - {""} or set(found) - {""}
    if wrong := named - set(experts):
      has = "two experts, high and low" if len(experts) > 1 else "one transformer"
      raise BadInput(f"LoRA {one.name}: it is for the expert {min(wrong)}, and this model has {has}")
    for expert, weights in found.items():
      if one.expert and expert not in ("", one.expert):
        raise BadInput(f"LoRA {one.name}: its names are of the expert {expert}")
      for target in (one.expert or expert,) if one.expert or expert else experts:
        parts[experts[target]].append((weights, one.strength))
    count = sum(map(len, found.values()))
    left = f"; left out: {len(unknown)}, as {unknown[0]}" if unknown else ""
    say(f"LoRA {one.name}: changes {count} weights{left}")
  return {key: lora_files.tree(some, cfg) for key, some in parts.items() if some}


def merged(params, model, loras, ignore=False, say=lambda line: None):
  """The weights of a t2v.Model with adapters added to them."""
  trees = deltas(loras, model.dit, [key for key in params if key.startswith("dit")], ignore, say)
  return params | {key: lora.merge(params[key], tree) for key, tree in trees.items()}
