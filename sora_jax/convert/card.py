"""README.md of an export, a model card in the form of the Hugging Face hub: loading, origin, hashes."""

import hashlib
import json
import re

from sora_jax import files

WEIGHTS = (".safetensors", ".npz", ".stablehlo", ".onnx", ".model")  # suffixes of the files that are hashed


def write(out, job, kind, loading):
  """Writes OUT/README.md -> {file: sha256} of all weights in OUT.

  job: an exporting.Export.  kind: its format.  loading: Markdown that says how to load it.
  """
  paths = [path for path in sorted(out.rglob("*")) if path.suffix in WEIGHTS]
  hashes = {str(path.relative_to(out)): sha256(path) for path in paths}
  licence = source_licence(job.workdir / "source")
  unknown_licence = "not stated by their source; ask their authors before you pass them on"
  tag = "image-to-video" if job.config["model"].get("dit", {}).get("cond_channels") else "text-to-video"
  library = ["library_name: diffusers"] if kind == "diffusers" else []
  weights = "running mean" if job.which == "ema" else "last ones"
  config = {name: job.config[name] for name in ("model", "sample", "optim", "lora") if name in job.config}
  lines = [
    "---",
    f"license: {licence or 'unknown'}",
    *library,
    f"pipeline_tag: {tag}",
    "tags: [sora_jax]",
    "---",
    "",
    "# Text to video",
    "",
    f"Written by `launch.export --format={kind}` of sora_jax.",
    "",
    "## Load it",
    "",
    loading,
    "## Where it comes from",
    "",
    f"- Weights: {weights}; {training(job, kind)}.",
    f"- Licence of the weights: {licence or unknown_licence}.",
    "",
    "## Config",
    "",
    "```json",
    json.dumps(config, indent=1),
    "```",
    "",
    "## Hashes",
    "",
    "| file | sha256 |",
    "| --- | --- |",
    *(f"| `{name}` | `{value}` |" for name, value in hashes.items()),
    "",
  ]
  (out / "README.md").write_text("\n".join(lines))
  return hashes


def training(job, kind):
  """How the weights were trained, as text."""
  if job.step:
    imported = (job.workdir / "source").exists()
    start = "imported weights" if imported else "nothing, or from what config.init named"
    return f"{job.step} steps of launch.train from {start}"
  added = files.read_json_if_exists(job.workdir / "model" / "config.json").get("adapters")
  if added:
    return f"as imported, with these adapters added: {', '.join(added)}"
  if not job.config.get("lora", {}).get("rank"):
    return "as imported, not trained further"
  return "as imported" if kind == "lora" else "as imported, with adapters added to them"


def source_licence(source):
  """The licence that the model card of the imported folder names; None without a card or a licence."""
  card = source / "README.md"
  if not card.exists():
    return None
  match = re.search(r"^license:\s*(\S+)", card.read_text(), re.M)
  return match[1] if match else None


def sha256(path):
  """The hash of a file, in hexadecimal."""
  digest = hashlib.sha256()
  for data in files.pieces_of(path):
    digest.update(data)
  return digest.hexdigest()
