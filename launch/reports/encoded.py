"""The report of an encoding job, in numbers and as a page: which files were taken, which skipped, and why.

A report is the dict of OUT/report.json, which launch.encode writes:

  source        what was encoded
  files         number of files
  records       number of records
  taken         {file: entry}
  passed_over   {file: reason}: skipped files. A damaged video whose beginning is good is in both.
  notes         {file: [text]}: notes from the listing of the source, on files that are not in `taken`

An entry describes what became of a file:

  pieces, frames    number of clips of the file, and of their frames
  seconds           time in the file at which the last clip ends
  fps, size         frames a second, [height, width]
  cropped           {"from": [height, width], "to": [height, width]}: pixels were cut off at the edges
  scaled            the same; the frames were made smaller
  frames_left_out   number of frames that are in no clip
  dropped           [{"start": seconds, "seconds": float, "why": str}]: parts of a video that are in no clip
  notes             [text]
"""

import collections
import heapq
import re

from launch.reports import charts, page, sizes

SHOWN = 200  # rows in a table of the page; the others are counted


def make_report(source, spec, items, entries, records) -> dict:
  """The report, without its numbers.

  spec: what --source says.  entries: {file: entry} of all files that were finished.  records: how many there
  are.
  """
  taken, skipped, notes = {}, dict(getattr(source, "ignored", ())), {}
  for file, note in getattr(source, "notes", ()):
    notes.setdefault(file, []).append(note)
  for item in items:
    entry = {name: value for name, value in entries.get(item.file, {}).items() if name != "stamp"}
    if "passed_over" in entry:
      skipped[item.file] = entry["passed_over"]
    if entry.get("pieces"):
      taken[item.file] = entry | {"notes": entry.get("notes", []) + notes.pop(item.file, [])}
  return {
    "format_version": 1,
    "source": spec,
    "files": len(items),
    "records": records,
    "sizes": "height, width in pixels",
    "taken": taken,
    "passed_over": skipped,
    "notes": notes,
  }


def add_piece(entry, clip, video_THWC) -> None:
  """Adds a clip to the entry of its file. video_THWC: the pixels that are encoded, after cropping."""
  frames, *size = clip.video_THWC.shape[:3]
  entry["pieces"] += 1
  entry["frames"] = entry.get("frames", 0) + len(video_THWC)
  entry["seconds"] = clip.start + frames / clip.fps
  entry["fps"], entry["size"] = clip.fps, list(video_THWC.shape[1:3])
  if entry["size"] != size:
    entry["cropped"] = {"from": size, "to": entry["size"]}
  if getattr(clip, "scaled_from", None):
    entry["scaled"] = {"from": list(clip.scaled_from), "to": size}
  left_out = entry.get("frames_left_out", 0) + getattr(clip, "left_out", 0) + frames - len(video_THWC)
  if left_out:
    entry["frames_left_out"] = left_out
  if getattr(clip, "notes", ()):
    entry["notes"] = list(clip.notes)


def all_dropped(dropped) -> str:
  """Why a file has no clip, if all of it was dropped: the reasons, the one with the most seconds first."""
  seconds = collections.Counter()
  for stretch in dropped:
    seconds[stretch["why"]] += stretch["seconds"]
  return "; ".join(f"{why}: {total:.2f} s" for why, total in seconds.most_common())


def numbers(report, index) -> dict:
  """The numbers of a report, for OUT/report.json. index: RecordIndex of the clips that were taken.

  clips, images, files_taken, files_cropped, files_scaled: counts.  seconds: of all clips except images.
  passed_over: {reason: files}.  dropped: {reason: {"stretches", "seconds"}}.
  histograms: counts of clips, see `sizes.histograms`.
  """
  taken, dropped = report["taken"].values(), {}
  for stretch in _stretches(report):
    total = dropped.setdefault(reason(stretch["why"]), {"stretches": 0, "seconds": 0.0})
    total["stretches"] += 1
    total["seconds"] = round(total["seconds"] + stretch["seconds"], 3)
  images, seconds, stride = 0, 0.0, index.header["vae_stride"]
  for part in sizes.parts(index.rows):
    frames = sizes.pixels(part, stride)[:, 0]
    images += int((frames == 1).sum())
    seconds += float((frames / part["fps"])[frames > 1].sum())
  return {
    "clips": len(index),
    "images": images,
    "seconds": round(seconds, 3),
    "files_taken": len(taken),
    "files_cropped": sum("cropped" in entry for entry in taken),
    "files_scaled": sum("scaled" in entry for entry in taken),
    "passed_over": dict(collections.Counter(map(reason, report["passed_over"].values())).most_common()),
    "dropped": dropped,
    "histograms": sizes.histograms(index.rows, stride),
  }


def reason(why) -> str:
  """The kind of a reason: "from 2.000 s on: corrupt: at 2.000 s" -> "corrupt"."""
  return re.sub(r"^from [\d.]+ s on: ", "", why).split(":")[0]


def report_page(report, index) -> str:
  """The page OUT/report.html: one HTML text that needs no other file."""
  values = report.get("numbers") or numbers(report, index)
  skipped = sum(values["passed_over"].values())
  dropped = sum(total["stretches"] for total in values["dropped"].values())
  facts = (
    ("clips", f"{values['clips']:,}"),
    ("length of those that move", page.seconds(values["seconds"])),
    ("files taken", f"{values['files_taken']:,}"),
    ("files passed over", f"{skipped:,}"),
    ("stretches dropped", f"{dropped:,}"),
  )
  head = page.header(
    {
      "title": f"{values['clips']:,} clips",
      "command": "launch.encode",
      "machine": str(report["source"]),
      "lede": f"What became of the {report['files']:,} files of {report['source']}: what was taken, at which "
      "sizes, and what was not, and why.",
      "facts": [{"name": name, "value": value} for name, value in facts],
    }
  )
  reasons = [(why, f"{count:,}", "files") for why, count in values["passed_over"].items()]
  for why, total in values["dropped"].items():
    reasons.append((why, f"{total['stretches']:,}", f"stretches, {page.seconds(total['seconds'])} in all"))
  reasons = table(("reason", "how many", ""), reasons, len(reasons), numeric=(1,))
  sections = [
    page.section(
      "What was taken",
      "Clips by class, as they are in the records.",
      histogram_cards(values["histograms"].values()),
    ),
    page.section(
      "What was not, and why",
      "Files passed over, and stretches of videos that are in no clip, by reason.",
      reasons or "<p>Everything was taken.</p>",
    ),
  ]
  return page.document(f"{values['clips']} clips", head, sections + _tables_of_files(report))


def _tables_of_files(report):
  """The sections of the page that name files."""

  def entries_with(name):
    return {file: entry[name] for file, entry in report["taken"].items() if entry.get(name)}

  def reason_row(file, why):
    return [(file, why)]

  def stretch_rows(file, stretches):
    return [(file, f"{s['start']:.2f} s", f"{s['seconds']:.2f}", s["why"]) for s in stretches]

  def size_row(file, change):
    before, after = (f"{height} × {width}" for height, width in (change["from"], change["to"]))
    return [(file, before, after)]

  def note_rows(file, notes):
    return [(file, note) for note in notes]

  sizes_header, stretches_header = ("file", "from", "to"), ("file", "from", "seconds", "why")
  return [
    _files("Files passed over", ("file", "why"), report["passed_over"], reason_row),
    _files("Stretches dropped", stretches_header, entries_with("dropped"), stretch_rows, numeric=(1, 2)),
    _files("Files cropped", sizes_header, entries_with("cropped"), size_row),
    _files("Files scaled", sizes_header, entries_with("scaled"), size_row),
    _files("Notes", ("file", "note"), _notes(report), note_rows),
  ]


def histogram_cards(histograms) -> str:
  """Entries of `sizes.histograms` -> HTML, cards side by side."""
  cards = []
  for chart in histograms:
    svg = charts.histogram(chart["title"], chart["labels"], chart["clips"], 340)
    cards.append(f'<article class="card"><h3>{page.escape(chart["title"])}</h3>{svg}</article>')
  return f'<div class="grid" style="--least:300px">{"".join(cards)}</div>'


def table(head, rows, total, numeric=()) -> str:
  """A table of texts, as HTML; "" without rows.

  head: names of the columns, or ().  numeric: columns that are set to the right.
  total: number of rows including those that are left out; a line below the table counts these.
  """
  if not rows:
    return ""
  kinds = [' class="num"' if i in numeric else "" for i in range(len(rows[0]))]
  title = "".join(f"<th{kind}>{page.escape(name)}</th>" for kind, name in zip(kinds, head))
  body = ""
  for row in rows:
    cells = "".join(f"<td{kind}>{page.escape(cell)}</td>" for kind, cell in zip(kinds, row))
    body += f"<tr>{cells}</tr>"
  more = f'<p class="none">… and {total - len(rows):,} more.</p>' if total > len(rows) else ""
  grid = f'<table class="plain"><thead><tr>{title}</tr></thead><tbody>{body}</tbody></table>'
  return f'<div class="card"><div class="scroll">{grid}</div>{more}</div>'


def _files(title, head, entries, rows_of, numeric=()):
  """A section with a table of the first SHOWN rows, by the name of the file; "" if no file has an entry.

  rows_of: (file, entry) -> rows.
  """
  shown = [row for file in heapq.nsmallest(SHOWN, entries) for row in rows_of(file, entries[file])][:SHOWN]
  if not shown:
    return ""
  total = sum(len(rows_of(file, entry)) for file, entry in entries.items())
  say = "By file." if total <= SHOWN else f"By file, the first {SHOWN}; OUT/report.json has all."
  return page.section(title, say, table(head, shown, total, numeric))


def _stretches(report):
  return (stretch for entry in report["taken"].values() for stretch in entry.get("dropped", ()))


def _notes(report):
  notes = {file: list(entry["notes"]) for file, entry in report["taken"].items() if entry.get("notes")}
  for file, more in report["notes"].items():
    notes.setdefault(file, []).extend(more)
  return notes
