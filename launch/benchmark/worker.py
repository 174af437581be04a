"""One side of one row of launch.benchmark, in a process of its own.

  python -m launch.benchmark.worker ours|theirs RUN SHAPE_AS_JSON FOLDER

The process builds its model, then reads commands from stdin, one word a line. `first` runs once and writes
the outputs to FOLDER/SIDE.npz; `run` times one run; `memory` runs once and reports its peaks in MB. Each
command is answered with one line of JSON. Neither side imports a library of the other: see ours.py,
theirs.py.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time

import numpy as np

THREADS = 2
PROMPT, NEGATIVE, GUIDANCE = "a red fox walks over the snow at dawn", "blurred, with words on it", 5.0


def clip(seed, grid, channels, text_tokens, text_width, text_pad=512):
  """A random clip. grid: (t, h, w) in patches of 1 x 2 x 2.

  -> latents [T, H, W, C], timestep, text [512, E] with zeros after its tokens.
  """
  rng = np.random.default_rng(seed)
  t, h, w = grid
  latents, timestep = (
    rng.standard_normal((t, 2 * h, 2 * w, channels), np.float32),
    float(rng.integers(1, 1000)),
  )
  text = np.zeros((text_pad, text_width), np.float32)
  text[:text_tokens] = rng.standard_normal((text_tokens, text_width), np.float32)
  return latents, timestep, text


def clips(shape):
  """All clips of a row, with prompts of 40 to 120 tokens."""
  rng = np.random.default_rng(0)
  return [
    clip(i, grid, 16, int(rng.integers(40, 121)), shape["text_width"])
    for i, grid in enumerate(shape["grids"])
  ]


def prompts(shape):
  """Random ids of the prompts of a row, without padding."""
  rng = np.random.default_rng(0)
  return [rng.integers(2, shape["vocab"], n) for n in shape["lengths"]]


def save_tokenizer(folder, sentences=(PROMPT, NEGATIVE) * 9, vocab_size=64, extra_ids=4):
  """Writes a small sentencepiece model of these sentences in the layout of the public ones."""
  import sentencepiece

  os.makedirs(folder)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(sentences),
    model_prefix=os.path.join(folder, "spiece"),
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  special = {
    "tokenizer_class": "T5Tokenizer",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_ids": extra_ids,
  }
  with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
    json.dump(special, f)


def targets(shapes):
  """Training targets of clips of these shapes [C, T, H, W]."""
  return [uniform(i, *shape) for i, shape in enumerate(shapes)]


def three_steps(step):
  """A training step that returns the losses of its clips -> a function that runs three at its first call.

  Later calls run it once. With three steps, the compared losses include those after the weights have changed.
  """
  first_call = True

  def run():
    nonlocal first_call
    count = 3 if first_call else 1
    first_call = False
    return {"loss": np.array([step() for _ in range(count)])}

  return run


def uniform(seed, *shape):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def resident(name):
  """A field of /proc/self/status in MB."""
  with open("/proc/self/status") as f:
    return next(int(line.split()[1]) / 1024 for line in f if line.startswith(name + ":"))


def trimmed():
  """Returns free memory to the system and resets the peak -> resident memory in MB."""
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
  return resident("VmRSS")


def main():
  which, run, shape, folder = sys.argv[1:]
  os.environ["OMP_NUM_THREADS"] = str(THREADS)
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print goes to stderr, not among the answers
  side = importlib.import_module(f"launch.benchmark.{which}")
  side.load(THREADS)
  bare = trimmed()
  step, compile_s = getattr(side, run)(json.loads(shape), folder)
  level = trimmed()

  def answer(**fields):
    answers.write(json.dumps(fields) + "\n")

  answer(compile_s=compile_s)
  for word in sys.stdin:
    began = time.perf_counter()
    if word == "memory\n":
      trimmed()
      step()
      peak = resident("VmHWM")
      answer(work=peak - level, all=peak - bare)
    else:
      outputs = step()
      seconds = time.perf_counter() - began
      if word == "first\n":
        np.savez(os.path.join(folder, f"{which}.npz"), **outputs)
      del outputs
      answer(s=seconds)


if __name__ == "__main__":
  main()
