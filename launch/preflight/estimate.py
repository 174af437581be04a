"""How long a compiled step takes at least, and about how long it will take.

The floors are the work of a device over the peak of its chip: products over FLOP/s, HBM traffic over its
bandwidth, bytes sent over the bandwidth of the links that are live in the topology. The estimate adds the
time of products at the share of the peak that published steps of the same kind reach, and that of the
collectives, which the compiler puts between the products where it does not say that they are asynchronous.

Published steps (`PUBLISHED`): Wan 2.1 14B, 75,600 tokens, of MaxDiffusion's README (August 2026) and of
tpu-recipes (training/ironwood, wan2.1-14b, 32 clips). Executed FLOPs and bytes were counted by the census in
their own steps, compiled for v5p; a device of TPU7x has the same quarter of a clip. Left out of the estimate:
input, checkpoints, the host, network between slices, and what XLA overlaps or fails to.
"""

import dataclasses
import math

# Share of the peak that products reach. Two v5p steps of MaxDiffusion give 0.50 and 0.48. Heads of 128 fill
# half of the 256-wide MXU of v6e and TPU7x: published attention kernels reach 0.34 with them there, and 0.63
# with heads of 256.
SHARE = {"v5p": 0.49, "v5e": 0.49, "v4": 0.49, "v6e": 0.34, "tpu7x": 0.34}
SHARE_OF_LARGE_HEADS = {"v6e": 0.5, "tpu7x": 0.5}
LINKS = {"v4": 6, "v5p": 6, "tpu7x": 6, "v5e": 4, "v6e": 4}  # of a chip, all of which `ici_bandwidth` counts


@dataclasses.dataclass(frozen=True)
class Published:
  """A step whose time is public; FLOPs and bytes sent are those of a device, as the census counts them."""

  name: str
  topology: str
  flops: float
  sent: float
  seconds: float


PUBLISHED = (
  Published("MaxDiffusion, full remat", "v5p:2x2x1", 8321e12, 267.6e9, 36.0),
  Published("MaxDiffusion, offload", "v5p:2x2x1", 7178e12, 264.5e9, 32.8),
  Published("MaxDiffusion on TPU7x, full remat", "tpu7x:4x4x4", 8321e12, 211.6e9, 24.58),
)


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds: floors of compute, HBM and network, and the estimate."""

  compute: float
  hbm: float
  network: float
  estimate: float

  @property
  def limit(self):
    """What takes longest at its peak."""
    return max(("compute", "hbm", "network"), key=lambda name: getattr(self, name))


def live_links(topology):
  """Links of a chip that lead to another one: two along an axis longer than 2, one along an axis of 2."""
  sides = [int(side) for side in topology.split(":")[1].split("x")]
  return sum(0 if side == 1 else 1 if side == 2 else 2 for side in sides)


def times(kind, chip, topology, flops, hbm_bytes, sent, overlapped=0.0, head_size=128):
  """Work of a device -> Times. kind: a key of chips.CHIPS. overlapped: what of `sent` is asynchronous."""
  share = SHARE[kind] if head_size < 256 else SHARE_OF_LARGE_HEADS.get(kind, SHARE[kind])
  links = min(live_links(topology), LINKS[kind])
  bandwidth = chip.ici_bandwidth * links / LINKS[kind] if links else math.inf
  compute, hbm, network = flops / chip.peak_flops, hbm_bytes / chip.hbm_bandwidth, sent / bandwidth
  waits = (sent - overlapped) / bandwidth
  return Times(compute, hbm, network, max(compute / share, hbm, network - waits) + waits)


def residuals(chips):
  """[(name, seconds published, seconds estimated)] of the published steps."""
  rows = []
  for step in PUBLISHED:
    kind = step.topology.split(":")[0]
    found = times(kind, chips[kind], step.topology, step.flops, 0.0, step.sent)
    rows.append((step.name, step.seconds, found.estimate))
  return rows
