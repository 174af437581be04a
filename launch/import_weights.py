"""Open weights into a work directory, which launch.sample, launch.encode, launch.train --config.init and launch.export take.

  python -m launch.import_weights --source=DIR --workdir=W

DIR: a pipeline of the Wan family as diffusers saves it (Wan 2.1 T2V, Wan 2.2 TI2V-5B, T2V-A14B, I2V-A14B), or one part of it (such as
DIR/vae). Adapters in the layout of PEFT and diffusers go on top of weights that are there already, which they need from then on:

  python -m launch.import_weights --source=LORA --base=W --workdir=W2

Everything is checked before anything is written; weights pass through memory one tensor at a time.
"""

import pathlib

from absl import flags

from launch import cli, importing
from sora_jax.errors import BadInput

SOURCE = flags.DEFINE_string("source", "", "folder of a pipeline, or of one of its parts")
WORKDIR = flags.DEFINE_string("workdir", "", "where the weights go, in our layout")
DTYPE = flags.DEFINE_enum("dtype", "source", ["source", "bfloat16", "float32"], "of the transformer and the text encoder; source: as they come")

BASE = flags.DEFINE_string("base", "", "with adapters: work directory of the weights that they adapt")
EXPERT = flags.DEFINE_enum("expert", "", ["", "high", "low"], "with adapters: which of two experts they adapt")


def main():
  if not SOURCE.value or not WORKDIR.value:
    raise BadInput("give --source=DIR, the folder of the weights, and --workdir=W")
  workdir = pathlib.Path(WORKDIR.value)
  if BASE.value:
    if DTYPE.value != "source":
      raise BadInput("--dtype is of whole weights; adapters (--base) are kept as they come: leave it out")
    adapters = importing.import_lora(SOURCE.value, BASE.value, workdir, EXPERT.value)
    what = f"done: adapters of rank {adapters.rank}" if adapters else f"{workdir} holds these adapters already; nothing to do"
    cli.say(f"{what}. Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")
  elif EXPERT.value:
    raise BadInput("--expert is of adapters; give the weights that they adapt with --base=W, or leave it out")
  elif not importing.import_weights(SOURCE.value, workdir, DTYPE.value):
    cli.say(f"{workdir} holds these weights already; nothing to do")
  elif missing := [name for name in ("model", "vae", "text") if not (workdir / name).exists()]:
    cli.say(f"done; {workdir} has no {', '.join(missing)} yet: import {'it' if len(missing) == 1 else 'them'} into it too before you sample")
  elif (workdir / "config.json").exists():
    cli.say(f"done. Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")
  else:
    cli.say(f"done: {', '.join(path.parent.name for path in sorted(workdir.glob('*/weights.safetensors')))} in {workdir}")
  return cli.OK


if __name__ == "__main__":
  cli.run(main)
