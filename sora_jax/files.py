"""Files on a disk or in a bucket: written whole or not at all, JSON, JSON lines, safetensors.

On a disk every writer writes `NAME.partial` beside its target and renames it; in a bucket, where an object
appears when it is whole, a local file is uploaded. So a reader never meets half a file, and a killed writer
leaves the old one.
"""

import contextlib
import json
import math
import os
import tempfile

import fsspec
import ml_dtypes
import numpy as np
from etils import epath

from sora_jax.errors import BadInput

# A remembered listing of a bucket hides what other processes wrote since.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)

DTYPES = {  # numpy's names -> those of safetensors
  "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64"
}  # fmt: skip
NUMPY_DTYPES = {theirs: np.dtype(getattr(ml_dtypes, ours, ours)) for ours, theirs in DTYPES.items()}


def is_local(path):
  """Is it a path of this machine's file system, not of a bucket?"""
  return "://" not in os.fspath(path)


@contextlib.contextmanager
def replacing(path):
  """A path to write to, beside `path` or, of a bucket, on this machine; it becomes `path` at the end.

  Where the block raises, it is removed.
  """
  path = epath.Path(path)
  if not is_local(path):
    with tempfile.TemporaryDirectory() as directory:
      partial = epath.Path(directory) / path.name
      yield partial
      copy(partial, path)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f"{path.name}.partial"
  try:
    yield partial
    sync(partial)
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def sync(path):
  """Has the disk keep what was written to a local file, before anything says that it is there."""
  with open(path, "rb") as f:
    os.fsync(f.fileno())


def copy(source, target):
  """Copies a file between disks and buckets, a piece at a time."""
  target = epath.Path(target)
  if is_local(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  with target.open("wb") as f:
    for piece in pieces_of(source):
      f.write(piece)


def copy_tree(source, target):
  """Copies all files below a directory."""
  for path in epath.Path(source).iterdir():
    (copy_tree if path.is_dir() else copy)(path, epath.Path(target) / path.name)


def write_bytes(path, content):
  """Writes a file of these bytes."""
  if not is_local(path):
    epath.Path(path).write_bytes(content)
    return
  with replacing(path) as partial:
    partial.write_bytes(content)


def pieces_of(path, size=1 << 26):
  """Yields the bytes of a file, at most `size` at a time."""
  with epath.Path(path).open("rb") as f:
    while data := f.read(size):
      yield data


# --- JSON


def write_json(path, value, depth=None):
  """Writes JSON, indented; dicts below `depth` levels take one line each, where there may be a million of
  them.
  """
  text = json.dumps(value, indent=1) if depth is None else _dump(value, depth)
  write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"))


def _dump(value, depth, margin=""):
  if depth < 1 or not isinstance(value, dict) or not value:
    return json.dumps(value, ensure_ascii=False)
  lines = (
    f"\n{margin} {json.dumps(k, ensure_ascii=False)}: {_dump(v, depth - 1, margin + ' ')}"
    for k, v in value.items()
  )
  return "{" + ",".join(lines) + f"\n{margin}}}"


def read_json(path):
  """Reads JSON; BadInput where the file is missing or broken."""
  path = epath.Path(path)
  try:
    return json.loads(path.read_bytes())
  except FileNotFoundError:
    raise BadInput(f"there is no {path}; give a directory that a sora_jax program wrote") from None
  except ValueError as error:
    raise BadInput(f"{path} is not valid JSON ({error}); restore it or start in a new directory") from None


def read_json_if_exists(path):
  """As `read_json`; {} where there is no such file."""
  return read_json(path) if epath.Path(path).exists() else {}


def append_jsonl(path, *values):
  """Appends lines of JSON; a line that a kill or a full disk cut short is ended first.

  In a bucket, where objects do not grow, the file is written anew: append several lines at a time.
  """
  lines = b"".join(
    json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for value in values
  )
  if not is_local(path):
    path = epath.Path(path)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + lines)
    return
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  with open(path, "a+b") as f:
    f.seek(max(0, f.tell() - 1))
    torn = f.read(1) not in (b"", b"\n")
    f.write((b"\n" if torn else b"") + lines)


def read_jsonl(path):
  """Yields the dicts of a file of JSON lines, none where there is no file.

  Lines cut short by a kill are left out.
  """
  path = epath.Path(path)
  if not path.exists():
    return
  with path.open("rb") as f:
    for line in f:
      with contextlib.suppress(ValueError):
        value = json.loads(line.decode("utf-8", "replace"))
        if isinstance(value, dict):
          yield value


# --- safetensors (huggingface.co/docs/safetensors: 8 bytes of length, a JSON header, the tensors one after
# another)


def safetensors_header(specs, metadata=None):
  """{name: (shape, dtype)} in the order of the file -> its first bytes, padded so that tensors are aligned to
  8 bytes.
  """
  header, end = {"__metadata__": metadata} if metadata else {}, 0
  for name, (shape, dtype) in specs.items():
    begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {"dtype": DTYPES[np.dtype(dtype).name], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header, ensure_ascii=False).encode("utf-8", "backslashreplace")
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


def parse_safetensors(data):
  """The bytes of a file, a buffer -> ({name: array that shares its memory}, metadata).

  ValueError where it is none.
  """
  data = np.frombuffer(data, np.uint8) if isinstance(data, bytes | memoryview) else data
  try:
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    metadata = header.pop("__metadata__", {})
    total = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if total != len(data) - start:
      raise ValueError(f"it has {len(data) - start} bytes of tensors, and its header says {total}")
    arrays = {}
    for name, entry in header.items():
      begin, end = (start + offset for offset in entry["data_offsets"])
      arrays[name] = data[begin:end].view(NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
  except (KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError) as error:
    raise ValueError(f"not a safetensors file: {error!r}") from error
  return arrays, metadata


def to_safetensors(arrays, metadata=None):
  """{name: array} -> the bytes of a file, the same for the same arrays (safetensors' own writer shuffles the
  metadata).
  """
  header = safetensors_header({name: (array.shape, array.dtype) for name, array in arrays.items()}, metadata)
  return header + b"".join(array.tobytes() for array in arrays.values())


def write_safetensors(path, specs, pieces, metadata=None):
  """Writes a file front to back, of which only a piece is in memory at a time; safetensors' own writer wants
  all of it.

  specs: {name: (shape, dtype)} of all tensors. pieces: iterator of (name, array): a tensor whole, or its
  slices along the first axis, one after another; cast to its dtype. In the order of specs. ValueError where
  they do not add up.
  """
  ends, at = {}, 0
  for name, (shape, dtype) in specs.items():
    at += math.prod(shape) * np.dtype(dtype).itemsize
    ends[name] = at
  with replacing(path) as partial, partial.open("wb") as f:
    f.write(safetensors_header(specs, metadata))
    at = 0
    for name, array in pieces:
      shape, dtype = specs[name]
      begin = ends[name] - math.prod(shape) * np.dtype(dtype).itemsize
      data = np.ascontiguousarray(array.astype(dtype, copy=False))
      if not begin <= at <= at + data.nbytes <= ends[name]:
        raise ValueError(
          f"{name}: {data.nbytes} bytes at {at} do not fit in its place, {begin} to {ends[name]}"
        )
      f.write(data.view(np.uint8).data)
      at += data.nbytes
    if at != max(ends.values(), default=0):
      raise ValueError(
        f"{path}: {at} bytes came; the tensors of the header have {max(ends.values(), default=0)}"
      )


def read_safetensors(path):
  """A file -> {name: numpy array}; of a local file memory-mapped, so that only what is used is read.

  BadInput where the file is missing, damaged or cut short.
  """
  path = epath.Path(path)
  try:
    data = np.memmap(path, np.uint8, "r") if is_local(path) else np.frombuffer(path.read_bytes(), np.uint8)
    return parse_safetensors(data)[0]
  except FileNotFoundError:
    raise BadInput(
      f"there is no {path}; its config.json is there, so the copy is not whole: copy it again"
    ) from None
  except ValueError as error:
    raise BadInput(f"{path} cannot be read ({error}); copy it again") from None


# --- nested dicts, as weights are kept, and their names in a file


def flatten(tree, prefix=""):
  """Nested dict -> {"a/b/c": leaf}, sorted by name."""
  flat = {}
  for name in sorted(tree):
    leaf = tree[name]
    flat.update(flatten(leaf, f"{prefix}{name}/") if isinstance(leaf, dict) else {prefix + name: leaf})
  return flat


def unflatten(flat):
  """{"a/b/c": leaf} -> nested dict."""
  tree = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
