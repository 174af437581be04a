"""Several directories of records, used as one."""

import numpy as np

from data.plan import Joined
from data.records import RecordIndex
from sora_jax.errors import BadInput

SHARED = {  # fields of the header that all directories must agree on: name for messages
  "latent_channels": "latent channels", "vae_stride": "VAE strides", "vae_fingerprint": "VAE",
  "text_fingerprint": "text encoder", "null_text": "null text", "null_text_embedding": "text embeddings",
  "conditions": "conditions of an image model",
}  # fmt: skip


def open_all(path):
  """ "A" or "A,B,...", directories of records -> RecordIndex, or a Mixture of several.

  BadInput if one is incomplete.
  """
  directories = [directory.strip() for directory in path.split(",")]
  if not all(directories) or len(set(directories)) < len(directories):
    raise BadInput(f"{path}: give a directory of records, or several different ones separated by commas")
  indexes = [RecordIndex.open(directory) for directory in directories]
  return indexes[0] if len(indexes) == 1 else Mixture(indexes)


class Mixture:
  """Several `RecordIndex` used as one.

  Records are numbered through all of them in order; sources are renumbered.

  directory: their names, for messages.  header: the fields they share, and the sources of all.  rows: a
  `Joined` of their indexes, for the plan.
  Raises BadInput, naming two directories, if they differ in VAE, text encoder, latent channels or null text.
  """

  def __init__(self, indexes):
    self.indexes = tuple(indexes)
    first = self.indexes[0]
    for other in self.indexes[1:]:
      for field, description in SHARED.items():
        value, other_value = first.header.get(field), other.header.get(field)
        if (value or None) != (other_value or None):
          raise BadInput(
            f"{first.directory} and {other.directory}: {description} {value} and {other_value}; records "
            "that are mixed must have the same VAE and text encoder; encode one of them again"
          )
    names = list(dict.fromkeys(name for index in self.indexes for name in index.header["sources"]))
    self.directory = ", ".join(str(index.directory) for index in self.indexes)
    self.header = {field: first.header.get(field) for field in SHARED} | {"sources": names}
    source_numbers = [
      np.array([names.index(name) for name in index.header["sources"]]) for index in self.indexes
    ]
    self.rows = Joined([index.rows for index in self.indexes], source_numbers)

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    which, own = self.rows.locate(i)
    return self.indexes[which][own]

  @property
  def null_text(self):
    """As in RecordIndex."""
    return self.indexes[0].null_text

  def describe(self, i):
    """Names record i for a message."""
    which, own = self.rows.locate(i)
    return self.indexes[which].describe(own)
