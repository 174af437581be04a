"""Files of adapters in any notation: the same layers, the same sums, and one line for what does not fit."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sora_jax import adapters
from sora_jax.errors import BadInput
from sora_jax.models import dit, lora
from sora_jax.weights import lora_files, table, wan_dit, wan_original

CFG = dit.DiTConfig(
  depth=2,
  heads=2,
  head_size=8,
  mlp=24,
  channels=4,
  patch=(1, 2, 2),
  text_width=12,
  time_freqs=16,
  cross_norm=True,
)
SHAPES = table.their_shapes(wan_dit.rows(CFG))
ORIGINAL = {theirs: name for name, theirs in wan_original.rename(SHAPES, "dit", layout="diffusers").items()}
MATRICES = [name for name in SHAPES if name.endswith(".weight") and len(SHAPES[name]) > 1]


def pairs(rank=3, seed=0, names=MATRICES):
  """{weight: (down, up)} of random numbers."""
  rng = np.random.default_rng(seed)
  out = {}
  for name in names:
    outputs, *inputs = SHAPES[name]
    down, up = rng.normal(size=(rank, *inputs)), rng.normal(size=(outputs, rank, *[1] * (len(inputs) - 1)))
    out[name] = down.astype(np.float32), up.astype(np.float32)
  return out


def comfyui(name):
  return f"diffusion_model.{ORIGINAL[name].removesuffix('.weight')}"


def kohya(name):
  return "lora_unet_" + ORIGINAL[name].removesuffix(".weight").replace(".", "_")


# how a trainer names a layer, and the two halves of a pair
NOTATIONS = {
  "diffusers": (lambda name: f"transformer.{name.removesuffix('.weight')}", "lora_A", "lora_B"),
  "peft": (
    lambda name: f"base_model.model.{name.removesuffix('.weight')}",
    "lora_A.default",
    "lora_B.default",
  ),
  "bare": (lambda name: name.removesuffix(".weight"), "lora_A", "lora_B"),
  "diffusion-pipe": (comfyui, "lora_A", "lora_B"),
  "comfyui": (comfyui, "lora_down", "lora_up"),
  "musubi-tuner": (kohya, "lora_down", "lora_up"),
  "mixed": (lambda name: kohya(name).replace("_self_attn_", ".self_attn."), "lora_down", "lora_up"),
}


def written(some, notation, alpha=None, dtype=np.float32):
  """{weight: (down, up)} -> the tensors of a file."""
  layer, down, up = NOTATIONS[notation]
  tensors = {}
  for name, pair in some.items():
    for half, value in zip((down, up), pair):
      tensors[f"{layer(name)}.{half}.weight"] = value.astype(dtype)
    if alpha is not None:
      tensors[f"{layer(name)}.alpha"] = np.full((), alpha, dtype)
  return tensors


def product(pair):
  down, up = pair
  return np.tensordot(up.reshape(up.shape[:2]), down, 1)


@pytest.fixture(scope="module")
def weights():
  rng = np.random.default_rng(9)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def merged(weights, deltas, **kwargs):
  """Weights in diffusers' layout with deltas added, by way of ours."""
  params = wan_dit.from_diffusers(weights, CFG)
  tree = lora_files.tree(deltas, CFG)
  return dict(wan_dit.to_diffusers(jax.device_get(lora.merge(params, tree, **kwargs)), CFG))


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("alpha, dtype", [(None, np.float32), (6.0, np.float16), (1.5, ml_dtypes.bfloat16)])
def test_every_notation_says_the_same(notation, alpha, dtype):
  """Names of all trainers, with and without alpha, in three dtypes: the same layers and numbers."""
  some = pairs()
  deltas, unknown = lora_files.read(written(some, notation, alpha, dtype), CFG)
  assert list(deltas) == [""] and not unknown and set(deltas[""]) == set(MATRICES)
  for name, delta in deltas[""].items():
    assert delta.scale == (1.0 if alpha is None else alpha / 3)
    wanted = tuple(value.astype(dtype).astype(np.float32) for value in some[name])
    np.testing.assert_array_equal(product(delta.pair), product(wanted))


def test_what_is_added_is_the_sum_of_all_files(weights):
  """Two files of other ranks and strengths, and one of full differences of weights, biases and norms."""
  first, second = pairs(2, 1), pairs(5, 2, MATRICES[::2])
  rng = np.random.default_rng(3)
  diffs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
  tensors = {}
  for name, value in diffs.items():
    module, _, kind = ORIGINAL[name].rpartition(".")
    ending = {"weight": "diff", "bias": "diff_b"}.get(kind)
    tensors[f"diffusion_model.{module}.{ending}" if ending else f"diffusion_model.{ORIGINAL[name]}.diff"] = (
      value
    )
  read = [
    lora_files.read(some, CFG)[0][""]
    for some in (written(first, "comfyui", 1.0), written(second, "diffusers"), tensors)
  ]
  for lazy in (False, True):
    found = merged(weights, zip(read, (0.5, -2.0, 0.25)), lazy=lazy)
    for name, value in weights.items():
      wanted = value + 0.25 * diffs[name]
      if name in first:
        wanted = wanted + 0.5 / 2 * product(first[name])
      if name in second:
        wanted = wanted - 2 * product(second[name])
      np.testing.assert_allclose(found[name], wanted, atol=1e-4, err_msg=name)
  alone = merged(weights, [(read[1], 1.0)])
  assert {name for name in weights if not np.array_equal(alone[name], weights[name])} == set(second)


def test_layers_that_a_file_leaves_out_stay(weights):
  """One block alone, of three: the others are as they were."""
  one = pairs(names=["blocks.1.attn1.to_q.weight"])
  found = merged(weights, [(lora_files.read(written(one, "bare"), CFG)[0][""], 1.0)])
  assert [name for name in weights if not np.array_equal(found[name], weights[name])] == list(one)


def test_a_patch_embedding_of_condition_channels():
  """Their one convolution is two arrays of ours; both get their part of it."""
  cfg = dataclasses.replace(CFG, conditioning="channels", cond_channels=5)
  rng = np.random.default_rng(0)
  down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 9, 1, 2, 2), (16, 3, 1, 1, 1)))
  tensors = {"patch_embedding.lora_A.weight": down, "patch_embedding.lora_B.weight": up}
  tree = lora_files.tree([(lora_files.read(tensors, cfg)[0][""], 1.0)], cfg)
  rows = [row for row in wan_dit.rows(cfg) if row.path[0] in tree]
  parts = [row.to_diffusers(np.asarray(lora.delta_weight(tree[row.path[0]], 1.0))) for row in rows]
  assert len(parts) == 2
  np.testing.assert_allclose(np.concatenate(parts, 1), product((down, up)), atol=1e-5)


def test_alpha_in_the_metadata():
  """As PEFT and diffusers write it: one for all, others by pattern, and the root of the rank."""
  some = written(pairs(4), "diffusers")

  def scales(**fields):
    fields = {f"transformer.{name}": value for name, value in fields.items()}
    deltas, _ = lora_files.read(some, CFG, {"lora_adapter_metadata": json.dumps(fields)})
    return {name: delta.scale for name, delta in deltas[""].items()}

  assert set(scales(lora_alpha=8).values()) == {2.0} and set(
    scales(lora_alpha=8, use_rslora=True).values()
  ) == {4.0}
  by_pattern = scales(lora_alpha=8, alpha_pattern={"attn1.to_q": 2})
  assert {name for name, scale in by_pattern.items() if scale == 0.5} == {
    f"blocks.{i}.attn1.to_q.weight" for i in range(2)
  }
  with pytest.raises(BadInput, match="DoRA"):
    scales(use_dora=True)


def test_files_for_two_experts(tmp_path):
  """A file may be for one expert, by its flag or its names, or for both."""
  plain = written(pairs(names=MATRICES[-2:]), "bare")
  named = {f"transformer_2.{name}": value for name, value in plain.items()}
  for name, tensors in (("plain", plain), ("named", named)):
    safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
  two, one = ["dit_high", "dit_low"], ["dit"]

  def keys(text, of):
    return sorted(adapters.deltas(adapters.open_all([text.replace("/", f"{tmp_path}/")]), CFG, of))

  assert keys("/plain.safetensors:0.5", one) == ["dit"] and keys("/plain.safetensors", two) == two
  assert keys("low=/plain.safetensors", two) == ["dit_low"] == keys("/named.safetensors", two)
  with pytest.raises(BadInput, match="for the expert high, and this model has one transformer"):
    keys("high=/plain.safetensors", one)
  with pytest.raises(BadInput, match="its names are of the expert low"):
    keys("high=/named.safetensors", two)


GOOD = written(pairs(names=["blocks.0.attn1.to_q.weight"]), "comfyui", 1.0)
Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
  "change, says",
  [
    ({f"{Q}.lora_up.weight": None}, f"{Q}.lora_down.weight has no other half"),
    (
      {f"{Q}.lora_up.weight": np.ones((16, 2))},
      r"shape \(16, 2\) where \(16, 3\) was expected; ranks do not match",
    ),
    (
      {f"{Q}.lora_down.weight": np.ones((3, 99))},
      r"shape \(3, 99\) where \(3, 16\) .* another size of model",
    ),
    ({f"{Q}.lora_up.weight": np.ones((99, 3))}, r"shape \(99, 3\) where \(16, 3\) .* another size of model"),
    ({f"{Q}.diff_b": np.ones(7)}, r"diff_b has shape \(7,\) where \(16,\)"),
    ({f"{Q}uack.lora_up.weight": np.ones(3)}, "quack.*nearest is blocks.0.attn1.to_q. .*--lora_ignore"),
    ({f"{Q.replace('.0.', '.7.')}.alpha": np.ones(())}, "1 names fit no layer, the first .*blocks.7"),
    ({f"{Q}.dora_scale": np.ones(16)}, "is of DoRA"),
    ({f"{Q}.lokr_w1": np.ones(16)}, "is of LoKr"),
  ],
)
def test_what_does_not_fit_is_named(change, says):
  tensors = {name: value for name, value in (GOOD | change).items() if value is not None}
  with pytest.raises(BadInput, match=says) as error:
    lora_files.read(tensors, CFG)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "name, model",
  [
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "FLUX"),
    ("diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight", "HunyuanVideo"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "Stable Diffusion"),
    ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "LTX-Video"),
    ("something.else", "give adapters of a Wan model"),
  ],
)
def test_a_file_for_another_model_is_recognised(name, model):
  with pytest.raises(BadInput, match=f"no name of the file is a layer of this model .*{model}"):
    lora_files.read({name: np.ones((2, 2))}, CFG)


def test_ignored_names_are_listed():
  deltas, unknown = lora_files.read(GOOD | {"blocks.0.img.diff": np.ones(3)}, CFG, ignore=True)
  assert unknown == ["blocks.0.img.diff"] and set(deltas[""]) == {"blocks.0.attn1.to_q.weight"}


@pytest.mark.parametrize(
  "text, says",
  [
    ("{file}:strong", "strength 'strong' is no number"),
    ("{file}:nan", "no number"),
    ("{file}.gone", "there is no file"),
    ("{file}.gone:0.5", "there is no file"),
  ],
)
def test_flags_that_cannot_be_read(tmp_path, text, says):
  file = tmp_path / "style.safetensors"
  safetensors.numpy.save_file(GOOD, file)
  with pytest.raises(BadInput, match=says):
    lora_files.LoRA.parse(text.format(file=file))
  parsed = lora_files.LoRA.parse(f"high={file}:-0.5")
  assert (parsed.path, parsed.strength, parsed.expert) == (file, -0.5, "high")
  assert adapters.identity([parsed]) != adapters.identity([lora_files.LoRA(file, -0.25, "high")])
  file.write_bytes(file.read_bytes()[:-9])
  with pytest.raises(BadInput, match="cannot be read"):
    parsed.tensors()
