"""The rows of launch.benchmark as PyTorch, diffusers and transformers compute them.

Each function makes a random model, writes its weights to `folder`, and returns (step, 0): step() runs once
and returns its outputs.
"""

import os

import numpy as np

from launch.benchmark import worker


def load(threads):
  """Imports what the rows need, and sets the number of threads."""
  import diffusers  # noqa: F401
  import torch

  torch.set_num_threads(threads)


def _save_weights(model, folder):
  from safetensors.torch import save_file

  weights = {name: value.clone() for name, value in model.state_dict().items()}
  save_file(weights, os.path.join(folder, "weights.safetensors"))


def matmul(shape, folder):
  import torch

  del folder
  m, k, n = shape["size"]
  a, b = (torch.from_numpy(worker.uniform(i, *s)) for i, s in enumerate(((m, k), (k, n))))
  return lambda: {"out": (a @ b).numpy()}, 0


def convolution(shape, folder):
  import torch

  del folder
  n, c, h, w = shape["size"]
  x = torch.from_numpy(worker.uniform(0, n, h, w, c)).permute(0, 3, 1, 2).contiguous()
  kernel = torch.from_numpy(np.ascontiguousarray(worker.uniform(1, 3, 3, c, c).transpose(3, 2, 0, 1)))
  return lambda: {"out": torch.nn.functional.conv2d(x, kernel, padding=1).permute(0, 2, 3, 1).numpy()}, 0


def _transformer(shape):
  from diffusers import WanTransformer3DModel

  return WanTransformer3DModel(
    num_attention_heads=shape["heads"],
    attention_head_dim=shape["head_size"],
    ffn_dim=shape["mlp"],
    num_layers=shape["depth"],
    text_dim=shape["text_width"],
  )


def _wan(shape, folder):
  import torch

  torch.manual_seed(0)
  model = _transformer(shape)
  _save_weights(model, folder)
  return model


def _padded(inputs):
  """Tensors of each clip -> tensors of one batch, padded with zeros to the size of the first, the largest."""
  import torch

  largest = inputs[0][0].shape

  def pad(x):
    """Pads the last three dimensions; torch counts them from the last one."""
    missing = [big - small for big, small in zip(largest[:1:-1], x.shape[:1:-1])]
    return torch.nn.functional.pad(x, [n for after in missing for n in (0, after)])

  return [torch.cat(part) for part in zip(*((pad(x), *rest) for x, *rest in inputs))]


def _tensors(latents, timestep, text):
  import torch

  return (
    torch.from_numpy(latents.transpose(3, 0, 1, 2)[None].copy()),
    torch.tensor([timestep]),
    torch.from_numpy(text[None]),
  )


def dit(shape, folder):
  """A call for each clip."""
  import torch

  model, inputs = _wan(shape, folder).eval(), [_tensors(*clip) for clip in worker.clips(shape)]

  def step():
    with torch.no_grad():
      outs = [model(*clip, return_dict=False)[0][0].permute(1, 2, 3, 0).numpy() for clip in inputs]
    return {str(i): out for i, out in enumerate(outs)}

  return step, 0


def dit_padded(shape, folder):
  """One call for all clips. Only the outputs of the largest clips are right: the others attend to padding."""
  import torch

  model, inputs = _wan(shape, folder).eval(), [_tensors(*clip) for clip in worker.clips(shape)]
  first, batch = inputs[0][0].shape, _padded(inputs)

  def step():
    with torch.no_grad():
      outs = model(*batch, return_dict=False)[0].permute(0, 2, 3, 4, 1).numpy()
    return {str(i): out for i, (out, clip) in enumerate(zip(outs, inputs)) if clip[0].shape == first}

  return step, 0


def train(shape, folder, padded=False):
  """A call for each clip, gradients summed; `padded`: one call. The mean squared error leaves padding out."""
  import torch

  model, clips = _wan(shape, folder).train(), [_tensors(*clip) for clip in worker.clips(shape)]
  targets = [torch.from_numpy(value)[None] for value in worker.targets([clip[0].shape[1:] for clip in clips])]
  batches = [(*clip, target, torch.ones_like(target)) for clip, target in zip(clips, targets)]
  if padded:
    latents, target, real = (_padded([(batch[i],) for batch in batches])[0] for i in (0, 3, 4))
    timestep, text = (torch.cat([clip[i] for clip in clips]) for i in (1, 2))
    batches = [(latents, timestep, text, target, real)]
  values = sum(float(real.sum()) for *_, real in batches)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)

  def step():
    losses = []
    for *inputs, target, real in batches:
      squares = torch.square((model(*inputs, return_dict=False)[0] - target) * real).sum((1, 2, 3, 4))
      (squares.sum() / values).backward()
      losses += (squares / real.sum((1, 2, 3, 4))).tolist()
    optimizer.step()
    optimizer.zero_grad()
    return losses

  return worker.three_steps(step), 0


def train_padded(shape, folder):
  """As `train`; returns the loss of the first clip in the first step: the other clips attend to padding."""
  step, seconds = train(shape, folder, padded=True)
  return lambda: {"loss": step()["loss"][:1, :1]}, seconds


def _vae(shape, folder):
  import torch
  from diffusers import AutoencoderKLWan

  torch.manual_seed(0)
  model = AutoencoderKLWan(base_dim=shape["base_dim"]).eval()
  _save_weights(model, folder)
  return model


def vae_encode(shape, folder):
  import torch

  model, video = _vae(shape, folder), worker.uniform(0, 1, shape["frames"], *shape["size"], 3)
  video = torch.from_numpy(np.moveaxis(video, -1, 1).copy())

  def step():
    with torch.no_grad():
      return {"mean": np.moveaxis(model.encode(video).latent_dist.mean.numpy(), 1, -1)}

  return step, 0


def vae_decode(shape, folder):
  import torch

  latents = worker.uniform(0, 1, 1 + shape["frames"] // 4, *(n // 8 for n in shape["size"]), 16)
  model, latents = _vae(shape, folder), torch.from_numpy(np.moveaxis(latents, -1, 1).copy())

  def step():
    with torch.no_grad():
      return {"video": np.moveaxis(model.decode(latents).sample.numpy(), 1, -1)}

  return step, 0


def text(shape, folder):
  """All prompts in one call, padded to 512 tokens, with a mask."""
  import torch
  from transformers import UMT5Config, UMT5EncoderModel

  torch.manual_seed(0)
  model = UMT5EncoderModel(
    UMT5Config(
      vocab_size=shape["vocab"],
      d_model=shape["width"],
      d_kv=shape["head_size"],
      d_ff=shape["mlp"],
      num_layers=shape["depth"],
      num_heads=shape["heads"],
      feed_forward_proj="gated-gelu",
    )
  ).eval()
  _save_weights(model, folder)
  prompts = worker.prompts(shape)
  ids, mask = (torch.zeros(len(prompts), 512, dtype=torch.long) for _ in range(2))
  for i, prompt in enumerate(prompts):
    ids[i, : len(prompt)], mask[i, : len(prompt)] = torch.from_numpy(prompt), 1

  def step():
    with torch.no_grad():
      out = model(ids, mask).last_hidden_state.numpy()
    return {str(i): out[i, : len(prompt)] for i, prompt in enumerate(prompts)}

  return step, 0


def job(shape, folder):
  """A pipeline, which is saved for the other side; it starts from the noise that the other side has saved."""
  import torch
  from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
  from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

  torch.manual_seed(0)
  saved = os.path.join(folder, "pipeline")
  worker.save_tokenizer(os.path.join(saved, "tokenizer"))
  text = UMT5Config(
    vocab_size=512,
    d_model=shape["text_width"],
    d_kv=8,
    d_ff=shape["text_width"],
    num_layers=1,
    num_heads=shape["text_width"] // 8,
    feed_forward_proj="gated-gelu",
  )
  pipe = WanPipeline(
    tokenizer=AutoTokenizer.from_pretrained(os.path.join(saved, "tokenizer")),
    text_encoder=UMT5EncoderModel(text).eval(),
    vae=AutoencoderKLWan(base_dim=shape["base_dim"]).eval(),
    transformer=_transformer(shape).eval(),
    scheduler=UniPCMultistepScheduler(
      prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
  )
  pipe.save_pretrained(saved)
  pipe.set_progress_bar_config(disable=True)

  def step():
    noise = np.load(os.path.join(folder, "noise.npy")).transpose(3, 0, 1, 2)[None].copy()
    return {
      "frames": pipe(
        prompt=worker.PROMPT,
        negative_prompt=worker.NEGATIVE,
        height=shape["size"][0],
        width=shape["size"][1],
        num_frames=shape["frames"],
        num_inference_steps=shape["steps"],
        guidance_scale=worker.GUIDANCE,
        latents=torch.from_numpy(noise),
      ).frames[0]
    }

  return step, 0
