"""README.md of an export: a model card in the form of the Hugging Face hub. What it is, how to load it, where it comes from, hashes."""

import hashlib
import json
import re

from sora_jax import files


def write(out, job, kind, loading):
  """Writes OUT/README.md -> {file: sha256} of all weights in OUT. job: an exporting.Export; `loading`: Markdown that says how to load it."""
  hashes = {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*"))
            if path.suffix in (".safetensors", ".npz", ".stablehlo", ".onnx", ".model")}
  source = job.workdir / "source"
  licence = source_licence(source)
  trained = "as imported, not trained further"
  if job.config.get("lora", {}).get("rank"):
    trained = "as imported" + ("" if kind == "lora" else ", with adapters added to them")
  if job.step:
    trained = f"{job.step} steps of launch.train from {'imported weights' if source.exists() else 'nothing, or from what config.init named'}"
  tag = "image-to-video" if job.config["model"].get("dit", {}).get("cond_channels") else "text-to-video"
  shown = {name: job.config[name] for name in ("model", "sample", "optim", "lora") if name in job.config}
  lines = [
      "---", f"license: {licence or 'unknown'}", *(["library_name: diffusers"] if kind == "diffusers" else []), f"pipeline_tag: {tag}",
      "tags: [sora_jax]", "---", "", "# Text to video", "", f"Written by `launch.export --format={kind}` of sora_jax.", "", "## Load it", "", loading,
      "## Where it comes from", "", f"- Weights: {'running mean' if job.which == 'ema' else 'last ones'}; {trained}.",
      f"- Licence of the weights: {licence or 'not stated where they were imported from; ask who made them before you pass them on'}.", "",
      "## Config", "", "```json", json.dumps(shown, indent=1), "```", "", "## Hashes", "", "| file | sha256 |", "| --- | --- |",
      *(f"| `{name}` | `{value}` |" for name, value in hashes.items()), ""]
  (out / "README.md").write_text("\n".join(lines))
  return hashes


def source_licence(source):
  """What the model card of the imported folder, if it had one, says of its licence."""
  card = source / "README.md"
  found = re.search(r"^license:\s*(\S+)", card.read_text(), re.M) if card.exists() else None
  return found and found[1]


def sha256(path):
  """Of a file, in hexadecimal."""
  digest = hashlib.sha256()
  for data in files.pieces_of(path):
    digest.update(data)
  return digest.hexdigest()
