"""A TFDS dataset of raw clips, videos or images with captions, in ArrayRecord. Read without TensorFlow.

  PATH/dataset_info.json   PATH is a version (NAME/1.0.0), or the folder that holds it
  the clip                 bytes of a file, in the first of the fields CLIPS that an example has
  its caption              in one of the fields CAPTIONS
  its name                 in one of the fields NAMES, else its position, SPLIT/00000123

Examples are parsed as tf.train.Example messages, not through features.json: its Image and Video need
TensorFlow, and it may name any class of any package to import. So a tfds.features.Image is read as the file
that it was made from. A features.Video, a sequence of PNG or JPEG images, becomes a file of these images,
unchanged, at the rate that the example has under `fps`, else at the rate of the rules.

Captions are in the examples, beside the bytes. Opening a source reads each example once (0.3 GB a second on
one core), decodes nothing, and keeps caption, name, size and checksum. data/curation.py turns files into
clips.
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
  """Clips of a split; item.location: the position in it.

  Examples without a readable clip are in `ignored`.
  """

  blobs: ArrayRecordDataSource

  def read(self, item: Item) -> Iterator[RawClip | Dropped]:
    """The pieces in order. Raises BadClip where the bytes cannot be read any further."""
    example = _example(self.blobs, item.location)
    files = _values(example, CLIPS)
    with tempfile.NamedTemporaryFile() as out:
      if len(files) > 1:
        join_images(files, _rate(example) or self.rules.fps, out)
      else:
        out.write(files[0])
      out.flush()
      yield from curation.read(pathlib.Path(out.name), item, self.rules)


def open_source(config) -> Source:
  """config: path. Optional: split (default: train; may be a slice, train[:10%]), the fields of Rules.

  Raises BadInput if there is no such dataset or split, if reading it needs TensorFlow, or if no example holds
  a clip.
  """
  directory, split, rules = (
    find_dataset(config.path),
    config.get("split") or "train",
    curation.Rules.of(config),
  )
  name, blobs = _open(directory, split)
  items, notes, ignored, field_names = {}, [], [], set()
  for i in range(len(blobs)):
    position = f"{split}/{i:08d}"
    try:
      example = _example(blobs, i)
    except BadClip as error:
      ignored.append((position, str(error)))
      continue
    field_names.update(example)
    files = _values(example, CLIPS)
    if not files:
      ignored.append((position, "holds no clip"))
      continue
    if len(files) > 1 and not (_rate(example) or rules.fps):
      raise BadInput(
        f"{directory}: its videos are sequences of images (tfds.features.Video), which have no rate; give "
        "it as --fps"
      )
    file = _name(example) or position
    if file in items:
      notes.append((position, f"another example is also named {file}: this one is named by its position"))
      file = position
    caption, fault = read_caption(next(iter(_values(example, CAPTIONS)), None))
    if fault:
      notes.append((file, fault))
    checksum = 0
    for content in files:
      checksum = zlib.crc32(content, checksum)
    items[file] = Item(file, caption, f"{sum(map(len, files))}-{checksum:08x}", i)
  if not items and field_names:
    raise BadInput(
      f"{directory}: no clips in it: its examples hold {', '.join(sorted(field_names))}; a clip is the bytes "
      f"of a file under one of {', '.join(CLIPS)}"
    )
  if not items:
    raise BadInput(
      f"{directory}: no clips in it: none of its {len(blobs)} examples can be read, such as "
      f"{': '.join(ignored[0])}"
    )
  return Source(
    name, tuple(items[file] for file in sorted(items)), tuple(sorted(notes)), tuple(ignored), rules, blobs
  )


def find_dataset(path) -> pathlib.Path:
  """The directory of the dataset at `path`, or directly below it.

  Raises BadInput if there is none, or several.
  """
  root = pathlib.Path(path)
  if (root / INFO).exists():
    return root
  datasets = sorted(p.parent for p in root.glob(f"*/{INFO}"))
  if len(datasets) > 1:
    raise BadInput(
      f"{root}: holds {len(datasets)} datasets, {', '.join(p.name for p in datasets)}; give one of them"
    )
  if (root / "index.json").exists():
    raise BadInput(
      f"{root}: holds records that launch.encode wrote: encoded already; train on them with "
      f"--config.data.path={root}"
    )
  if not datasets and any(root.glob("*.array_record*")):
    raise BadInput(
      f"{root}: ArrayRecord files without a {INFO}: nothing says what their records are; give the clips as "
      "files with a manifest, in tar shards, or as a TFDS dataset"
    )
  if not datasets:
    raise BadInput(f"{root}: no {INFO} in it; give a version of a TFDS dataset, as NAME/1.0.0")
  return datasets[0]


def _open(directory, split):
  """-> (name of the dataset, random access to the serialized examples of the split)."""
  try:
    info = dataset_info.read_proto_from_builder_dir(directory)
  except (OSError, ParseError, UnicodeDecodeError) as error:
    raise BadInput(f"{directory / INFO}: cannot be read ({_line(error)}); copy the dataset again") from error
  formats = {info.file_format or "tfrecord", *info.alternative_file_formats}
  if "array_record" not in formats:
    command = (
      f"python -m tensorflow_datasets.scripts.convert_format --dataset_version_dir={directory} "
      "--out_file_format=array_record"
    )
    raise BadInput(
      f"{directory}: is in the format {', '.join(sorted(formats))}; only array_record can be read here; on a "
      f"machine with TensorFlow, run {command}"
    )
  template = naming.ShardedFileTemplate(
    dataset_name=info.name, data_dir=directory, filetype_suffix="array_record"
  )
  table = splits.SplitDict.from_proto(info.splits, template)
  try:
    shards = table[split].file_instructions
  except (KeyError, ValueError) as error:
    names = ", ".join(sorted(table)) or "none"
    raise BadInput(
      f"{directory}: no split {split}; it has {names}, and slices such as train[:10%]"
    ) from error
  if not shards:
    raise BadInput(f"{directory}: its split {split} is empty; give another")
  return info.name, ArrayRecordDataSource(shards)


def _example(blobs, i):
  """{name: tf.train.Feature} of example i. Raises BadClip if it cannot be read."""
  try:
    return dict(tf_example_pb2.Example.FromString(blobs[i]).features.feature)
  except (RuntimeError, DecodeError) as error:
    raise BadClip("corrupt", _line(error)) from error


def _values(example, names):
  """The list of bytes in the first of these fields that is not empty; () if there is none."""
  for name in names:
    if name in example and example[name].bytes_list.value:
      return example[name].bytes_list.value
  return ()


def _name(example):
  """The text, or the number, in the first of NAMES that has one; "" if there is none."""
  for feature in (example[name] for name in NAMES if name in example):
    for value in (*feature.bytes_list.value, *feature.int64_list.value):
      if value != b"":
        return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
  return ""


def _rate(example):
  """Frames a second, from the field `fps` of an example; 0 if it has none."""
  if "fps" not in example:
    return 0
  values = [*example["fps"].float_list.value, *example["fps"].int64_list.value]
  return max(0, values[0]) if values else 0


def join_images(images, fps, out):
  """Writes PNG or JPEG files, one a frame, unchanged to `out` as a QuickTime file of a constant rate."""
  try:
    step = 1 / Fraction(fps).limit_denominator(1001)
    with av.open(io.BytesIO(images[0])) as first, av.open(out, "w", format="mov") as container:
      stream = container.add_stream_from_template(first.streams.video[0])
      for i, image in enumerate(images):
        packet = av.Packet(image)
        packet.stream, packet.time_base, packet.is_keyframe = stream, step, True
        packet.pts, packet.dts, packet.duration = i, i, 1
        container.mux(packet)
  except (av.error.FFmpegError, ArithmeticError, ValueError, IndexError) as error:
    raise BadClip(
      "not a video", f"a sequence of {len(images)} images at {fps:g} a second: {_line(error)}"
    ) from error


def _line(error):
  """The message of an error in one line."""
  return " ".join(str(error).split())
