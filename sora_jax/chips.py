"""What a TPU can do: peaks, memory and bandwidths of each kind, for utilisation and for checks before a run.

All numbers are those of one jax device, which is a chip, but half a chip of TPU7x. Peak of bf16 products,
bandwidths: Google's pages of the chips (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and the scaling
book (jax-ml.github.io/scaling-book/tpus). HBM: what the compiler of libtpu 0.0.42.1 says is available to a
program that needs more; of v4, whose two cores are one device on real chips, from such a message there.
Kinds: `device_kind` of the topologies in that libtpu, and the other names that jax knows
(jax/_src/pallas/mosaic/tpu_info.py).
"""

import dataclasses

GIB, GB = 2**30, 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device of a kind of TPU. FLOP/s, bytes, bytes a second."""

  peak_flops: float  # of bf16 products
  hbm_bytes: float  # that a program can have
  hbm_bandwidth: float
  ici_bandwidth: float  # all links together, one way
  device_kinds: tuple


CHIPS = {
  "v4": Chip(275e12, 30.75 * GIB, 1228 * GB, 270 * GB, ("TPU v4",)),
  "v5e": Chip(197e12, 15.75 * GIB, 819 * GB, 180 * GB, ("TPU v5 lite", "TPU v5e")),
  "v5p": Chip(459e12, 95.74 * GIB, 2765 * GB, 540 * GB, ("TPU v5", "TPU v5p")),
  "v6e": Chip(918e12, 31.25 * GIB, 1640 * GB, 360 * GB, ("TPU v6 lite", "TPU v6e")),
  "tpu7x": Chip(2307e12 / 2, 94.75 * GIB, 7380 * GB / 2, 600 * GB / 2, ("TPU7x",)),  # two devices a chip
}


def chip_of(device_kind):
  """The Chip of a jax device, by its `device_kind`; None where it is no TPU of the table."""
  return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
