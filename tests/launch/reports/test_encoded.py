"""The report of an encoding job: all files are counted, and the page names a limited number of them."""

import dataclasses
import json
import re
import types

import numpy as np
import pytest

from data.records import INDEX_DTYPE
from launch.jobs import encode_unit
from launch.reports import encoded as report
from tests.launch.reports.test_page import Reader


@dataclasses.dataclass
class Index:
  """What a report asks of a RecordIndex."""

  rows: np.ndarray
  header: dict

  def __len__(self):
    return len(self.rows)


@pytest.fixture
def index():
  rows = np.zeros(60, INDEX_DTYPE)
  rows["t"], rows["h"], rows["w"] = np.resize([1, 5, 21], 60), np.resize([8, 30], 60), 40
  rows["fps"], rows["text_tokens"] = 24, np.arange(60)
  return Index(rows, {"vae_stride": [4, 8, 8]})


def make_report(files):
  """The report of so many files: a third is skipped, the others are taken, with all fields of an entry."""
  taken = {
    f"{i:06d} <b>.mp4": {
      "pieces": 1,
      "frames": 17,
      "seconds": 2.0,
      "fps": 24.0,
      "size": [64, 320],
      "notes": ["no caption & no sound"] * (i % 3),
      "cropped": {"from": [70, 321], "to": [64, 320]},
      "scaled": {"from": [1080, 1920], "to": [540, 960]},
      "dropped": [
        {"start": 1.5, "seconds": 0.25, "why": "black"},
        {"start": 3.0, "seconds": 0.5, "why": "too short: 2 frames; at least 5"},
      ],
    }
    for i in range(files)
    if i % 3
  }
  passed_over = {
    f"{i:06d} <b>.mp4": ("corrupt: at 2.000 s", "from 1.250 s on: corrupt: cut off", "no clip")[i // 3 % 3]
    for i in range(0, files, 3)
  }
  return {
    "format_version": 1,
    "source": "CLIPS",
    "files": files,
    "records": 60,
    "sizes": "height, width in pixels",
    "taken": taken,
    "passed_over": passed_over,
    "notes": {"captions.jsonl": ["line 7 is not UTF-8"]},
  }


def test_everything_is_counted(index):
  """Of 90 files 30 are passed over, for two reasons; each of the 60 others lost two stretches."""
  numbers = report.numbers(make_report(90), index)
  assert (
    numbers["clips"],
    numbers["images"],
    numbers["files_taken"],
    numbers["files_cropped"],
    numbers["files_scaled"],
  ) == (60, 20, 60, 60, 60)
  assert numbers["passed_over"] == {"corrupt": 20, "no clip": 10}
  assert numbers["dropped"] == {
    "black": {"stretches": 60, "seconds": 15.0},
    "too short": {"stretches": 60, "seconds": 30.0},
  }
  assert numbers["seconds"] == pytest.approx(20 * (17 + 81) / 24, abs=1e-3)
  assert all(
    sum(chart["clips"]) == (40 if name == "fps" else 60) for name, chart in numbers["histograms"].items()
  )


def test_the_page_is_whole(index):
  """Tags close, words are escaped, nothing is fetched, and each part says its piece."""
  html_page = report.report_page(make_report(90), index)
  said = " ".join(Reader(html_page).words)
  for words in (
    "000001 <b>.mp4",
    "no caption & no sound",
    "line 7 is not UTF-8",
    "from 1.250 s on: corrupt: cut off",
    "1080 × 1920",
    "540 × 960",
    "64 × 320",
    "1.50 s",
    "60",
    "Width : height",
  ):
    assert words in said, words
  assert not re.search(r"https?://| src=", html_page)


def test_a_clean_job_has_no_empty_tables(index):
  clean = make_report(3) | {"taken": {"a.mp4": {"pieces": 1}}, "passed_over": {}, "notes": {}}
  html_page = report.report_page(clean, index)
  assert (
    "Everything was taken." in html_page
    and "<h2>Files" not in html_page
    and not Reader(html_page).all("table")
  )


def test_many_files_are_counted_not_listed(index):
  """Six thousand files: the page names the first 200 of each kind, by name, and says how many there are."""
  few, many = (report.report_page(make_report(files), index) for files in (600, 6000))
  assert len(many) < 1.1 * len(few) and many.count("\n") < 400
  assert "000000 &lt;b&gt;.mp4" in many and "005997 &lt;b&gt;.mp4" not in many
  said = " ".join(Reader(many).words)
  assert "… and 1,800 more." in said and "… and 7,800 more." in said and "the first 200" in said


def test_it_stands_beside_the_records(index, tmp_path):
  """Once there is an index, the job writes numbers to report.json and the page beside it; not before."""
  source = types.SimpleNamespace(ignored=[("x.doc", "no clip")], notes=[])
  writer = types.SimpleNamespace(uids=range(60), files={"a.mp4": {"stamp": "s", "pieces": 60}})
  items = [types.SimpleNamespace(file="a.mp4")]
  stopped = encode_unit.write_report(tmp_path / "report.json", source, "CLIPS", items, writer)
  assert "numbers" not in stopped and [path.name for path in tmp_path.iterdir()] == ["report.json"]
  done = encode_unit.write_report(tmp_path / "report.json", source, "CLIPS", items, writer, index)
  assert done["numbers"] == report.numbers(stopped, index) and done["numbers"]["passed_over"] == {
    "no clip": 1
  }
  assert json.loads((tmp_path / "report.json").read_text()) == done
  assert (tmp_path / "report.html").read_text() == report.report_page(stopped, index)
