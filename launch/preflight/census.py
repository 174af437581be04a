"""What one execution of a compiled step does on one device, counted from the text that the compiler gives.

`compiled.cost_analysis()` counts the body of a loop once and a Pallas kernel not at all. `count` walks the
module from its entry and multiplies by the turns of loops. It counts

  FLOPs        of products (dot, convolution) and of kernels; not of elementwise operations.
  kernels      splash attention by its operands, padded (`splash_work`); others by their own cost estimate.
  collectives  payload: bytes of the result of an all-gather, of the operands of others. wire: bytes that a
               device sends in a ring of n: payload (n-1)/n; twice that for an all-reduce; all of the payload
               for a permutation. An all-reduce that the TPU compiler fuses with the slicing of its result
               (all-reduce-scatter) is a reduce-scatter.
  HBM          bytes that instructions read and write in HBM: of a slice what is sliced, of an update in
               place what is updated. An estimate: what a kernel reads again for each tile is not seen.
  host         bytes copied to and from host memory.

Of a conditional the branch with the most FLOPs counts. `live_peak` adds up which arrays are alive at a time.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from launch.preflight import hlo

COLLECTIVES = (
  "all-gather all-reduce reduce-scatter all-to-all ragged-all-to-all collective-permute collective-broadcast"
).split()
FREE = (  # move no bytes; what loops and calls contain is counted where it stands
  "parameter constant tuple get-tuple-element bitcast while conditional after-all call optimization-barrier"
).split()
SLICES = ("dynamic-slice", "slice", "gather")
# An asynchronous collective of the TPU compiler stands in the fusion that starts it, in those that run beside
# it, and in the one that ends it.
CARRIED = re.compile(r"async-collective-done|(^| )async_collective_fusion")
PALLAS = "tpu_custom_call"
LIBRARY = re.compile("matmul|conv|gemm|cublas|cudnn", re.I)  # custom calls that hide products


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective; bytes are totals over all its runs."""

  kind: str
  axes: tuple  # names of the mesh axes over which it runs
  is_async: bool
  runs: float
  payload_bytes: float
  wire_bytes: float
  op: str


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One Pallas kernel; FLOPs are the total over all its runs."""

  name: str
  kind: str  # "splash fwd", "splash dq", "splash dkv", "splash dkv+dq", "other"
  runs: float
  flops: float
  shape: tuple  # of splash: heads, queries, keys, "head size of keys/of values"


@dataclasses.dataclass
class Census:
  """All of one device, in one execution."""

  dense_flops: float = 0.0
  kernel_flops: float = 0.0
  hbm_bytes: float = 0.0
  host_bytes: float = 0.0
  collectives: list = dataclasses.field(default_factory=list)
  kernels: list = dataclasses.field(default_factory=list)
  loops: list = dataclasses.field(default_factory=list)  # (name, turns)
  products: list = dataclasses.field(default_factory=list)  # (FLOPs, runs, shape, op), largest first
  unknown: list = dataclasses.field(default_factory=list)  # lines: what could not be counted

  @property
  def flops(self):
    return self.dense_flops + self.kernel_flops

  def add(self, other):
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def count(text, mesh_shape, tiles_run=lambda queries, keys: 1.0):
  """Counts what one execution of a module does on a device -> Census.

  text: of the optimized module, compiled.as_text(). mesh_shape: {axis: size} of the mesh that it was compiled
  for, in the order of its devices. tiles_run(queries, keys): share of the tiles that a splash kernel with
  these padded lengths runs, as other tiles of a packed row have no segment in common.
  """
  module = hlo.parse(text)
  if math.prod(mesh_shape.values()) != module.devices:
    raise ValueError(f"a mesh of {mesh_shape} is not one of the {module.devices} devices of the module")
  census = _Counter(module, mesh_shape, tiles_run).run(module.entry)
  census.products.sort(key=lambda product: -product[0])
  census.unknown = list(dict.fromkeys(census.unknown))
  return census


@dataclasses.dataclass(frozen=True)
class _Counter:
  module: hlo.Module
  mesh_shape: dict
  tiles_run: object

  def run(self, name, runs=1, fused=False, in_async=False, going_on=False):
    """Counts `runs` executions of a computation -> Census.

    fused: it is the inside of a fusion, whose memory traffic is that of the fusion. going_on: its collectives
    were started, and counted, before.
    """
    census = Census()
    computation = self.module.computations[name]
    for ins in computation.values():
      if ins.op == "while":
        self.loop(census, computation, ins, runs)
      elif ins.op == "conditional":
        names = self.module.branches(ins)
        branches = [self.run(branch, runs, fused, in_async, going_on) for branch in names]
        census.add(max(branches, key=lambda branch: branch.flops))
      elif ins.op in ("dot", "convolution"):
        flops = runs * hlo.product_flops(ins, computation)
        census.dense_flops += flops
        census.products.append((flops, runs, str(ins.shape), _tail(ins)))
      elif ins.op.removesuffix("-start") in COLLECTIVES and not going_on:
        self.collective(census, computation, ins, runs, "all-reduce-scatter" in name, in_async)
      if ins.op == "custom-call" or ins.op == "async-start" and PALLAS in ins.attributes:
        self.custom_call(census, computation, ins, runs)
      if not fused and ins.op not in FREE and not ins.op.endswith("-done"):
        hbm, host = traffic(self.module, computation, ins)
        census.hbm_bytes += runs * hbm
        census.host_bytes += runs * host
      if ins.op in ("fusion", "call", "async-start", "call-start", "custom-call"):
        overlaps = in_async or ins.op in ("async-start", "call-start")
        for called, _ in self.module.called(ins, "calls", "to_apply"):
          label = (called + ins.name).lower()
          census.add(
            self.run(
              called,
              runs,
              fused or ins.op not in ("call", "custom-call"),
              overlaps or "async" in label and "collective" in label,
              going_on or CARRIED.search(f"{ins.name} {called}") is not None,
            )
          )
    return census

  def loop(self, census, computation, ins, runs):
    turns = hlo.trip_count(self.module, computation, ins)
    if turns is None:
      census.unknown.append(f"how often the loop {ins.name} runs; counted once: {_tail(ins)}")
    census.loops.append((ins.name, 1 if turns is None else turns))
    census.add(self.run(ins.attribute("body"), runs * (1 if turns is None else turns)))

  def collective(self, census, computation, ins, runs, scatters, in_async):
    kind, is_start = ins.op.removesuffix("-start"), ins.op.endswith("-start")
    try:
      groups = hlo.groups(ins, self.module.devices)
    except ValueError as error:
      census.unknown.append(f"the devices of {ins.name}, counted as all: {error}")
      groups = np.arange(self.module.devices)[None]
    n = groups.shape[1]
    payload = sum(hlo.num_bytes(computation[name].shape) for name in ins.operands)
    if kind == "all-gather":
      payload = payload * n if is_start else hlo.num_bytes(ins.shape)
    if kind == "all-reduce" and scatters:
      kind = "reduce-scatter"
    ring = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
    wire = payload * ring.get(kind, (n - 1) / n)
    axes = axes_of(groups, self.mesh_shape)
    census.collectives.append(
      Collective(kind, axes, in_async or is_start, runs, runs * payload, runs * wire, _tail(ins))
    )

  def custom_call(self, census, computation, ins, runs):
    target = re.search(r'custom_call_target="([^"]*)"', ins.attributes)
    target = target[1] if target else ""
    if PALLAS not in (target or ins.attributes):
      if LIBRARY.search(target):
        census.unknown.append(f"FLOPs of the custom call {target} {ins.name}")
      return
    kind, flops, shape = "other", None, ()
    if splash := splash_work(ins, computation):
      kind, flops, shape = splash
      flops *= self.tiles_run(shape[1], shape[2])
    elif estimate := re.search(r'cost_estimate"?[^}]*?"?flops"?\s*:\s*"?(\d+)', ins.attributes):
      flops = float(estimate[1])
    if flops is None:
      shapes = ", ".join(str(array) for name in ins.operands for array in hlo.arrays(computation[name].shape))
      census.unknown.append(f"FLOPs of the Pallas kernel {ins.name} ({shapes})")
    total = runs * (flops or 0.0)
    census.kernels.append(Kernel(ins.name, kind, runs, total, shape))
    census.kernel_flops += total


def _tail(ins, most=100):
  return ins.source[-most:]


def axes_of(groups, mesh_shape):
  """Names of the mesh axes along which the devices of a group differ; groups [n, members] of hlo.groups."""
  along = np.unravel_index(groups, tuple(mesh_shape.values()))
  return tuple(name for name, at in zip(mesh_shape, along) if (at != at[:, :1]).any())


def splash_work(ins, computation):
  """Work of a splash kernel if all its tiles run -> (kind, FLOPs, shape as in Kernel); None of other kernels.

  Heads of keys and values may have other sizes. Products of jax's kernels, K the
  size of keys and V of values: forward K + V; dq makes scores (K), dP (V) and dq (K); dkv scores, dP, dk (K)
  and dv (V); dkv fused with dq one more (K).
  """
  match = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{ins.name} {ins.source}")
  if not match:
    return None
  operands = [array for name in ins.operands for array in hlo.arrays(computation[name].shape)]
  floats = [x.dims for x in operands if x.dtype in ("bf16", "f16", "f32") and len(x.dims) > 1]
  if len(floats) < 3:
    return None
  query, key, value = floats[:3]
  K, V, kind = query[-1], value[-1], match[1]
  gradients = [array for array in hlo.arrays(ins.shape) if len(array.dims) > 2]  # others are scratch
  if kind == "dkv" and len(gradients) > 2:
    kind = "dkv+dq"
  width = {"fwd": K + V, "dq": 2 * K + V, "dkv": 2 * K + 2 * V, "dkv+dq": 3 * K + 2 * V}[kind]
  heads, queries, keys = math.prod(query[:-2]), query[-2], key[-2]
  return f"splash {kind}", 2 * heads * queries * keys * width, (heads, queries, keys, f"{K}/{V}")


# -- memory traffic ------------------------------------------------------------------------------------------


def traffic(module, computation, ins):
  """(bytes read and written in HBM, bytes to or from the host) of one run of an instruction."""
  operands = [computation[name].shape for name in ins.operands]

  def hbm(*shapes):
    return sum(hlo.num_bytes(shape, hlo.DEVICE_MEMORY) for shape in shapes)

  def at_host(*shapes):
    return any(array.space == hlo.HOST_MEMORY for shape in shapes for array in hlo.arrays(shape))

  if ins.op in ("dynamic-slice-start", "dynamic-update-slice-start"):
    moved = hlo.num_bytes(operands[1] if "update" in ins.op else ins.shape[1])
    host = at_host(ins.shape)
    return (1 if host else 2) * moved, moved if host else 0
  if ins.op in ("copy-start", "copy"):
    target = ins.shape[0] if ins.op == "copy-start" else ins.shape
    return hbm(operands[0], target), hlo.num_bytes(operands[0]) if at_host(operands[0], target) else 0
  if ins.op == "fusion" and module.called(ins, "calls"):
    reads, update = _fusion_traffic(module.called(ins, "calls")[0][1])
    read = sum(min(hbm(shape), reads.get(k, math.inf)) for k, shape in enumerate(operands))
    return read + min(hbm(ins.shape), update), 0
  if ins.op in SLICES:
    return 2 * hbm(ins.shape), 0
  if ins.op == "dynamic-update-slice":
    return 2 * min(hbm(ins.shape), hlo.num_bytes(operands[1])), 0
  return hbm(*operands, *([] if ins.op.endswith("-start") else [ins.shape])), 0


def _fusion_traffic(computation):
  """({parameter: bytes that are read of it, where only slices are}, bytes of an update in place or inf)."""
  users = collections.defaultdict(list)
  for ins in computation.values():
    for name in ins.operands:
      users[name].append(ins)

  def read(name):
    total = 0
    for user in users[name]:
      if user.op == "bitcast":
        total += read(user.name)
      elif user.op in SLICES and user.operands[0] == name:
        total += hlo.num_bytes(user.shape)
      elif not (user.op == "dynamic-update-slice" and user.operands[0] == name):
        return math.inf
    return total

  reads = {int(ins.literal): read(ins.name) for ins in computation.values() if ins.op == "parameter"}
  root = computation.behind(computation.root.name)
  if root.op != "dynamic-update-slice":
    return reads, math.inf
  return reads, hlo.num_bytes(computation[root.operands[1]].shape)


# -- memory that is alive ------------------------------------------------------------------------------------


def live_peak(text, most=15):
  """Most bytes of HBM that are alive at a time -> (bytes above the arguments, [(bytes, shape, name, op)]).

  The list has the largest `most` arrays of that moment, without the arguments. Arrays are padded to tiles and
  live from the instruction that makes them to the last that reads them, in the order of the schedule. Loops,
  updates in place and outputs in donated arguments share memory. The compiler shares more, so this is an
  upper estimate of its peak_memory_in_bytes. What it allocates is above that again, by gaps.
  """
  module = hlo.parse(text)
  peak, live = _Liveness(module, module.entry, {}).peak()
  return peak, sorted(live, key=lambda row: -row[0])[:most]


class _Liveness:
  """Values of the instructions of a computation: numbers of buffers, in lists where tuples are."""

  def __init__(self, module, name, known):
    self.module, self.name, self.known = module, name, known
    self.computation = module.computations[name]
    self.rows, self.born, self.last, self.values = [], [], [], {}  # rows: (bytes, shape, name, op)

  def peak(self):
    """(bytes, rows of the buffers alive) at the worst moment; arguments count as nothing."""
    if self.name in self.known:
      return self.known[self.name]
    for time, ins in enumerate(self.computation.values()):
      self.place(time, ins)
    for buffer in _flat(self.values[self.computation.root.name]):
      self.last[buffer] = len(self.computation)
    changes = collections.defaultdict(lambda: ([], []))
    for buffer, (born, last) in enumerate(zip(self.born, self.last)):
      changes[born][0].append(buffer)
      changes[last][1].append(buffer)
    free = self.donated()
    alive, total, best = set(), 0, (-1, [])
    for time, ins in enumerate(self.computation.values()):
      alive |= set(changes[time][0]) - free
      total += sum(self.rows[buffer][0] for buffer in set(changes[time][0]) - free)
      inner, rows = self.inside(ins)
      if total + inner > best[0]:
        best = total + inner, [self.rows[buffer] for buffer in alive if self.rows[buffer][0]] + rows
      total -= sum(self.rows[buffer][0] for buffer in set(changes[time][1]) & alive)
      alive -= set(changes[time][1])
    self.known[self.name] = best
    return best

  def inside(self, ins):
    """The peak of the computation that an instruction runs, above its own arguments."""
    names = {"while": [ins.attribute("body")], "call": [ins.attribute("to_apply")]}.get(ins.op, [])
    names = self.module.branches(ins) if ins.op == "conditional" else names
    peaks = [_Liveness(self.module, name, self.known).peak() for name in names]
    return max(peaks, key=lambda peak: peak[0], default=(0, []))

  def donated(self):
    """Buffers of the outputs that lie in donated arguments."""
    if self.name != self.module.entry:
      return set()
    outputs = self.values[self.computation.root.name]
    outputs = outputs if isinstance(outputs, list) else [outputs]
    return {buffer for k in self.module.donated for buffer in _flat(outputs[k])}

  def place(self, time, ins):
    """Gives the value of an instruction its buffers, and extends the life of those that it reads."""
    for name in ins.operands:
      value = self.values[name]
      if ins.op == "get-tuple-element":
        value = value[int(ins.attribute("index"))]
      for buffer in _flat(value) if ins.op not in ("bitcast", "tuple") else ():
        self.last[buffer] = time
    self.values[ins.name] = self.value(time, ins)

  def fresh(self, time, shape, ins):
    if isinstance(shape, list):
      return [self.fresh(time, part, ins) for part in shape]
    free = shape.space != hlo.DEVICE_MEMORY or ins.op == "parameter"
    self.rows.append((0 if free else shape.padded_bytes, str(shape), ins.name, _tail(ins)))
    self.born.append(time)
    self.last.append(time)
    return len(self.rows) - 1

  def value(self, time, ins):
    operands = [self.values[name] for name in ins.operands]
    if ins.op == "get-tuple-element":
      return operands[0][int(ins.attribute("index"))]
    if ins.op == "tuple":
      return operands
    if ins.op in ("bitcast", "optimization-barrier", "while", "dynamic-update-slice"):
      return operands[0]
    if ins.op == "copy-start":  # (target, source, semaphore)
      return [self.fresh(time, ins.shape[0], ins), operands[0]]
    if ins.op.endswith("-start") and isinstance(ins.shape, list):  # (operands, results, semaphores)
      first = operands[0] if len(operands) == 1 else operands
      return [first, *self.fresh(time, ins.shape[1:], ins)]
    if ins.op.endswith("-done") and operands and isinstance(operands[0], list):
      return operands[0][0 if ins.op == "copy-done" else 1]
    value = self.fresh(time, ins.shape, ins)
    for output, operand in self.in_place(ins).items():
      if isinstance(value, list):
        value[output] = operands[operand]
      else:
        value = operands[operand]
    return value

  def in_place(self, ins):
    """{output: operand} of what a fusion updates in place, or a custom call says that it does."""
    said = re.search(r"output_to_operand_aliasing=\{(.*?)\}(?:,|$)(?! \{)", ins.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", said[1] + "}") if said else ()
    shared = {int(output or 0): int(operand) for output, operand in pairs}
    for _, inner in self.module.called(ins, "calls") if ins.op == "fusion" else ():
      outputs = inner.root.operands if inner.root.op == "tuple" else [inner.root.name]
      for output, name in enumerate(outputs):
        made = inner.behind(name)
        updates = made.op == "dynamic-update-slice"
        made = inner.behind(name, ("bitcast", "dynamic-update-slice"))
        if updates and made.op == "parameter":
          shared[output] = int(made.literal)
    return shared


def _flat(value):
  return [value] if isinstance(value, int) else [buffer for part in value for buffer in _flat(part)]
