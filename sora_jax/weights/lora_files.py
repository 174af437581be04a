"""Files of adapters as people have them -> what they add to the weights of a DiT.

Trainers name the same layers in many ways:

  transformer.blocks.0.attn1.to_q.lora_A.weight          diffusers, PEFT
  diffusion_model.blocks.0.self_attn.q.lora_A.weight     ComfyUI, diffusion-pipe; also lora_down
  lora_unet_blocks_0_self_attn_q.lora_down.weight        kohya, musubi-tuner
  diffusion_model.blocks.0.self_attn.q.diff_b            a full difference of a bias; .diff: of a weight

So a name is compared without its prefix, and with underscores for dots, to the names that the weights have in
diffusers and in the original releases. What a pair adds is strength * alpha / rank * B A; a difference adds
strength * itself. alpha is a tensor of the file, or in its metadata, or the rank. Compare
`_convert_non_diffusers_wan_lora_to_diffusers` in diffusers 0.42.1 (loaders/lora_conversion_utils.py), which
leaves out differences of norms, and ComfyUI (comfy/lora.py), which has them.
"""

import dataclasses
import difflib
import json
import math
import pathlib
import re

import numpy as np

from sora_jax.errors import BadInput
from sora_jax.models import lora
from sora_jax.weights import files, table, wan_dit, wan_original

FILE = "pytorch_lora_weights.safetensors"  # in a folder of diffusers
EXPERTS = {  # prefixes that name one of two experts
  "transformer_1": "high",
  "transformer_2": "low",
  "high_noise": "high",
  "low_noise": "low",
}
PREFIX = re.compile(
  r"(base_model\.model|model|diffusion_model|transformer(?:_[12])?|(?:high|low)_noise)\.|lora_unet_+"
)
KINDS = {  # how a name ends, and what it is
  r"lora_A(\.\w+)?\.weight|lora_down\.weight": "down",
  r"lora_B(\.\w+)?\.weight|lora_up\.weight": "up",
  r"lora_B(\.\w+)?\.bias|lora_up\.bias": "up_bias",
  r"alpha": "alpha",
  r"diff": "diff",
  r"diff_b": "diff_bias",
}
OTHER_KINDS = {  # of adapters that are no sum of products
  "dora_scale": "DoRA",
  "lora_magnitude_vector": "DoRA",
  "lokr_": "LoKr",
  "hada_": "LoHa",
  "oft_": "OFT",
}
OTHER_MODELS = {  # parts of names, with underscores for dots, and whose they are
  "double_blocks": "HunyuanVideo or FLUX",
  "single_transformer_blocks": "FLUX or HunyuanVideo",
  "joint_blocks": "Stable Diffusion 3",
  "down_blocks": "Stable Diffusion",
  "input_blocks": "Stable Diffusion",
  "lora_te": "a text encoder",
  "transformer_blocks": "LTX-Video, CogVideoX or Qwen-Image",
  "layers_": "Lumina or Z-Image",
}


@dataclasses.dataclass(frozen=True)
class LoRA:
  """A file of adapters, how strongly it counts, and for which expert: high or low, or all ("")."""

  path: pathlib.Path
  strength: float = 1.0
  expert: str = ""

  @classmethod
  def parse(cls, text):
    """[high=|low=]FILE[:STRENGTH], as style.safetensors:0.8 -> LoRA. Raises BadInput."""
    expert, path, strength = "", str(text), 1.0
    if path.partition("=")[0] in ("high", "low"):
      expert, _, path = path.partition("=")
    before, colon, after = path.rpartition(":")
    if colon and not pathlib.Path(path).exists():
      path = before
      try:
        strength = float(after)
      except ValueError:
        strength = math.nan
      if not math.isfinite(strength):
        raise BadInput(f"LoRA {text}: the strength {after!r} is no number; as FILE:0.8")
    if not pathlib.Path(path).exists():
      raise BadInput(f"LoRA {text}: there is no file {path}; as [high=|low=]FILE[:STRENGTH]")
    return cls(pathlib.Path(path), strength, expert)

  @property
  def name(self):
    """As `parse` takes it, without the folder."""
    return f"{self.expert}{'=' * bool(self.expert)}{self.path.name}:{self.strength:g}"

  def file(self):
    """The file itself, also where `path` is the folder that diffusers writes."""
    return self.path / FILE if self.path.is_dir() else self.path

  def tensors(self):
    """-> files.Tensors."""
    return files.Tensors(self.file())


@dataclasses.dataclass
class Delta:
  """What a file adds to one weight of diffusers' layout. Arrays are float32.

  pair: (down [r, inputs...], up [outputs, r]), or None. scale: alpha / rank.
  """

  pair: tuple | None = None
  scale: float = 1.0
  diff: np.ndarray | None = None


def read(tensors, cfg, metadata=None, ignore=False):
  """Mapping of names to arrays -> ({expert: {weight in diffusers: Delta}}, names that fit nothing).

  expert: "" where the names say none. metadata: that of the file. ignore: leave out names that fit nothing.
  Raises BadInput, which names a tensor that does not fit and why.
  """
  modules = _modules(cfg)
  found, unknown = {}, []
  for name in tensors:
    expert, module, kind = _split(name, modules)
    if kind is None:
      unknown.append(name)
    else:
      found.setdefault((expert, module), {})[kind] = name
  if not found:
    raise BadInput(_no_match(list(tensors)))
  if unknown and not ignore:
    raise BadInput(_first_unknown(unknown, modules))
  shapes = table.their_shapes(wan_dit.rows(cfg))
  alphas, deltas = _Alphas(metadata), {}
  for (expert, module), names in found.items():
    out, arrays = deltas.setdefault(expert, {}), {}
    for kind, name in names.items():
      arrays[kind] = np.asarray(tensors[name]).astype(np.float32)
    weight = module if module in shapes else f"{module}.weight"
    if "down" in names or "up" in names:
      pair, scale = _pair(module, names, arrays, shapes[weight], alphas)
      out[weight] = Delta(pair, scale)
    elif "up_bias" in names:
      raise BadInput(f"LoRA: {names['up_bias']} has no matrices beside it; download the file again")
    for kind, target in (("diff", weight), ("diff_bias", f"{module}.bias"), ("up_bias", f"{module}.bias")):
      if kind in names:
        diff = arrays[kind] * (np.float32(scale) if kind == "up_bias" else 1)
        if diff.size != np.prod(shapes[target]):
          raise BadInput(_misfit(names[kind], diff.shape, shapes[target]))
        delta = out.setdefault(target, Delta())
        diff = diff.reshape(shapes[target])
        delta.diff = diff if delta.diff is None else delta.diff + diff
  return deltas, unknown


def tree(deltas, cfg):
  """[({weight in diffusers: Delta}, strength)], added up -> nested dict like the weights of a DiT.

  At each weight that changes it has {"a": [layers, inputs..., R], "b": [layers, R, outputs...]} or {"diff":
  as the weight}, or both, float32; R: the ranks of all files together. Outside of blocks there are no layers.
  """
  out, deltas = {}, list(deltas)
  for row in wan_dit.rows(cfg):
    node = _row_delta(row, deltas)
    if node:
      *parents, last = row.path
      place = out
      for key in parents:
        place = place.setdefault(key, {})
      place[last] = node
  return out


def _row_delta(row, deltas):
  """What all files add to one of our arrays -> {"a", "b", "diff"}, or some of it, or {}."""
  nothing, diffs, pairs = Delta(), [0.0] * len(row.names), []
  for weights, strength in deltas:
    layers = [weights.get(name, nothing) for name in row.names]
    for i, one in enumerate(layers):
      if one.diff is not None:
        diffs[i] = diffs[i] + np.float32(strength) * row.from_diffusers(one.diff)
    if any(one.pair for one in layers):
      pairs.append(stack(row, layers, strength))
  node = {}
  if any(np.ndim(diff) for diff in diffs):
    shape = row.our_shape[1:] if row.stacked else row.our_shape
    layers = [np.broadcast_to(np.float32(diff), shape) for diff in diffs]
    node["diff"] = np.stack(layers) if row.stacked else np.array(layers[0])
  if pairs:
    node["a"] = np.concatenate([a for a, _ in pairs], -1)
    node["b"] = np.concatenate([b for _, b in pairs], int(row.stacked))
  return node


def delta_of(tree, row, layer):
  """What a tree adds to one of our arrays, or to a layer of it, float32; None: nothing."""
  for key in row.path:
    tree = tree.get(key, {})
  if not tree:
    return None
  one = {name: value[layer] if row.stacked else value for name, value in tree.items()}
  return np.asarray(lora.delta_weight(one, 1.0))


def pair_rows(row, rank):
  """A matrix's row of the table -> the rows of its adapter: A [r, inputs] and B [outputs, r]."""
  out_word, *in_words = row.theirs.split()
  inputs = {c for word in in_words for c in word if c.isalpha()}
  ours = row.ours.split()
  ours_in = [word for word in ours if inputs & set(word)]
  ours_out = [word for word in ours if not inputs & set(word)]
  sizes, module = row.sizes | {"r": rank}, row.name.removesuffix(".weight")
  a = dataclasses.replace(
    row,
    path=(*row.path, "a"),
    name=f"{module}.lora_A.weight",
    theirs=" ".join(["r", *in_words]),
    ours=" ".join([*ours_in, "r"]),
    sizes=sizes,
  )
  b = dataclasses.replace(
    row,
    path=(*row.path, "b"),
    name=f"{module}.lora_B.weight",
    theirs=f"{out_word} r",
    ours=" ".join(["r", *ours_out]),
    sizes=sizes,
    parts=None,
  )
  return a, b


def stack(row, deltas, strength=1.0, rank=0):
  """The pairs of one of our arrays, a Delta for each layer -> (a, b) in our layout.

  Smaller ranks are padded with zeros to the largest, or to `rank`; strength * alpha / rank is a factor of b.
  """
  rank = max(rank, *(len(one.pair[0]) for one in deltas if one.pair))
  row_a, row_b = pair_rows(row, rank)
  a = np.zeros(row_a.our_shape, np.float32)
  b = np.zeros(row_b.our_shape, np.float32)
  layers = zip(a, b) if row.stacked else [(a, b)]
  for (a_layer, b_layer), one in zip(layers, deltas, strict=True):
    if one.pair:
      down, up = one.pair
      pad = rank - len(down)
      a_layer[...] = row_a.from_diffusers(np.pad(down, [(0, pad)] + [(0, 0)] * (down.ndim - 1)))
      b_layer[...] = row_b.from_diffusers(np.pad(up, [(0, 0), (0, pad)])) * np.float32(strength * one.scale)
  return a, b


def _modules(cfg):
  """{name with underscores, as in diffusers or in the original release: module in diffusers}."""
  modules = {}
  names = [name for row in wan_dit.rows(cfg) for name in row.names]
  original = {ours: theirs for theirs, ours in wan_original.rename(names, "dit", layout="diffusers").items()}
  for name in names:
    module = re.sub(r"\.(weight|bias)$", "", name)
    for other in (name, original[name]):
      modules[re.sub(r"\.(weight|bias)$", "", other).replace(".", "_")] = module
  return modules


def _split(name, modules):
  """Name in a file -> (expert, module, a value of KINDS); the last is None where it fits no module."""
  for ending, kind in KINDS.items():
    match = re.fullmatch(rf"(.+)\.({ending})", name)
    if match:
      expert, rest = _without_prefix(match[1])
      module = modules.get(rest.replace(".", "_"))
      return expert, module, kind if module else None
  return "", None, None


def _without_prefix(name, expert=""):
  """-> (expert, rest of the name)."""
  match = PREFIX.match(name)
  if not match:
    return expert, name
  return _without_prefix(name[match.end() :], EXPERTS.get(match[1], expert))


def _pair(module, names, arrays, shape, alphas):
  """-> ((down, up), alpha / rank)."""
  for kind, other in (("down", "up"), ("up", "down")):
    if other not in names:
      raise BadInput(f"LoRA: {names[kind]} has no other half in the file; download it again")
  down, up = arrays["down"], arrays["up"]
  rank, (outputs, *inputs) = len(down), shape
  if len(shape) < 2:
    raise BadInput(f"LoRA: {names['down']} adapts {module}, which is no matrix here")
  if up.size != outputs * rank or up.shape[:2] != (outputs, rank):
    reason = "ranks do not match" if up.shape[0] == outputs else "is it for another size of model?"
    raise BadInput(f"LoRA: {names['up']} has shape {up.shape} where {(outputs, rank)} was expected; {reason}")
  if down.size != rank * np.prod(inputs):
    raise BadInput(_misfit(names["down"], down.shape, (rank, *inputs)))
  scale = alphas.scale(module, float(arrays["alpha"].reshape(-1)[0]) if "alpha" in arrays else None, rank)
  return (down.reshape(rank, *inputs), up.reshape(outputs, rank)), scale


class _Alphas:
  """alpha / rank of each module, from a tensor of the file or from the metadata that PEFT writes."""

  def __init__(self, metadata):
    fields = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
    fields = {name.removeprefix("transformer."): value for name, value in fields.items()}
    if fields.get("use_dora"):
      raise BadInput("LoRA: it is DoRA, whose norms are not known here; train or merge it as plain LoRA")
    self._alpha, self._patterns = fields.get("lora_alpha"), fields.get("alpha_pattern") or {}
    self._root = bool(fields.get("use_rslora"))

  def scale(self, module, alpha, rank):
    if alpha is None:
      alpha = next(
        (value for name, value in self._patterns.items() if re.fullmatch(rf"(.*\.)?({name})", module)),
        self._alpha,
      )
    if alpha is None:
      return 1.0
    return alpha / (math.sqrt(rank) if self._root else rank)


def _misfit(name, shape, wanted):
  return (
    f"LoRA: {name} has shape {tuple(shape)} where {tuple(map(int, wanted))} was expected; is it for another "
    "size of model?"
  )


def _no_match(names):
  """A line for a file none of whose names is a layer of the model."""
  if not names:
    return "LoRA: the file holds no tensors; download it again"
  text = " ".join(names).replace(".", "_")
  kind = next((kind for mark, kind in OTHER_KINDS.items() if mark in text), None)
  if kind:
    return _other_kind(names[0], kind)
  model = next((model for mark, model in OTHER_MODELS.items() if mark in text), None)
  looks = f"it looks like one for {model}" if model else "give adapters of a Wan model"
  return f"LoRA: no name of the file is a layer of this model (the first is {names[0]}); {looks}"


def _other_kind(name, kind):
  """A line for a file of another kind of adapter."""
  return f"LoRA: {name} is of {kind}; only LoRA and full differences are read: merge it where it was made"


def _first_unknown(unknown, modules):
  """A line for names that fit nothing, with what the first may have meant."""
  flat = unknown[0].replace(".", "_")
  kind = next((kind for mark, kind in OTHER_KINDS.items() if mark in flat), None)
  if kind:
    return _other_kind(unknown[0], kind)
  core = re.sub(r"\.(lora_[ABud].*|alpha|diff(_b)?)$", "", _without_prefix(unknown[0])[1]).replace(".", "_")
  near = difflib.get_close_matches(core, modules, 1, 0.0)
  return (
    f"LoRA: {len(unknown)} names fit no layer, the first {unknown[0]}; the nearest is {modules[near[0]]}. "
    "Is it for another model? --lora_ignore leaves them out"
  )
