"""Files of adapters: `pipe.load_lora_weights` and ours make the same velocity of the same file."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from diffusers import UniPCMultistepScheduler, WanPipeline

from sora_jax import adapters
from sora_jax.models import lora
from sora_jax.weights import table, wan_dit, wan_original
from tests.golden.calls import dit_velocities
from tests.oracle.test_dit import peer, their_velocity
from tests.weights.test_lora_files import NOTATIONS

BLOCKS = (
  "attn1.to_q",
  "attn1.to_k",
  "attn1.to_v",
  "attn1.to_out.0",
  "attn2.to_q",
  "attn2.to_k",
  "attn2.to_v",
)
BLOCKS += ("attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
OUTSIDE = ("condition_embedder.time_proj", "proj_out")
OUTSIDE += tuple(
  f"condition_embedder.{part}_embedder.linear_{i}" for part in ("time", "text") for i in (1, 2)
)


def draw_file(cfg, notation, alpha, layers, biases=False):
  """The tensors of a file for every block, with random ranks; biases: full differences of these, too."""
  rng, shapes = np.random.default_rng(1), table.their_shapes(wan_dit.rows(cfg))
  original = {theirs: name for name, theirs in wan_original.rename(shapes, "dit", layout="diffusers").items()}
  _, down, up = NOTATIONS[notation]
  tensors = {}

  def layer(name):
    own = original[f"{name}.weight"].removesuffix(".weight")
    return {"diffusers": f"transformer.{name}", "musubi-tuner": f"lora_unet_{own.replace('.', '_')}"}.get(
      notation, f"diffusion_model.{own}"
    )

  for name in layers:
    outputs, inputs = shapes[f"{name}.weight"]
    rank = int(rng.integers(1, 5))
    pair = {down: (rank, inputs), up: (outputs, rank)}
    for half, shape in pair.items():
      tensors[f"{layer(name)}.{half}.weight"] = 0.3 * rng.normal(size=shape).astype(np.float32)
    if alpha is not None:
      tensors[f"{layer(name)}.alpha"] = np.full((), alpha, np.float32)
    if biases:
      tensors[f"{layer(name)}.diff_b"] = 0.3 * rng.normal(size=outputs).astype(np.float32)
  return tensors


def draw_call():
  """Latents [T, H, W, C], a time and a text [S, E], as `their_velocity` takes them."""
  rng = np.random.default_rng(0)
  call = [rng.normal(size=(3, 6, 8, 6)), 625, rng.normal(size=(7, 10))]
  return [np.asarray(value, np.float32) for value in call]


@pytest.mark.parametrize(
  "notation, alpha, outside, biases",
  [
    ("diffusers", None, True, False),
    ("diffusion-pipe", None, True, True),  # as of CausVid: all layers, and differences of biases
    ("comfyui", 2.0, False, False),
    ("musubi-tuner", 3.0, False, False),
  ],
)
def test_the_same_file_gives_the_same_velocity(notation, alpha, outside, biases, tmp_path, close):
  model, cfg, params = peer({})
  layers = [f"blocks.{i}.{name}" for i in range(cfg.depth) for name in BLOCKS]
  file = tmp_path / "style.safetensors"
  safetensors.numpy.save_file(
    draw_file(cfg, notation, alpha, [*layers, *(OUTSIDE if outside else ())], biases), file
  )
  call = draw_call()
  plain = their_velocity(model, *call)
  pipe = WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer=model)
  pipe.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="style")
  pipe.set_adapters("style", 0.7)
  theirs = their_velocity(pipe.transformer, *call)
  (tree,) = adapters.deltas(adapters.open_all([f"{file}:0.7"]), cfg, ["dit"]).values()
  (ours,) = dit_velocities(cfg, jax.device_get(lora.merge(params, tree)), [call])
  close("LoRA", ours, theirs)
  assert np.abs(theirs - plain).max() > 1e-2


def test_two_files_at_once(tmp_path, close):
  """Of unlike strengths, as `set_adapters` adds them."""
  model, cfg, params = peer({})
  layers = [f"blocks.{i}.{name}" for i in range(cfg.depth) for name in BLOCKS]
  pipe = WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer=model)
  files = {"a": ("diffusers", None, 0.4), "b": ("musubi-tuner", 3.0, -1.2)}
  for name, (notation, alpha, _) in files.items():
    safetensors.numpy.save_file(draw_file(cfg, notation, alpha, layers), tmp_path / f"{name}.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
  pipe.set_adapters(list(files), [strength for *_, strength in files.values()])
  call = draw_call()
  theirs = their_velocity(pipe.transformer, *call)
  texts = [f"{tmp_path / name}.safetensors:{strength}" for name, (*_, strength) in files.items()]
  (tree,) = adapters.deltas(adapters.open_all(texts), cfg, ["dit"]).values()
  (ours,) = dit_velocities(cfg, jax.device_get(lora.merge(params, tree)), [call])
  close("LoRA", ours, theirs)
