"""Weights as they lie on disk: single files without a config, eight bits with scales, one folder for all."""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from launch.benchmark import worker
from sora_jax import files as our_files, parts, workdir as workdirs
from sora_jax.convert import importing
from sora_jax.errors import BadInput
from sora_jax.models import vae
from sora_jax.pipeline import Pipeline
from sora_jax.weights import files, spiece, table, wan_dit, wan_original, wan_pipeline, wan_vae

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def dit_weights():
  """-> (config, {name in the original release: array})."""
  tensors = files.Tensors(GOLDEN / "dit")
  names = wan_original.rename(tensors, "dit", layout="diffusers")
  cfg = wan_dit.config_from_diffusers(files.read_config(GOLDEN / "dit"))
  return cfg, {original: tensors[name] for original, name in names.items()}


@pytest.fixture
def known(dit_weights, monkeypatch):
  """The tiny transformer is a known size."""
  monkeypatch.setattr(wan_dit, "SIZES", wan_dit.SIZES | {"tiny": dit_weights[0]})


@pytest.fixture(scope="module")
def folder(dit_weights, tmp_path_factory):
  """A transformer with a prefix, a VAE, and a text encoder with its tokenizer, as files for ComfyUI."""
  folder = tmp_path_factory.mktemp("comfyui")
  prefixed = {f"model.diffusion_model.{name}": value for name, value in dit_weights[1].items()}
  safetensors.numpy.save_file(prefixed, folder / "wan.safetensors")
  cfg = dataclasses.replace(vae.SIZES["wan2.1"], base_dim=4)
  tensors = dict(wan_vae.to_diffusers(jax.device_get(vae.init(jax.random.key(0), cfg)), cfg))
  safetensors.numpy.save_file(tensors, folder / "vae.safetensors")
  tokenizer = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  worker.save_tokenizer(tokenizer, ("a red ball moves left", "a blue cat sleeps") * 9, vocab_size=40)
  model = np.frombuffer(spiece.from_folder(tokenizer), np.uint8)
  text = safetensors.numpy.load_file(GOLDEN / "umt5" / "model.safetensors")
  safetensors.numpy.save_file(text | {"spiece_model": model}, folder / "umt5.safetensors")
  return folder


def write_eight_bits(path, tensors, names, scale, ending):
  """A safetensors file, of which `names` have eight bits and a scale. -> what the weights are worth."""
  header, pieces, at, worth = {}, [], 0, dict(tensors)

  def put(name, value, kind):
    nonlocal at
    data = np.ascontiguousarray(value).tobytes()
    header[name] = {"dtype": kind, "shape": list(np.shape(value)), "data_offsets": [at, at + len(data)]}
    pieces.append(data)
    at += len(data)

  for name, value in tensors.items():
    if name in names:
      small = (np.asarray(value, np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
      put(name, small, "F8_E4M3")
      put(name.removesuffix(".weight") + ending, np.float32(scale), "F32")
      worth[name] = (small.astype(np.float32) * np.float32(scale)).astype(ml_dtypes.bfloat16)
    else:
      put(name, np.asarray(value, np.float32), "F32")
  put("scaled_fp8", np.zeros(2, ml_dtypes.float8_e4m3fn), "F8_E4M3")
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))
  return worth


def test_a_folder_of_single_files(known, folder, tmp_path):
  """All parts are recognised, and sample together; the tokenizer comes out of the text encoder's file."""
  importing.plan(folder, tmp_path / "w").run()
  pipe = Pipeline.open(tmp_path / "w")
  assert (pipe.defaults["shift"], pipe.defaults["steps"], pipe.schedule) == (5.0, 50, "diffusers")
  fields = {"id": "a", "prompt": "a red ball", "size": [16, 32], "frames": 1, "steps": 1, "guidance": 1.0}
  (result,) = pipe.run([fields])
  assert result.video().shape == (1, 16, 32, 3)
  tensors = files.Tensors(GOLDEN / "dit")
  for name, value in wan_dit.to_diffusers(pipe.params["dit"], pipe.model.dit):
    np.testing.assert_array_equal(value, np.asarray(tensors[name], np.float32))


def test_one_file_alone(known, folder, tmp_path):
  """A transformer alone; the rest goes into the same work directory by other commands."""
  for name in ("wan", "vae", "umt5"):
    importing.plan(folder / f"{name}.safetensors", tmp_path / "w").run()
  assert workdirs.read_config(tmp_path / "w").sample.shift == 5.0
  assert Pipeline.open(tmp_path / "w").embed(["a red ball"])[0].shape[1] == 32


def test_two_experts_in_one_folder(known, folder, dit_weights, tmp_path):
  """By `high` and `low` in their names; others are not guessed."""
  shutil.copytree(folder, tmp_path / "two")
  (tmp_path / "two" / "wan.safetensors").rename(tmp_path / "two" / "wan2.2_low_noise.safetensors")
  other = {name: value + 1 for name, value in dit_weights[1].items()}
  safetensors.numpy.save_file(other, tmp_path / "two" / "wan2.2_high_noise.safetensors")
  pipeline = wan_pipeline.open_pipeline(tmp_path / "two")
  assert [part.key for part in pipeline.parts] == ["dit_high", "dit_low", "text", "vae"]
  assert "high" in pipeline.parts[0].folder.name and (pipeline.boundary, pipeline.sample["shift"]) == (
    0.875,
    12,
  )
  (tmp_path / "two" / "wan2.2_high_noise.safetensors").rename(tmp_path / "two" / "mine.safetensors")
  with pytest.raises(BadInput, match="holds 2 transformers; two experts have `high` and `low`"):
    wan_pipeline.open_pipeline(tmp_path / "two")


@pytest.mark.parametrize("ending", files.SCALES)
def test_eight_bits_with_scales(known, dit_weights, tmp_path, ending):
  """Weights times their scales, as bfloat16; the file's marks are left out."""
  cfg, tensors = dit_weights
  names = [name for name in tensors if ".self_attn.q.weight" in name or ".ffn.0.weight" in name]
  worth = write_eight_bits(tmp_path / "wan.safetensors", tensors, names, 0.03, ending)
  part = wan_pipeline.open_file(tmp_path / "wan.safetensors")
  assert part.cfg == cfg and {part.stored[name] for name in names} == {"bfloat16"}
  importing.plan(tmp_path / "wan.safetensors", tmp_path / "w").run()
  _, params = parts.load_part(tmp_path / "w" / "model", None)
  named = wan_original.rename(tensors, "dit")
  for name, value in wan_dit.to_diffusers(params["dit"], cfg):
    np.testing.assert_array_equal(np.asarray(value, np.float32), np.asarray(worth[named[name]], np.float32))


def test_a_transformer_of_no_known_size(dit_weights, tmp_path):
  """The line names the nearest size, and the first tensor that differs."""
  (tmp_path / "w").mkdir()
  safetensors.numpy.save_file(dit_weights[1], tmp_path / "wan.safetensors")
  says = r"no known size \(.*wan-14b.*\); the nearest is wan-.*the first .*\(.*in the file"
  with pytest.raises(BadInput, match=says) as error:
    wan_pipeline.open_pipeline(tmp_path / "wan.safetensors")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["wan-1.3b", "wan-5b", "wan-14b", "wan-14b-i2v"])
def test_released_sizes_are_told_from_their_shapes(size):
  cfg = wan_dit.SIZES[size]

  class Shapes(dict):
    def shape(self, name):
      return self[name]

  assert wan_dit.config_of(Shapes(table.their_shapes(wan_dit.rows(cfg)))) == cfg


def test_gates_of_sparse_attention_are_left_out(tmp_path):
  """FastWan's: WanDMDPipeline, with weights that its dense attention does not use."""
  shutil.copytree(GOLDEN / "dit", tmp_path / "transformer")
  index = {"_class_name": "WanDMDPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
  our_files.write_json(tmp_path / "model_index.json", index)
  extra = {
    f"blocks.{i}.to_gate_compress.{kind}": np.ones(3, np.float32)
    for i in range(2)
    for kind in ("weight", "bias")
  }
  (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
  safetensors.numpy.save_file(extra, tmp_path / "transformer" / "gates.safetensors")
  pipeline = wan_pipeline.open_pipeline(tmp_path)
  assert any("4 tensors of sparse attention, as blocks.0.to_gate_compress" in note for note in pipeline.notes)
  importing.plan(tmp_path, tmp_path / "w").run()
  _, params = parts.load_part(tmp_path / "w" / "model", None)
  assert set(dict(wan_dit.to_diffusers(params["dit"], pipeline.parts[0].cfg))) == set(
    files.Tensors(GOLDEN / "dit")
  )


def test_pickles_without_torch(tmp_path, monkeypatch):
  """One line says how to convert them."""
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"x")
  with pytest.raises(BadInput, match=r"PyTorch, which is not installed here; .*torch.load\('Wan2.1_VAE.pth'"):
    wan_pipeline.open_pipeline(tmp_path / "Wan2.1_VAE.pth")
