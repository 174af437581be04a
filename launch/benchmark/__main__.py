"""Compares our models with the public PyTorch ones on this machine's CPU, with the same weights and inputs.

  python -m launch.benchmark [--only=dit,vae] [--pairs=5] [--out=FILE.json]

Needs the extra `oracle` (torch, diffusers, transformers). Outputs are compared first, then both sides are
timed in turns. Each row of the table runs in two processes, one for each side, with two threads and in
float32. A pair is one run of ours, followed at once by one run of theirs: on a shared machine only the ratio
of the two is meaningful, and the table gives the median of the ratios. Compilation is timed separately.
Memory is the peak of resident memory in one run, which starts after all free memory was returned to the
system: `work` is the peak above the level before the first run, with weights loaded; `all` is the peak above
the level with only the libraries loaded.

Rows (theirs; ours is what launch.sample and launch.train compute):
  machine           a plain matrix product and a 3 x 3 convolution: what each side can reach on this machine
  dit               `WanTransformer3DModel`, forward pass of one clip with a prompt padded to 512 tokens
  mixed padded      16 clips of 8 sizes, one batch, each padded to the longest; ours: packed in one row
  mixed alone       the same clips, a call for each
  train             loss, gradient and AdamW, of one clip
  train padded      8 clips of 8 sizes, one batch, each padded to the longest; ours: packed in one row
  train alone       the same clips, a call for each, their gradients summed
  vae encode/decode `AutoencoderKLWan` at the shape of Wan 2.1; ours: streamed
  text              `UMT5EncoderModel`, prompts padded to 512 tokens as `WanPipeline` does; ours: of their
                    true length
  whole job         `WanPipeline`, prompt to frames, with guidance; ours: the same folder imported, and
                    sampled as launch.sample does (from the same noise; frames in [0, 1] may differ by 0.01,
                    which is 40 dB)
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
  flags.DEFINE_list("only", [], "rows, by the first word or words of their names; all rows by default")
  flags.DEFINE_integer("pairs", 5, "runs of each side, in turns", lower_bound=1)
  sizes = "widths of the public models, or tiny widths, which only test that the benchmark works"
  flags.DEFINE_enum("size", "full", ["full", "tiny"], sizes)
  flags.DEFINE_string("out", "", "file for the numbers, as JSON")


def main():
  chosen = rows.chosen(FLAGS.only)
  missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
  if missing:
    raise BadInput(f"{', '.join(missing)} must be installed for the comparison; pip install '.[oracle]'")
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
