"""Several directories of records as one."""

import numpy as np

from data.plan import Joined
from data.records import RecordIndex
from sora_jax.errors import BadInput

SAME = {"latent_channels": "latent channels", "vae_stride": "VAE strides", "vae_fingerprint": "VAE", "text_fingerprint": "text encoder",
        "null_text": "null text", "null_text_embedding": "text embeddings", "conditions": "conditions of an image model"}


def open_all(path):
  """"A" or "A,B,...", directories of records -> RecordIndex, or Mixture of several. BadInput where one is not whole."""
  directories = [directory.strip() for directory in path.split(",")]
  if not all(directories) or len(set(directories)) < len(directories):
    raise BadInput(f"{path}: a directory of records, or several different ones with commas between them")
  indexes = [RecordIndex.open(directory) for directory in directories]
  return indexes[0] if len(indexes) == 1 else Mixture(indexes)


class Mixture:
  """Several `RecordIndex` used as one: record i is counted through all of them, in order. Sources are numbered anew.

  directory: their names, for messages.  header: what they share, with all their sources.  rows: `Joined` indexes, for the plan.
  BadInput, naming two directories, where they are not of the same VAE, text encoder, latent channels or null text.
  """

  def __init__(self, indexes):
    self.indexes = tuple(indexes)
    first = self.indexes[0]
    for other in self.indexes[1:]:
      for field, what in SAME.items():
        ours, theirs = first.header.get(field), other.header.get(field)
        if (ours or None) != (theirs or None):
          raise BadInput(f"{first.directory} and {other.directory}: {what} {ours} and {theirs}; records that are mixed are of the same VAE "
                         "and text encoder; encode one of them again")
    names = list(dict.fromkeys(name for index in self.indexes for name in index.header["sources"]))
    self.directory = ", ".join(str(index.directory) for index in self.indexes)
    self.header = {field: first.header.get(field) for field in SAME} | {"sources": names}
    self.rows = Joined([index.rows for index in self.indexes],
                       [np.array([names.index(name) for name in index.header["sources"]]) for index in self.indexes])

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    which, own = self.rows.locate(i)
    return self.indexes[which][own]

  @property
  def null_text(self):
    """As of RecordIndex."""
    return self.indexes[0].null_text

  def describe(self, i):
    """Names record i for a message."""
    which, own = self.rows.locate(i)
    return self.indexes[which].describe(own)
