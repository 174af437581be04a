"""Open weights into a work directory, which launch.sample, launch.encode, launch.train --config.init and
launch.export take.

  python -m launch.import_weights --source=DIR --workdir=W

DIR: a pipeline of the Wan family as diffusers saves it (Wan 2.1 T2V, Wan 2.2 TI2V-5B, T2V-A14B, I2V-A14B), an
original release, one part of it (such as DIR/vae), or single files as people collect them for ComfyUI.
Adapters, in the names of any trainer, are added to it for good with --lora; or go on top of weights that are
there already, which they need from then on, to be trained further:

  python -m launch.import_weights --source=DIR --lora=style.safetensors:0.8 --workdir=W
  python -m launch.import_weights --source=LORA --base=W --workdir=W2

Everything is checked before anything is written; weights pass through memory one tensor at a time.
"""

import pathlib

from absl import flags

from launch.common import claims, program
from launch.common.progress import Bar, say
from sora_jax.convert import importing
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS


def define_flags():
  flags.DEFINE_string("source", "", "folder of a pipeline, or of one of its parts, or a file of one")
  flags.DEFINE_string("workdir", "", "where the weights go, in our layout")
  flags.DEFINE_enum(
    "dtype",
    "source",
    ["source", "bfloat16", "float32"],
    "of the transformer and the text encoder; source: as they come",
  )
  program.define_lora()
  flags.DEFINE_string("base", "", "with adapters: work directory of the weights that they adapt")
  flags.DEFINE_enum("expert", "", ["", "high", "low"], "with adapters: which of two experts they adapt")


def main():
  if not FLAGS.source or not FLAGS.workdir:
    raise BadInput("give --source=DIR, the folder of the weights, and --workdir=W")
  workdir = pathlib.Path(FLAGS.workdir)
  if FLAGS.base:
    import_lora(workdir)
  else:
    import_pipeline(workdir)
  return program.OK


def import_lora(workdir):
  if FLAGS.lora:
    raise BadInput("--lora is added to whole weights, and --base is beneath adapters that are kept: give one")
  if FLAGS.dtype != "source":
    raise BadInput("--dtype is of whole weights; adapters (--base) are kept as they come: leave it out")
  plan = importing.plan_lora(FLAGS.source, FLAGS.base, workdir, FLAGS.expert)
  done = f"{workdir} holds these adapters already; nothing to do"
  if plan:
    with claims.lock_workdir(workdir):
      plan.run()
    done = f"done: adapters of rank {plan.adapters.rank}"
  say(f"{done}. Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")


def import_pipeline(workdir):
  if FLAGS.expert:
    raise BadInput("--expert is of adapters; give the weights that they adapt with --base=W, or leave it out")
  plan = importing.plan(FLAGS.source, workdir, FLAGS.dtype, FLAGS.lora, FLAGS.lora_ignore, say)
  if plan is None:
    say(f"{workdir} holds these weights already; nothing to do")
    return
  claims.need_disk(workdir, plan.num_bytes, "the weights")
  claims.need_memory(plan.memory, "the largest tensor")
  for note in plan.notes:
    say(note)
  say(f"importing {plan}")
  with claims.lock_workdir(workdir), Bar("tensors", plan.tensors) as bar:
    plan.run(bar.advance, program.stop_requested)
  missing = [name for name in ("model", "vae", "text") if not (workdir / name).exists()]
  if missing:
    them = "it" if len(missing) == 1 else "them"
    say(f"done; {workdir} has no {', '.join(missing)} yet: import {them} into it too before you sample")
  elif (workdir / "config.json").exists():
    say(f"done. Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")
  else:
    written = ", ".join(path.parent.name for path in sorted(workdir.glob("*/weights.safetensors")))
    say(f"done: {written} in {workdir}")


if __name__ == "__main__":
  program.run(main, define_flags)
