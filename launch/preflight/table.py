"""Compiles what our goals are about, and prints what each needs beside its goal.

  python -m launch.preflight.table [--only=TEXT] [--out=FILE.jsonl]

Three quarters of an hour on two cores. What FILE holds already is not compiled again. The goals are those of
the peers, compiled by the same compiler, or better: a step of MaxDiffusion on Wan 2.1 14B, 75,600 tokens,
v5p:2x2x1, has 42.0 GiB of live memory, executes 1.70 of the model's FLOPs and sends 268 GB.
"""

import dataclasses
import pathlib

from absl import flags

from data import plan as plans
from launch.common import program
from launch.common.progress import say
from launch.packing import reference
from launch.preflight import programs, report, search
from launch.reports import tables
from sora_jax import batch as batches, files, workdir as workdirs
from sora_jax.errors import BadInput

FLAGS = flags.FLAGS
CLIPS = 100_000  # of the reference mixture, of which a median row is taken


@dataclasses.dataclass(frozen=True)
class Entry:
  """One program and its goals: GiB, executed / model FLOPs, GB sent; None: no goal, it must fit."""

  name: str
  topology: str
  settings: dict  # dotted names of the config, "__" for a dot; or the arguments of programs.coding
  gib: float | None = None
  ratio: float | None = None
  sent: float | None = None
  program: str = "train"
  packed: bool = False  # rows of the reference mixture


def clip(tokens=75_600, size="wan-14b", **settings):
  """A step on rows that one clip fills each."""
  row = {"model__size": size, "data__rows": 1, "data__row_clips": 1, "data__row_tokens": tokens}
  return row | {"data__row_text": 512, "mesh__fsdp": 1, "model__remat": "full"} | settings


BF16 = {"model__param_dtype": "bfloat16", "optim__moment_dtype": "bfloat16", "ema_decay": 0.0}
FOUR, CUBE, V5E, V6E, V7X = "v5p:2x2x1", "v5p:4x4x4", "v5e:16x16", "v6e:16x16", "tpu7x:4x4x4"
SAVED = {"model__remat": "attention"}
THRIFTY = BF16 | {"model__scans": 4}
LONG = {"mesh__fsdp": 8, "mesh__context": 8}
PACKED = {"data__row_clips": 64, "data__row_text": 4096, "data__row_tokens": 81_920, "data__rows": 256}
XL = PACKED | {"model__size": "XL"}

ENTRIES = (
  Entry("14B lean", FOUR, clip(mesh__context=4, **THRIFTY), 38, None, 130),
  Entry("14B fast", FOUR, clip(mesh__context=4, model__remat="attention", **THRIFTY), 50, 1.20, 130),
  Entry("14B lean, offload", FOUR, clip(mesh__context=4, model__remat="full_offload", **BF16), 38, None, 130),
  Entry(
    "14B fast, offload", FOUR, clip(mesh__context=4, model__remat="gated_offload", **BF16), 50, 1.20, 130
  ),
  Entry("14B float32 and EMA", FOUR, clip(mesh__context=4)),
  Entry(
    "14B, 64 rows",
    CUBE,
    clip(data__rows=64, mesh__fsdp=16, model__remat="full_offload", **BF16),
    50,
    None,
    100,
  ),
  Entry(
    "14B float32 and EMA, 64 rows", CUBE, clip(data__rows=64, mesh__fsdp=16, model__remat="full_offload")
  ),
  Entry("14B, 64 rows", V5E, clip(data__rows=64, mesh__fsdp=64, mesh__context=4, **THRIFTY), 15.75),
  Entry("14B, 32 rows", V7X, clip(data__rows=32, mesh__fsdp=8, mesh__context=4, **SAVED, **BF16), 94.75),
  Entry(
    "XL packed",
    V5E,
    XL | {"mesh__fsdp": 64, "mesh__context": 4, "micro_steps": 4} | SAVED,
    12.6,
    1.3,
    packed=True,
  ),
  Entry(
    "XL packed",
    V6E,
    XL | {"mesh__fsdp": 256} | SAVED,
    25.0,
    1.3,
    packed=True,
  ),
  Entry("14B, one row of 524,288", CUBE, clip(524_288, **LONG), 95.74, None, 400),
  Entry(
    "14B, one row of 524,288", V5E, clip(524_288, mesh__fsdp=32, mesh__context=8, **BF16), 15.75, None, 400
  ),
  Entry("14B, one row of 1,048,576", CUBE, clip(1_048_576, **LONG), 95.74),
  Entry(
    "14B, one guided step",
    FOUR,
    {"model__size": "wan-14b", "sample__row_tokens": 75_600, "data__row_text": 512},
    11,
    1.02,
    60,
    "sample",
  ),
  Entry("VAE 2.1, decode 720p", FOUR, {"vae": "wan2.1", "size": (720, 1280)}, program="decode"),
  Entry("VAE 2.1, encode 720p", FOUR, {"vae": "wan2.1", "size": (720, 1280)}, program="encode"),
  Entry("VAE 2.2, decode 1080p", CUBE, {"vae": "wan2.2", "size": (1088, 1920)}, program="decode"),
  Entry(
    "5B, a minute of 1080p",
    CUBE,
    {"model__size": "wan-5b", "sample__row_tokens": 361 * 34 * 60, "data__row_text": 512},
    program="sample",
  ),
  Entry("XL, 256 chips", V5E, XL | {"mesh__fsdp": 256, "model__remat": "full"}, packed=True),
)


def define_flags():
  flags.DEFINE_string("only", "", "only what has this text in its name or topology")
  flags.DEFINE_string("out", "", "file for the numbers, JSON lines; what it holds is not compiled again")
  program.define_config("configs/t2v.py:base")


def main():
  path = pathlib.Path(FLAGS.out) if FLAGS.out else None
  known = {row["key"]: row for row in files.read_jsonl(path)} if path and path.exists() else {}
  chosen = [entry for entry in ENTRIES if FLAGS.only in f"{entry.name} {entry.topology}"]
  if not chosen:
    raise BadInput(f"--only={FLAGS.only!r} is in no name; names: {'; '.join(e.name for e in ENTRIES)}")
  rows = []
  for entry in chosen:
    key = f"{entry.name} {entry.topology}"
    if key not in known:
      say(f"compiling {key}")
      numbers, _ = search.check(make(entry), entry.topology)
      known[key] = numbers | {"key": key}
      if path:
        files.append_jsonl(path, known[key])
    rows.append(cells(entry, known[key]))
  header = ("what", "topology", "GiB", "goal", "executed / model", "goal", "GB sent", "goal", "CPU-minutes")
  for line in tables.lines(header, rows, left=(0, 1)):
    say(line)
  return program.OK


def make(entry):
  """Entry -> Program."""
  config = search.changed(
    program.get_config(), **{k: v for k, v in entry.settings.items() if k not in ("vae", "size")}
  )
  devices = programs.devices_of(entry.topology)
  if entry.program in ("encode", "decode"):
    return programs.coding(entry.program, entry.settings["vae"], devices, entry.settings["size"], 81)
  if entry.program == "sample":
    return programs.sampling(
      config, workdirs.make_model(config, None, workdirs.sampling_layout(config, devices=devices))
    )
  model = workdirs.make_model(config, None, workdirs.make_layout(config, devices))
  row = programs.full_row(config, model)
  if entry.packed:
    data = config.data
    shape = batches.RowShape(data.row_tokens, data.row_clips, data.row_text)
    row = programs.median_row(
      plans.Plan(reference.index(CLIPS), rows_per_step=64, shape=shape, patch=model.dit.patch, seed=0)
    )
  return programs.training(config, model, model.layout, row)


def cells(entry, numbers):
  """A row of the table."""
  ratio = numbers.get("executed_over_model")
  sent = numbers.get("sent")
  goals = [f"<= {goal:g}" if goal else "" for goal in (entry.gib, entry.ratio, entry.sent)]
  fits = "" if numbers["fits"] else " no fit"
  return (
    entry.name,
    entry.topology,
    report.gib(numbers) + fits,
    goals[0],
    f"{ratio:.3f}" if ratio else "",
    goals[1],
    f"{sent / 1e9:.1f}" if sent is not None else "",
    goals[2],
    f"{numbers['compile']['cpu_seconds'] / 60:.1f}",
  )


if __name__ == "__main__":
  program.run(main, define_flags)
