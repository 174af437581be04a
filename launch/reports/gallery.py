"""The page of a folder of launch.sample: OUT/index.html with every video beside what was given, its prompt
and its settings. Requests that differ in settings alone stand in one table.

Videos are linked, so the page belongs into its folder; what was given is in the page.
"""

import os
import pathlib
import urllib.parse

from launch.reports import page

# Settings of a request that may differ within a table, those that make its rows and columns first.
SETTINGS = "steps guidance seed sampler shift strength cache guidance_rescale size frames fps".split()
GIVEN = ("image", "last_image", "video", "video_b", "mask")
MOST_BYTES = 4 << 20  # of a given file that is put into the page


def write(out, lines):
  """Lines of manifest.jsonl (the last of each id) -> path of the page."""
  groups = {}
  for line in lines:
    if line["status"] == "ok":
      given = {name: line[name] for name in GIVEN if line.get(name)}
      groups.setdefault((line["prompt"], line["task"], tuple(given.items())), []).append(line)
  failed = [line for line in lines if line["status"] != "ok"]
  sections = [_group(*key, members) for key, members in groups.items()]
  if failed:
    rows = "".join(
      f"<tr><td>{page.escape(line['id'])}</td><td>{page.escape(line['error'])}</td></tr>" for line in failed
    )
    sections.append(page.section("Could not be done", "", f"<table>{rows}</table>"))
  count = sum(map(len, groups.values()))
  title = f"{count} video{'s' * (count != 1)} of launch.sample"
  text = page.document(title, page.header({"title": title}), sections)
  return page.save(pathlib.Path(out) / "index.html", text)


def _group(prompt, task, given, lines):
  """A prompt with all its videos."""
  differ = [name for name in SETTINGS if len({str(line.get(name)) for line in lines}) > 1]
  first = lines[0]
  same = [name for name in SETTINGS if name not in differ and first.get(name) is not None]
  same = [f"{name} {_value(first, name)}" for name in same]
  inputs = [f"<figure>{_given(path)}<figcaption>{name}</figcaption></figure>" for name, path in given]
  if len(differ) < 2:
    body = _side_by_side(inputs + [_cell(line, differ) for line in lines])
  else:
    row, column, *rest = differ
    columns = list(dict.fromkeys(str(line.get(column)) for line in lines))
    head = "".join(f"<th>{column} {page.escape(value)}</th>" for value in columns)
    rows = ""
    for value in dict.fromkeys(str(line.get(row)) for line in lines):
      cells = ""
      for other in columns:
        found = [line for line in lines if (str(line.get(row)), str(line.get(column))) == (value, other)]
        cells += "<td>" + "".join(_cell(line, rest) for line in found) + "</td>"
      rows += f"<tr><th>{row} {page.escape(value)}</th>{cells}</tr>"
    body = _side_by_side(inputs) + f"<table><tr><th></th>{head}</tr>{rows}</table>"
  return page.section(page.escape(prompt), page.escape(f"{task}; {', '.join(same)}"), body)


def _side_by_side(figures):
  """Figures of one size."""
  width = 320 * len(figures)
  return f'<div class="grid" style="--least:200px;max-width:{width}px">{"".join(figures)}</div>'


def _value(line, name):
  """A setting as text."""
  value = line[name]
  return "x".join(map(str, value)) if isinstance(value, list) else value


def _cell(line, names):
  """A video and the settings of these names."""
  label = ", ".join(f"{name} {_value(line, name)}" for name in names if line.get(name) is not None)
  label = label or line["id"]
  source = urllib.parse.quote(line["path"])
  shown = (
    f'<img src="{source}" alt="">'
    if line["path"].endswith(".png")
    else f'<video src="{source}" autoplay loop muted playsinline></video>'
  )
  return f"<figure>{shown}<figcaption>{page.escape(label)}</figcaption></figure>"


def _given(path):
  """A given file, in the page if it is not too large."""
  if not os.path.exists(path) or os.path.getsize(path) > MOST_BYTES:
    return page.escape(os.path.basename(path))
  return page.media(path, "")
