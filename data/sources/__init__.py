"""Sources of clips, a module each; what a source is, see data/clips.py. Those of real files are known by the path given."""

import importlib
import pathlib

from sora_jax.errors import BadInput
from sora_jax.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
OF_FILES = ("folder", "manifest", "tar", "tfds")      # what becomes of a file: data/curation.py
MANIFESTS = (".jsonl", ".csv", ".parquet")


def kind_of(path) -> str | None:
  """Which of OF_FILES reads what lies at a path, or fits a pattern; None if it can be no path but a name."""
  place = pathlib.Path(path)
  if place.suffix.lower() in MANIFESTS and not place.is_dir():
    return "manifest"
  if place.suffix.lower() == ".tar":
    return "tar"
  if any(place.glob("*.tar")):
    clip = next((file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES), None)
    if clip:
      raise BadInput(f"{path}: holds tar shards, and clips such as {clip.name}; give '{path}/*.tar' for the shards, or move them away")
    return "tar"
  if any(any(place.glob(name)) for name in ("dataset_info.json", "features.json", "*/dataset_info.json", "*.array_record*")):
    return "tfds"
  return "folder" if place.exists() or not str(path).partition(":")[0].isidentifier() else None


def open_files(config):
  """A source of the files at config.path, by the module that reads them; the rest of config is for that module's `open_source`."""
  return importlib.import_module(f"data.sources.{kind_of(config.path) or 'folder'}").open_source(config)
