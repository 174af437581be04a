"""The page that the quickstart writes: one index.html with the results, the videos, and what to try next.

The file contains everything (videos and images as base64 data URIs, curves as inline SVG), so it can be
opened from a disk, an e-mail or a server. Its template and style are in launch/reports/page.html, its curves
in launch/reports/charts.py.

The page is made from a story, a plain dict. Every part of it may be absent; its section is then left out. A
video that is None, or whose file does not exist, is shown as missing. An unknown name raises ValueError, so
that a misspelt part is not lost.

  title     str, the headline; plain text, as all text here
  lede      str, the two or three sentences under it
  status    str, shown as a notice: the page was written while the run goes on, or something failed
  started   float, when the run started: seconds since 1970
  machine   str, what it ran on
  command   str, what was run
  facts     [{name: str, value: str}]: the few numbers that matter most, in large type
  models    [{key: str, name: str, detail: str}]: the models compared, in the order in which they are shown;
            `key` (letters, digits, _) names them everywhere below and gives them their colour
  phases    [{name: str, seconds: float, detail: str}]: the stages of the run, in order
  prompts   [{prompt: str, videos: {key: path | None}, verdicts: {key: {question: bool}}}]
  scores    [{name: str, unit: "%" | str, values: {key: float}, chance: float, goals: {key: float}, most:
            float}]: with unit "%" values, chance and goals are fractions in [0, 1]; `most` ends the scale (1
            for "%"; with neither there is no bar, only the number); more is better
  reconstructions  [{caption: str, original: path, reconstruction: path, psnr: float dB, ssim: float}]
  curves    [{title: str, unit: str, x: str, series: [{key, name: str, x: [n], y: [n]}], goal: float, log:
            bool, log_x: bool}]: `x` names the horizontal axis (else "step"); a value that is None or not
            finite is left out; log, log_x: logarithmic axes
  bars      [{title: str, unit: str, x: str, labels: [n], series: [{key, name: str, y: [n]}]}]
  next      [{say: str, command: str}]: what to try, with the command to copy

PARTS says which names of an item may be left out. Paths are mp4, webm, png, jpg, webp or gif files.
"""

import base64
import datetime
import html
import math
import pathlib
import re

import sora_jax
from launch.reports import charts
from launch.reports.charts import number
from sora_jax import files

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
MEDIA = {
  ".mp4": "video/mp4",
  ".webm": "video/webm",
  ".png": "image/png",
  ".jpg": "image/jpeg",
  ".jpeg": "image/jpeg",
  ".webp": "image/webp",
  ".gif": "image/gif",
}

# The names of the items of each part of the story: (required, optional).
PARTS = {
  "facts": (("name", "value"), ()),
  "models": (("key", "name"), ("detail",)),
  "phases": (("name", "seconds"), ("detail",)),
  "prompts": (("prompt", "videos"), ("verdicts",)),
  "scores": (("name", "values"), ("unit", "chance", "goals", "most")),
  "reconstructions": (("caption", "original", "reconstruction"), ("psnr", "ssim")),
  "curves": (("title", "series"), ("unit", "x", "goal", "log", "log_x")),
  "bars": (("title", "labels", "series"), ("unit", "x")),
  "next": (("say", "command"), ()),
}
TEXTS = ("title", "lede", "status", "started", "machine", "command")


def write_page(out_html, story: dict) -> pathlib.Path:
  """Writes the page of a story (see the module) atomically -> its path. Creates missing folders.

  Raises ValueError if the story has an unknown name, or lacks a required one.
  """
  check(story)
  keys = [model["key"] for model in story.get("models", ())]
  keys += [s["key"] for part in ("curves", "bars") for chart in story.get(part, ()) for s in chart["series"]]
  colours = "".join(f"--series-{key}:var(--series-{i % 4});" for i, key in enumerate(dict.fromkeys(keys)))
  sections = [_prompts(story), _scores(story), _reconstructions(story), _curves(story), _next(story)]
  head = f"<style>:root{{{colours}}}</style>\n{header(story)}"
  return save(out_html, document(story.get("title", "sora_jax"), head, sections))


def document(title, header, sections) -> str:
  """Fills the template of a page: title as text, header and sections as HTML. Leaves out empty sections."""
  footer = f"Written by sora_jax {sora_jax.__version__}. This page is one file: move it, mail it, keep it."
  sections = "\n".join(filter(None, sections))
  fill = {"title": escape(title), "header": header, "sections": sections, "footer": footer}
  return re.sub(r"@\{(\w+)\}", lambda match: fill[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def save(path, text):
  """Writes a page atomically -> its path. Creates missing folders."""
  files.write_bytes(path, text.encode("utf-8", "backslashreplace"))
  return path


def check(story: dict) -> None:
  """Raises ValueError if the story has an unknown name, or lacks a required one."""
  unknown = set(story) - set(PARTS) - set(TEXTS)
  if unknown:
    raise ValueError(f"story has {sorted(unknown)}; known: {sorted([*PARTS, *TEXTS])}")
  for part, (needed, optional) in PARTS.items():
    for i, item in enumerate(story.get(part, ())):
      unknown, absent = set(item) - set(needed) - set(optional), set(needed) - set(item)
      if unknown or absent:
        known = sorted((*needed, *optional))
        raise ValueError(
          f"story[{part!r}][{i}]: unknown {sorted(unknown)}, absent {sorted(absent)}; known: {known}"
        )
  for key in (model["key"] for model in story.get("models", ())):
    if not re.fullmatch(r"\w+", key, re.ASCII):
      raise ValueError(f"story['models'] has the key {key!r}; letters, digits and _ only")


def seconds(value) -> str:
  """A duration as text: 41 s, 3 min 05 s, 1 h 12 min."""
  value = round(value)
  if value < 60:
    return f"{value} s"
  if value < 3600:
    return f"{value // 60} min {value % 60:02d} s"
  return f"{value // 3600} h {value % 3600 // 60:02d} min"


def media(path, label) -> str:
  """The file at `path` as a self-contained <video> or <img>; a sentence if it does not exist."""
  path = pathlib.Path(path) if path else None
  if path is None or not path.is_file() or not path.stat().st_size:
    return '<span class="none">not made</span>'
  kind = MEDIA.get(path.suffix.lower())
  if kind is None:
    raise ValueError(f"{path}: the page shows {', '.join(MEDIA)}")
  data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
  if kind.startswith("video"):
    return f'<video src="{data}" aria-label="{escape(label)}" autoplay loop muted playsinline></video>'
  return f'<img src="{data}" alt="{escape(label)}">'


def escape(value) -> str:
  return html.escape(str(value), quote=True)


def _figure(path, label, caption) -> str:
  return f"<figure><div>{media(path, label)}</div><figcaption>{caption}</figcaption></figure>"


def _key(key) -> str:
  return f'<span class="key" style="--c:var(--series-{key})"></span>'


def section(title, say, body) -> str:
  """A section of a page: a title, a sentence, and its body as HTML."""
  return f'<section>\n<h2>{title}</h2>\n<p class="say">{say}</p>\n{body}\n</section>'


def header(story) -> str:
  """The head of a page, from all of TEXTS, `facts` and `phases` of a story."""
  phases = story.get("phases", ())
  spent = sum(phase["seconds"] for phase in phases)
  eyebrow = [story[name] for name in ("machine", "command") if name in story]
  if "started" in story:
    started = datetime.datetime.fromtimestamp(story["started"])
    eyebrow.insert(0, started.strftime("%-d %B %Y, %H:%M"))
  out = [
    f'<p class="eyebrow">{" · ".join(map(escape, eyebrow)) or "sora_jax"}</p>',
    f"<h1>{escape(story.get('title', 'sora_jax'))}</h1>",
  ]
  if "lede" in story:
    out.append(f'<p class="lede">{escape(story["lede"])}</p>')
  if "status" in story:
    out.append(f'<p class="status" role="status">{escape(story["status"])}</p>')
  if story.get("facts"):
    facts = "".join(
      f"<div><dt>{escape(f['name'])}</dt><dd>{escape(f['value'])}</dd></div>" for f in story["facts"]
    )
    out.append(f'<dl class="facts">{facts}</dl>')
  if spent > 0:
    parts = "".join(f'<i style="flex:{phase["seconds"]:.3f} 0 0"></i>' for phase in phases)
    items = "".join(
      f"<li><b>{escape(phase['name'])}</b> <span>{seconds(phase['seconds'])}</span>"
      f"<small>{escape(phase.get('detail', ''))}</small></li>"
      for phase in phases
    )
    out.append(f'<div class="time" aria-hidden="true">{parts}</div><ul class="phases">{items}</ul>')
  return "\n".join(out)


def _prompts(story) -> str:
  if not story.get("prompts"):
    return ""
  models = story.get("models") or [{"key": key, "name": key} for key in story["prompts"][0]["videos"]]
  legend = "".join(
    f"<li>{_key(m['key'])}<b>{escape(m['name'])}</b> {escape(m.get('detail', ''))}</li>" for m in models
  )
  cards = []
  for item in story["prompts"]:
    figures = []
    for model in models:
      verdicts = item.get("verdicts", {}).get(model["key"], {})
      chips = "".join(
        f'<span class="{"yes" if right else "no"}">{escape(question)}</span>'
        for question, right in verdicts.items()
      )
      caption = f'{_key(model["key"])}{escape(model["name"])}<div class="chips">{chips}</div>'
      figures.append(_figure(item["videos"].get(model["key"]), f"{model['name']}: {item['prompt']}", caption))
    cards.append(
      f'<article class="card"><p class="prompt">“{escape(item["prompt"])}”</p>'
      f'<div class="pair">{"".join(figures)}</div></article>'
    )
  least = 160 * len(models) + 44
  body = (
    f'<div class="bar"><ul class="legend">{legend}</ul>'
    '<label class="toggle"><input type="checkbox" id="crisp"> show single pixels</label></div>'
    f'<div class="grid" style="--least:{least}px">{"".join(cards)}</div>'
  )
  say = "Each prompt with the videos that were made from it."
  if any(item.get("verdicts") for item in story["prompts"]):
    say += " The marks are what plain image processing, no model, finds in the finished files."
  return section("Prompts and their videos", say, body)


def _scores(story) -> str:
  if not story.get("scores"):
    return ""
  names = {model["key"]: model["name"] for model in story.get("models", ())}
  rows = "".join(
    _score(score, key, i, names) for score in story["scores"] for i, key in enumerate(score["values"])
  )
  head = "<th></th><th>model</th><th></th>"
  head += "".join(f'<th class="num">{name}</th>' for name in ("measured", "chance", "goal"))
  return section(
    "Scores",
    "Measured on held-out prompts and clips, from the finished files. A dotted mark is what guessing would "
    "reach, a solid mark is the goal.",
    f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>',
  )


def _score(score, key, i, names) -> str:
  """The row of the i-th model of a score. Only the first row has the name of the score."""
  value, chance, goal = score["values"][key], score.get("chance"), score.get("goals", {}).get(key)
  percent = score.get("unit") == "%"
  most = score.get("most", 1.0 if percent else None)
  known = value is not None and math.isfinite(value)

  def show(x):
    return f"{round(100 * x, 1):g} %" if percent else f"{number(x)} {score.get('unit', '')}".strip()

  def at(x):
    return f"{min(max(100 * x / most, 0), 100):.1f}%"

  bullet = ""
  if most and known:
    bullet = f'<i style="width:{at(value)}"></i>'
    bullet += f'<s class="chance" style="left:{at(chance)}"></s>' if chance is not None else ""
    bullet += f'<s style="left:{at(goal)}"></s>' if goal is not None else ""
    bullet = f'<div class="bullet" style="--c:var(--series-{key})" aria-hidden="true">{bullet}</div>'
  goal_cell = ""
  if goal is not None:
    goal_cell = f"{show(goal)} "
    if known:
      goal_cell += '<b class="met">✓</b>' if value >= goal else '<b class="unmet">✕</b>'
  row = "<tr>"
  if i == 0:
    row = f'<tr class=first><td class="name" rowspan="{len(score["values"])}">{escape(score["name"])}</td>'
  return (
    f'{row}<td class="model">{_key(key)}{escape(names.get(key, key))}</td>'
    f'<td>{bullet}</td><td class="num">{show(value) if known else "–"}</td>'
    f'<td class="num">{show(chance) if chance is not None else ""}</td>'
    f'<td class="num">{goal_cell}</td></tr>'
  )


def _reconstructions(story) -> str:
  cards = []
  for item in story.get("reconstructions", ()):
    figures = [
      _figure(item["original"], f"original: {item['caption']}", "original"),
      _figure(item["reconstruction"], f"reconstruction: {item['caption']}", "encoded and decoded"),
    ]
    quality = []
    if item.get("psnr") is not None:
      quality.append(f"PSNR {number(item['psnr'])} dB")
    if item.get("ssim") is not None:
      quality.append(f"SSIM {item['ssim']:.3f}")
    note = f'<p class="none" style="margin:8px 0 0">{" · ".join(quality)}</p>' if quality else ""
    cards.append(
      f'<article class="card"><p class="prompt">{escape(item["caption"])}</p>'
      f'<div class="pair">{"".join(figures)}</div>{note}</article>'
    )
  if not cards:
    return ""
  return section(
    "What the video autoencoder keeps",
    "Held-out clips, and the same clips after encoding to latents and decoding: "
    "no generated video can look better than this.",
    f'<div class="grid" style="--least:330px">{"".join(cards)}</div>',
  )


def _curves(story) -> str:
  drawn = [(charts.line_chart, curve) for curve in story.get("curves", ())]
  drawn += [(charts.bar_chart, bars) for bars in story.get("bars", ())]
  if not drawn:
    return ""
  three = len(drawn) % 3 == 0
  cards = []
  for draw, chart in drawn:
    unit = f' <span class="unit">{escape(chart["unit"])}</span>' if chart.get("unit") else ""
    several = len(chart["series"]) > 1
    legend = (
      "".join(f"<li>{_key(s['key'])}{escape(s['name'])}</li>" for s in chart["series"]) if several else ""
    )
    cards.append(
      f'<article class="card chart"><h3>{escape(chart["title"])}{unit}</h3><ul class="legend">{legend}</ul>'
      f"{draw(chart, 340 if three else 480)}</article>"
    )
  return section(
    "How it went",
    "Point at a curve to read its values.",
    f'<div class="grid" style="--least:{310 if three else 440}px">{"".join(cards)}</div>',
  )


def _next(story) -> str:
  if not story.get("next"):
    return ""
  items = "".join(
    f'<div><p>{escape(item["say"])}</p><div class="copy"><pre tabindex="0">{escape(item["command"])}</pre>'
    '<button class="do-copy" type="button">Copy</button></div></div>'
    for item in story["next"]
  )
  return section(
    "Try next",
    "At the root of the repository, after: source .venv/bin/activate",
    f'<div class="commands">{items}</div>',
  )
