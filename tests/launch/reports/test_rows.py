"""The picture of packed rows: true to scale, whole by itself, small, whatever the rows."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from launch.reports import charts, rows as pictures
from launch.reports.rows import Segment, packed_rows

KINDS = ("image", "short <clip>", "clip", "long")


def draw(rows, length, **words):
  words = {"title": "rows & clips", "say": "as <packed>"} | words
  return packed_rows(rows, [1.0] * len(rows), length, KINDS, **words)


def spans(svg):
  """-> for each bar the (left, width, fill or class) of what is drawn in it, in units."""
  bars = [g for g in ET.fromstring(svg).findall(".//{*}g")]
  return [
    [
      (
        *map(float, re.match(r"M([\d.]+) 0h([\d.]+)v", path.get("d")).groups()),
        path.get("class") or path.get("fill"),
      )
      for path in bar.findall("{*}path")
    ]
    for bar in bars
  ]


def test_a_segment_is_as_wide_as_its_tokens_are_many():
  """Segments follow each other in order, the rest of the bar is padding, and a full row has none."""
  rows = [
    [Segment(300, (17, 64, 64), 1), Segment(80, (1, 32, 32), 0), Segment(20, (1, 16, 16), 0)],
    [Segment(500, (81, 64, 64), 3)],
  ]
  first, second = spans(draw(rows, 500))
  across = pictures.WIDTH - 2 * pictures.LEFT
  for (left, wide, name), start, tokens, key in zip(
    first, (0, 300, 380, 400), (300, 80, 20, 100), ("k1", "k0", "k0", "url(#hatch)"), strict=True
  ):
    assert left == pytest.approx(across * start / 500, abs=0.1) and name == key
    assert across * tokens / 500 - 1.6 <= wide <= across * tokens / 500 + 0.1
  assert [name for *_, name in second] == ["k3"]


def test_it_stands_by_itself():
  """No other file, no script; texts are escaped; light and dark; the legend has only kinds that occur."""
  svg = draw([[Segment(90, (17, 480, 832), 1), Segment(5, (1, 16, 16), 0)]], 100)
  text = "".join(ET.fromstring(svg).itertext())
  assert (
    "rows & clips" in text and "as <packed>" in text and "short <clip>" in text and "17 × 480 × 832" in text
  )
  assert "long" not in text and "95.0 % full" in text and "padding" in text
  assert "prefers-color-scheme:dark" in svg and "<script" not in svg and "href" not in svg
  assert re.findall(r"https?://[^\"]+", svg) == ["http://www.w3.org/2000/svg"]


def test_labels_stand_only_where_they_fit():
  """By the width of letters that a browser has measured: no label is wider than its segment."""
  wide = {n: 852 * n / 1000 for n in range(1, 1001)}
  for tokens in (10, 40, 60, 90, 130, 400):
    (g,) = ET.fromstring(draw([[Segment(tokens, (17, 480, 832), 1)]], 1000)).findall(".//{*}g")
    lines = [text.text for text in g.findall("{*}text")]
    assert all(5.9 * len(line) < wide[tokens] for line in lines)
    assert bool(lines) == (tokens >= 90)


def test_it_stays_small():
  """Below 60 kB, with as many rows as that allows; one at least."""
  rng = np.random.default_rng(0)
  for clips in (8, 64, 800):
    rows = [
      [Segment(int(n), (17, 256, 256), int(n) % 4) for n in rng.integers(1, 40, clips)] for _ in range(6)
    ]
    svg = draw(rows, 40 * clips)
    assert len(svg.encode()) <= pictures.ROOM and len(spans(svg)) == (6 if clips < 800 else 1)


def test_a_histogram_is_true_to_scale():
  """Bars as long as counts are great, none for none; their sum is told in shares."""
  svg = charts.histogram("of <these>", ["a & b", "c", "d"], [30, 0, 10], 340)
  widths = [float(rect.get("width")) for rect in ET.fromstring(svg).iter("rect")]
  assert widths[1] == 0 and widths[0] == pytest.approx(3 * widths[2], rel=0.01)
  text = "".join(ET.fromstring(svg).itertext())
  assert "75 %" in text and "25 %" in text and "a & b" in text
  assert (
    max(float(rect.get("x")) + float(rect.get("width")) for rect in ET.fromstring(svg).iter("rect")) < 340
  )
  assert "<svg" not in charts.histogram("t", ["a"], [0], 340)
