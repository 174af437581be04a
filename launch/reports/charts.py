"""Curves and bars as inline SVG, without library or script. Colours are the page's variables --series-KEY.

A chart is `width` x 250 units and scales with its container. Each mark has its value in a <title>, shown on
hover.
"""

import html
import math

HEIGHT = 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 16, 36
POINTS = 240  # a longer curve is divided into this many intervals; their means are drawn
NOISY = 48  # a curve with at least so many points is also drawn smoothed, over the faint original

SHEET = (  # style of a file of its own
  ":root{--series-0:#2b6cb8;--series-1:#c8560f;--series-2:#6a51a3}text{fill:#222}.tick,.axis{font-size:12px;"
  "fill:#666}.last{font-size:12px;font-weight:600}.grid{stroke:#e4e4e4}path{fill:none}.line{stroke-width:2}"
  ".faint{stroke-width:1;opacity:.25}.hit{opacity:0}"
)


def number(value) -> str:
  """A short decimal of 3 to 4 significant digits; large numbers have a space between thousands."""
  if value is None or not math.isfinite(value):
    return "–"
  size = abs(value)
  if size >= 10_000:
    return f"{value:,.0f}".replace(",", "\u202f")
  if size >= 100 or value == int(value):
    return f"{value:.0f}"
  if size >= 10:
    return f"{value:.1f}"
  return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.2g}"


def round_number(value) -> str:
  """A round value on an axis."""
  return f"{value:g}" if 1e-4 <= abs(value) < 10_000 or value == 0 else number(value)


def ticks(low, high, count=4) -> list:
  """Round values in [low, high], about `count` of them, at steps of 1, 2 or 5 times a power of ten."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
  first = math.ceil(low / step - 1e-9)
  return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high) -> list:
  """1, 2 and 5 times the powers of ten in [low, high]; only the powers if these are more than 6.

  Fewer than two are replaced by linear ticks.
  """
  powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
  values = [step * power for power in powers for step in (1, 2, 5) if low <= step * power <= high]
  if len(values) > 6:
    values = [power for power in powers if low <= power <= high]
  return values if len(values) > 1 else ticks(low, high)


def smooth(ys, window) -> list:
  """Mean over the `window` points around each point. Near the start, where curves are steep, the window is
  smaller, so that it has as many points on both sides."""
  sums, out = [0.0], []
  for y in ys:
    sums.append(sums[-1] + y)
  for i in range(len(ys)):
    first, after = i - min(window // 2, i), min(i + min(window // 2, i) + 1, len(ys))
    out.append((sums[after] - sums[first]) / (after - first))
  return out


def thin(points, limit=POINTS) -> list:
  """[(x, y)] -> at most `limit` points, each the mean of an interval. Skips points that are not finite."""
  points = [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]
  size = -(-len(points) // limit) or 1
  intervals = [points[i : i + size] for i in range(0, len(points), size)]
  return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in intervals]


def line_chart(curve, width) -> str:
  """One <svg> of a curve of the story (launch/reports/page.py); a sentence if it has no finite point."""
  drawn = []
  for s in curve["series"]:
    points = thin(zip(s["x"], s["y"]))
    if points:
      noisy = len(points) >= NOISY
      drawn.append((s, points, smooth([y for _, y in points], len(points) // 12) if noisy else None))
  if not drawn:
    return '<p class="none">Nothing was measured.</p>'
  xs = [x for _, points, _ in drawn for x, _ in points]
  ys = [y for _, points, smoothed in drawn for y in (smoothed or [y for _, y in points])]
  faint = sorted(y for _, points, smoothed in drawn if smoothed for _, y in points)
  ys += faint[len(faint) // 50 : len(faint) - len(faint) // 50]  # a rare spike may leave the frame
  goal = curve.get("goal")
  log, log_x = curve.get("log") and min(ys) > 0, curve.get("log_x") and min(xs) > 0
  if goal is not None:
    ys.append(goal)
  frame = _Frame(width, (min(xs), max(xs)), _span(ys, log), log, log_x)

  marks = [frame.grid(), frame.axis(curve.get("x", "step"))]
  if goal is not None:
    y = frame.y(goal)
    marks.append(
      f'<line class="goal" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text class="goal" x="{LEFT + 6}" y="{y - 6:.1f}">goal {number(goal)}</text>'
    )
  for s, points, smoothed in drawn:
    colour = f"var(--series-{s['key']})"
    path = _path(frame, points)
    if smoothed:
      marks.append(f'<path class="faint" d="{path}" stroke="{colour}"/>')
      points = [(x, y) for (x, _), y in zip(points, smoothed)]
      path = _path(frame, points)
    marks.append(f'<path class="line" d="{path}" stroke="{colour}"/>')
    every = -(-len(points) // 40)
    kind = "dot" if len(points) <= 24 else "hit"
    for x, y in points[::every]:
      title = html.escape(f"{s['name']}, {curve.get('x', 'step')} {number(x)}: {number(y)}")
      marks.append(
        f'<circle class="{kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" fill="{colour}">'
        f"<title>{title}</title></circle>"
      )
    x, y = points[-1]
    offset = -9 if frame.y(y) - TOP > 22 else 18  # above the last point if there is room, else below it
    marks.append(
      f'<text class="last" x="{frame.x(x):.1f}" y="{frame.y(y) + offset:.1f}" '
      f'text-anchor="end">{number(y)}</text>'
    )
  return _svg(curve["title"], width, marks, [s["name"] for s, _, _ in drawn])


def bar_chart(bars, width) -> str:
  """One <svg> of groups of bars, with one bar for each series in a group."""
  values = [y for s in bars["series"] for y in s["y"] if y is not None and math.isfinite(y)]
  if not values:
    return '<p class="none">Nothing was measured.</p>'
  frame = _Frame(width, (0, len(bars["labels"])), (0, max(values) * 1.12 or 1), False)
  thick = min((frame.x(1) - frame.x(0)) * 0.72 / len(bars["series"]), 34)
  marks = [frame.grid()]
  for i, label in enumerate(bars["labels"]):
    middle = frame.x(i + 0.5)
    marks.append(
      f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
      f"{html.escape(str(label))}</text>"
    )
    for j, s in enumerate(bars["series"]):
      y = s["y"][i]
      if y is None or not math.isfinite(y):
        continue
      left, top = middle + (j - len(bars["series"]) / 2) * thick, frame.y(y)
      title = html.escape(f"{s['name']}, {bars.get('x', '')} {label}: {number(y)}")
      height = max(frame.y(0) - top, 0.5)
      marks.append(
        f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{thick - 2:.1f}" height="{height:.1f}" rx="2" '
        f'fill="var(--series-{s["key"]})"><title>{title}</title></rect>'
      )
  marks.append(frame.name(bars.get("x", "")))
  return _svg(bars["title"], width, marks, [s["name"] for s in bars["series"]])


class _Frame:
  """Data coordinates -> units of the SVG."""

  def __init__(self, width, across, up, log, log_x=False):
    self.width, (self.left, self.right), (self.low, self.high) = width, across, up
    self.log, self.log_x = log, log_x
    if self.right <= self.left:
      self.right = self.left + 1

  def x(self, value):
    scale = math.log if self.log_x else float
    part = (scale(value) - scale(self.left)) / (scale(self.right) - scale(self.left))
    return LEFT + (self.width - LEFT - RIGHT) * part

  def y(self, value):
    """The vertical position. Spikes of the faint curve are cut a little outside the frame."""
    if self.log and value <= 0:
      part = 0.0
    else:
      scale = math.log if self.log else float
      part = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(part, -0.04), 1.04)

  def grid(self):
    marks, values = [], log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)
    for value in values:
      y = self.y(value)
      marks.append(
        f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{round_number(value)}</text>'
      )
    return "".join(marks)

  def axis(self, name):
    y = HEIGHT - BOTTOM + 16
    marks = [
      f'<text class="tick" x="{self.x(v):.1f}" y="{y}" text-anchor="middle">{round_number(v)}</text>'
      for v in (log_ticks(self.left, self.right) if self.log_x else ticks(self.left, self.right, 5))
    ]
    return "".join(marks) + self.name(name)

  def name(self, text):
    text = html.escape(text)
    return f'<text class="axis" x="{self.width - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{text}</text>'


def _span(values, log):
  """The range of the y axis: that of the values and a margin, which is a ratio on a logarithmic axis."""
  low, high = min(values), max(values)
  if log:
    return low / 1.1, high * 1.1
  margin = (high - low) * 0.08 or abs(high) * 0.08 or 1.0
  first = 0.0 if 0 <= low < 0.25 * high else low - margin
  return first, high + margin


def _path(frame, points):
  return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def sheet(curve, bars, width=480) -> str:
  """One file.svg of a curve and of bars, side by side, each below its title and the names of its series."""
  names = [s["name"] for s in curve["series"]]
  legend = "".join(
    f'<circle cx="{LEFT + 6 + 120 * i}" cy="38" r="5" fill="var(--series-{s["key"]})"/>'
    f'<text x="{LEFT + 16 + 120 * i}" y="42">{html.escape(s["name"])}</text>'
    for i, s in enumerate(curve["series"])
  )
  body = ""
  for i, (draw, chart) in enumerate(((line_chart, curve), (bar_chart, bars))):
    place = f'<svg x="{i * width}" y="52" width="{width}" height="{HEIGHT}"'
    body += f'<text x="{i * width + LEFT}" y="18" font-weight="600">{html.escape(chart["title"])}</text>'
    body += draw(chart, width).replace("<svg", place, 1)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width} {HEIGHT + 56}" role="img" '
    f'aria-label="{html.escape(", ".join(names), quote=True)}" font-family="system-ui, sans-serif" '
    f'font-size="13"><style>{SHEET}</style><rect width="100%" height="100%" fill="#fff"/>{legend}{body}'
    "</svg>\n"
  )


def _svg(title, width, marks, names):
  label = html.escape(f"{title}: {', '.join(names)}", quote=True)
  return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def histogram(title, labels, counts, width) -> str:
  """One <svg> of the counts of classes, as horizontal bars, so that names of classes may be long."""
  total, step, letter = sum(counts), 24, 7  # units: between two bars, and of a letter of 12
  if not total:
    return '<p class="none">There are none.</p>'
  values = []
  for count in counts:
    decimals = 1 if 0 < 10 * count < total else 0
    values.append(f"{count:,} · {100 * count / total:.{decimals}f} %")
  left, right = 10 + letter * max(map(len, labels)), 10 + letter * max(map(len, values))
  marks = []
  for i, (label, count, value) in enumerate(zip(labels, counts, values)):
    length = max((width - left - right) * count / max(counts), 1) if count else 0
    marks.append(
      f'<text class="tick" x="{left - 8}" y="{step * i + 16}" text-anchor="end">{html.escape(label)}</text>'
      f'<rect x="{left}" y="{step * i + 4}" width="{length:.1f}" height="16" rx="2" fill="var(--series-0)"/>'
      f'<text class="tick" x="{left + length + 8:.1f}" y="{step * i + 16}">{value}</text>'
    )
  items = ", ".join(f"{label}: {value}" for label, value in zip(labels, values))
  aria = html.escape(f"{title}: {items}", quote=True)
  height = step * len(labels) + 4
  return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{aria}">{"".join(marks)}</svg>'
