"""Makes wan_original.json: names and shapes of all weights of the original Wan classes.

  python -m tests.golden.wan_names WAN2.1 WAN2.2

WAN2.1 and WAN2.2 are clones of github.com/Wan-Video/Wan2.1 (9737cba) and Wan2.2 (42bf4cf). Needs the extra
`oracle` and einops. The models are built from their own code, without storage.

The file has one entry for each model: {"size": arguments, "weights": {name: [shape, times]}}. `{}` in a name
stands for the number of a block; all blocks are alike.
"""

import importlib
import json
import pathlib
import re
import sys
import types

import torch

TINY = {"dim": 24, "ffn_dim": 40, "freq_dim": 16, "text_dim": 20, "num_heads": 2, "num_layers": 3}
DITS = {  # class, arguments: wan/configs/*.py and the releases' config.json
  "dit tiny": ("1", {"model_type": "t2v", "in_dim": 6, "out_dim": 6, **TINY}),
  "wan-1.3b": ("1", {"model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}),
  "wan-14b": ("2", {"model_type": "t2v", "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}),
  "wan-14b-i2v": (
    "2",
    {"model_type": "i2v", "in_dim": 36, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
  ),
  "wan-5b": (
    "2",
    {"model_type": "ti2v", "in_dim": 48, "out_dim": 48, "dim": 3072, "ffn_dim": 14336, "num_heads": 24,
     "num_layers": 30},
  ),
}  # fmt: skip
SMALL = {
  "dim": 8,
  "z_dim": 4,
  "dim_mult": [1, 2, 2, 4],
  "num_res_blocks": 1,
  "temperal_downsample": [False, True, True],
}
VAES = {
  "plain tiny": ("vae", SMALL),
  "wan2.1": (
    "vae",
    {"dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
     "temperal_downsample": [False, True, True]},
  ),
  "residual tiny": ("vae2_2", SMALL | {"dec_dim": 16, "dim_mult": [1, 2, 4, 4]}),
  "wan2.2": (
    "vae2_2",
    {"dim": 160, "dec_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
     "temperal_downsample": [False, True, True]},
  ),
}  # fmt: skip
TEXTS = {
  "text tiny": {
    "vocab": 50, "dim": 16, "dim_attn": 24, "dim_ffn": 20, "num_heads": 4, "num_layers": 2, "num_buckets": 8,
    "shared_pos": False,
  },
  "umt5-xxl": {
    "vocab": 256384, "dim": 4096, "dim_attn": 4096, "dim_ffn": 10240, "num_heads": 64, "num_layers": 24,
    "num_buckets": 32, "shared_pos": False,
  },
}  # fmt: skip


def weights(model):
  """{name: [shape, times]}, where all blocks share one entry; they must have the same shapes."""
  folded = {}
  for name, value in model.state_dict().items():
    at = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
    shape, times = folded.get(at, [list(value.shape), 0])
    assert shape == list(value.shape)
    folded[at] = [shape, times + 1]
  return folded


def modules(clone, name):
  """Imports the modules of a clone as a package, with stubs for attention kernels and tokenizers."""
  package = types.ModuleType(name)
  package.__path__ = [str(pathlib.Path(clone) / "wan" / "modules")]
  sys.modules[name] = package
  for module, attribute in (("attention", "flash_attention"), ("tokenizers", "HuggingfaceTokenizer")):
    stub = types.ModuleType(module)
    setattr(stub, attribute, None)
    sys.modules[f"{name}.{module}"] = stub
  return lambda part: importlib.import_module(f"{name}.{part}")


def main(first, second):
  torch.cuda.current_device = lambda: 0  # used in the signature of a class that is not needed here
  clones = {"1": modules(first, "wan21"), "2": modules(second, "wan22")}
  out = {}
  with torch.device("meta"):
    for name, (clone, size) in DITS.items():
      out[name] = {"size": size, "weights": weights(clones[clone]("model").WanModel(**size))}
    for name, (part, size) in VAES.items():
      out[name] = {
        "size": size,
        "weights": weights(clones["1" if part == "vae" else "2"](part).WanVAE_(**size)),
      }
    for name, size in TEXTS.items():
      out[name] = {"size": size, "weights": weights(clones["1"]("t5").T5Encoder(**size))}
  lines = []
  for name, entry in out.items():
    entries = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entry["weights"].items()]
    head = f'"{name}": {{"size": {json.dumps(entry["size"])}, "weights": {{\n'
    lines.append(head + ",\n".join(entries) + "\n}}")
  (pathlib.Path(__file__).parent / "wan_original.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
