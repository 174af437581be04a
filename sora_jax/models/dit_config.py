"""The shape of a diffusion transformer, what its blocks save for the backward pass, and sizes with names."""

import dataclasses
import math

import jax

from sora_jax.models.attention import SAVED

# Names of activations, beside attention's SAVED.
BLOCK_INPUT, SELF_OUT, MLP_OUT = "block_input", "self_out", "mlp_out"


def _in_host_memory(saved, moved):
  """The remat policy that saves activations of these names on the device, and others in the host's memory."""
  return jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=saved,
    names_which_can_be_offloaded=moved,
    offload_src="device",
    offload_dst="pinned_host",
  )


REMAT = {  # what a block saves for its backward pass
  "none": None,  # everything
  "full": jax.checkpoint_policies.nothing_saveable,  # its input
  # Its input, the output of self-attention.
  "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
  # Its input, the products with weights, the output of attention.
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED),
  ),
  # As full and attention, with the block's input in the host's memory; and with what is gated, too, whose
  # products, a third of a block's, only the gradients of the gates need again.
  "full_offload": _in_host_memory([], [BLOCK_INPUT]),
  "attention_offload": _in_host_memory([SAVED], [BLOCK_INPUT]),
  "gated_offload": _in_host_memory([SAVED], [BLOCK_INPUT, SELF_OUT, MLP_OUT]),
}
CONDITIONING = ("token_sigma", "channels", "replacement")
PREDICTS = ("velocity", "data")
MIN_SIGMA = 0.05  # smallest divisor of predicts="data" (as in arXiv:2511.13720)


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Shape of a DiT and of its inputs. Raises ValueError when it cannot be built."""

  depth: int
  heads: int
  head_size: int
  mlp: int  # width of the mlp
  channels: int = 32  # of a latent
  patch: tuple = (1, 1, 1)  # latents in a token: t, y, x
  text_width: int = 128
  cond_channels: int = 0  # condition channels of each latent: cond_BLQ, Q = latents in a patch times these
  time_freqs: int = 256  # sinusoids of the noise level
  rope_theta: float = 10_000.0  # wavelengths of the rotary positions go up to 2 pi times this
  # Cosines along each of t, y, x whose products tell a token its position in its clip; 0: positions are
  # relative only.
  place_waves: int = 0
  # Size of the initial biases of query and key, by which a head looks at one neighbour; 0: none at first.
  near: float = 0.0
  cross_norm: bool = True  # affine norm before cross-attention
  eps: float = 1e-6
  # How given tokens enter: at sigma 0 (token_sigma) | as extra channels (channels) | replaced by the noised
  # truth at each step (replacement).
  conditioning: str = "token_sigma"
  predicts: str = "velocity"  # output of the last layer: velocity | data, from which velocity is computed
  # A prompt that ends in zeros counts as padded with zeros to this many tokens, which are attended to (Wan:
  # 512); 0: no such padding.
  text_pad: int = 0
  lora_scale: float = 1.0  # of adapters, if there are any
  dtype: str = "float32"  # of activations; weights are float32
  remat: str = "none"
  scans: int = 1  # scans over the layers, one after another (models/scan.py)

  def __post_init__(self):
    object.__setattr__(self, "patch", tuple(self.patch))
    sizes = (self.depth, self.heads, self.mlp, self.channels, self.text_width, *self.patch)
    if min(sizes) < 1 or len(self.patch) != 3:
      raise ValueError(f"DiTConfig: sizes must be at least 1, with patch (t, y, x), not {self}")
    if self.head_size % 2 or self.head_size < 6 or self.time_freqs % 2:
      raise ValueError(
        f"DiTConfig: head_size {self.head_size} and time_freqs {self.time_freqs} must be even, "
        "head_size at least 6"
      )
    choices = {
      "conditioning": CONDITIONING,
      "predicts": PREDICTS,
      "remat": tuple(REMAT),
      "dtype": ("float32", "bfloat16"),
    }
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ValueError(f"DiTConfig: {name}={getattr(self, name)!r}; known: {', '.join(known)}")
    if not 1 <= self.scans <= (1 if self.remat == "none" else self.depth):
      raise ValueError(
        f"DiTConfig: scans={self.scans}, remat={self.remat!r} with {self.depth} layers; scans must be 1 to "
        "the number of layers, and 1 for remat='none'"
      )
    if (self.conditioning == "channels") != (self.cond_channels > 0):
      raise ValueError(
        f"DiTConfig: conditioning={self.conditioning!r} with cond_channels={self.cond_channels}; "
        "cond_channels must be positive for conditioning='channels', and 0 otherwise"
      )

  @property
  def width(self):
    return self.heads * self.head_size

  @property
  def values_in(self):
    """P: values in a token."""
    return math.prod(self.patch) * self.channels

  @property
  def values_cond(self):
    """Q: condition values in a token."""
    return math.prod(self.patch) * self.cond_channels


def _ours(depth, heads):
  shape = {"head_size": 256, "mlp": heads * 1024, "channels": 48, "patch": (1, 2, 2), "text_width": 4096}
  return DiTConfig(depth=depth, heads=heads, dtype="bfloat16", remat="dots", **shape)


def _wan(depth, heads, mlp, channels=16, conditioning="replacement", **kwargs):
  shape = {
    "head_size": 128,
    "mlp": mlp,
    "channels": channels,
    "patch": (1, 2, 2),
    "text_width": 4096,
    "text_pad": 512,
  }
  kwargs |= {"conditioning": conditioning, "dtype": "bfloat16", "remat": "full"}
  return DiTConfig(depth=depth, heads=heads, **shape, **kwargs)


_SMALL = DiTConfig(
  depth=5,
  heads=3,
  head_size=48,
  mlp=432,
  channels=48,
  patch=(1, 2, 2),
  rope_theta=30.0,
  predicts="data",
  remat="dots",
)
_QUICK = dataclasses.replace(_SMALL, place_waves=4, near=6.0)

SIZES = {
  # The model that ships, for two CPU cores. Its grids are few patches wide, where longer rotary waves would
  # distinguish neighbours no better than no positions at all.
  "tiny": _SMALL,
  # What the quickstart trains: as tiny, and learns shapes and directions in a tenth of the time.
  "quick": _QUICK,
  # As quick, and larger: what is trained to replace the model that ships.
  "world": dataclasses.replace(_QUICK, depth=6, heads=4, mlp=576),
  # A third and three times of its compute, for launch.scaling.
  "quick-small": dataclasses.replace(_QUICK, depth=4, heads=2, mlp=288),
  "quick-large": dataclasses.replace(_QUICK, depth=6, heads=5, mlp=720),
  "S": _ours(12, 2),
  "B": _ours(12, 3),
  "L": _ours(24, 4),
  "XL": _ours(28, 6),  # head size 256: the width of the MXU on v6e, v7x
  "wan-1.3b": _wan(30, 12, 8960),
  "wan-5b": _wan(30, 24, 14336, channels=48, conditioning="token_sigma"),  # Wan 2.2 TI2V
  "wan-14b": _wan(40, 40, 13824),  # Wan 2.1 T2V; each expert of Wan 2.2 T2V-A14B
  # Each expert of I2V-A14B: 16 + 4 + 16 channels.
  "wan-14b-i2v": _wan(40, 40, 13824, conditioning="channels", cond_channels=20),
}
