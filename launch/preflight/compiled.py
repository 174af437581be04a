"""Compiles a program for a topology and counts what it takes: memory, FLOPs, bytes sent."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import resource
import tempfile
import time

from launch.preflight import census
from sora_jax.chips import chip_of

GIB = 2**30
TOTAL = re.compile(r"color=0\)\s*Total bytes: (\d+)")
REFUSED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass
class Compiled:
  """A program as the compiler made it. Bytes and FLOPs are those of one device.

  assigned: what the buffer assignment takes, which is what must fit; more than the chip's memory where the
  compiler refused the program (`error`).
  """

  program: object
  chip: object
  assigned: float
  arguments: float = 0.0
  live_peak: float = 0.0
  host: float = 0.0
  census: census.Census = None
  live: list = dataclasses.field(default_factory=list)
  seconds: float = 0.0  # of compiling
  cpu_seconds: float = 0.0
  error: str = ""

  @property
  def fits(self):
    return not self.error and self.assigned <= self.chip.hbm_bytes

  @property
  def model_flops(self):
    """Of one device."""
    return self.program.model_flops / self.program.layout.mesh.size

  @property
  def ratio(self):
    """Executed / model FLOPs."""
    return self.census.flops / self.model_flops if self.model_flops else None

  @property
  def sent(self):
    return sum(one.wire_bytes for one in self.census.collectives)


def compile_program(program):
  """Program -> Compiled. A program that the compiler refuses for its memory comes back with `error`."""
  chip = chip_of(program.layout.mesh.devices.flat[0].device_kind)
  lowered = program.lower()
  began, used = time.monotonic(), _cpu_seconds()
  with tempfile.TemporaryDirectory() as dump:
    try:
      options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
      executable = lowered.compile(compiler_options=options)
    except Exception as error:
      text = str(error)
      if "RESOURCE_EXHAUSTED" not in text:
        raise
      needed = REFUSED.search(text)
      assigned = float(needed.group(1)) * UNITS[needed.group(2)] if needed else float("inf")
      return Compiled(
        program,
        chip,
        assigned,
        error=text,
        seconds=time.monotonic() - began,
        cpu_seconds=_cpu_seconds() - used,
      )
    seconds, cpu_seconds = time.monotonic() - began, _cpu_seconds() - used
    assigned = _assigned(pathlib.Path(dump))
  memory, text = executable.memory_analysis(), executable.as_text()
  return Compiled(
    program=program,
    chip=chip,
    assigned=assigned or memory.peak_memory_in_bytes,
    arguments=memory.argument_size_in_bytes,
    live_peak=memory.peak_memory_in_bytes,
    host=memory.host_temp_size_in_bytes,
    census=census.count(text, dict(program.layout.mesh.shape), program.tiles_run),
    live=census.live_peak(text)[1],
    seconds=seconds,
    cpu_seconds=cpu_seconds,
  )


def _assigned(dump):
  """Bytes of the buffer assignment, arguments and all: `memory_analysis()` says 4 to 36 GiB more."""
  reports = dump.glob("*after_optimizations-memory-usage-report.txt")
  totals = [TOTAL.search(path.read_text()) for path in reports]
  return max((float(total.group(1)) for total in totals if total), default=0.0)


def _cpu_seconds():
  return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
