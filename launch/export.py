"""Weights of a work directory as files for other programs; the folder's README.md says how to load it, and
where it comes from.

  python -m launch.export --workdir=W --format=diffusers --out=DIR

  diffusers     a pipeline that `WanPipeline.from_pretrained` opens; its parts alone where the model is no
                whole pipeline of Wan
  safetensors   a directory that our programs take as --workdir, and that can be shipped: config.json, vae/,
                text/, model/
  numpy         the same weights as .npz files
  stablehlo     the DiT's velocity, and the VAE a chunk at a time, by jax.export: for CPU, CUDA and TPU, any
                batch and size
  onnx          the DiT's velocity for one size, weights inside
  lora          adapters alone (launch.train --config.lora.rank), which `pipe.load_lora_weights` takes; the
                others merge them
"""

from absl import flags

from launch.common import claims, program
from launch.common.progress import say
from sora_jax.convert import exporting
from sora_jax.errors import BadInput
from sora_jax.weights import lora

FLAGS = flags.FLAGS


def define_flags():
  flags.DEFINE_string("workdir", "", "work directory of launch.train or launch.import_weights")
  flags.DEFINE_string("out", "", "where the files go; must be empty")
  flags.DEFINE_enum("format", "safetensors", list(exporting.FORMATS), "kind of files")
  flags.DEFINE_enum(
    "dtype",
    "source",
    ["source", "bfloat16", "float16", "float32"],
    "of the weights; source: as each tensor was where it was imported from, or as it was trained",
  )
  flags.DEFINE_enum(
    "names", "diffusers", lora.NAMES, "of adapters: those of diffusers and PEFT, or of ComfyUI"
  )
  flags.DEFINE_enum("weights", "ema", ["ema", "params"], "running mean of the weights, or the last ones")


def main():
  if not FLAGS.workdir or not FLAGS.out:
    raise BadInput("give --workdir=W of launch.train or launch.import_weights, and --out=DIR")
  export = exporting.plan(
    FLAGS.workdir, FLAGS.out, FLAGS.format, FLAGS.dtype, FLAGS.weights, say, FLAGS.names
  )
  if export is None:
    say(f"{FLAGS.out} holds this export already; nothing to do")
    return program.OK
  claims.need_disk(export.out.parent, 1.1 * export.num_bytes, "the weights")
  step = export.run(program.stop_requested)
  say(f"step {step} of {FLAGS.workdir} is in {FLAGS.out}; its README.md says how to load it")
  return program.OK


if __name__ == "__main__":
  program.run(main, define_flags)
