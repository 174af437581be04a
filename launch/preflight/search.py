"""Other settings of a run: those that help most where it does not fit, and a table of the sensible ones."""

import copy
import itertools
import math
import pathlib

from launch.common.progress import say
from launch.preflight import compiled, report
from launch.reports import tables
from sora_jax import files
from sora_jax.errors import BadInput

GIB = 2**30
POLICIES = ("full", "attention", "dots", "full_offload", "gated_offload")
LEANEST = ("full", "full_offload")


def check(program, topology):
  """Program -> (its numbers, see report.facts; Compiled)."""
  found = compiled.compile_program(program)
  return report.facts(found, topology), found


def changed(config, **values):
  """A copy of a config with other values, by dotted name ("__" for a dot)."""
  config = copy.deepcopy(config)
  for name, value in values.items():
    *path, last = name.split("__")
    node = config
    for part in path:
      node = node[part]
    node[last] = value
  return config


def tries(config, layout):
  """Settings that lower memory -> {words: values}, the most promising first."""
  shape, out = layout.mesh.shape, {}
  if config.model.remat not in LEANEST:
    out["--config.model.remat=full"] = {"model__remat": "full"}
  if config.model.scans == 1 and config.model.remat != "none":
    out["--config.model.scans=4"] = {"model__scans": 4}
  if config.model.remat != "full_offload":
    out["--config.model.remat=full_offload"] = {"model__remat": "full_offload"}
  if shape["data"] > 1:
    wider = shape["data"] * config.mesh.fsdp
    out[f"--config.mesh.fsdp={wider}"] = {"mesh__fsdp": wider}
  if config.mesh.fsdp % 2 == 0:
    fsdp, context = config.mesh.fsdp // 2, config.mesh.context * 2
    out[f"--config.mesh.fsdp={fsdp} --config.mesh.context={context}"] = {
      "mesh__fsdp": fsdp,
      "mesh__context": context,
    }
  rows = config.data.rows // config.micro_steps
  if rows % (2 * shape["data"] * shape["fsdp"]) == 0:
    more = 2 * config.micro_steps
    out[f"--config.micro_steps={more}"] = {"micro_steps": more}
  if config.model.param_dtype == "float32":
    words = "--config.model.param_dtype=bfloat16 --config.optim.moment_dtype=bfloat16"
    out[words] = {"model__param_dtype": "bfloat16", "optim__moment_dtype": "bfloat16"}
  if config.ema_decay:
    out["--config.ema_decay=0"] = {"ema_decay": 0.0}
  return out


def suggest(config, make, topology, found, count=3):
  """Says by how much the program does not fit; compiles settings that need less, and says by how much the
  best `count` of them do.
  """
  over = (found.assigned - found.chip.hbm_bytes) / GIB
  say((f"{over:.1f} GiB too much; " if math.isfinite(over) else "") + "compiling settings that need less")
  results = []
  for words, values in tries(config, found.program.layout).items():
    try:
      numbers, other = check(make(changed(config, **values)), topology)
    except BadInput:  # this mesh does not serve these rows
      continue
    if math.isfinite(other.assigned):
      results.append((other.assigned, words, numbers, other))
    if len(results) == 2 * count:
      break
  for assigned, words, numbers, other in sorted(results, key=lambda result: result[0])[:count]:
    verdict = "fits" if other.fits else f"{(assigned - other.chip.hbm_bytes) / GIB:.1f} GiB too much"
    ratio = numbers.get("executed_over_model")
    work = f"; executed / model FLOPs {ratio:.2f}" if ratio else ""
    say(f"  {words}: {assigned / GIB:.1f} GiB, {verdict}{work}")


def meshes(config, layout):
  """(fsdp, context) of the sensible meshes, powers of two: rows lie on data and fsdp, or one row on all."""
  devices = layout.mesh.size // config.mesh.tensor
  powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
  rows = config.data.rows // config.micro_steps
  for fsdp, context in itertools.product(powers, powers):
    data = devices // (fsdp * context)
    if fsdp * context * data == devices and data >= 1 and (rows % (data * fsdp) == 0 or rows == data):
      if context <= 16 and fsdp * context >= min(devices, 16):
        yield fsdp, context


def table(config, make, topology, out, policies=POLICIES):
  """Compiles every sensible mesh and remat policy; prints the table, the fastest that fits first -> does any
  fit?

  What is compiled already in OUT/search.jsonl is not compiled again.
  """
  known, path = {}, pathlib.Path(out) / "search.jsonl" if out else None
  if path and path.exists():
    known = {tuple(row["settings"]): row for row in files.read_jsonl(path)}
  pairs = list(itertools.product(meshes(config, make(config).layout), policies))
  say(f"{len(pairs)} settings, one to four minutes of CPU time each")
  rows = []
  for (fsdp, context), policy in pairs:
    settings = (fsdp, context, policy)
    if settings not in known:
      try:
        numbers, _ = check(
          make(changed(config, mesh__fsdp=fsdp, mesh__context=context, model__remat=policy)), topology
        )
      except BadInput:
        continue
      known[settings] = numbers | {"settings": settings}
      if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append_jsonl(path, known[settings])
    rows.append((settings, known[settings]))
    say("  " + "  ".join(_cells(settings, known[settings])))
  rows.sort(key=lambda row: (not row[1]["fits"], row[1].get("seconds", {}).get("estimate", 1e9)))
  header = ("fsdp", "context", "remat", "GiB", "fits", "executed / model", "GB sent", "about s")
  for line in tables.lines(header, [_cells(*row) for row in rows], left=(2,)):
    say(line)
  return any(row["fits"] for _, row in rows)


def _cells(settings, numbers):
  fsdp, context, policy = settings
  ratio, seconds = numbers.get("executed_over_model"), numbers.get("seconds")
  return (
    str(fsdp),
    str(context),
    policy,
    report.gib(numbers),
    "yes" if numbers["fits"] else "no",
    f"{ratio:.3f}" if ratio else "",
    f"{numbers['sent'] / 1e9:.1f}" if "sent" in numbers else "",
    f"{seconds['estimate']:.1f}" if seconds else "",
  )
