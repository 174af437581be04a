"""Imports and exports a folder of the golden models in the layout of diffusers, and broken copies of it."""

import json
import os
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.export import deserialize

from launch.benchmark import worker
from launch.common import claims
from sora_jax import files as our_files, parts, workdir as workdirs
from sora_jax.convert import exporting, importing
from sora_jax.errors import BadInput
from sora_jax.models import dit, lora, text, vae
from sora_jax.pipeline import Pipeline
from sora_jax.weights import files, lora as peft, lora_files, table, umt5, wan_dit, wan_pipeline, wan_vae


def import_weights(source, workdir, dtype="source"):
  """-> True if there was anything to do."""
  plan = importing.plan(source, workdir, dtype)
  if plan:
    plan.run()
  return plan is not None


def import_lora(source, base, workdir, expert=""):
  """-> the adapters' config; None if there was nothing to do."""
  plan = importing.plan_lora(source, base, workdir, expert)
  if plan:
    plan.run()
  return plan and plan.adapters


def export(workdir, out, kind, dtype="source"):
  """-> the step; None if there was nothing to do."""
  plan = exporting.plan(workdir, out, kind, dtype)
  return None if plan is None else plan.run()


GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
FOLDERS = {"transformer": "dit", "text_encoder": "umt5"}
PARTS = (*FOLDERS, "vae")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """A pipeline's folder; tensors of all three dtypes in its transformer."""
  folder = tmp_path_factory.mktemp("pipeline") / "theirs"
  for name, golden in FOLDERS.items():
    shutil.copytree(GOLDEN / golden, folder / name, ignore=shutil.ignore_patterns("golden.npz"))
  cfg = vae.VAEConfig(base_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
  (folder / "vae").mkdir()
  write(folder / "vae" / "config.json", wan_vae.config_to_diffusers(cfg))
  safetensors.numpy.save_file(
    dict(wan_vae.to_diffusers(jax.device_get(vae.init(jax.random.key(0), cfg)), cfg)),
    folder / "vae" / "diffusion_pytorch_model.safetensors",
  )
  for number, dtype in enumerate((ml_dtypes.bfloat16, np.float16)):
    shard = sorted((folder / "transformer").glob("*.safetensors"))[number]
    tensors = safetensors.numpy.load_file(shard)
    safetensors.numpy.save_file({key: value.astype(dtype) for key, value in tensors.items()}, shard)
  worker.save_tokenizer(
    folder / "tokenizer", ("a red ball moves left", "a blue cat sleeps") * 9, vocab_size=40
  )
  (folder / "scheduler").mkdir()
  write(
    folder / "scheduler" / "scheduler_config.json",
    {
      "_class_name": "UniPCMultistepScheduler",
      "prediction_type": "flow_prediction",
      "use_flow_sigmas": True,
      "flow_shift": 3.0,
    },
  )
  parts = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
  }
  write(
    folder / "model_index.json",
    {"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": False, **parts},
  )
  (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
  return folder


@pytest.fixture(scope="module")
def workdir(pipeline, tmp_path_factory):
  """The same, imported."""
  workdir = tmp_path_factory.mktemp("imported")
  assert import_weights(pipeline, workdir)
  return workdir


def write(path, value):
  path.write_text(json.dumps(value))


def changed(pipeline, tmp_path, path, change):
  """A copy of the folder with one JSON file changed."""
  folder = tmp_path / "changed"
  shutil.copytree(pipeline, folder)
  write(folder / path, change(json.loads((folder / path).read_text())))
  return folder


def test_there_and_back(pipeline, workdir, tmp_path):
  """Tensors come back with name, shape, dtype and bits, and so do small files. Nothing is done twice."""
  assert not import_weights(pipeline, workdir)
  assert (
    export(workdir, tmp_path / "back", "diffusers") == 0
    and export(workdir, tmp_path / "back", "diffusers") is None
  )
  kinds = set()
  for part in PARTS:
    there, back = files.Tensors(pipeline / part), files.Tensors(tmp_path / "back" / part)
    assert sorted(there) == sorted(back)
    for name in there:
      kinds.add(there.dtype(name))
      assert (
        there[name].dtype == back[name].dtype
        and there[name].tobytes() == back[name].tobytes()
        and there.shape(name) == back.shape(name)
      )
  assert kinds == {"float32", "bfloat16", "float16"}
  for path in pipeline.rglob("*.json"):
    if ".index." not in path.name:
      assert json.loads(path.read_text()) == json.loads(
        (tmp_path / "back" / path.relative_to(pipeline)).read_text()
      ), path
  card = (tmp_path / "back" / "README.md").read_text()
  assert "license: apache-2.0" in card and "from_pretrained" in card and card.count(".safetensors` | `") == 3


def test_shards(workdir, tmp_path):
  """Large parts are written in shards with an index, which are read as one."""
  cfg, _ = workdirs.load_vae(workdir / "vae")
  _, params = parts.load_part(workdir / "vae", None)
  fields, specs, pieces = wan_pipeline.part_to_diffusers("vae", cfg, params, None, np.dtype)
  exporting.write_shards(tmp_path, "diffusion_pytorch_model", specs, pieces, most=20_000)
  assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 3 and len(files.Tensors(tmp_path)) == len(specs)
  assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 60_000
  assert wan_vae.config_from_diffusers(fields) == cfg


def test_sampled(workdir, tmp_path):
  """An imported folder samples by its own schedule, with a zero after its prompts for their padding.

  Its numpy export holds the same weights.
  """
  pipe = Pipeline.open(workdir)
  text_SE = pipe.embed(["a red ball"])[0]
  assert text_SE.shape[1] == 32 and text_SE[:-1].any(-1).all() and not text_SE[-1].any()
  assert (pipe.schedule, pipe.defaults["sampler"], pipe.defaults["shift"]) == ("diffusers", "unipc", 3.0)
  asked = {"id": "a", "prompt": "a red ball", "size": [16, 32], "frames": 1, "steps": 1, "guidance": 1.0}
  (result,) = pipe.run([asked])
  assert result.video().shape == (1, 16, 32, 3)
  export(workdir, tmp_path / "numpy", "numpy", "float32")
  saved = np.load(tmp_path / "numpy" / "dit.npz")
  np.testing.assert_array_equal(
    saved["blocks/self/query"], np.asarray(pipe.params["dit"]["blocks"]["self"]["query"])
  )
  with pytest.raises(BadInput, match="guidance_low is for models of two experts"):
    pipe.parse({"id": "b", "prompt": "x", "guidance_low": 2.0})


def test_stablehlo(workdir, tmp_path):
  """The exported computations equal the models, at sizes other than those of the export."""
  export(workdir, tmp_path / "hlo", "stablehlo", "float32")

  def load(name):
    return deserialize(bytearray((tmp_path / "hlo" / f"{name}.stablehlo").read_bytes()))

  assert set(load("dit").platforms) == {"cpu", "cuda", "tpu"}
  rng = np.random.default_rng(0)
  pipe = Pipeline.open(workdir)
  cfg = pipe.model.dit
  segment = np.repeat([[1, 2, 0]], (20, 30, 3), axis=1).astype(np.int32)
  row = (
    rng.normal(size=(1, 53, cfg.values_in)),
    rng.integers(0, 5, (1, 53, 3)),
    segment,
    [[0.0, 0.7]],
    rng.integers(0, 2, (1, 53)),
    rng.normal(size=(1, 9, cfg.text_width)),
    segment,
    np.repeat([[1, 2]], (4, 5), axis=1),
  )
  row = [
    np.asarray(x, kind)
    for x, kind in zip(row, (np.float32, np.float32, int, np.float32, int, np.float32, int, int), strict=True)
  ]
  row = [x.astype(np.int32) if x.dtype == int else x for x in row]
  velocity = jax.jit(load("dit").call)(
    safetensors.numpy.load_file(tmp_path / "hlo" / "dit.safetensors"), *row
  )
  expected = jax.jit(dit.DiT(cfg).apply)({"params": pipe.params["dit"]}, *row)
  np.testing.assert_allclose(velocity[:, :50], expected[:, :50], atol=1e-5)
  latents = rng.normal(size=(1, 2, 2, 3, 16)).astype(np.float32)
  weights = safetensors.numpy.load_file(tmp_path / "hlo" / "vae.safetensors")
  memory, begin = load("vae-decode-first").call(weights, latents[:, :1])
  _, rest = load("vae-decode-next").call(weights, memory, latents[:, 1:])
  again = np.concatenate([begin, rest], 1)
  np.testing.assert_allclose(again, vae.decode(pipe.vae_params, latents, pipe.vae_cfg), atol=1e-5)
  _, mean = load("vae-encode-first").call(weights, again[:, :1])
  np.testing.assert_allclose(mean, vae.encode(pipe.vae_params, again[:, :1], pipe.vae_cfg)[0], atol=1e-4)


def interrupt(*_):
  raise KeyboardInterrupt


def test_adapters(workdir, tmp_path, monkeypatch):
  """Adapters written in PEFT's layout are read back as the same function.

  Merged, they are the weights plus alpha / rank A B.
  """
  cfg = workdirs.make_model(workdirs.read_config(workdir), workdir / "text", None).dit
  adapters = lora.LoRAConfig(rank=3, alpha=6.0, targets=("attn1.to_q", "to_out.0", "ffn.net.0.proj"))
  params = table.from_diffusers(
    {
      name: np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)
      for name, shape in table.their_shapes(peft.rows(cfg, adapters)).items()
    },
    peft.rows(cfg, adapters),
  )
  theirs = dict(peft.to_diffusers(params, cfg, adapters))
  assert (
    theirs["transformer.blocks.1.attn1.to_q.lora_A.weight"].shape == (3, 48)
    and len(theirs) == 4 * 2 * cfg.depth
  )
  config, again = peft.from_files(theirs, cfg)
  assert (config.rank, config.alpha, set(config.targets)) == (
    3,
    3.0,
    {"attn1.to_q", "attn1.to_out.0", "attn2.to_out.0", "ffn.net.0.proj"},
  )
  safetensors.numpy.save_file(theirs, tmp_path / lora_files.FILE)
  with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
    killed.setattr(importing.parts, "save_part", interrupt)
    import_lora(tmp_path, workdir, tmp_path / "w")
  assert (
    import_lora(tmp_path, workdir, tmp_path / "w") and import_lora(tmp_path, workdir, tmp_path / "w") is None
  )
  assert export(tmp_path / "w", tmp_path / "merged", "diffusers", "float32") == 0
  merged, plain = Pipeline.open(tmp_path / "w").params["dit"], Pipeline.open(workdir).params["dit"]
  back = dict(wan_dit.to_diffusers(merged, cfg))
  name = "blocks.1.attn1.to_q"
  change = theirs[f"transformer.{name}.lora_B.weight"] @ theirs[f"transformer.{name}.lora_A.weight"]
  np.testing.assert_allclose(
    back[f"{name}.weight"] - dict(wan_dit.to_diffusers(plain, cfg))[f"{name}.weight"], change, atol=1e-5
  )
  written = files.Tensors(tmp_path / "merged" / "transformer")
  assert all(np.allclose(written[name], value, atol=1e-6) for name, value in back.items())
  (tmp_path / "w" / "config.json").unlink()  # now it is a foreign model without a config
  write(tmp_path / "w" / "model" / "config.json", {"made_from": "0"})
  with pytest.raises(BadInput, match="holds a model already"):
    import_lora(tmp_path, workdir, tmp_path / "w")
  with pytest.raises(BadInput, match="holds one model; leave --expert out"):
    import_lora(tmp_path, workdir, tmp_path / "w3", "high")
  alphas = {key.replace("lora_A.weight", "alpha"): np.float32(6) for key in theirs if "lora_A" in key}
  assert peft.from_files(theirs | alphas, cfg)[0].scale == 2.0
  head = {
    f"transformer.proj_out.lora_{half}.weight": np.ones(shape)
    for half, shape in (("A", (3, 48)), ("B", (64, 3)))
  }
  with pytest.raises(BadInput, match=r"proj_out.weight is changed, too; .* --lora"):
    peft.from_files(theirs | head, cfg)


def test_adapters_added_for_good(pipeline, workdir, tmp_path):
  """Imported with adapters, weights are what `Pipeline.open` makes of them with --lora; the card says so."""
  rng, file = np.random.default_rng(0), tmp_path / "style.safetensors"
  down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 48), (48, 2)))
  layer = "diffusion_model.blocks.1.self_attn.k"
  safetensors.numpy.save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, file)
  flag = f"{file}:0.5"
  importing.plan(pipeline, tmp_path / "w", loras=[flag]).run()
  assert importing.plan(pipeline, tmp_path / "w", loras=[flag]) is None
  with pytest.raises(BadInput, match="another --dtype or --lora"):
    importing.plan(pipeline, tmp_path / "w")
  plain, merged = Pipeline.open(workdir), Pipeline.open(tmp_path / "w")
  added = Pipeline.open(workdir, lora=[flag])
  assert len({plain.identity, merged.identity, added.identity}) == 3
  for a, b in zip(jax.tree.leaves(merged.params), jax.tree.leaves(added.params), strict=True):
    np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=2e-2)  # stored as bfloat16
  weights = [pipe.params["dit"]["blocks"]["self"]["key"] for pipe in (plain, added)]
  changed = np.abs(np.asarray(weights[1]) - np.asarray(weights[0])).max((1, 2, 3))
  assert changed[0] == 0 and changed[1] > 0.1
  export(tmp_path / "w", tmp_path / "out", "diffusers")
  assert "with these adapters added: style.safetensors:0.5" in (tmp_path / "out" / "README.md").read_text()


def test_eight_bits(workdir, tmp_path):
  """An imported model samples in 8 bits, with adapters, too; and is what adapters are trained upon."""
  fields = {"id": "a", "prompt": "a red ball", "size": [16, 32], "frames": 1, "steps": 3, "guidance": 1.0}
  layer, rng = "blocks.1.attn1.to_k", np.random.default_rng(0)
  pair = {
    f"{layer}.lora_{half}.weight": rng.normal(size=shape) for half, shape in (("A", (2, 48)), ("B", (48, 2)))
  }
  file = tmp_path / "style.safetensors"
  safetensors.numpy.save_file({name: value.astype(np.float32) for name, value in pair.items()}, file)
  latents = {}
  for files_of_lora in ((), (f"{file}:0.2",)):
    for kind in ("", "int8"):
      pipe = Pipeline.open(workdir, lora=files_of_lora, eight_bits=kind)
      (result,) = pipe.run([fields])
      latents[files_of_lora, kind] = np.asarray(result.latents_THWC)
      query = pipe.params["dit"]["blocks"]["self"]["query"]
      assert (query.dtype == np.int8) == (kind == "int8")
    error = np.abs(latents[files_of_lora, "int8"] - latents[files_of_lora, ""]).max()
    assert 0 < error < 0.1 * np.abs(latents[files_of_lora, ""]).max()
  assert np.abs(latents[(), ""] - latents[files_of_lora, ""]).max() > error
  config = workdirs.read_config(workdir)
  with config.unlocked():
    config.init, config.model.base, config.model.weights = str(workdir), workdirs.identity(workdir), "int8"
  model = workdirs.make_model(config, workdir / "text", None)
  base = workdirs.base_weights(config, model, "bfloat16", only=("dit",))
  assert list(base) == ["dit"] and base["dit"]["blocks"]["mlp"]["in"].dtype == np.int8


def test_adapters_in_the_names_of_comfyui(workdir, tmp_path):
  """The same numbers under the names of the original release; they are read back as the same adapters."""
  cfg = workdirs.make_model(workdirs.read_config(workdir), workdir / "text", None).dit
  config = lora.LoRAConfig(rank=2, alpha=4.0, targets=("to_out.0", "ffn.net.2"))
  shapes = table.their_shapes(peft.rows(cfg, config))
  tensors = {name: np.random.default_rng(1).normal(size=shape) for name, shape in shapes.items()}
  params = table.from_diffusers(tensors, peft.rows(cfg, config))
  theirs, comfyui = (dict(peft.to_diffusers(params, cfg, config, names)) for names in peft.NAMES)
  assert comfyui.keys() == {
    f"diffusion_model.blocks.{i}.{layer}.lora_{half}.weight"
    for i in range(cfg.depth)
    for layer in ("self_attn.o", "cross_attn.o", "ffn.2")
    for half in "AB"
  }
  read = [peft.from_files(some, cfg)[1] for some in (theirs, comfyui)]
  for a, b in zip(*map(jax.tree.leaves, read), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(BadInput, match="--names=comfyui is of adapters: give --format=lora"):
    exporting.plan(workdir, tmp_path / "out", "numpy", names="comfyui")


def test_adapters_of_unlike_ranks_and_scales(workdir):
  """Files that training would not write, but others do, are adapters to train on, of one rank and scale."""
  cfg = workdirs.make_model(workdirs.read_config(workdir), workdir / "text", None).dit
  rng = np.random.default_rng(0)
  theirs, wanted = {}, {}
  for layer, rank in ((0, 2), (1, 5)):
    name = f"transformer.blocks.{layer}.attn2.to_v"
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, 48), (48, rank)))
    theirs |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": np.full((), 4.0)}
    wanted[layer] = up @ down * 4 / rank
  config, params = peft.from_files(theirs, cfg)
  assert (config.rank, config.scale, config.targets) == (5, 1.0, ("attn2.to_v",))
  pair = params["blocks"]["cross"]["value"]
  for layer, change in wanted.items():
    ours = np.asarray(lora.delta_weight({name: value[layer] for name, value in pair.items()}, config.scale))
    np.testing.assert_allclose(ours.reshape(48, 48).T, change, atol=1e-5)


def test_one_part(pipeline, tmp_path):
  """The VAE alone, for launch.encode; a text encoder brings the tokenizer that lies beside it."""
  import_weights(pipeline / "vae", tmp_path / "w")
  import_weights(pipeline / "text_encoder", tmp_path / "w")
  assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["source", "text", "vae"]
  assert text.Tokenizer(tmp_path / "w" / "text" / "tokenizer.model").encode("a red ball")


def test_another_dtype(pipeline, tmp_path):
  """--dtype=bfloat16 is that of transformer and text encoder, and what is computed in."""
  import_weights(pipeline, tmp_path / "w", "bfloat16")

  def kinds(part):
    _, weights = parts.load_part(tmp_path / "w" / part, None)
    return {leaf.dtype.name for leaf in our_files.flatten(weights).values()}

  assert kinds("model") == {"bfloat16"} and kinds("text") == {"bfloat16"} and kinds("vae") == {"float32"}
  assert our_files.read_json(tmp_path / "w" / "config.json")["model"]["dtype"] == "bfloat16"
  export(tmp_path / "w", tmp_path / "out", "safetensors", "float32")
  written = {part: files.Tensors(tmp_path / "out" / part) for part in ("model", "text", "vae")}
  assert all(tensors.dtype(name) == "float32" for tensors in written.values() for name in tensors)


def test_what_is_wrong_is_named(pipeline, workdir, tmp_path, monkeypatch):
  """One line each, and nothing is written."""
  cut = tmp_path / "cut"
  shutil.copytree(pipeline, cut)
  shard = sorted((cut / "transformer").glob("*.safetensors"))[2]
  shard.write_bytes(shard.read_bytes()[:-100])
  odd = tmp_path / "odd"
  shutil.copytree(pipeline, odd)
  tensors = safetensors.numpy.load_file(odd / "vae" / "diffusion_pytorch_model.safetensors")
  safetensors.numpy.save_file(
    tensors | {"quant_conv.bias": np.zeros(32, np.int8)}, odd / "vae" / "diffusion_pytorch_model.safetensors"
  )
  lacking = tmp_path / "lacking"
  shutil.copytree(pipeline, lacking)
  (lacking / "text_encoder" / "config.json").unlink()
  (tmp_path / "pickle").mkdir()
  (tmp_path / "pickle" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
  (tmp_path / "pickle" / "vae.pth").write_bytes(b"x")

  def change(path, **fields):
    copy = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    return changed(pipeline, copy, path, lambda old: old | fields)

  wrong = {
    "does not exist": tmp_path / "nowhere",
    "no readable config.json": pipeline / "scheduler",
    "cannot be read": cut,
    "quant_conv.bias .* I8": odd,
    "text_encoder has no readable config.json": lacking,
    "is a pickle of PyTorch": tmp_path / "pickle",
    "is a FluxPipeline; known are WanPipeline": change("model_index.json", _class_name="FluxPipeline"),
    "is a UNet.*known are WanTransformer3DModel": change(
      "transformer/config.json", _class_name="UNet2DModel"
    ),
    r"blocks.2.attn1.norm_k.weight.*\(shape \(48,\)\)": change("transformer/config.json", num_layers=3),
    r"ffn.net.0.proj.weight has shape \(96, 48\) where \(97, 48\)": change(
      "transformer/config.json", ffn_dim=97
    ),
    "is not that of a WanTransformer3DModel": change("transformer/config.json", attention_head_dim="24"),
    "image_dim=1280": change("transformer/config.json", image_dim=1280),
    "boundary_ratio 0.9": change("model_index.json", boundary_ratio=0.9),
    "names transformer_2, and there is no such folder": change(
      "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]
    ),
  }
  for says, source in wrong.items():
    with pytest.raises(BadInput, match=says) as error:
      import_weights(source, tmp_path / "w")
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists(), says
  with pytest.raises(BadInput, match="holds other weights"):
    newer = change("model_index.json")
    os.utime(newer / "vae" / "diffusion_pytorch_model.safetensors")
    import_weights(newer, workdir)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("x")
  with pytest.raises(BadInput, match="not empty"):
    export(workdir, tmp_path / "full", "diffusers")
  with pytest.raises(BadInput, match="numpy has no bfloat16"):
    export(workdir, tmp_path / "out", "numpy")
  with pytest.raises(BadInput, match="holds no adapters"):
    export(workdir, tmp_path / "out", "lora")
  assert not list(tmp_path.glob("out*"))
  foreign = tmp_path / "foreign"
  (foreign / "checkpoints").mkdir(parents=True)
  (foreign / "text").mkdir()
  (foreign / "text" / "tokenizer.model").write_bytes(b"mine")
  with pytest.raises(BadInput, match="belongs to another program"):
    import_weights(pipeline / "text_encoder", foreign)
  assert (foreign / "text" / "tokenizer.model").read_bytes() == b"mine"
  monkeypatch.setattr(claims.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
  with pytest.raises(BadInput, match="the weights: .* are needed, and .* are free"):
    claims.need_disk(tmp_path, importing.plan(pipeline, tmp_path / "w").num_bytes, "the weights")


def test_an_unknown_scheduler_is_noted(pipeline, tmp_path):
  folder = changed(
    pipeline, tmp_path, "scheduler/scheduler_config.json", lambda old: old | {"use_karras_sigmas": True}
  )
  opened = wan_pipeline.open_pipeline(folder)
  assert "use_karras_sigmas is True" in opened.notes[0] and opened.sample["shift"] == 3.0
  folder = changed(
    pipeline,
    tmp_path / "2",
    "scheduler/scheduler_config.json",
    lambda old: {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8.0},
  )
  assert wan_pipeline.open_pipeline(folder).sample["sampler"] == "euler"


class Shapes(dict):
  """Stands for files.Tensors of a model that is too large to be here: {name: shape}."""

  def shape(self, name):
    return self[name]

  def dtype(self, name):
    return "bfloat16"


@pytest.mark.parametrize(
  ("heads", "ffn_dim", "layers", "channels_in", "channels_out", "expand", "billions"),
  [
    pytest.param(12, 8960, 30, 16, 16, False, 1.419, id="2.1 T2V-1.3B"),
    pytest.param(40, 13824, 40, 16, 16, False, 14.288, id="2.1 T2V-14B"),
    pytest.param(24, 14336, 30, 48, 48, True, 5.000, id="2.2 TI2V-5B"),
    pytest.param(40, 13824, 40, 36, 16, False, 14.289, id="2.2 I2V-A14B"),
  ],
)
def test_released_shapes(heads, ffn_dim, layers, channels_in, channels_out, expand, billions):
  """For the configs of the releases, the tables cover every weight of our model.

  The model has the published number of parameters.
  """
  cfg = wan_dit.config_from_diffusers(
    {
      "num_attention_heads": heads,
      "attention_head_dim": 128,
      "ffn_dim": ffn_dim,
      "num_layers": layers,
      "in_channels": channels_in,
      "out_channels": channels_out,
      "patch_size": [1, 2, 2],
      "text_dim": 4096,
      "freq_dim": 256,
      "cross_attn_norm": True,
      "eps": 1e-6,
      "qk_norm": "rms_norm_across_heads",
    },
    expand,
  )
  rows = wan_dit.rows(cfg)
  table.check(Shapes(table.their_shapes(rows)), rows)
  from_rows = sum(int(np.prod(row.our_shape)) for row in rows)
  assert from_rows == dit.count_params(cfg) and round(from_rows / 1e9, 3) == billions
  with pytest.raises(BadInput, match="1 tensors missing"):
    table.check(
      Shapes({name: shape for name, shape in table.their_shapes(rows).items() if name != "proj_out.bias"}),
      rows,
    )


def test_released_encoder():
  """UMT5-XXL, from the names and shapes of its weights alone, as the original release has it."""
  rows = umt5.rows(text.SIZES["umt5-xxl"])
  cfg = umt5.config_of(Shapes(table.their_shapes(rows)))
  assert sum(int(np.prod(row.our_shape)) for row in umt5.rows(cfg)) == text.count_params(cfg) == 5_680_910_336
