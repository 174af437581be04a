"""A TFDS dataset of raw clips, encoded videos or pictures with captions, in ArrayRecord; read without TensorFlow.

  PATH/dataset_info.json   PATH is a version (NAME/1.0.0), or the folder that holds it
  the clip                 bytes of a file, under the first of CLIPS that an example has
  its caption              under one of CAPTIONS
  its name                 under one of NAMES, else its position, SPLIT/00000123

Examples are read as the tf.train.Example messages that they are, not through features.json, whose Image and Video ask
for TensorFlow, and which may name any class of any package to import. So a tfds.features.Image is the very file that it
was made of; a features.Video, which is a row of PNG or JPEG pictures, becomes a file of them, untouched, at the rate that
the example has under `fps`, or else at that of the rules.

Captions stand beside the bytes, in the examples: opening a source reads each once (0.3 GB a second on one core), decodes
nothing, and keeps caption, name, size and checksum. What is taken of a clip, see data/curation.py.
"""

import dataclasses
import io
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from fractions import Fraction

import av
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import dataset_info, naming, splits
from tensorflow_datasets.proto import tf_example_pb2

from data import curation
from data.clips import BadClip, Dropped, Item, RawClip, read_caption
from sora_jax.errors import BadInput

INFO = "dataset_info.json"
CLIPS = ("video", "mp4", "webm", "mkv", "mov", "avi", "gif", "image", "png", "jpg", "jpeg", "webp")
CAPTIONS = ("caption", "text")
NAMES = ("file", "filename", "file_name", "id")


@dataclasses.dataclass(frozen=True)
class Source(curation.FileSource):
  """Clips of a split; item.location: the position in it. Examples that cannot be read, or hold no clip, are in `ignored`."""
  blobs: ArrayRecordDataSource

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """Pieces in order; BadClip where the bytes cannot be read any further."""
    example = _example(self.blobs, item.location)
    files = _values(example, CLIPS)
    with tempfile.NamedTemporaryFile() as out:
      if len(files) > 1:
        join(files, _rate(example) or self.rules.fps, out)
      else:
        out.write(files[0])
      out.flush()
      yield from curation.read(pathlib.Path(out.name), item, self.rules)


def open_source(config) -> Source:
  """config: path; split (train; slices such as train[:10%] are taken); the fields of data.curation.Rules. All but path may be missing.

  BadInput if there is no such dataset or split, if it needs TensorFlow to be read, or if no example of it holds a clip.
  """
  directory, split, rules = find(config.path), config.get("split") or "train", curation.Rules.of(config)
  name, blobs = _open(directory, split)
  items, notes, ignored, seen = {}, [], [], set()
  for i in range(len(blobs)):
    position = f"{split}/{i:08d}"
    try:
      example = _example(blobs, i)
    except BadClip as error:
      ignored.append((position, str(error)))
      continue
    seen.update(example)
    files = _values(example, CLIPS)
    if not files:
      ignored.append((position, "holds no clip"))
      continue
    if len(files) > 1 and not (_rate(example) or rules.fps):
      raise BadInput(f"{directory}: its videos are rows of pictures (tfds.features.Video), which have no rate; give it as --fps")
    file = _name(example) or position
    if file in items:
      notes.append((position, f"another example is {file}, too: this one goes by its position"))
      file = position
    caption, wrong = read_caption(next(iter(_values(example, CAPTIONS)), None))
    if wrong:
      notes.append((file, wrong))
    checksum = 0
    for one in files:
      checksum = zlib.crc32(one, checksum)
    items[file] = Item(file, caption, f"{sum(map(len, files))}-{checksum:08x}", i)
  if not items:
    why = f"its examples hold {', '.join(sorted(seen))}; a clip is the bytes of a file under one of {', '.join(CLIPS)}" if seen else (
        f"none of its {len(blobs)} examples can be read, such as {': '.join(ignored[0])}")
    raise BadInput(f"{directory}: no clips in it: {why}")
  return Source(name, tuple(items[file] for file in sorted(items)), tuple(sorted(notes)), tuple(ignored), rules, blobs)


def find(path) -> pathlib.Path:
  """The directory of the dataset at `path`, or right below it. BadInput where there is none, or several."""
  root = pathlib.Path(path)
  if (root / INFO).exists():
    return root
  found = sorted(p.parent for p in root.glob(f"*/{INFO}"))
  if len(found) > 1:
    raise BadInput(f"{root}: holds {len(found)} datasets, {', '.join(p.name for p in found)}; give one of them")
  if (root / "index.json").exists():
    raise BadInput(f"{root}: holds records that launch.encode wrote: encoded already; train on them with --config.data.path={root}")
  if not found and any(root.glob("*.array_record*")):
    raise BadInput(f"{root}: ArrayRecord files without a {INFO}: nothing says what their records are; bring the clips as files with a manifest, "
                   "in tar shards, or as a TFDS dataset")
  if not found:
    raise BadInput(f"{root}: no {INFO} in it; give a version of a TFDS dataset, as NAME/1.0.0")
  return found[0]


def _open(directory, split):
  """-> (name of the dataset, random access to the serialized examples of the split)."""
  try:
    info = dataset_info.read_proto_from_builder_dir(directory)
  except (OSError, ParseError, UnicodeDecodeError) as error:
    raise BadInput(f"{directory / INFO}: cannot be read ({_line(error)}); copy the dataset again") from error
  formats = {info.file_format or "tfrecord", *info.alternative_file_formats}
  if "array_record" not in formats:
    raise BadInput(f"{directory}: is in the format {', '.join(sorted(formats))}; array_record is read here; where TensorFlow is installed, run "
                   f"python -m tensorflow_datasets.scripts.convert_format --dataset_version_dir={directory} --out_file_format=array_record")
  template = naming.ShardedFileTemplate(dataset_name=info.name, data_dir=directory, filetype_suffix="array_record")
  table = splits.SplitDict.from_proto(info.splits, template)
  try:
    shards = table[split].file_instructions
  except (KeyError, ValueError) as error:
    raise BadInput(f"{directory}: no split {split}; it has {', '.join(sorted(table)) or 'none'}, and slices such as train[:10%]") from error
  if not shards:
    raise BadInput(f"{directory}: its split {split} is empty; give another")
  return info.name, ArrayRecordDataSource(shards)


def _example(blobs, i):
  """{name: tf.train.Feature} of example i; BadClip if it cannot be read back."""
  try:
    return dict(tf_example_pb2.Example.FromString(blobs[i]).features.feature)
  except (RuntimeError, DecodeError) as error:
    raise BadClip("corrupt", _line(error)) from error


def _values(example, names):
  """The bytes, one or several, under the first of the names that has some; () if none has."""
  return next((example[name].bytes_list.value for name in names if name in example and example[name].bytes_list.value), ())


def _name(example):
  """Text, or a number, under the first of NAMES that has one; "" if none has."""
  for feature in (example[name] for name in NAMES if name in example):
    for value in (*feature.bytes_list.value, *feature.int64_list.value):
      if value != b"":
        return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
  return ""


def _rate(example):
  """Frames a second that an example speaks of; 0 if it does not."""
  values = [*example["fps"].float_list.value, *example["fps"].int64_list.value] if "fps" in example else []
  return max(0, *values[:1], 0)


def join(pictures, fps, out):
  """PNG or JPEG files, one a frame -> a QuickTime file that holds them as they are, at a constant rate; written to `out`."""
  try:
    step = 1 / Fraction(fps).limit_denominator(1001)
    with av.open(io.BytesIO(pictures[0])) as first, av.open(out, "w", format="mov") as container:
      stream = container.add_stream_from_template(first.streams.video[0])
      for i, picture in enumerate(pictures):
        packet = av.Packet(picture)
        packet.stream, packet.time_base, packet.is_keyframe = stream, step, True
        packet.pts, packet.dts, packet.duration = i, i, 1
        container.mux(packet)
  except (av.error.FFmpegError, ArithmeticError, ValueError, IndexError) as error:
    raise BadClip("not a video", f"a row of {len(pictures)} pictures at {fps:g} a second: {_line(error)}") from error


def _line(error):
  return " ".join(str(error).split())
