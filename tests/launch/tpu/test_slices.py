"""Sizes of slices against those of the vendor's tables."""

import pytest

from launch.tpu import slices
from sora_jax.errors import BadInput

# GKE: topology, chips, nodes, machine type, label (plan-tpus)
GKE = [
  ("v5e:2x2", 4, 1, "ct5lp-hightpu-4t", "tpu-v5-lite-podslice"),
  ("v5e:16x16", 256, 64, "ct5lp-hightpu-4t", "tpu-v5-lite-podslice"),
  ("v5p:2x2x1", 4, 1, "ct5p-hightpu-4t", "tpu-v5p-slice"),
  ("v5p:4x4x4", 64, 16, "ct5p-hightpu-4t", "tpu-v5p-slice"),
  ("v5p:8x8x16", 1024, 256, "ct5p-hightpu-4t", "tpu-v5p-slice"),
  ("v6e:1x1", 1, 1, "ct6e-standard-1t", "tpu-v6e-slice"),
  ("v6e:16x16", 256, 64, "ct6e-standard-4t", "tpu-v6e-slice"),
  ("tpu7x:2x2x1", 4, 1, "tpu7x-standard-4t", "tpu7x"),
  ("tpu7x:4x4x4", 64, 16, "tpu7x-standard-4t", "tpu7x"),
]


@pytest.mark.parametrize(("name", "chips", "hosts", "machine", "label"), GKE)
def test_slices_of_gke(name, chips, hosts, machine, label):
  kind = slices.parse(name)
  assert (kind.chips, kind.hosts, kind.machine, kind.accelerator) == (chips, hosts, machine, label)
  assert kind.hosts * kind.chips_per_host == kind.chips and name.endswith(kind.topology)


@pytest.mark.parametrize(
  ("name", "full", "chips", "runtime"),
  [
    ("v5p-8", "v5p-8", 4, "v2-alpha-tpuv5"),
    ("v5p-128", "v5p-128", 64, "v2-alpha-tpuv5"),  # cores, two a chip
    ("v5litepod-256", "v5litepod-256", 256, "v2-alpha-tpuv5-lite"),
    ("v5e-16", "v5litepod-16", 16, "v2-alpha-tpuv5-lite"),
    ("v6e-256", "v6e-256", 256, "v2-alpha-tpuv6e"),
  ],
)
def test_types_of_gcloud(name, full, chips, runtime):
  assert slices.parse_type(name) == slices.Type(full, chips, runtime)


@pytest.mark.parametrize(
  "name",
  [
    "",
    "v5p",
    "v5p:",
    "v5p:4x4",
    "v5p:4x4x6",
    "v5p:8x4x4",
    "v5p:0x4x4",
    "v6e:16x32",
    "v4:4x4x4",
    "tpu7x:64x64x64",
  ],
)
def test_slices_that_do_not_exist(name):
  with pytest.raises(BadInput, match="--topology="):
    slices.parse(name)


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("v5p-9", "size"),
    ("v5p-2", "size"),
    ("v6e-48", "size"),
    ("tpu7x-16", "jobset"),
    ("v5p:4x4x4", "v5p-128"),
    ("h100-8", "v5p-N"),
  ],
)
def test_types_that_do_not_exist(name, says):
  with pytest.raises(BadInput, match=says):
    slices.parse_type(name)
