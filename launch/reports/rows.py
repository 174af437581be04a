"""A picture of packed rows: one self-contained SVG for a README or a page, in light and dark mode.

Each row is a bar. Each clip is a segment of it, in the colour of its kind, with a width in proportion to its
tokens. The colours are those of Okabe and Ito, which people of any colour vision can distinguish; dark
letters are legible on all of them.
"""

import dataclasses
import html

from launch.reports.charts import ticks

WIDTH, LEFT, TOP = 900, 24, 96
BAR, UNDER = 38, 28  # heights of a bar and of the text below it
LETTER = 6.1  # mean width of a letter of 11 units
ROOM = 60_000  # bytes; a picture that would be larger shows fewer rows
COLOURS = ("#56b4e9", "#2fb58a", "#f0b440", "#e8794a")

STYLE = """
.packed{--page:#fff;--edge:#e5e1da;--ink:#1d1c1a;--soft:#66625b;--empty:#efece6;--hatch:#b9b3a8}
@media(prefers-color-scheme:dark){.packed{--page:#161616;--edge:#33312e;--ink:#ecebe8;--soft:#a19d95;--empty:#262523;--hatch:#5b5852}}
.packed text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:var(--soft)}
.packed .title{font-size:19px;font-weight:600;fill:var(--ink)}.packed .say{font-size:13.5px}.packed .fill{fill:var(--ink)}
.packed g text{font-size:11px;fill:#141414;text-anchor:middle}
"""  # noqa: E501


@dataclasses.dataclass(frozen=True)
class Segment:
  """A clip in a row. size: frames, height and width in pixels.  kind: index into the legend and COLOURS."""

  tokens: int
  size: tuple
  kind: int


def packed_rows(rows, shares, length, kinds, title, say) -> str:
  """Rows of Segments -> SVG of the first rows, as many as fit in ROOM, and at least one.

  shares: cost of attention in each row, as a multiple of the mean of its step.  length: tokens that a row
  holds. kinds: names of the kinds, for the legend, which leaves out those that do not occur.  say: the line
  below the title.
  """
  while len((svg := _draw(rows, shares, length, kinds, title, say)).encode()) > ROOM and len(rows) > 1:
    rows, shares = rows[:-1], shares[:-1]
  return svg


def _draw(rows, shares, length, kinds, title, say):
  across = WIDTH - 2 * LEFT
  height = TOP + len(rows) * (BAR + UNDER) + 34
  style = STYLE + "".join(f".packed .k{i}{{fill:{colour}}}" for i, colour in enumerate(COLOURS))
  occurring = sorted({segment.kind for row in rows for segment in row})
  legend = [(f"k{i}", kinds[i]) for i in occurring] + [("empty", "padding")]
  marks = [
    f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="var(--page)" '
    'stroke="var(--edge)"/>',
    f'<text class="title" x="{LEFT}" y="34">{html.escape(title)}</text>',
    f'<text class="say" x="{LEFT}" y="55">{html.escape(say)}</text>',
    _legend(legend),
  ]
  for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
    used = sum(segment.tokens for segment in row)
    y = TOP + i * (BAR + UNDER)
    clips = "1 clip" if len(row) == 1 else f"{len(row)} clips"
    marks += [
      f'<g transform="translate({LEFT} {y})">{_bar(row, length, across)}</g>',
      f'<text x="{LEFT}" y="{y + BAR + 15}">{clips} · {100 * used / length:.1f} % full</text>',
      f'<text x="{WIDTH - LEFT}" y="{y + BAR + 15}" text-anchor="end">'
      f"attention {share:.3f} × the mean of the step</text>",
    ]
  marks.append(_axis(length, across, TOP + len(rows) * (BAR + UNDER) + 2))
  aria = html.escape(f"{title}. {say}", quote=True)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" class="packed" viewBox="0 0 {WIDTH} {height}" role="img" '
    f'aria-label="{aria}">'
    f'<style>{style}</style><defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="7" height="7" fill="var(--empty)"/>'
    '<path d="M0 0v7" stroke="var(--hatch)" stroke-width="2.4"/></pattern></defs>'
    f"{''.join(marks)}</svg>\n"
  )


def _axis(length, across, y):
  """The axis of tokens below the bars."""
  marks = []
  for value in [*(tick for tick in ticks(0, length, 5) if tick < 0.9 * length), length]:
    x = LEFT + across * value / length
    anchor, unit = "middle", ""
    if value == 0:
      anchor = "start"
    elif value == length:
      anchor, unit = "end", " tokens"
    marks.append(
      f'<path d="M{x:.1f} {y}v5" stroke="var(--soft)"/><text x="{x:.1f}" y="{y + 18}" text-anchor="{anchor}">'
      f"{value:,.0f}{unit}</text>"
    )
  return "".join(marks)


def _legend(entries):
  x, marks = LEFT, []
  for key, name in entries:
    label = html.escape(name)
    fill = 'fill="url(#hatch)"' if key == "empty" else f'class="{key}"'
    marks.append(
      f'<rect x="{x}" y="68" width="13" height="13" rx="3" {fill}/><text x="{x + 19}" y="79">{label}</text>'
    )
    x += 40 + round(6.4 * len(name))
  return "".join(marks)


def _bar(row, length, across):
  """The segments side by side, with a gap between two of them; the padding at the end is hatched."""
  x, marks, scale = 0.0, [], across / length
  for segment in row:
    wide = segment.tokens * scale
    gap = min(1.5, wide / 4)
    shape = f'class="k{segment.kind}" d="M{x:.1f} 0h{wide - gap:.1f}v{BAR}h-{wide - gap:.1f}z"'
    x += wide
    frames, height, width = segment.size
    name = f"{frames} × {height} × {width}"
    in_two_lines = [f"{frames} ×", f"{height} × {width}"] if frames > 1 else [f"{height} × {width}"]
    lines = next((lines for lines in ([name], in_two_lines) if LETTER * max(map(len, lines)) + 6 < wide), [])
    text = ""
    for n, line in enumerate(lines):
      y = BAR / 2 + 4 + 13 * (n - (len(lines) - 1) / 2)
      text += f'<text x="{x - wide / 2:.1f}" y="{y:g}">{line}</text>'
    if wide >= 8:
      marks.append(f"<path {shape}><title>{name}: {segment.tokens} tokens</title></path>{text}")
    else:
      marks.append(f"<path {shape}/>")
  padding = across - x
  if padding >= 0.05:
    marks.append(f'<path fill="url(#hatch)" d="M{x:.1f} 0h{padding:.1f}v{BAR}h-{padding:.1f}z"/>')
  return "".join(marks)
