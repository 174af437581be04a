"""What the training-free cache of block outputs costs and saves (field `cache` of a request).

The schedule is static, so the saving is counted: steps over those at which blocks are computed; what else a
step does (text, in and out projections) is under a hundredth of a large model's FLOPs. The cost is measured:
PSNR of the same requests' videos, before they are encoded, against those without a cache.
"""

import numpy as np

from launch.common import program
from launch.common.progress import Bar
from sora_jax import metrics, sample
from sora_jax.errors import Stopped

VALUES = (1.5, 2.0, 2.25, 2.5, 3.0, 4.0)  # of `cache`


def measure(pipe, requests):
  """-> [{cache, saved (block FLOPs without, over with), psnr (dB, mean over the requests)}]. Raises Stopped
  if a stop was requested.
  """
  plain, table = videos(pipe, requests, 1.0), []
  with Bar("cache", len(VALUES)) as bar:
    for cache in VALUES:
      cached = videos(pipe, requests, cache)
      psnr = [min(100.0, metrics.psnr(a, b)) for a, b in zip(plain, cached, strict=True)]
      steps = pipe.parse({"id": "a", **requests[0]}).steps
      saved = steps / sample.computed_steps(steps, cache).sum()
      table.append({"cache": cache, "saved": float(saved), "psnr": float(np.mean(psnr))})
      bar.advance()
  return table


def videos(pipe, requests, cache):
  """The requests' videos, in [0, 1]."""
  made = {}
  for result in pipe.run([{**fields, "cache": cache} for fields in requests], stop=program.stop_requested):
    made[result.position] = result.video() / 255
  if len(made) < len(requests):
    raise Stopped
  return [made[i] for i in range(len(requests))]
