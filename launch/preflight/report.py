"""What preflight found, as lines of text, as JSON, and as one picture."""

import collections
import html
import math

from launch.preflight import estimate
from launch.reports import charts, tables
from sora_jax.chips import CHIPS

GIB, TERA, GIGA = 2**30, 1e12, 1e9
FLOORS = ("compute", "hbm", "network")
LEFT, WIDTH = 230, 500  # of the bars of the picture
STYLE = (
  "<style>.bar { fill: #4477aa } .time { fill: #cc6677 } text { fill: #222 } "
  ".limit { stroke: #222; stroke-dasharray: 4 3 }</style>"
)


def facts(found, topology):
  """Compiled -> a dict of numbers, for JSON: bytes, FLOPs and seconds, of one device and one call."""
  program, kind = found.program, topology.split(":")[0]
  out = {
    "program": program.name,
    "topology": topology,
    "mesh": dict(program.layout.mesh.shape),
    "fits": found.fits,
    "memory": {
      "limit": found.chip.hbm_bytes,
      "assigned": found.assigned if math.isfinite(found.assigned) else None,
      "arguments": found.arguments,
      "live_peak": found.live_peak,
      "host": found.host,
    },
    "compile": {"seconds": found.seconds, "cpu_seconds": found.cpu_seconds},
    "tokens": program.tokens,
    **program.facts,
  }
  if found.error:
    return out | {"error": found.error.splitlines()[0]}
  census = found.census
  head = program.facts.get("head_size", 128)
  overlapped = sum(one.wire_bytes for one in census.collectives if one.is_async)
  clock = estimate.times(
    kind, found.chip, topology, census.flops, census.hbm_bytes, found.sent, overlapped, head
  )
  return out | {
    "flops": {"model": found.model_flops, "dense": census.dense_flops, "kernels": census.kernel_flops},
    "executed_over_model": found.ratio,
    "sent": found.sent,
    "collectives": [
      {"kind": kind, "axes": axes, "async": is_async, "runs": runs, "wire_bytes": wire}
      for (kind, axes, is_async), (runs, wire) in collectives(census)
    ],
    "kernels": [
      {"kind": k.kind, "runs": k.runs, "flops": k.flops, "shape": list(k.shape)} for k in census.kernels
    ],
    "hbm_traffic": census.hbm_bytes,
    "host_traffic": census.host_bytes,
    "live": [{"bytes": size, "shape": shape, "op": op} for size, shape, _, op in found.live],
    "unknown": census.unknown,
    "seconds": {"compute": clock.compute, "hbm": clock.hbm, "network": clock.network, "limit": clock.limit}
    | {"estimate": clock.estimate},
  }


def gib(numbers):
  """Memory that the compiler assigns, for a table; "?" where it refused before it knew."""
  assigned = numbers["memory"]["assigned"]
  return "?" if assigned is None else f"{assigned / GIB:.1f}"


def collectives(census):
  """[((kind, axes, asynchronous), [runs, bytes sent])], the most bytes first."""
  sums = collections.defaultdict(lambda: [0.0, 0.0])
  for one in census.collectives:
    total = sums[one.kind, " x ".join(one.axes) or "none", one.is_async]
    total[0] += one.runs
    total[1] += one.wire_bytes
  return sorted(sums.items(), key=lambda item: -item[1][1])


def lines(numbers):
  """The facts of `facts` -> lines for the terminal."""
  memory, mesh = numbers["memory"], numbers["mesh"]
  axes = "  ".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "one device"
  yield f"{numbers['program']} on {numbers['topology']}: {axes}"
  if "parameters" in numbers:
    yield (
      f"{numbers['parameters'] / 1e9:.2f} G parameters; {numbers['rows']} rows of {numbers['row_tokens']:,} "
      f"tokens; {numbers['tokens']:,} tokens a step"
    )
  if memory["assigned"] is None:
    yield f"the compiler refuses it, not for its memory as a whole: {numbers['error'][:300]}"
    return
  room = 1 - memory["assigned"] / memory["limit"]
  verdict = f"fits, {room:.0%} to spare" if numbers["fits"] else "DOES NOT FIT"
  yield (
    f"memory  {memory['assigned'] / GIB:.1f} of {memory['limit'] / GIB:.2f} GiB a device: {verdict} "
    f"(weights, optimiser and batch {memory['arguments'] / GIB:.1f}"
    + (f"; host {memory['host'] / GIB:.1f}" if memory["host"] else "")
    + f"); compiled in {numbers['compile']['cpu_seconds'] / 60:.1f} CPU-minutes"
  )
  if "flops" not in numbers:
    yield f"the compiler says: {numbers.get('error', '')[:300]}"
    return
  yield from work_lines(numbers)


def work_lines(numbers):
  """FLOPs, traffic, network and time."""
  flops, seconds = numbers["flops"], numbers["seconds"]
  executed = flops["dense"] + flops["kernels"]
  ratio = numbers["executed_over_model"]
  model = f"; the model needs {flops['model'] / TERA:,.1f}, so {ratio:.3f} times" if ratio else ""
  yield (
    f"FLOPs   {executed / TERA:,.1f} T a device, {flops['kernels'] / TERA:,.1f} of them in attention "
    f"kernels{model}"
  )
  host = f"; to and from the host {numbers['host_traffic'] / GIGA:.1f} GB" if numbers["host_traffic"] else ""
  yield f"HBM     {numbers['hbm_traffic'] / TERA:.2f} TB read and written{host}"
  yield f"network {numbers['sent'] / GIGA:,.1f} GB sent by a device:"
  rows = [
    (
      one["kind"],
      one["axes"],
      "overlapped" if one["async"] else "",
      f"{one['runs']:,.0f}",
      f"{one['wire_bytes'] / GIGA:,.2f} GB",
    )
    for one in numbers["collectives"]
    if one["wire_bytes"] >= 1e-3 * numbers["sent"]
  ]
  for line in tables.lines((), rows, left=(0, 1, 2)) if rows else ["none"]:
    yield f"          {line}"
  floors = ", ".join(f"{name} {seconds[name]:.2f} s" for name in FLOORS)
  yield f"floors  {floors}: {seconds['limit']} limits the step"
  published = "; ".join(
    f"{name} {guess:.1f} s for {real:.1f}" for name, real, guess in estimate.residuals(CHIPS)
  )
  yield (
    f"time    about {seconds['estimate']:.3g} s, without input and checkpoints; "
    f"the same estimate for published steps: {published}"
  )
  for line in numbers["unknown"]:
    yield f"not counted: {line}"


def picture(numbers):
  """One SVG: what fills the memory of a device against what it has, and the floors of time."""
  memory, seconds = numbers["memory"], numbers.get("seconds", {})
  live = [(x["shape"], x["bytes"]) for x in numbers.get("live", ())[:8]]
  rest = memory["assigned"] - memory["arguments"] - sum(size for _, size in live)
  bars = [("weights, optimiser, batch", memory["arguments"]), *live, ("what is smaller", max(rest, 0))]
  scale = WIDTH / max(memory["limit"], memory["assigned"])
  marks, y, x = [], 40, LEFT
  for name, size in bars:
    marks.append(_bar(name, x, y, size * scale, f"{size / GIB:.2f} GiB", "bar"))
    y, x = y + 26, x + size * scale
  limit = LEFT + memory["limit"] * scale
  marks.append(
    f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="34" y2="{y}" class="limit"/>'
    f'<text x="{limit:.1f}" y="30" text-anchor="end">a device has {memory["limit"] / GIB:.2f} GiB</text>'
  )
  y += 24
  longest = max((seconds.get(name, 0) for name in FLOORS), default=0) or 1
  for name in FLOORS if seconds else ():
    width = WIDTH * seconds[name] / longest
    marks.append(_bar(f"{name}, at its peak", LEFT, y, width, f"{charts.number(seconds[name])} s", "time"))
    y += 26
  title = html.escape(f"{numbers['program']} on {numbers['topology']}: one device")
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {y + 10}" font-family="system-ui" '
    f'font-size="13">{STYLE}<rect width="860" height="{y + 10}" fill="#fff"/>'
    f'<text x="{LEFT}" y="14" font-weight="600">{title}</text>{"".join(marks)}</svg>\n'
  )


def _bar(name, x, y, width, value, kind):
  return (
    f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{html.escape(name)}</text>'
    f'<rect x="{x:.1f}" y="{y}" width="{max(width, 1):.1f}" height="18" class="{kind}"/>'
    f'<text x="{x + width + 6:.1f}" y="{y + 14}">{value}</text>'
  )
