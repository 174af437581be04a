"""TPU slices: what they are called by us, by gcloud and by GKE, and how many chips and hosts they have.

A slice is GENERATION:TOPOLOGY here, as in launch.preflight: v5p:4x4x4. Sources, as of November 2026:
  GKE labels, machine types, topologies   cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, and the
                                          table in src/xpk/core/system_characteristics.py of XPK
  types of gcloud                         docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}
  runtime versions                        docs.cloud.google.com/tpu/docs/runtimes
  no queued resources for tpu7x           docs.cloud.google.com/tpu/docs/create-tpu-vm
"""

import dataclasses
import math
import re

from sora_jax.errors import BadInput

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # whole pods have 256 chips
PARTS_OF_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # 3-D pods are cubes of 4x4x4, and these
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of TPU."""

  gke_accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
  machine: str  # of Compute Engine; {} is the number of chips
  most: int  # chips that one slice can have
  flat: bool  # its topologies have two axes, not three
  gcloud: str = ""  # prefix of its types; empty: the Cloud TPU API does not offer it
  unit: int = 1  # what a chip counts in the number of a type: v5p counts cores, two a chip
  runtime: str = ""


GENERATIONS = {
  "v5e": Generation(
    "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", 256, True, "v5litepod", 1, "v2-alpha-tpuv5-lite"
  ),
  "v5p": Generation("tpu-v5p-slice", "ct5p-hightpu-{}t", 6144, False, "v5p", 2, "v2-alpha-tpuv5"),
  "v6e": Generation("tpu-v6e-slice", "ct6e-standard-{}t", 256, True, "v6e", 1, "v2-alpha-tpuv6e"),
  "tpu7x": Generation("tpu7x", "tpu7x-standard-{}t", 9216, False),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice on GKE."""

  topology: str
  chips: int
  hosts: int
  chips_per_host: int
  accelerator: str  # node label
  machine: str


@dataclasses.dataclass(frozen=True)
class Type:
  """A slice as gcloud names it."""

  name: str
  chips: int
  runtime: str


def parse(name):
  """A name such as v5p:4x4x4 -> Slice; BadInput where there is none such."""
  kind, _, topology = name.partition(":")
  generation = GENERATIONS.get(kind)
  if not generation:
    raise BadInput(
      f"--topology={name}: it is GENERATION:TOPOLOGY, as v5p:4x4x4; generations: {', '.join(GENERATIONS)}"
    )
  if not _exists(generation, topology):
    cubes = f"or three multiples of 4 in rising order, up to {generation.most} chips"
    allowed = ", ".join(FLAT if generation.flat else (*PARTS_OF_A_CUBE, cubes))
    raise BadInput(f"--topology={name}: {kind} has no slice of {topology or 'no size'}; allowed: {allowed}")
  chips = math.prod(map(int, topology.split("x")))
  each = min(chips, CHIPS_PER_HOST)
  return Slice(
    topology, chips, chips // each, each, generation.gke_accelerator, generation.machine.format(each)
  )


def _exists(generation, topology):
  if generation.flat:
    return topology in FLAT
  if topology in PARTS_OF_A_CUBE:
    return True
  if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", topology):
    return False
  sides = [int(side) for side in topology.split("x")]
  return (
    sides == sorted(sides) and not any(side % 4 for side in sides) and math.prod(sides) <= generation.most
  )


def parse_type(name):
  """A name such as v5p-128 -> Type; BadInput where there is none such."""
  match = re.fullmatch(r"(v5litepod|v5e|v5p|v6e|tpu7x)-(\d{1,5})", name)
  if not match:
    hint = f"; {name} is written {_type_of(name)} here" if _type_of(name) else ""
    raise BadInput(f"--type={name}: types are v5litepod-N, v5p-N and v6e-N, as v5p-128{hint}")
  kind, number = match[1].replace("v5litepod", "v5e"), int(match[2])
  generation = GENERATIONS[kind]
  if not generation.gcloud:
    raise BadInput(f"--type={name}: Google offers no queued resources of {kind}; use launch.tpu.jobset")
  chips, rest = divmod(number, generation.unit)
  sizes = {math.prod(map(int, size.split("x"))) for size in (FLAT if generation.flat else PARTS_OF_A_CUBE)}
  whole_cubes = not generation.flat and chips and chips % 64 == 0 and chips <= generation.most
  if rest or not (chips in sizes or whole_cubes):
    allowed = ", ".join(str(size * generation.unit) for size in sorted(sizes))
    more = "" if generation.flat else f", or a multiple of 128 up to {2 * generation.most}"
    raise BadInput(f"--type={name}: there is no slice of this size; the number is one of {allowed}{more}")
  return Type(f"{generation.gcloud}-{number}", chips, generation.runtime)


def _type_of(name):
  """v5p:4x4x4 -> v5p-128; empty where it is no slice that gcloud knows."""
  try:
    chips, generation = parse(name).chips, GENERATIONS[name.partition(":")[0]]
  except BadInput:
    return ""
  return generation.gcloud and f"{generation.gcloud}-{chips * generation.unit}"
