"""Reads the text of an optimized HLO module, as `compiled.as_text()` gives it.

`parse` gives computations of instructions in the order of the schedule. The other functions answer a question
about one instruction: how many bytes its result has, how often a loop runs, which devices a collective joins,
how many FLOPs a product has. Source: openxla.org/xla/operation_semantics; what it does not say (groups by a
mesh, tiles, memory spaces) is read from texts of jax 0.10.2 and libtpu 0.0.42.1.
"""

import dataclasses
import functools
import math
import re

import numpy as np

BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}  # others say theirs: f32, s4
DEVICE_MEMORY, HOST_MEMORY = 0, 5  # S(n) of a layout; 1 is the TPU's VMEM, 2 holds semaphores
INTEGERS = ("s32", "u32", "s64", "u64")

_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_ARRAY = re.compile(r"([a-z]\w*)(?:\[([^\]]*)\])?(?:\{([^{}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
  """dtype and dims of an array; the dims from minor to major; the tile of the last of them; memory space."""

  dtype: str
  dims: tuple = ()
  minor_to_major: tuple = ()
  tile: tuple = ()
  space: int = DEVICE_MEMORY

  @property
  def itemsize(self):
    """Bytes of an item; half a byte for 4 bits."""
    digits = re.search(r"\d+", self.dtype)
    return (BITS[self.dtype] if self.dtype in BITS else int(digits[0]) if digits else 32) / 8

  @property
  def num_bytes(self):
    return self.itemsize * math.prod(self.dims)

  @property
  def padded_bytes(self):
    """Bytes that are allocated: every dim of a tile is a multiple of the tile's."""
    dims = list(self.dims)
    for dim, size in zip(self.minor_to_major, reversed(self.tile)):
      dims[dim] = -(-dims[dim] // size) * size
    return self.itemsize * math.prod(dims)

  def __str__(self):
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line. `shape` is an Array or a list of shapes; `literal` the text of a constant, the number of a
  parameter; `attributes` all that follows the operands."""

  name: str
  op: str
  shape: Array | list
  operands: tuple
  literal: str
  attributes: str
  is_root: bool

  def attribute(self, key):
    """The name or number after `key=`, or None."""
    match = re.search(rf"[ ,]{key}=%?([\w.\-]+)", self.attributes)
    return match and match[1]

  @property
  def source(self):
    """Where the program asks for it, as `jit(step)/while/body/dot_general`; "" if XLA made it."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ""


class Computation(dict):
  """{name: Instruction}, in the order of the schedule."""

  @property
  def root(self):
    return next(ins for ins in self.values() if ins.is_root)

  def behind(self, name, ops=("bitcast",)):
    """The instruction of this name, or the one behind it, past operations that only pass their operand on."""
    ins = self[name]
    while ins.op in ops:
      ins = self[ins.operands[0]]
    return ins


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name, the name of the first to run, number of devices, outputs that lie in arguments."""

  computations: dict
  entry: str
  devices: int
  donated: tuple  # indices of outputs; () stands for the only output too

  def called(self, ins, *keys):
    """The computations that an instruction names under these keys: [(name, Computation)]."""
    names = [ins.attribute(key) for key in keys]
    return [(name, self.computations[name]) for name in names if name]

  def branches(self, ins):
    """Names of the computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", ins.attributes)
    if listed:
      return re.findall(r"%?([\w.\-]+)", listed[1])
    return [ins.attribute("true_computation"), ins.attribute("false_computation")]


def parse(text):
  """Text of a module -> Module."""
  computations, entry, current, pending = {}, None, None, []

  def finish():
    if pending:
      ins = _instruction(re.sub(r"/\*.*?\*/", "", " ".join(pending)))
      current[ins.name] = ins
      pending.clear()

  for line in text.split("\n"):
    if current is None:
      header = not line.startswith("HloModule") and _HEADER.match(line)
      if header:
        current = computations[header[2]] = Computation()
        entry = header[2] if header[1] else entry
    elif line == "}" or line.startswith("}, "):  # its thread may follow
      finish()
      current = None
    elif _START.match(line):
      finish()
      pending.append(line)
    elif pending:  # some attributes are longer than a line
      pending.append(line)
  head = text.split("\n", 1)[0]
  counts = [re.search(rf"{key}=(\d+)", head) for key in ("num_partitions", "replica_count")]
  donated = re.findall(r"\{(\d*)\}: \(\d+, \{\}, (?:may|must)-alias\)", head)
  devices = math.prod(int(count[1]) for count in counts if count)
  return Module(computations, entry, devices, tuple(int(index or 0) for index in donated))


def _instruction(line):
  start = _START.match(line)
  shape, i = _shape(line, start.end())
  first = line.index("(", i)
  last = _closing(line, first)
  op, inner = line[i:first].strip(), line[first + 1 : last]
  plain = op in ("constant", "parameter")
  operands = () if plain else tuple(re.findall(r"%([\w.\-]+)", inner))
  return Instruction(start[2], op, shape, operands, inner if plain else "", line[last + 1 :], bool(start[1]))


def _closing(text, i):
  """Index of the bracket that closes the one at i."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, i):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  raise ValueError(f"a bracket is not closed: {text[i : i + 80]}")


def _shape(text, i):
  """-> (shape that begins at or after i, index after it)."""
  while text[i] in " ,":
    i += 1
  if text[i] != "(":
    match = _ARRAY.match(text, i)
    return _array(*match.groups()), match.end()
  shapes, i = [], i + 1
  while text[i] != ")":
    shape, i = _shape(text, i)
    shapes.append(shape)
  return shapes, i + 1


@functools.lru_cache(None)
def _array(dtype, dims, layout):
  order, _, rest = (layout or "").partition(":")
  tile, space = re.search(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
  sizes = tuple(int(size.lstrip(" <=")) for size in (dims or "").split(",") if size)
  return Array(dtype, sizes, _ints(order), _ints(tile[1]) if tile else (), int(space[1]) if space else 0)


def _ints(text):
  return tuple(int(number) for number in text.split(",") if number.strip())


def arrays(shape):
  """The arrays of a shape, tuples flattened."""
  return [shape] if isinstance(shape, Array) else [array for part in shape for array in arrays(part)]


def num_bytes(shape, space=None):
  """Bytes of a shape without padding; of the arrays in one memory space, if given."""
  return sum(array.num_bytes for array in arrays(shape) if space in (None, array.space))


# -- loops ---------------------------------------------------------------------------------------------------


def trip_count(module, computation, loop):
  """How often the body of a `while` in this computation runs; None if the text does not say.

  XLA says it for CPUs (known_trip_count). Otherwise the condition has to be `counter < constant`, with steps
  of 1, which is what scans are; a start that is not a constant is taken to be 0.
  """
  known = re.search(r"known_trip_count\D*(\d+)", loop.attributes)
  if known:
    return int(known[1])
  condition = module.computations[loop.attribute("condition")]
  test, operands = condition.root, condition.root.operands
  if test.op == "fusion":
    ((_, inner),) = module.called(test, "calls")
    test = inner.root
    sides = [inner.behind(name, ("bitcast", "copy")) for name in test.operands]
    operands = [operands[int(side.literal)] if side.op == "parameter" else side for side in sides]
  sides = [condition.behind(x, ("bitcast", "copy")) if isinstance(x, str) else x for x in operands]
  if test.op != "compare" or "direction=LT" not in test.attributes:
    return None
  counter, limit = sides
  if counter.op != "get-tuple-element" or limit.op != "constant":
    return None
  return max(0, int(limit.literal) - _start(computation, loop, int(counter.attribute("index"))))


def _start(computation, loop, index):
  """The value of an item of the loop's state before its first turn, or 0 if it is not a constant."""
  state = computation[loop.operands[0]]
  if state.op != "tuple":
    return 0
  first = computation.behind(state.operands[index], ("bitcast", "copy"))
  return int(first.literal) if first.op == "constant" and first.shape.dtype in INTEGERS else 0


# -- collectives ---------------------------------------------------------------------------------------------


def groups(ins, devices):
  """Devices that a collective joins, [groups, members]; [pairs, 2] of a permutation.

  They are numbers in the order of the mesh. Four notations: pairs, lists, iota, and a mesh that XLA made for
  this instruction; none of them means all devices. ValueError for another.
  """
  text = ins.attributes
  if explicit := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", text):
    return np.array([_ints(group) for group in re.findall(r"\{([\d,]*)\}", explicit[1])])
  if match := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
    return _iota(match[2]).reshape(_ints(match[1][1:-1]))
  own = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\]?(?:T\([\d,]+\))?)\))? ?\{([^}]*)\}"
  if match := re.search(own, text):
    return _mesh_groups(*match.groups())
  if "replica_groups=" in text and "replica_groups={}" not in text:
    raise ValueError(f"unknown notation of replica_groups: {text[:200]}")
  return np.arange(devices)[None]


def _iota(text):
  """ "[2,4]T(1,0)" -> the numbers 0..7 as [2, 4], transposed, flat."""
  dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  dims = _ints(dims)
  return np.arange(math.prod(dims)).reshape(dims).transpose(_ints(order) if order else None).ravel()


def _mesh_groups(mesh, ids, over):
  """The groups of a mesh that XLA made for one instruction -> [groups, members].

  mesh: "'a'=2,'b'=4". ids: its devices, as "[4,2]T(1,0)", "0,1,..." or None. over: the axes that are joined,
  as "'a','b'"; "'b':(2)4" is a part of b, as if b were of [2, 4, rest].
  """
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  parts = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)}
  dims, joined = [], []
  for name, size in sizes.items():
    if name not in parts:
      dims.append(size)
      continue
    before, part = (int(number or default) for number, default in zip(parts[name], (1, size)))
    joined.append(len(dims) + 1)
    dims += [before, part, size // (before * part)]
  if ids is None:
    numbers = np.arange(math.prod(dims))
  else:
    numbers = _iota(ids) if ids.startswith("[") else np.array(_ints(ids))
  last = range(-len(joined), 0)
  members = math.prod(dims[dim] for dim in joined)
  return np.moveaxis(numbers.reshape(dims), joined, last).reshape(-1, members)


# -- products ------------------------------------------------------------------------------------------------


def product_flops(ins, computation):
  """FLOPs of a `dot` or `convolution`, 2 for each multiplication that is not with padding."""
  left, right = (computation[name].shape.dims for name in ins.operands[:2])
  if ins.op == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", ins.attributes)
    return (
      2 * math.prod(ins.shape.dims) * math.prod(left[i] for i in _ints(contracted[1] if contracted else ""))
    )
  return _convolution_flops(left, right, ins.shape.dims, ins.attributes)


def _convolution_flops(left, right, out, attributes):
  """The TPU compiler writes products of matrices as convolutions with wide padding (window size=40
  pad=39_39).

  So the positions of the window count only where they meet an item of the input: neither padding nor the gaps
  of a dilated input.
  """
  of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
  window = re.search(r"window=\{([^}]*)\}", attributes)
  window = dict(item.split("=") for item in window[1].split()) if window else {}
  flops = 2 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
  for k, label in enumerate(sorted(label for label in of_left if label.isdigit())):

    def setting(name, default):
      return window[name].split("x")[k] if name in window else default

    strides = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    pad = int(setting("pad", "0_0").split("_")[0])
    sizes = (
      dims[labels.index(label)] for dims, labels in zip((left, right, out), (of_left, of_right, of_out))
    )
    flops *= _valid_positions(*sizes, pad, *strides)
  return flops


@functools.lru_cache(None)
def _valid_positions(items, window, outputs, pad, stride, dilation, window_dilation):
  """Pairs of an output and a position of the window that meet an item, along one spatial dim."""
  starts = np.arange(outputs) * stride - pad
  count = 0
  for k in range(window):
    at = starts + k * window_dilation
    count += np.count_nonzero((at >= 0) & (at <= (items - 1) * dilation) & (at % dilation == 0))
  return int(count)
