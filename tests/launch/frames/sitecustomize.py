"""On the PYTHONPATH of a program: the frames of every video are saved beside it, before they are encoded."""

import numpy as np

from sora_jax import video

encode = video.write_mp4


def write_mp4(path, frames, *arguments, **options):
  frames = list(frames)
  np.save(f"{path}.npy", np.stack(frames))
  return encode(path, iter(frames), *arguments, **options)


video.write_mp4 = write_mp4
