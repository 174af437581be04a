"""Imports run one way.

The table below is the architecture; a file that imports against it fails by name and line.
"""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = ("sora_jax", "data", "launch", "configs", "tests")
BASIS = tuple(f"sora_jax.{name}" for name in ("batch", "patches", "masks", "layout", "multihost"))
STEP = (
  *BASIS,
  *(f"sora_jax.{name}" for name in ("models", "diffusion", "tasks", "timeline", "optim", "metrics", "flops")),
)

# What a module of the package may import of ours, by the longest prefix that names it. A module may always
# import its own package, `sora_jax` itself (its version) and `sora_jax.errors`.
ALLOWED = {
  "sora_jax": (),
  **{
    f"sora_jax.{name}": ()
    for name in (
      "errors",
      "files",
      "batch",
      "patches",
      "masks",
      "layout",
      "multihost",
      "diffusion",
      "safety",
      "metrics",
      "video",
    )
  },
  "sora_jax.optim": ("sora_jax.layout",),
  "sora_jax.models": BASIS,
  "sora_jax.weights": ("sora_jax.models", "sora_jax.layout"),
  "sora_jax.adapters": ("sora_jax.models", "sora_jax.weights"),
  "sora_jax.timeline": (),
  "sora_jax.tasks": (*BASIS, "sora_jax.timeline"),
  "sora_jax.train": STEP,
  "sora_jax.train_vae": STEP,
  "sora_jax.sample": STEP,
  "sora_jax.checkpoint": ("sora_jax.manifests", "sora_jax.multihost", "sora_jax.files"),
  "sora_jax.manifests": ("sora_jax.files", "sora_jax.multihost"),
  "sora_jax.parts": ("sora_jax.files", "sora_jax.models"),
  "sora_jax.workdir": tuple(
    f"sora_jax.{name}" for name in ("checkpoint", "parts", "files", "models", "layout")
  ),
  "sora_jax.codec": ("sora_jax.models",),
  "sora_jax.embedder": tuple(
    f"sora_jax.{name}" for name in ("workdir", "parts", "models", "layout", "multihost")
  ),
  "sora_jax.pipeline": (
    *STEP,
    *(f"sora_jax.{name}" for name in ("workdir", "adapters", "codec", "embedder", "sample", "video")),
  ),
  "sora_jax.convert": tuple(
    f"sora_jax.{name}"
    for name in ("workdir", "adapters", "parts", "files", "weights", "models", "patches", "tasks")
  ),
  "data": (*BASIS, "sora_jax.video", "sora_jax.files"),
  # the programs; configs by path only
  "launch": ("data", "sora_jax", "launch.common", "launch.jobs", "launch.reports"),
  "launch.common": ("data", "sora_jax"),
  "launch.reports": ("data", "sora_jax", "launch.common"),
  "launch.jobs": ("data", "sora_jax", "launch.common", "launch.reports"),
  "launch.common.processes": (),
  "launch.preflight": ("data", "sora_jax", "launch.common", "launch.reports", "launch.packing"),
  "configs": (),
}

# What a module may import of others. Not named here: whatever setup.py declares as core.
OTHERS = {
  "sora_jax.diffusion": {"jax", "numpy"},
  "sora_jax.patches": {"jax", "numpy"},
  "sora_jax.batch": {"jax", "numpy"},
  "sora_jax.masks": {"numpy"},
  "sora_jax.timeline": {"numpy"},
  "configs": {"ml_collections", "numpy"},
}
# What a module may import at its top besides those: an extra of setup.py.
EXTRAS = {"launch.serve.app": {"starlette", "uvicorn"}}
# launch.benchmark.theirs may, inside functions, and so may weights.files, which reads pickles where torch is
NEVER = {"torch", "diffusers", "transformers", "tensorflow"}


def imports(source):
  """Python source -> [(line, dotted name, at the top level of the file)] of everything that it imports."""
  tree = ast.parse(source)
  top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
      top -= {id(node) for node in ast.walk(function)}
  imported = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      imported += [(node.lineno, alias.name, id(node) in top) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: imports are absolute here"
      # `from sora_jax import batch` imports sora_jax.batch; that `sora_jax.batch.pack` is no module does no
      # harm
      imported += [(node.lineno, f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
  return imported


def within(name, prefix):
  return name == prefix or name.startswith(prefix + ".")


def rule(table, module, default):
  """The entry of the longest prefix of `module` in the table."""
  fitting = [prefix for prefix in table if within(module, prefix)]
  return table[max(fitting, key=len)] if fitting else default


def core():
  """Import names of what setup.py installs without an extra."""
  text = (ROOT / "setup.py").read_text()
  listed = re.search(r"^CORE = \[\n(.*?)^\]", text, re.M | re.S).group(1)
  names = {name.lower().replace("-", "_") for name in re.findall(r'"([\w-]+)', listed)}
  return (names - {"orbax_checkpoint", "absl_py", "protobuf", "tensorboardx"}) | {
    "orbax",
    "absl",
    "google",
    "tensorboardX",
  }


def violations(module, source):
  """What the source of a module may not import -> list of lines to read."""
  root, *inside = module.split(".")
  own = f"{root}.{inside[0]}" if root in ("sora_jax", "launch") and inside else root
  own = module if module in ALLOWED else own  # what has an entry of its own has no package
  allowed = (*rule(ALLOWED, module, ()), own, "sora_jax.errors", "sora_jax.__version__")
  strict, extra = rule(OTHERS, module, set()), EXTRAS.get(module, ())
  wrong = []
  for line, name, top in imports(source):
    root = name.split(".")[0]
    if root in OURS:
      if name == "sora_jax" or any(within(name, prefix) for prefix in allowed):
        continue
      wrong.append(
        f"{module}:{line} imports {name}; allowed: {', '.join(rule(ALLOWED, module, ())) or 'none of ours'}"
      )
    elif root in sys.stdlib_module_names or root in extra:
      continue
    elif root in NEVER:
      if top or not module.startswith(("launch.benchmark.", "sora_jax.weights.files")):
        wrong.append(
          f"{module}:{line} imports {root}, which only tests/oracle may, and launch.benchmark.theirs and "
          "sora_jax.weights.files inside functions"
        )
    # an extra: inside functions
    elif strict and root not in strict or not strict and top and root not in core():
      wrong.append(f"{module}:{line} imports {root}, which is not among {sorted(strict or core())}")
  return wrong


def modules():
  """All our library files -> [(dotted name, path)]."""
  listed = []
  for top in OURS[:-1]:
    for path in sorted((ROOT / top).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      listed.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
  return listed


def test_imports_run_one_way():
  listed = modules()
  assert len(listed) > 10, "the walk finds the library"
  wrong = [line for module, path in listed for line in violations(module, path.read_text())]
  assert not wrong, "\n" + "\n".join(wrong)


def circles(sources):
  """{module: source} -> one circle of imports, as a list of modules, or [].

  Imports inside functions count, too.
  """
  edges = {}
  for module, source in sources.items():
    names = (name for _, name, _ in imports(source))
    targets = (name if name in sources else name.rpartition(".")[0] for name in names)
    edges[module] = {target for target in targets if target in sources and target != module}
  done = set()

  def walk(module, path):
    if module in path:
      return path[path.index(module) :] + [module]
    if module in done:
      return []
    circle = next(
      (circle for circle in (walk(target, [*path, module]) for target in sorted(edges[module])) if circle), []
    )
    done.add(module)
    return circle

  return next((circle for circle in (walk(module, []) for module in sorted(edges)) if circle), [])


def test_no_circles():
  assert not circles({module: path.read_text() for module, path in modules()})
  chain = {"a": "import b", "b": "def late():\n  from c import x", "c": "from d import y", "d": ""}
  assert circles(chain) == [] and circles(chain | {"d": "from b import z"}) == ["b", "c", "d", "b"]


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("sora_jax.models.dit", "from sora_jax.train import loss"),
    ("sora_jax.models.dit", "from data import plan"),
    ("sora_jax.diffusion.flow", "from sora_jax import batch"),
    ("sora_jax.diffusion.flow", "import flax"),
    ("sora_jax.video", "import sora_jax.metrics"),
    ("sora_jax.weights.wan", "from sora_jax.train import State"),
    ("sora_jax.pipeline", "from launch.common import progress"),
    ("sora_jax.workdir", "from sora_jax import pipeline"),
    ("sora_jax.convert.importing", "from sora_jax.pipeline import Pipeline"),
    ("launch.common.loop", "from launch.jobs import sample"),
    ("launch.common.loop", "from launch import train"),
    ("launch.common.processes", "from launch.common import program"),
    ("launch.common.processes", "from sora_jax import train"),
    ("launch.reports.page", "from launch.jobs import encode"),
    ("launch.jobs.sample", "from launch.train import main"),
    ("launch.train", "from launch import sample"),
    ("launch.train", "from launch.benchmark import rows"),
    ("data.loader", "import sora_jax.train"),
    ("data.loader", "def late():\n  from sora_jax.models import vae"),
    ("launch.train", "from configs import t2v"),
    ("configs.t2v", "import jax"),
    ("configs.t2v", "from sora_jax import layout"),
    ("sora_jax.models.text", "import torch"),
    ("launch.benchmark.theirs", "import torch"),
    ("launch.jobs.sample", "def late():\n  import torch"),
    ("launch.serve.app", "import flask"),
    ("launch.serve.worker", "import starlette"),
  ],
)
def test_a_violation_is_seen(module, source):
  assert violations(module, source)


@pytest.mark.parametrize(
  ("module", "source"),
  [
    (
      "sora_jax.models.dit",
      "import jax\nfrom sora_jax.models import attention\nfrom sora_jax.patches import grid",
    ),
    ("sora_jax.train", "from sora_jax.models.dit import DiT\nfrom sora_jax import optim"),
    ("sora_jax.safety.policy", "from sora_jax.errors import BadInput\nimport json"),
    ("data.sources.shapes", "from data.clips import RawClip\nimport numpy as np"),
    (
      "launch.sample",
      "from data import records\nfrom sora_jax import sample\nimport orbax.checkpoint as ocp",
    ),
    ("launch.train", "from launch.common import loop\nfrom launch.jobs import sample"),
    (
      "launch.packing.figures",
      "from launch.packing import peers\nfrom launch.reports import page\nfrom data import plan",
    ),
    ("sora_jax.pipeline", "from sora_jax import codec, sample, workdir"),
    ("launch.benchmark.theirs", "def peer():\n  import torch"),
    ("launch.export", "def onnx():\n  import jax2onnx"),
    ("launch.serve.app", "import uvicorn\nfrom starlette.routing import Route"),
    ("configs.t2v", "import ml_collections"),
  ],
)
def test_what_is_allowed_passes(module, source):
  assert not violations(module, source)


def test_locked_versions_are_whole():
  """Every line pins one version, no package is pinned twice, and what setup.py asks for is there."""
  pins = {}
  for lock in ("requirements.lock", "requirements-oracle.lock"):
    for line in (ROOT / lock).read_text().splitlines():
      if line.startswith("#"):
        continue
      match = re.fullmatch(r"([\w.-]+)==([\w.]+)( ; .+)?", line)
      assert match, f"{lock}: {line!r} pins no exact version"
      name = match[1].lower().replace("_", "-")
      assert name not in pins, f"{name} is pinned twice"
      pins[name] = match[2]
  text = (ROOT / "setup.py").read_text()
  asked = re.search(r"^CORE = \[\n(.*?)^\]", text, re.M | re.S).group(1)
  asked += "".join(re.findall(r'"(?:test|oracle)": \[(.*?)\]', text))
  names = {name.lower().replace("_", "-") for name in re.findall(r'"([\w-]+)[><=]', asked)}
  assert len(names) > 20 and names <= set(pins), names - set(pins)
