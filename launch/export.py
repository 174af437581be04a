"""Weights of a work directory as plain files: a directory that launch.sample and launch.encode take as --workdir, and that can be shipped.

  python -m launch.export --workdir=W --format=safetensors --dtype=bfloat16 --out=DIR

DIR/config.json, DIR/vae, DIR/text, DIR/model; each part a config.json and weights.safetensors.
"""

import ml_dtypes
import numpy as np
from absl import flags
from etils import epath

from launch import build, cli
from sora_jax import checkpoint
from sora_jax.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", "", "work directory of launch.train")
OUT = flags.DEFINE_string("out", "", "where the files go; must be empty")
FORMAT = flags.DEFINE_enum("format", "safetensors", ["safetensors"], "kind of files")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the weights")
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "running mean of the weights, or the last ones")


def main():
  if not WORKDIR.value or not OUT.value:
    raise BadInput("give --workdir=W of launch.train, and --out=DIR")
  workdir, out = epath.Path(WORKDIR.value), epath.Path(OUT.value)
  config, given = checkpoint.read_json(workdir / "config.json"), f"{checkpoint.identity(workdir, WEIGHTS.value)} {DTYPE.value}"
  there = {path.name for path in out.iterdir()} if out.exists() else set()
  if "config.json" in there and checkpoint.read_json(out / "model" / "config.json").get("made_from") == given:
    cli.say(f"{out} holds this export already; nothing to do")
    return cli.OK
  if there - {"vae", "text", "model"}:                      # these alone are what a kill left of an export
    raise BadInput(f"--out={out} is not empty; give another, or empty it")
  weights, step = checkpoint.load_weights(workdir, WEIGHTS.value, say=cli.say)
  dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[DTYPE.value]
  fields, params = checkpoint.load_part(workdir / "vae")
  checkpoint.save_part(out / "vae", fields, params, dtype)
  build.copy_part(workdir / "text", out / "text")
  checkpoint.save_part(out / "model", {"step": step, "weights": WEIGHTS.value, "made_from": given}, weights, dtype)
  config["data"]["path"] = config["init"] = ""              # of the machine that it was trained on; nobody else has them
  checkpoint.write_json(out / "config.json", config)
  size = sum((out / part / checkpoint.WEIGHTS).stat().length for part in ("vae", "model"))
  cli.say(f"step {step} of {workdir} is in {out}, {size / 1e6:.2f} MB of weights in {DTYPE.value}. "
          f"Next: python -m launch.sample --workdir={out} --prompt=TEXT --out=OUT")
  return cli.OK


if __name__ == "__main__":
  cli.run(main)
