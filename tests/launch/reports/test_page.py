"""The page: whole, self-contained, and graceful where a part of the story is missing."""

import base64
import html.parser
import math
import re

import numpy as np
import pytest

from launch.reports import charts, page
from sora_jax import video

VOID = {"meta", "input", "img"}  # never closed


class Reader(html.parser.HTMLParser):
  """Tags in order, with their attributes; checks that what opens is closed, in the right order."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.tags, self.words = [], [], []
    self.feed(text)
    assert not self.stack

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag, (tag, self.stack)

  def handle_data(self, data):
    self.words.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def clip(tmp_path):
  """clip(name) -> path of a tiny mp4, whose grey square moves."""

  def make(name):
    frames_THWC = np.full((5, 32, 48, 3), 40, np.uint8)
    for t in range(5):
      frames_THWC[t, 8:24, 4 + 4 * t : 20 + 4 * t] = 200
    video.write_mp4(tmp_path / name, frames_THWC, 8)
    return tmp_path / name

  return make


@pytest.fixture
def story(clip, tmp_path):
  video.write_png(tmp_path / "still.png", np.zeros((16, 16, 3), np.uint8))
  return {
    "title": "Trained <here>",
    "lede": "In minutes.",
    "status": "still running",
    "started": 1.8e9,
    "machine": "2 cores",
    "command": "bash launch/quickstart.sh",
    "facts": [{"name": "fill", "value": "99.1 %"}],
    "models": [{"key": "shipped", "name": "ships", "detail": "98 min"}, {"key": "fresh", "name": "new"}],
    "phases": [{"name": "VAE", "seconds": 180.4, "detail": "400 steps"}, {"name": "DiT", "seconds": 302}],
    "prompts": [
      {
        "prompt": 'a "red" ball',
        "videos": {"shipped": clip("a.mp4"), "fresh": clip("b.mp4")},
        "verdicts": {"shipped": {"colour": True}, "fresh": {"colour": False}},
      },
      {"prompt": "a still", "videos": {"shipped": tmp_path / "still.png", "fresh": None}},
    ],
    "scores": [
      {
        "name": "colour",
        "unit": "%",
        "values": {"shipped": 0.984, "fresh": 0.5},
        "chance": 0.125,
        "goals": {"shipped": 0.98, "fresh": 0.85},
      },
      {"name": "PSNR", "unit": "dB", "values": {"fresh": 29.3}},
    ],
    "reconstructions": [
      {
        "caption": "held out",
        "original": clip("o.mp4"),
        "reconstruction": clip("r.mp4"),
        "psnr": 29.31,
        "ssim": 0.912,
      }
    ],
    "curves": [
      {
        "title": "loss",
        "series": [
          {"key": "fresh", "name": "new", "x": list(range(300)), "y": [1 / (1 + i) for i in range(300)]}
        ],
        "goal": 0.1,
        "log": True,
      }
    ],
    "bars": [
      {"title": "sigma", "labels": [0.1, 0.9], "series": [{"key": "fresh", "name": "new", "y": [0.5, 0.2]}]}
    ],
    "next": [{"say": "again", "command": "python -m launch.sample --prompt='a & b'"}],
  }


def test_everything_is_in_the_one_file(story, tmp_path):
  """Videos and images are the bytes of the files; nothing is fetched; tags are closed; texts are escaped."""
  out = page.write_page(tmp_path / "deep" / "index.html", story)
  text = out.read_text()
  read = Reader(text)
  assert len(read.all("video")) == 4 and len(read.all("img")) == 1
  first = read.all("video")[0]
  assert {"autoplay", "loop", "muted", "playsinline"} <= set(first)
  kind, data = first["src"].split(";base64,")
  assert kind == "data:video/mp4" and base64.b64decode(data) == (tmp_path / "a.mp4").read_bytes()
  sources = [attrs.get("src") or attrs.get("href") or "" for _, attrs in read.tags]
  assert not [source for source in sources if source and not source.startswith("data:")]
  assert not re.search(r"https?://", text)
  said = " ".join(read.words)
  for words in (
    "Trained <here>",
    'a "red" ball',
    "a & b",
    "3 min 00 s",
    "98.4 %",
    "12.5 %",
    "29.3 dB",
    "not made",
  ):
    assert words in said, words
  assert not list((tmp_path / "deep").glob("*.part"))


@pytest.mark.parametrize("left_out", [*page.PARTS, *page.TEXTS, "everything"])
def test_a_missing_part_is_left_out(story, tmp_path, left_out):
  kept = {} if left_out == "everything" else {name: part for name, part in story.items() if name != left_out}
  Reader(page.write_page(tmp_path / "index.html", kept).read_text())


def test_without_a_shipped_model(story, tmp_path, clip):
  """Only the models of the story are shown; a missing or an empty file is a sentence, not a broken player."""
  (tmp_path / "empty.mp4").touch()
  story["models"] = story["models"][1:]
  story["prompts"] = [
    {"prompt": "p", "videos": {"fresh": tmp_path / "empty.mp4"}},
    {"prompt": "q", "videos": {"fresh": tmp_path / "gone.mp4"}},
    {"prompt": "r", "videos": {}},
  ]
  read = Reader(page.write_page(tmp_path / "index.html", story).read_text())
  assert sum("not made" in word for word in read.words) == 3
  assert len(read.all("video")) == 2  # the reconstructions


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda story: story.update(promts=[]), "promts"),
    (lambda story: story["scores"][0].update(chanse=1), "chanse"),
    (lambda story: story["phases"][0].pop("seconds"), "seconds"),
    (lambda story: story["models"][0].update(key="a b"), "a b"),
  ],
)
def test_a_misspelt_story_is_an_error(story, tmp_path, change, said):
  """... and the page that was there stays."""
  out = page.write_page(tmp_path / "index.html", story)
  before = out.read_bytes()
  change(story)
  with pytest.raises(ValueError, match=said):
    page.write_page(out, story)
  assert out.read_bytes() == before


def test_a_chart_stays_in_its_frame():
  """All marks of odd curves lie in the view box, whatever the values; nothing is drawn from nothing."""
  odd = [
    ([0], [3.0]),
    ([0, 1, 2], [5.0, 5.0, 5.0]),
    ([0, 1, 2], [None, float("nan"), 2.0]),
    ([10, 20], [-1e9, 1e9]),
    (list(range(1000)), [math.exp(-i / 50) + (50 if i == 500 else 0) for i in range(1000)]),
    ([1, 2], [0.0, 0.0]),
  ]
  for log in (False, True):
    for x, y in odd:
      svg = charts.line_chart(
        {"title": "t", "series": [{"key": "a", "name": "a", "x": x, "y": y}], "log": log}, 400
      )
      for cy in re.findall(r'cy="([-\d.]+)"', svg):
        assert -10 <= float(cy) <= charts.HEIGHT, (log, x[:3], y[:3])
      assert "nan" not in svg and "inf" not in svg
  nothing = charts.line_chart(
    {"title": "t", "series": [{"key": "a", "name": "a", "x": [1], "y": [None]}]}, 400
  )
  assert "<svg" not in nothing and "Nothing" in nothing


def test_ticks_are_round_and_inside():
  for low, high in [(0, 1), (15.8, 31.3), (-3, 4e5), (1e-6, 3e-6), (2, 2)]:
    values = charts.ticks(low, high)
    assert 1 <= len(values) <= 9 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in values)
    if high > low:
      steps = np.diff(values)
      np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_smoothing_keeps_a_straight_line_and_the_mean():
  """A line stays a line, but for the last half window; noise shrinks."""
  line = np.arange(100.0)
  np.testing.assert_allclose(charts.smooth(line, 10)[:95], line[:95], atol=1e-9)
  noise = np.random.default_rng(0).normal(size=400)
  assert np.std(charts.smooth(noise, 40)) < 0.3 * np.std(noise)
