"""Every variant of every page in configs/ opens and gives a model and a training state, by shapes alone."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest

import launch.train
from launch.common.settings import check_rows, make_optimizer, make_sigma
from sora_jax import batch as batches, layout, optim, train, train_vae, workdir as workdirs
from sora_jax.diffusion import samplers
from sora_jax.errors import BadInput, pick
from sora_jax.models import dit, vae


def open_page(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  page = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(page)
  return page


FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
PAGES = {path.stem: open_page(path) for path in sorted(FOLDER.glob("*.py"))}
VARIANTS = [(name, variant) for name, page in PAGES.items() for variant in page.VARIANTS]
IMPORTED = dit.SIZES["wan-1.3b"]
SAMPLE = {
  "size": [480, 832],
  "frames": 81,
  "fps": 16.0,
  "steps": 50,
  "sampler": "unipc",
  "shift": 5.0,
  "guidance": 6.0,
}


def test_weights_with_another_text_encoder():
  """--config.init with a text encoder of another size: its DiT, and a new encoder, as the seed gives it."""
  config = PAGES["t2v"].get_config("world")
  config.init, config.model.size = (
    str(workdirs.shipped()),
    workdirs.read_config(workdirs.shipped()).model.size,
  )
  theirs = workdirs.read_config(config.init).model.text
  config.model.text = next(name for name in ("small", "tiny") if name != theirs)
  place = layout.Layout(layout.make_mesh(fsdp=2, devices=jax.devices()[:2]))
  model = workdirs.make_model(config, workdirs.shipped() / "text", place)
  weights, _ = launch.train.other_text_encoder(config, model, workdirs.targets(model))
  stored, _ = workdirs.load_weights(config.init)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(weights["dit"]), jax.device_get(stored["dit"]))
  fresh = layout.unbox(jax.jit(model.init)(jax.random.key(config.seed)))["text"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(weights["text"]), jax.device_get(fresh))


def flat(config, prefix=""):
  """Nested config -> {"a.b": value}."""
  out = {}
  for name, value in config.items():
    out |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
  return out


def layout_of(config):
  """config.mesh on as many of the 8 devices as it needs."""
  axes = config.mesh.to_dict()
  return layout.Layout(layout.make_mesh(data=1, **axes, devices=jax.devices()[: math.prod(axes.values())]))


def t2v_state(config, workdir):
  """What launch.train builds before its first step -> state of shapes."""
  if config.model.size == "init":
    config.init = str(workdir)
    fields = {"model": {"dit": dataclasses.asdict(IMPORTED)}, "sample": SAMPLE}
    (workdir / "config.json").write_text(json.dumps(fields))
  workdirs.adopt(config)
  model = workdirs.trained_part(
    config, workdirs.make_model(config, workdirs.shipped() / "text", layout_of(config))
  )
  make_sigma(config)
  batches.RowShape(config.data.row_tokens, config.data.row_clips, config.data.row_text)
  assert config.sample.sampler in samplers.SAMPLERS
  return train.abstract_state(model, make_optimizer(config, train.boxed_weights(model)))


def vae_state(config, workdir):
  """What launch.train_vae builds before its first step -> state of shapes."""
  del workdir
  cfg = pick(vae.SIZES, config.model, "config.model")
  vae.check_size((1, config.data.frames, *config.data.crop, 3), cfg, first=True)
  tx = make_optimizer(config, train_vae.boxed_weights(cfg))
  return train_vae.abstract_state(cfg, tx, train_vae.loss_config(config), layout_of(config))


STATES = {"t2v": t2v_state, "pod": t2v_state, "vae": vae_state}


def on_few(config):
  """The page with a mesh of at most 8 devices: each axis of more than two becomes two."""
  for name, size in config.mesh.items():
    config.mesh[name] = min(size, 2)
  return config


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_resolves(name, variant, tmp_path):
  """Shapes of all weights and of the optimiser's state, placed by the page's mesh. No value is left None."""
  config = on_few(PAGES[name].get_config(variant))
  state = STATES[name](config, tmp_path)
  assert None not in flat(config).values()
  assert workdirs.make_layout(config).mesh.shape["fsdp"] == config.mesh.fsdp
  largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
  moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.shape == largest.shape]
  assert moments
  for leaf in (largest, *moments):
    ways = config.mesh.fsdp * config.mesh.context
    assert math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size // ways


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_value_that_is_wrong_does_not_resolve(name, variant, tmp_path):
  """What the test above calls reads the page: a setting that no dataclass knows is bad input."""
  config = on_few(PAGES[name].get_config(variant))
  with config.unlocked():
    config.optim.beta = 0.5
  with pytest.raises(BadInput, match="config.optim.*beta"):
    STATES[name](config, tmp_path)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_has_the_keys_of_the_neutral_page(name, variant):
  """No variant adds a key or loses one, and `optim` has every field of OptimConfig but `steps`."""
  config = PAGES[name].get_config(variant)
  assert flat(config).keys() == flat(PAGES[name].neutral()).keys()
  assert set(config.optim) == {field.name for field in dataclasses.fields(optim.OptimConfig)} - {"steps"}


@pytest.mark.parametrize(
  ("name", "variant"), [pair for pair in VARIANTS if pair[0] == "pod" or pair[1] in ("base", "finetune")]
)
def test_a_pod_inherits_nothing_of_tiny(name, variant):
  """Patience with bad updates, threads and prompts are those of a large run."""
  config, tiny = PAGES[name].get_config(variant), PAGES["vae" if name == "vae" else "t2v"].get_config("tiny")
  assert tiny.max_bad_steps < config.max_bad_steps and tiny.data.threads < config.data.threads
  assert name == "vae" or config.sample.prompts == () != tiny.sample.prompts


@pytest.mark.parametrize("variant", PAGES["pod"].VARIANTS)
def test_a_page_of_a_pod_shares_its_rows(variant):
  """The mesh of the page serves its rows: no device computes what another computes."""
  config = PAGES["pod"].get_config(variant)
  chips = {"v5e": 256, "v6e": 256, "v5p": 64}.get(variant.split("-")[-1], 4)
  axes = config.mesh.to_dict()
  data = chips // math.prod(axes.values())
  mesh = jax.sharding.AbstractMesh((data, axes["fsdp"], axes["context"], axes["tensor"]), layout.AXES)
  check_rows(config, layout.Layout(mesh))
  with pytest.raises(BadInput, match="rows|row_tokens"):
    config.data.rows, config.data.row_tokens = 3, 1001
    check_rows(config, layout.Layout(mesh))


@pytest.mark.parametrize("name", PAGES)
def test_an_unknown_variant_lists_those_there_are(name):
  known = re.escape(", ".join(PAGES[name].VARIANTS))
  for wrong in ("huge", "neutral", ""):
    with pytest.raises(ValueError, match=f"{name}.py has no variant '{wrong}'; it has {known}"):
      PAGES[name].get_config(wrong)
