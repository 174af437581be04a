"""Preflight of the step: what is compiled is what trains, what is said of it follows from the census."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import t2v
from launch.preflight import compiled, estimate, programs, report, search
from sora_jax import chips, embedder, flops, layout, train, workdir as workdirs
from sora_jax.errors import BadInput
from sora_jax.models import text

GIB = 2**30


def small(**values):
  """The page `tiny` with embeddings in the records, and other values."""
  config = t2v.get_config("tiny")
  config.model.text, config.data.rows, config.data.row_tokens = "", 4, 256
  config.mesh.fsdp, config.mesh.context = 2, 2
  return search.changed(config, **values)


def program_of(config):
  mesh = layout.Layout(workdirs.make_layout(config, jax.devices()).mesh)
  model = workdirs.make_model(config, None, mesh)
  row = programs.Row(np.array([100, 90, 40]), np.array([5, 9, 4]))
  return programs.training(config, model, mesh, row)


@pytest.fixture(scope="module")
def found():
  """The step of `small`, compiled for 8 CPUs, as if they were chips of v5e."""
  program = program_of(small())
  executable = program.lower().compile()
  counted = compiled.census.count(executable.as_text(), dict(program.layout.mesh.shape), program.tiles_run)
  live = [(3 * GIB, "f32[8,8]", "fusion.1", "op")]
  return compiled.Compiled(program, chips.CHIPS["v5e"], 5 * GIB, GIB, 4 * GIB, 0.0, counted, live, 1.0, 2.0)


def test_the_step_that_trains_is_the_step_that_is_checked(found, monkeypatch):
  """launch.train's own jit_step is lowered, with its State and batch; model FLOPs are those of its clips."""
  seen, real = [], train.jit_step

  def jit_step(*args, **kwargs):
    seen.append(kwargs)
    return real(*args, **kwargs)

  monkeypatch.setattr(train, "jit_step", jit_step)
  config = small(micro_steps=2, ema_decay=0.0)
  program_of(config).lower()
  assert seen == [{"ema_decay": 0.0, "sigma": seen[0]["sigma"], "spike": config.spike, "micro_steps": 2}]
  row = found.program.facts
  assert (row["rows"], row["row_tokens"], row["row_clips"]) == (4, 256, 3) and found.program.tokens == 4 * 230
  cfg = workdirs.make_model(small(), None, None).dit
  wanted = 4 * flops.step(cfg, np.array([100, 90, 40]), np.array([5, 9, 4]))
  assert found.program.model_flops == pytest.approx(float(wanted))
  assert found.model_flops == pytest.approx(float(wanted) / 8)
  assert any(one.axes == ("fsdp", "context") for one in found.census.collectives)


def test_a_text_encoder(monkeypatch):
  """What embeds prompts in a sampling job is compiled, with its weights cut over the mesh of that job."""
  tiny = text.TextConfig(vocab=40, width=64, depth=1, heads=4, head_size=8, mlp=64)
  monkeypatch.setitem(text.SIZES, "umt5-xxl", tiny)
  program = programs.embedding(small(), jax.devices(), "umt5-xxl")
  lowered = program.lower()
  assert program.layout.mesh.size == jax.device_count() and program.tokens == 8 * 512
  assert lowered.out_info.shape == (8, 512, 64)
  weights = jax.tree.leaves(embedder.targets(tiny, program.layout))
  assert program.facts["parameters"] == sum(leaf.size for leaf in weights)
  assert all(not leaf.sharding.is_fully_replicated for leaf in weights if leaf.ndim > 1 and leaf.size > 1024)


@pytest.mark.parametrize("sampler", ["unipc", "renoise"])
def test_a_step_of_sampling(sampler):
  """The step of a sampling job is lowered with its own arguments; guidance doubles its work."""
  config = small()
  config.sample.sampler = sampler
  mesh = workdirs.sampling_layout(config, devices=jax.devices())
  model = workdirs.make_model(config, None, mesh)
  program, alone = (programs.sampling(config, model, 2, guided) for guided in (True, False))
  assert program.model_flops == 2 * alone.model_flops > 0
  assert program.lower().out_info[0].shape == (2, program.tokens // 2, model.dit.values_in)


def test_tiles_that_run():
  """The share of tiles of attention in which a clip meets itself: of two equal clips a half."""
  row = programs.Row(np.array([1024, 1024]), np.array([128, 128]))
  assert row.tiles_run(2048, 256)(2048, 2048) == 0.5
  assert row.tiles_run(2048, 256)(2048, 256) == 0.5
  assert programs.Row(np.array([2048]), np.array([256])).tiles_run(2048, 256)(2048, 2048) == 1.0


def test_what_is_said_of_a_step(found):
  numbers = report.facts(found, "v5e:2x4")
  json.dumps(numbers)
  lines = "\n".join(report.lines(numbers))
  assert (
    "fsdp=2" in lines and "context=2" in lines and "5.0 of 15.75 GiB a device: fits, 68% to spare" in lines
  )
  assert f"so {found.ratio:.3f} times" in lines and "limits the step" in lines
  picture = report.picture(numbers)
  assert "a device has 15.75 GiB" in picture and "f32[8,8]" in picture and picture.count("<rect") == 7
  full = dataclasses.replace(found, assigned=20 * GIB, error="RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm")
  lines = "\n".join(report.lines(report.facts(full, "v5e:2x4")))
  assert "DOES NOT FIT" in lines and "RESOURCE_EXHAUSTED" in lines and not full.fits


def test_a_program_that_is_refused_for_another_reason(found):
  """Such as the vector memory of a kernel: no number of GiB is made up, and the JSON is JSON."""
  other = dataclasses.replace(found, assigned=float("inf"), error="RESOURCE_EXHAUSTED: E1001: VmemOom")
  numbers = report.facts(other, "v5e:2x4")
  assert "Infinity" not in json.dumps(numbers) and report.gib(numbers) == "?" and not other.fits
  assert "VmemOom" in list(report.lines(numbers))[-1]


def test_a_program_that_is_refused():
  """The compiler's own words become the memory that it wanted; another failure is not swallowed."""

  class Lowered:
    def __init__(self, message):
      self.message = message

    def compile(self, compiler_options):
      del compiler_options
      raise RuntimeError(self.message)

  def check(message):
    program = dataclasses.replace(program_of(small()), lower=lambda: Lowered(message))
    return compiled.compile_program(program)

  refused = check("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded")
  assert refused.assigned == 20.5 * GIB and refused.error
  with pytest.raises(RuntimeError, match="INTERNAL"):
    check("INTERNAL: broken")


def test_times_of_published_steps():
  """The estimate is within 15 % of the published times, and says what limits a step."""
  rows = estimate.residuals(chips.CHIPS)
  assert len(rows) == 3
  for _, real, guess in rows:
    assert abs(guess / real - 1) < 0.15
  chip = chips.CHIPS["v5p"]
  assert estimate.times("v5p", chip, "v5p:2x2x1", 1e12, 1e9, 1e12).limit == "network"
  assert estimate.times("v5p", chip, "v5p:2x2x1", 1e15, 1e9, 0.0).limit == "compute"
  apart, beside = (estimate.times("v5p", chip, "v5p:2x2x1", 1e15, 0.0, 1e11, over) for over in (0.0, 1e11))
  assert beside.estimate < apart.estimate
  assert [estimate.live_links(name) for name in ("v5p:2x2x1", "v5p:4x4x4", "v5e:16x16")] == [2, 6, 4]


def test_settings_that_need_less():
  """Each changes the page, leaves the original alone, and is a flag that a user can type."""
  config = small(model__remat="dots")
  tries = search.tries(config, workdirs.make_layout(config, jax.devices()))
  assert {"--config.model.remat=full", "--config.model.scans=4"} <= tries.keys()
  assert "--config.ema_decay=0" in tries
  for words, values in tries.items():
    other = search.changed(config, **values)
    assert other.to_json() != config.to_json() and words.startswith("--config.")
  meshes = list(search.meshes(config, workdirs.make_layout(config, jax.devices())))
  assert (2, 4) in meshes and (4, 2) in meshes and all(fsdp * context <= 8 for fsdp, context in meshes)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"data__rows": 3}, "config.data.rows=3: a multiple of 2, as data=2"),
    ({"data__rows": 6}, "config.data.rows=6: a multiple of 4 .data=2 x fsdp=2 share the rows., or 2"),
    ({"micro_steps": 3}, "config.data.rows is 4; it must be a multiple of config.micro_steps=3"),
    ({"data__row_tokens": 255}, "row_tokens is 255; a multiple of 2: context=2 share a row"),
    ({"mesh__fsdp": 3}, "config.mesh: .*does not fit 8 devices"),
  ],
)
def test_a_mesh_that_cannot_serve_the_rows(values, words):
  """One line that names the axis and the sizes, before anything compiles."""
  with pytest.raises(BadInput, match=words):
    program_of(small(**values))


def test_bad_input(run_program):
  """One line and exit code 2: no topology, no compiler, no records."""
  for flags, words in (
    ((), "no --topology; name the slice, as --topology=v5p:4x4x4, or give --data-only"),
    (("--data-only",), "no --config.data.path"),
    (("--topology=v5p:4x4x4",), "pip install '.[tpu]'"),
  ):
    done = run_program("preflight", "--config=configs/t2v.py:tiny", *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
