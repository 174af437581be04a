"""Losses of a reconstruction, for training the VAE: a trained discriminator, and fixed VGG16 features.

discriminator   a logit for each patch of 8 x 8 pixels of each frame (arXiv:1611.07004 sec. 3.2.2). It is
                causal in time like the VAE, so that clips and images go through the same weights. The hinge
                loss is in train_vae.py.
perceptual      distance of unit-length VGG16 features after each stage's last ReLU before pooling
                (arXiv:1801.03924 eq. 1, all channels of equal weight), mean over stages
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sora_jax.layout import Layout
from sora_jax.models.causal_conv import plane_conv
from sora_jax.models.vae_blocks import Conv, Norm

WIDTHS = (32, 64, 128)
# Index in `features` of torchvision's vgg16 of each convolution, by stage.
VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
VGG_WIDTHS = (64, 128, 256, 512, 512)
# Of RGB in [0, 1], as torchvision trained it.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Discriminator(nn.Module):
  """Video [B, T, H, W, 3] in [-1, 1] -> logits [B, T, H/8, W/8]; positive means real."""

  layout: Layout | None = None

  @nn.compact
  def __call__(self, video_BTHWC):
    x = video_BTHWC if self.layout is None else self.layout.constrain(video_BTHWC, "act_batch")
    for i, width in enumerate(WIDTHS):
      x = Conv(width, (3, 3), name=f"down_{i}")(x, stride=2)
      x = Conv(width, name=f"conv_{i}")(nn.leaky_relu(Norm(name=f"norm_{i}")(x), 0.2))
    return Conv(1, name="logit")(nn.leaky_relu(x, 0.2))[..., 0]


def vgg_features(weights, video_BTHWC):
  """Video in [-1, 1] -> list of VGG16 features [B, T, h, w, C] of five stages.

  Stages for which the frame is too small are left out.

  weights: {"features.N.weight": (height, width, in, out), "features.N.bias": (out,)}.
  """
  x = ((video_BTHWC + 1) / 2 - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)
  features = []
  for i, stage in enumerate(VGG_STAGES):
    if i:
      if min(x.shape[2:4]) < 2:
        break
      B, T, H, W, C = x.shape
      x = nn.max_pool(x.reshape(-1, H, W, C), (2, 2), (2, 2)).reshape(B, T, H // 2, W // 2, C)
    for n in stage:
      x = nn.relu(plane_conv(x, weights[f"features.{n}.weight"]) + weights[f"features.{n}.bias"])
    features.append(x)
  return features


def perceptual_distance(weights, a_BTHWC, b_BTHWC):
  """Squared distance of unit-length features, mean over stages and positions. -> scalar"""
  distances = []
  for a, b in zip(vgg_features(weights, a_BTHWC), vgg_features(weights, b_BTHWC), strict=True):
    distances.append(jnp.mean(jnp.sum((_unit(a) - _unit(b)) ** 2, -1)))
  return jnp.mean(jnp.stack(distances))


def _unit(x):
  """Vectors along the last axis, scaled to unit length."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-10)
