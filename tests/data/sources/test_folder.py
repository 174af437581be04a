"""A folder of a user: every clip is listed, with its caption or a note; the order on disk has no effect."""

import json
from fractions import Fraction

import numpy as np
import pytest
from ml_collections import ConfigDict

from data.clips import LONGEST_CAPTION, BadClip
from data.sources import folder
from sora_jax import video
from sora_jax.errors import BadInput


def config(path, max_seconds=0.0, fps=0.0):
  return ConfigDict({"path": str(path), "max_seconds": max_seconds, "fps": fps, "temporal_stride": 4})


def clip(path, frames=9, fps=8, height=32, width=48, seed=0):
  """A video, or an image, whose frames are of one grey each."""
  path.parent.mkdir(parents=True, exist_ok=True)
  images = np.broadcast_to(
    (20 + 4 * np.arange(frames))[:, None, None, None], (frames, height, width, 3)
  ).astype(np.uint8)
  if path.suffix == ".png":
    video.write_png(path, images[0])
  else:
    video.write_mp4(path, images, fps, crf=4)
  return path


def test_a_tree_with_captions_of_both_kinds(tmp_path):
  for name in ("b/two.mp4", "a.MP4", "b/c/three.png", "one.mp4", "silent.mp4", "latin.mp4", ".hidden/x.mp4"):
    clip(tmp_path / name)
  (tmp_path / "one.txt").write_text("  a grey\nsquare ")
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
  (tmp_path / "latin.txt").write_bytes("un carré gris".encode("latin-1"))
  (tmp_path / "alone.txt").write_text("no clip of this name")
  (tmp_path / "notes.pdf").write_text("")
  (tmp_path / "._one.mp4").write_bytes(b"what macOS leaves")
  (tmp_path / "captions.jsonl").write_text(
    "\n".join(
      [
        json.dumps({"file": "b/two.mp4", "caption": "two, naïve 猫"}),
        "{broken",
        json.dumps({"file": "one.mp4", "caption": "another"}),
        json.dumps({"file": "gone.mp4", "caption": "x"}),
        json.dumps(["file"]),
        json.dumps({"file": 3, "caption": "x"}),
        json.dumps({"file": "a.MP4", "shots": [{"seconds": "long", "prompt": "x"}]}),
        "",
      ]
    )
  )
  (tmp_path / "b" / "captions.jsonl").write_text(
    json.dumps({"file": "c/three.png", "shots": [{"seconds": 1, "prompt": p} for p in ("three", "four")]})
  )
  source = folder.open_source(config(tmp_path))
  items = source.items()
  assert {item.file: item.caption for item in items} == {
    "a.MP4": "with a byte order mark",
    "b/c/three.png": "three four",
    "b/two.mp4": "two, naïve 猫",
    "latin.mp4": "",
    "one.mp4": "a grey square",
    "silent.mp4": "",
  }
  assert [item.shots for item in items if item.shots] == [((0.0, "three"), (1.0, "four"))]
  assert [item.file for item in items] == sorted(item.file for item in items)
  assert dict(source.ignored).keys() == {"notes.pdf"}
  notes = [f"{file}: {note}" for file, note in source.notes]
  for part in (
    "silent.mp4: no caption",
    "latin.mp4: latin.txt: its caption is not UTF-8",
    "alone.txt: a caption without a clip",
    "captions.jsonl: line 2 is not",
    "captions.jsonl: line 4 names gone.mp4, which does not exist",
    "captions.jsonl: line 5 is not",
    "captions.jsonl: line 6 is not",
    "captions.jsonl: line 7 is not",
    "one.mp4: has two captions",
  ):
    assert sum(part in note for note in notes) == 1, (part, notes)
  assert len(notes) == 9
  for item in items:
    assert [len(piece.video_THWC) for piece in source.read(item)] == [1 if item.file.endswith("png") else 9]


def test_no_clips(tmp_path):
  (tmp_path / "readme.txt").write_text("nothing here")
  for path, part in (
    (tmp_path, "no clips in it (of 1 files); it takes mp4"),
    (tmp_path / "missing", "no such folder"),
    (tmp_path / "readme.txt", "is a file"),
  ):
    with pytest.raises(BadInput) as e:
      folder.open_source(config(path))
    assert part in str(e.value) and "\n" not in str(e.value)


def test_links_are_followed_but_not_in_circles(tmp_path):
  clip(tmp_path / "here" / "a.mp4")
  clip(tmp_path / "elsewhere" / "b.mp4")
  (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
  assert [item.file for item in folder.open_source(config(tmp_path / "here")).items()] == [
    "a.mp4",
    "linked/b.mp4",
  ]


def test_a_link_that_leads_nowhere(tmp_path):
  """It is named; the other files are listed."""
  clip(tmp_path / "a.mp4")
  (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
  source = folder.open_source(config(tmp_path))
  assert [item.file for item in source.items()] == ["a.mp4"]
  assert dict(source.ignored) == {"gone.mp4": "cannot be opened: No such file or directory"}


def test_names_that_are_not_utf8(tmp_path):
  clip(tmp_path / "a.mp4").rename(tmp_path / b"caf\xe9.mp4".decode("utf-8", "surrogateescape"))
  (item,) = folder.open_source(config(tmp_path)).items()
  assert item.file == "caf\\xe9.mp4" and item.file.encode("utf-8")
  assert len(list(folder.open_source(config(tmp_path)).read(item))) == 1


def test_pieces_at_the_native_rate(tmp_path):
  clip(tmp_path / "a.mp4", frames=40, fps=25)
  source = folder.open_source(config(tmp_path, max_seconds=0.68))
  pieces = list(source.read(source.items()[0]))
  assert [len(p.video_THWC) for p in pieces] == [17, 17, 5]
  assert [p.start for p in pieces] == pytest.approx([0, 0.68, 1.36])
  assert all(p.fps == pytest.approx(25) and p.video_THWC.shape[1:] == (32, 48, 3) for p in pieces)
  assert pieces[-1].left_out == 1
  greys = np.concatenate([p.video_THWC.mean((1, 2, 3)) for p in pieces])
  np.testing.assert_allclose(greys, 20 + 4 * np.arange(39), atol=2.5)


def test_a_rate_that_was_asked_for(tmp_path):
  clip(tmp_path / "a.mp4", frames=41, fps=25)
  clip(tmp_path / "b.png")
  source = folder.open_source(config(tmp_path, fps=12.5))
  a, b = (list(source.read(item)) for item in source.items())
  (a,), (b,) = a, b
  assert a.fps == b.fps == 12.5 and len(b.video_THWC) == 1
  np.testing.assert_allclose(a.video_THWC.mean((1, 2, 3)), 20 + 8 * np.arange(21), atol=2.5)


def test_a_damaged_file_gives_what_was_whole(tmp_path):
  path = clip(tmp_path / "a.mp4")
  (tmp_path / "a.mp4").write_bytes(path.read_bytes()[:200])
  source = folder.open_source(config(tmp_path))
  with pytest.raises(BadClip):
    list(source.read(source.items()[0]))


def test_the_version_changes_with_the_file(tmp_path):
  """It changes with the size, and with the content at the same size; a copy keeps it."""
  path = clip(tmp_path / "a.mp4")
  (before,) = folder.open_source(config(tmp_path)).items()
  content = path.read_bytes()
  path.unlink()
  path.write_bytes(content)
  assert folder.open_source(config(tmp_path)).items() == [before]
  versions = {before.version}
  for changed in (content[:-1] + b"!", b"!" + content[1:], content + b"!"):
    path.write_bytes(changed)
    versions.add(folder.open_source(config(tmp_path)).items()[0].version)
  assert len(versions) == 4


def test_captions_that_are_none(tmp_path):
  for name in "abc":
    clip(tmp_path / f"{name}.mp4", frames=1)
  (tmp_path / "a.txt").write_bytes(b"x" * (LONGEST_CAPTION + 1))
  (tmp_path / "captions.jsonl").write_bytes(
    b'{"file": "b.mp4", "caption": "caf\xe9"}\n'
    b'{"file": "c.mp4", "caption": "' + b"y" * (LONGEST_CAPTION + 1) + b'"}'
  )
  source = folder.open_source(config(tmp_path))
  assert [item.caption for item in source.items()] == ["", "", ""]
  notes = dict(source.notes)
  assert "a.txt: its caption has more than 1048576 bytes" in notes["a.mp4"] and "more than" in notes["c.mp4"]
  assert (
    "no caption" in notes["b.mp4"] and "line 1 is not" in notes["captions.jsonl"] and len(source.notes) == 4
  )


def test_a_variable_rate_keeps_its_length(tmp_path):
  """The rate is the average over all times, so 2.6 s of video stay 2.6 s."""
  import av

  times = [33 * i for i in range(20)] + [660 + 100 * i for i in range(20)]
  with av.open(str(tmp_path / "a.mp4"), "w") as out:
    stream = out.add_stream("libx264", rate=30)
    stream.height = stream.width = 32
    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
    for t in times:
      frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + t // 15, np.uint8), format="rgb24")
      frame.pts, frame.time_base = t, Fraction(1, 1000)
      out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
  source = folder.open_source(config(tmp_path))
  (piece,) = source.read(source.items()[0])
  frames = len(piece.video_THWC) + piece.left_out
  assert frames / piece.fps == pytest.approx(2.6, abs=0.1)
  shown = (piece.video_THWC.mean((1, 2, 3)) - 20) * 15 / 1000  # the time that each frame shows
  np.testing.assert_allclose(shown, np.arange(len(shown)) / piece.fps, atol=0.1)
