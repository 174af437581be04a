"""Open weights into a work directory, which launch.sample, launch.encode, launch.train --config.init and launch.export take.

  python -m launch.import_weights --source=DIR --workdir=W

DIR: a pipeline of the Wan family as diffusers saves it (Wan 2.1 T2V, Wan 2.2 TI2V-5B, T2V-A14B, I2V-A14B), or one part of it (such as
DIR/vae). Everything is checked before anything is written; weights pass through memory one tensor at a time.
"""

import dataclasses
import functools
import pathlib
import shutil
import zlib

import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import cli
from sora_jax import checkpoint
from sora_jax.errors import BadInput
from sora_jax.models import text, vae
from sora_jax.weights import table, wan_pipeline

SOURCE = flags.DEFINE_string("source", "", "folder of a pipeline, or of one of its parts")
WORKDIR = flags.DEFINE_string("workdir", "", "where the weights go, in our layout")
DTYPE = flags.DEFINE_enum("dtype", "source", ["source", "bfloat16", "float32"], "of the transformer and the text encoder; source: as they come")


def main():
  if not SOURCE.value or not WORKDIR.value:
    raise BadInput("give --source=DIR, the folder of the weights, and --workdir=W")
  source, workdir = pathlib.Path(SOURCE.value), pathlib.Path(WORKDIR.value)
  found = wan_pipeline.open_pipeline(source)
  tokenizer = read_tokenizer(found.tokenizer) if found.tokenizer else None
  parts = {}                                    # directory in W -> its parts: the experts share one
  for part in found.parts:
    parts.setdefault("model" if part.key.startswith("dit") else part.key, []).append(part)
  todo = {name: some for name, some in parts.items() if not is_done(workdir / name, some)}
  if not todo:
    cli.say(f"{workdir} holds these weights already; nothing to do")
    return cli.OK
  specs = {name: {key: spec for part in some for key, spec in part_specs(part).items()} for name, some in todo.items()}
  sizes = {key: np.prod(shape) * dtype.itemsize for some in specs.values() for key, (shape, dtype) in some.items()}
  cli.need_disk(workdir, sum(sizes.values()), "the weights")
  cli.need_memory(4 * max(np.prod(shape) * 4 for some in found.parts for shape in table.their_shapes(some.rows).values()), "the largest tensor")
  cli.lock_workdir(workdir)
  for note in found.notes:
    cli.say(note)
  cli.say(f"importing {', '.join(part.folder.name for part in found.parts)} of {source} into {workdir}: "
          f"{sum(map(count, found.parts)) / 1e6:.2f} M parameters, {sum(sizes.values()) / 1e9:.2f} GB")
  with cli.Bar("tensors", sum(len(part.stored) for some in todo.values() for part in some)) as bar:
    for name, some in todo.items():
      fields = part_config(some)
      checkpoint.write_part(workdir / name, fields, specs[name], pieces(some, fields, bar))
  if tokenizer is not None:
    (workdir / "text").mkdir(exist_ok=True)
    (workdir / "text" / "tokenizer.model").write_bytes(tokenizer)
  keep_source(source, workdir / "source", found)
  if found.sample:
    checkpoint.write_json(workdir / "config.json", experiment(found))
    cli.say(f"done. Next: python -m launch.sample --workdir={workdir} --prompt=TEXT --out=OUT")
  else:
    cli.say(f"done: {', '.join(str(workdir / name) for name in todo)}")
  return cli.OK


def is_done(directory, some):
  """Does it hold these parts? BadInput where it holds others."""
  path = directory / "config.json"
  if not path.exists():
    return False
  if checkpoint.read_json(path).get("made_from") != made_from(some):
    raise BadInput(f"{directory} holds other weights, or these with another --dtype; give another --workdir")
  return True


def made_from(some):
  """Changes when the files of the parts do."""
  files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for part in some for path in sorted(part.folder.iterdir())
           if path.suffix in (".safetensors", ".json")]
  return f"{zlib.crc32(repr((files, DTYPE.value)).encode()):08x}"


def part_specs(part):
  """{our name: (shape, dtype)}."""
  def dtype(row):
    if DTYPE.value != "source" and part.key != "vae":
      return np.dtype(DTYPE.value)
    return np.dtype(functools.reduce(jnp.promote_types, {part.tensors.dtype(name) for name in row.names}))
  return {our_name(part, row): (row.our_shape, dtype(row)) for row in part.rows}


def our_name(part, row):
  """As in W: model/ holds "dit/...", or "dit_high/..." and "dit_low/..."."""
  return "/".join([part.key] * part.key.startswith("dit") + list(row.path))


def part_config(some):
  """What config.json of the directory says; `pieces` adds a checksum of the weights."""
  part = some[0]
  fields = {"made_from": made_from(some)}
  if part.key == "vae":
    return fields | vae.config_to_dict(part.cfg)
  if part.key == "text":
    stored = set(part.stored.values())
    half = DTYPE.value == "bfloat16" or DTYPE.value == "source" and stored == {"bfloat16"}
    return fields | dataclasses.asdict(dataclasses.replace(part.cfg, dtype="bfloat16" if half else "float32"))
  return fields | {"step": 0, "dit": dataclasses.asdict(part.cfg)}


def pieces(some, fields, bar):
  """All tensors in our layout -> iterator of (our name, array or one layer of it)."""
  crc = 0
  for part in some:
    for row, _, array in table.stream(part.tensors, part.rows):
      array = np.ascontiguousarray(array)
      crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
      bar.advance(1, part.folder.name)
      yield our_name(part, row), array
  fields["weights_crc32"] = f"{crc:08x}"


def read_tokenizer(folder):
  """tokenizer/ -> the sentencepiece model in it, as bytes."""
  for name in ("spiece.model", "tokenizer.model"):
    if (folder / name).exists():
      text.Tokenizer(folder / name)
      return (folder / name).read_bytes()
  raise BadInput(f"{folder} holds no spiece.model; download the tokenizer again")


def keep_source(source, target, found):
  """What export needs to give the same folder back: all small files, and name and dtype of every tensor."""
  for path in sorted(source.rglob("*")):
    if path.is_file() and path.suffix in (".json", ".txt", ".md", ".model") and not path.name.endswith(".index.json"):
      copy = target / path.relative_to(source)
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, copy)
  checkpoint.write_json(target / "tensors.json", {part.key: part.stored for part in found.parts})


def experiment(found):
  """W/config.json: what launch.sample reads, and launch.train where it begins from W."""
  dit = next(part for part in found.parts if part.key.startswith("dit"))
  half = DTYPE.value == "bfloat16" or DTYPE.value == "source" and "bfloat16" in set(dit.stored.values())
  return {
      "format_version": checkpoint.FORMAT_VERSION, "program": cli.program(),
      "model": {"size": "imported", "dit": dataclasses.asdict(dit.cfg), "boundary": found.boundary, "text": "", "remat": "none",
                "dtype": "bfloat16" if half else "float32"},
      "data": {"base_fps": 0.0},
      "sample": {**found.sample, "row_tokens": 1024, "rows": 1},
  }


def count(part):
  """Parameters of a part."""
  return sum(np.prod(row.our_shape) for row in part.rows)


if __name__ == "__main__":
  cli.run(main)
