"""The report of an encoding job: what was taken, in numbers and as a page, and what was not, and why. Written by launch.encode.

A report is the dict of OUT/report.json: `source`, `files` (how many), `taken` {file: entry}, `passed_over` {file: why}, `notes` {file: [text]}.
An entry says of a file what became of it; it may hold

  cropped, scaled   {"from": [height, width], "to": [height, width]}: pixels cut off at the edges; made smaller
  dropped           [{"start": seconds, "seconds": float, "why": str}]: stretches of a video that are in no clip
  notes             [text]
"""

import collections
import heapq
import re

from launch.reports import charts, page, sizes

SHOWN = 200             # files that a table of the page names; the others are counted


def numbers(report, index) -> dict:
  """The report in numbers, for OUT/report.json.

  clips, images, seconds (of all clips that are no images), files_taken, files_cropped, files_scaled: counts.
  passed_over: {reason: files}.  dropped: {reason: {"stretches", "seconds"}}.  histograms: as `sizes.histograms` counts clips.
  index: RecordIndex of what was taken.
  """
  dropped = {}
  for stretch in _stretches(report):
    found = dropped.setdefault(reason(stretch["why"]), {"stretches": 0, "seconds": 0.0})
    found["stretches"] += 1
    found["seconds"] = round(found["seconds"] + stretch["seconds"], 3)
  images, seconds, stride = 0, 0.0, index.header["vae_stride"]
  for part in sizes.parts(index.rows):
    frames = sizes.pixels(part, stride)[:, 0]
    images += int((frames == 1).sum())
    seconds += float((frames / part["fps"])[frames > 1].sum())
  return {"clips": len(index), "images": images, "seconds": round(seconds, 3), "files_taken": len(report["taken"]),
          **{f"files_{kind}": sum(kind in entry for entry in report["taken"].values()) for kind in ("cropped", "scaled")},
          "passed_over": dict(collections.Counter(map(reason, report["passed_over"].values())).most_common()),
          "dropped": dropped, "histograms": sizes.histograms(index.rows, stride)}


def reason(why) -> str:
  """The kind of a reason: "from 2.000 s on: corrupt: at 2.000 s" -> "corrupt"."""
  return re.sub(r"^from [\d.]+ s on: ", "", why).split(":")[0]


def report_page(report, index) -> str:
  """The page OUT/report.html: one HTML text that needs no other file."""
  found, notes = report.get("numbers") or numbers(report, index), _notes(report)
  passed, dropped = sum(found["passed_over"].values()), sum(kind["stretches"] for kind in found["dropped"].values())
  head = page.header({
      "title": f"{found['clips']:,} clips", "command": "launch.encode", "machine": str(report["source"]),
      "lede": f"What became of the {report['files']:,} files of {report['source']}: what was taken, at which sizes, "
              "and what was not, and why.",
      "facts": [{"name": name, "value": value} for name, value in (
          ("clips", f"{found['clips']:,}"),
          ("length of those that move", page.seconds(found["seconds"])), ("files taken", f"{found['files_taken']:,}"),
          ("files passed over", f"{passed:,}"), ("stretches dropped", f"{dropped:,}"))]})
  reasons = [(kind, f"{count:,}", "files") for kind, count in found["passed_over"].items()]
  reasons += [(kind, f"{told['stretches']:,}", f"stretches, {page.seconds(told['seconds'])} in all")
              for kind, told in found["dropped"].items()]
  return page.document(f"{found['clips']} clips", head, [
      page.section("What was taken", "Clips by class, as they are in the records.", histogram_cards(found["histograms"].values())),
      page.section("What was not, and why", "Files passed over, and stretches of videos that are in no clip, by reason.",
                   table(("reason", "how many", ""), reasons, len(reasons), numeric=(1,)) or "<p>Everything was taken.</p>"),
      _files("Files passed over", ("file", "why"), report["passed_over"], lambda file, why: [(file, why)]),
      _files("Stretches dropped", ("file", "from", "seconds", "why"),
             {file: entry["dropped"] for file, entry in report["taken"].items() if entry.get("dropped")},
             lambda file, stretches: [(file, f"{s['start']:.2f} s", f"{s['seconds']:.2f}", s["why"]) for s in stretches], numeric=(1, 2)),
      *(_files(f"Files {kind}", ("file", "from", "to"), {file: entry[kind] for file, entry in report["taken"].items() if kind in entry},
               lambda file, size: [(file, *(f"{h} × {w}" for h, w in (size["from"], size["to"])))]) for kind in ("cropped", "scaled")),
      _files("Notes", ("file", "note"), notes, lambda file, notes: [(file, note) for note in notes]),
  ])


def histogram_cards(histograms) -> str:
  """Entries of `sizes.histograms` as cards side by side."""
  cards = (f'<article class="card"><h3>{page.escape(chart["title"])}</h3>'
           f'{charts.histogram(chart["title"], chart["labels"], chart["clips"], 340)}</article>' for chart in histograms)
  return f'<div class="grid" style="--least:300px">{"".join(cards)}</div>'


def table(head, rows, total, numeric=()) -> str:
  """A table of texts; "" without rows. head: names of the columns, or (). numeric: which columns are set to the right.

  total: how many rows there would be; those that are left out are counted below it.
  """
  if not rows:
    return ""
  kind = [" class=\"num\"" * (i in numeric) for i in range(len(rows[0]) if rows else 0)]
  title = "".join(f"<th{k}>{page.escape(name)}</th>" for k, name in zip(kind, head))
  body = "".join(f"<tr>{''.join(f'<td{k}>{page.escape(cell)}</td>' for k, cell in zip(kind, row))}</tr>" for row in rows)
  more = f'<p class="none">… and {total - len(rows):,} more.</p>' if total > len(rows) else ""
  return f'<div class="card"><div class="scroll"><table class="plain"><thead><tr>{title}</tr></thead><tbody>{body}</tbody></table></div>{more}</div>'


def _files(title, head, entries, rows_of, numeric=()):
  """A section with the first SHOWN rows, by the name of the file; rows_of(file, entry) -> rows. "" where no file has an entry."""
  shown = [row for file in heapq.nsmallest(SHOWN, entries) for row in rows_of(file, entries[file])][:SHOWN]
  total = sum(len(rows_of(file, entry)) for file, entry in entries.items())
  say = "By file." if total <= SHOWN else f"By file, the first {SHOWN}; OUT/report.json has all."
  return page.section(title, say, table(head, shown, total, numeric)) if shown else ""


def _stretches(report):
  return (stretch for entry in report["taken"].values() for stretch in entry.get("dropped", ()))


def _notes(report):
  notes = {file: list(entry["notes"]) for file, entry in report["taken"].items() if entry.get("notes")}
  for file, more in report["notes"].items():
    notes.setdefault(file, []).extend(more)
  return notes
