"""Sources of clips, one module each; data/clips.py defines the interface.

For real files the path decides the module.
"""

import importlib
import pathlib

from sora_jax.errors import BadInput
from sora_jax.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
OF_FILES = ("folder", "manifest", "tar", "tfds")  # sources of real files, which data/curation.py processes
MANIFESTS = (".jsonl", ".csv", ".parquet")
TFDS_FILES = ("dataset_info.json", "features.json", "*/dataset_info.json", "*.array_record*")


def kind_of(path) -> str | None:
  """Which of OF_FILES reads a path or a pattern; None if it can only be the name of a source."""
  root = pathlib.Path(path)
  if root.suffix.lower() in MANIFESTS and not root.is_dir():
    return "manifest"
  if root.suffix.lower() == ".tar":
    return "tar"
  if any(root.glob("*.tar")):
    clip = next((file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES), None)
    if clip:
      raise BadInput(
        f"{path}: holds tar shards, and clips such as {clip.name}; give '{path}/*.tar' for the shards, or "
        "move them away"
      )
    return "tar"
  if any(any(root.glob(pattern)) for pattern in TFDS_FILES):
    return "tfds"
  if root.exists():
    return "folder"
  is_name = str(path).partition(":")[0].isidentifier()
  return None if is_name else "folder"


def open_files(config):
  """A source of the files at config.path.

  `open_source` of the module that reads them takes the rest of the config.
  """
  return importlib.import_module(f"data.sources.{kind_of(config.path) or 'folder'}").open_source(config)
