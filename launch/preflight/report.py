"""What preflight found, as lines of text, as JSON, and as one picture."""

import collections
import html

from launch.preflight import estimate
from launch.reports import charts, tables
from sora_jax.chips import CHIPS

GIB, TERA, GIGA = 2**30, 1e12, 1e9


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
      "assigned": found.assigned,
      "arguments": found.arguments,
      "live_peak": found.live_peak,
      "host": found.host,
    },
    "compile": {"seconds": found.seconds, "cpu_seconds": found.cpu_seconds},
    **program.facts,
  }
  if found.error:
    return out | {"error": found.error.splitlines()[0]}
  census = found.census
  head = program.facts.get("head_size", 128)
  clock = estimate.times(
    kind, found.chip, topology, census.flops, census.hbm_bytes, found.sent, head_size=head
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
    "tokens": program.tokens,
  }


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
  yield f"HBM     {numbers['hbm_traffic'] / TERA:.2f} TB read and written; host {numbers['host_traffic'] / GIGA:.1f} GB"
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
  yield (
    f"floors  compute {seconds['compute']:.2f} s, HBM {seconds['hbm']:.2f} s, network {seconds['network']:.2f} s: "
    f"{seconds['limit']} limits the step"
  )
  yield (
    f"time    about {seconds['estimate']:.1f} s, without input, checkpoints and what overlaps; the same estimate for "
    "published steps: "
    + "; ".join(f"{name} {guess:.1f} s for {real:.1f}" for name, real, guess in estimate.residuals(CHIPS))
  )
  for line in numbers["unknown"]:
    yield f"not counted: {line}"


def picture(numbers):
  """One SVG: memory by what holds it against the chip's, and the floors of time."""
  memory = numbers["memory"]
  live = [(f"{x['shape']}", x["bytes"]) for x in numbers.get("live", ())[:8]]
  rest = memory["assigned"] - memory["arguments"] - sum(size for _, size in live)
  bars = [("weights, optimiser, batch", memory["arguments"]), *live, ("smaller ones", max(rest, 0))]
  rows, top = [], 34
  scale = 520 / max(memory["limit"], memory["assigned"])
  x = 200.0
  for i, (name, size) in enumerate(bars):
    y = top + 26 * i
    rows.append(
      f'<text x="192" y="{y + 14}" text-anchor="end">{html.escape(name)}</text>'
      f'<rect x="{x:.1f}" y="{y}" width="{max(size * scale, 1):.1f}" height="18" class="bar"/>'
      f'<text x="{x + size * scale + 6:.1f}" y="{y + 14}">{size / GIB:.2f} GiB</text>'
    )
    x += size * scale
  bottom = top + 26 * len(bars)
  limit = 200 + memory["limit"] * scale
  rows.append(
    f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{top - 6}" y2="{bottom}" class="limit"/>'
    f'<text x="{limit - 6:.1f}" y="{top - 10}" text-anchor="end">the chip has {memory["limit"] / GIB:.2f} GiB</text>'
  )
  y = bottom + 30
  seconds = numbers.get("seconds", {})
  longest = max((seconds.get(name, 0) for name in ("compute", "hbm", "network")), default=0) or 1
  for name in ("compute", "hbm", "network"):
    if name in seconds:
      width = 520 * seconds[name] / longest
      rows.append(
        f'<text x="192" y="{y + 14}" text-anchor="end">{name} at its peak</text>'
        f'<rect x="200" y="{y}" width="{max(width, 1):.1f}" height="18" class="time"/>'
        f'<text x="{206 + width:.1f}" y="{y + 14}">{charts.number(seconds[name])} s</text>'
      )
      y += 26
  title = f"{numbers['program']} on {numbers['topology']}, one device"
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {y + 10}" font-family="system-ui" font-size="13">'
    "<style>.bar{fill:#4477aa}.time{fill:#cc6677}.limit{stroke:#222;stroke-dasharray:4 3}text{fill:#222}</style>"
    f'<rect width="860" height="{y + 10}" fill="#fff"/><text x="200" y="14" font-weight="600">{html.escape(title)}</text>'
    + "".join(rows)
    + "</svg>\n"
  )
