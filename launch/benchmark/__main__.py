"""Our models beside the public PyTorch ones, on this machine's CPU: the same weights and inputs, outputs compared first, then timed in turns.

  python -m launch.benchmark [--only=dit,vae] [--pairs=5] [--out=FILE.json]

Needs the extra `oracle` (torch, diffusers, transformers). Each row of the table runs in two processes, one for each side, with two
threads and float32. A pair is one run of ours and one of theirs, right after each other: on a machine that others use too, only the ratio of
the two says anything, and the table has the median of the ratios. Compilation is timed apart. Memory is the peak of resident
memory in one run, begun when all that is free went back to the system: `work` over the level before the first run, with weights loaded;
`all` over the level with nothing but the libraries loaded.

Rows (theirs; ours is what launch.sample and launch.train compute):
  machine           a plain matrix product and a 3 x 3 convolution: what each side could reach here
  dit               `WanTransformer3DModel`, forward of one clip with a prompt padded to 512 tokens
  mixed padded      16 clips of 8 sizes, one batch, each padded to the longest; ours: packed in one row
  mixed alone       the same clips, a call for each
  train             loss, gradient and AdamW, of one clip
  train padded      of 8 clips of 8 sizes, one batch, each padded to the longest; ours: packed in one row
  train alone       of the same clips, a call for each, their gradients summed
  vae encode/decode `AutoencoderKLWan` at the shape of Wan 2.1; ours: streamed
  text              `UMT5EncoderModel`, prompts padded to 512 tokens as `WanPipeline` does; ours: of their true length
  whole job         `WanPipeline`, prompt to frames, with guidance; ours: the same folder imported, sampled as launch.sample does (from the same
                    noise; frames in [0, 1] may differ by 0.01, which is 40 dB)
"""

import importlib.util
import tempfile

from absl import flags

from launch.benchmark import rows
from launch.common import program
from launch.common.progress import say
from sora_jax import files
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS
LIBRARIES = ("torch", "diffusers", "transformers")


def define_flags():
  flags.DEFINE_list("only", [], "rows, by the first word or words of their names; all by default")
  flags.DEFINE_integer("pairs", 5, "runs of each side, in turns", lower_bound=1)
  flags.DEFINE_enum("size", "full", ["full", "tiny"], "widths of the public models, or tiny ones that tell nothing but that all works")
  flags.DEFINE_string("out", "", "where the numbers go, as JSON")


def main():
  chosen = rows.chosen(FLAGS.only)
  missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
  if missing:
    raise BadInput(f"{', '.join(missing)} must be installed to compare with; pip install '.[oracle]'")
  results = []
  for row in chosen:
    with tempfile.TemporaryDirectory() as folder:
      result = rows.measure(row, getattr(row, FLAGS.size), FLAGS.pairs, folder)
    results.append(result)
    say(f"{row.name}: {result['ours_s']:.3f} s, theirs {result['theirs_s']:.3f} s, {result['time']:.2f} x")
  for line in rows.table(results):
    say(line)
  if FLAGS.out:
    files.write_json(FLAGS.out, {"size": FLAGS.size, "pairs": FLAGS.pairs, "rows": results})
  return program.OK


if __name__ == "__main__":
  program.run(main, define_flags)
