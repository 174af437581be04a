"""The programs on bad input: exit code 2, one line that names it, nothing is lost, the rest is done."""

import dataclasses
import fcntl
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import t2v as page
from launch.common import claims
from launch.jobs import sample
from sora_jax import files, layout, parts, video
from sora_jax.errors import BadInput
from sora_jax.models import dit, t2v, text, vae


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A directory as launch.export writes it, of a model that was never trained."""
  workdir, config = tmp_path_factory.mktemp("model"), page.get_config("tiny")
  config.sample.steps, config.sample.rows, config.sample.row_tokens = 2, 1, 16
  cfg = vae.SIZES["tiny"]
  parts.save_part(workdir / "vae", vae.config_to_dict(cfg, "tiny"), vae.init(jax.random.key(0), cfg))
  (workdir / "text").mkdir()
  text.train_tokenizer(["a red ball moves left", "a blue square"], workdir / "text" / "tokenizer.model")
  whole = t2v.Model(
    dit.SIZES[config.model.size],
    dataclasses.replace(text.SIZES["tiny"], vocab=text.Tokenizer(workdir / "text/tokenizer.model").vocab),
  )
  parts.save_part(workdir / "model", {"step": 7}, layout.unbox(jax.jit(whole.init)(jax.random.key(0))))
  files.write_json(
    workdir / "config.json",
    {"format_version": 1, "program": "launch.train", **json.loads(config.to_json_best_effort())},
  )
  return workdir


def test_a_job_does_the_rest(model, run_program, tmp_path):
  """Of twelve requests two are good and are made; the others are named by line or id. None is made twice."""
  video.write_png(tmp_path / "ball.png", np.full((20, 30, 3), 200, np.uint8))
  good = {"id": "good", "prompt": "a red ball", "size": [16, 16], "frames": 1}
  lines = [
    json.dumps(good),
    '{"id": "cut", "prompt": "a red',
    json.dumps(good | {"id": "blank", "prompt": "  "}),
    json.dumps(good | {"id": "long", "prompt": "x" * 10_000}),
    json.dumps(good | {"id": "small", "size": [4, 16]}),
    json.dumps(good | {"id": "missing", "task": "image_to_video", "image": "nowhere.png"}),
    json.dumps(good | {"id": "odd", "colour": "red"}),
    json.dumps(good),
    json.dumps(good | {"id": "endless", "fps": float("nan")}),
    json.dumps(good | {"id": "half", "prompt": "a \ud800 ball"}),
    "[1]",
    json.dumps(good | {"id": "onwards", "task": "image_to_video", "image": "ball.png", "frames": 5}),
  ]
  (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n")
  arguments = ("sample", f"--workdir={model}", "--requests=r.jsonl", "--out=made")
  done = run_program(*arguments, cwd=tmp_path)
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert (
    "10 of 12 requests could not be done" in done.stderr
    and "line 2 of r.jsonl is not valid JSON" in done.stderr
  )
  manifest = sample.read_manifest(tmp_path / "made")
  for name, says in {
    "blank": "prompt is empty",
    "long": "10000 characters",
    "small": "one stride",
    "missing": "nowhere.png",
    "odd": "colour",
    "endless": "fps is nan",
    "half": "no character",
    "good (again)": "two requests",
  }.items():
    assert (
      manifest[name]["status"] == "failed"
      and says in manifest[name]["error"]
      and f"request {name}: " in done.stdout
    )
  for line in (2, 11):
    assert manifest[f"{line:05d}"]["status"] == "failed" and f"line {line} of r.jsonl" in done.stdout
  assert "two requests have the id 'good'" in done.stdout
  assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
    "good.png",
    "manifest.jsonl",
    "onwards.mp4",
  ]
  assert np.stack([frame.image_HWC for frame in video.read(tmp_path / "made" / "onwards.mp4")]).shape == (
    5,
    16,
    16,
    3,
  )

  before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("*.??[g4]")}
  again = run_program(*arguments, cwd=tmp_path)
  assert again.returncode == 2 and "0 made, 2 were there already, 10 could not be done" in again.stdout
  assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("*.??[g4]")}


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (("sample",), "give either --prompt=TEXT (or --shots) or --requests"),
    (("sample", "--prompt=a ball", "--frames=many"), "--frames=many"),
    (("sample", "--prompt=a ball", "--workdir=/nowhere"), "/nowhere"),
    (("sample", "--requests=/nowhere.jsonl", "--workdir={model}"), "/nowhere.jsonl"),
    (("sample", "--prompt=a ball", "--size=4,4", "--workdir={model}"), "one stride"),
    (("sample", "--prompt=", "--workdir={model}"), "prompt is empty"),
    (("train", "--config={root}/configs/t2v.py:tiny", "--workdir=w"), "no --config.data.path"),
    (
      ("train", "--config={root}/configs/t2v.py:tiny", "--config.optim.learning_rat=1", "--workdir=w"),
      'Did you mean "learning_rate"',
    ),
    (("train", "--config={root}/configs/t2v.py:tiny", "--config.steps=few", "--workdir=w"), "few"),
    (
      (
        "train",
        "--config={root}/configs/t2v.py:base",
        "--config.data.path=r",
        "--config.sample.every=9",
        "--workdir=w",
      ),
      "prompts is empty",
    ),
    (("train", "--config={root}/configs/t2v.py:huge", "--workdir=w"), "no variant 'huge'"),
    (
      ("train", "--config={root}/configs/t2v.py:tiny", "--config.data.path=/nowhere", "--workdir=w"),
      "/nowhere",
    ),
    (("train_vae", "--config={root}/configs/vae.py:tiny"), "no --workdir"),
    (
      ("train_vae", "--config={root}/configs/vae.py:tiny", "--config.data.crop=(4,4)", "--workdir=w"),
      "height a multiple of 8",
    ),
    (
      ("train_vae", "--config={root}/configs/vae.py:tiny", "--config.model=big", "--workdir=w"),
      "'big'; it must be one of tiny",
    ),
    (
      (
        "train_vae",
        "--config={root}/configs/vae.py:tiny",
        "--config.data.source=folder",
        "--config.data.path=.",
        "--workdir=w",
      ),
      "no ",
    ),
    (
      (
        "train_vae",
        "--config={root}/configs/vae.py:tiny",
        "--config.ssim_weight=1",
        "--config.data.crop=(8,8)",
        "--workdir=w",
      ),
      "11 x 11",
    ),
    (
      ("train_vae", "--config={root}/configs/vae.py:tiny", "--config.decoder_only=True", "--workdir=w"),
      "config.init is empty",
    ),
    (
      (
        "train_vae",
        "--config={root}/configs/vae.py:tiny",
        "--config.model=wan2.1",
        "--config.init={model}",
        "--workdir=w",
      ),
      "not of size 'wan2.1'",
    ),
    (
      ("train_vae", "--config={root}/configs/vae.py:tiny", "--config.log_every=0", "--workdir=w"),
      "log_every is 0",
    ),
    (("train_vae", "--config={root}/configs/vae.py:tiny", "--profile=9:3", "--workdir=w"), "--profile=9:3"),
    (("train_vae", "--config={root}/configs/vae.py:tiny", "--workdir={root}/setup.py"), "another path"),
    (("sample", "--requests=r.jsonl", "--steps=5"), "goes with --prompt"),
    (("export", "--out=here"), "--workdir=W"),
  ],
  ids=lambda value: "-".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_one_line(model, run_program, tmp_path, arguments, says):
  """Told before anything compiles, and nothing is written."""
  root = sample.__file__.rsplit("/launch/", 1)[0]
  done = run_program(*(a.format(model=model, root=root) for a in arguments), cwd=tmp_path)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
  assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_names_as_vbench_expects(model, run_program, tmp_path):
  """The prompt, and how often it came before; a prompt that can name no file costs itself alone."""
  prompts = ("a red ball", "a blue ball", "a red ball", "left/right")
  lines = [{"prompt": prompt, "frames": 1, "size": [16, 16], "steps": 1, "id": "x"} for prompt in prompts]
  (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  done = run_program(
    "sample",
    f"--workdir={model}",
    f"--requests={tmp_path / 'r.jsonl'}",
    f"--out={tmp_path / 'made'}",
    "--names=vbench",
  )
  assert done.returncode == 2 and "id is 'left/right-0'" in done.stdout
  names = {path.name for path in (tmp_path / "made").glob("*.png")}
  assert names == {"a red ball-0.png", "a red ball-1.png", "a blue ball-0.png"}


def test_another_model_makes_another_video(model, run_program, tmp_path):
  """The same request to the same folder is made again if the model has changed; else it is kept."""
  arguments = ("sample", "--prompt=a red ball", "--size=16,16", "--frames=1", "--out=made")
  other = tmp_path / "other"
  shutil.copytree(model, other)
  fields, weights = parts.load_part(other / "model")
  parts.save_part(other / "model", fields, jax.tree.map(lambda leaf: leaf * 1.1, weights))
  outputs = [
    run_program(*arguments, f"--workdir={workdir}", cwd=tmp_path).stdout for workdir in (model, other)
  ]
  assert [("1 made" in said, "1 were there already" in said) for said in outputs] == [(True, False)] * 2


def test_help(run_program):
  """Every program says its flags and ends with 0."""
  for name in ("sample", "train"):
    done = run_program(name, "--help")
    assert done.returncode == 0 and "--workdir" in done.stdout and f"python -m launch.{name}" in done.stdout


def test_one_trainer_at_a_time(run_program, tmp_path):
  """The second is told, and leaves the first alone."""
  with open(tmp_path / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = run_program("train_vae", "--config=configs/vae.py:tiny", f"--workdir={tmp_path}")
  assert (
    done.returncode == 2
    and "another program is training here" in done.stderr
    and [p.name for p in tmp_path.iterdir()] == [".lock"]
  )


def test_a_work_directory_of_another_config(run_program, tmp_path):
  """It is named with what differs, and stays as it was."""
  config = json.dumps({"format_version": 1, "program": "launch.train_vae", "seed": 1})
  (tmp_path / "config.json").write_text(config)
  (tmp_path / "manifests").mkdir()
  (tmp_path / "manifests" / "20.json").write_text("{}")
  done = run_program("train_vae", "--config=configs/vae.py:tiny", f"--workdir={tmp_path}")
  assert done.returncode == 2 and "belongs to another config" in done.stderr and done.stderr.count("\n") == 1
  assert (tmp_path / "config.json").read_text() == config


def test_a_work_directory_of_an_earlier_version(tmp_path):
  """A config.json without keys that were added since goes on with what they did then, and with nothing
  else.
  """
  config = page.get_config("tiny")
  claims.claim_workdir(tmp_path, config, ())
  fields = files.read_json(tmp_path / "config.json")
  for key in claims.ADDED:
    *path, name = key.split(".")
    assert functools.reduce(dict.__getitem__, path, fields).pop(name) == claims.ADDED[key]
  fields["data"].pop("given")
  fields["data"]["image_to_video"] = 0.0
  (tmp_path / "model").mkdir()
  files.write_json(tmp_path / "config.json", fields)
  config.optim.b1 = 0.5
  with pytest.raises(BadInput, match="optim.b1 is 0.9 there, 0.5 here"):
    claims.claim_workdir(tmp_path, config, ())
  claims.claim_workdir(tmp_path, page.get_config("tiny"), ())


@pytest.mark.parametrize(
  "flag, says",
  [
    ("{}/gone.safetensors", "there is no file"),
    ("{}/flux.safetensors", "it looks like one for HunyuanVideo or FLUX"),
    ("{}/cut.safetensors", "cannot be read"),
    ("{}/flux.safetensors:much", "the strength 'much' is no number"),
    ("low={}/flux.safetensors", "it looks like one for"),
  ],
)
def test_adapters_that_do_not_fit(model, run_program, tmp_path, flag, says):
  layer = "diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"
  safetensors.numpy.save_file({layer: np.ones((2, 2), np.float32)}, tmp_path / "flux.safetensors")
  (tmp_path / "cut.safetensors").write_bytes((tmp_path / "flux.safetensors").read_bytes()[:-3])
  out = tmp_path / "out"
  done = run_program(
    "sample", f"--workdir={model}", "--prompt=a red ball", f"--lora={flag.format(tmp_path)}", f"--out={out}"
  )
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
  assert not out.exists()


def test_few_steps_with_guidance(model, run_program, tmp_path):
  """Adapters, few steps, and guidance: it is done, and a line says what such adapters are made for."""
  layer = "blocks.0.attn1.to_q"
  width = dit.SIZES["quick"].width
  pair = {f"{layer}.lora_A.weight": np.zeros((2, width)), f"{layer}.lora_B.weight": np.zeros((width, 2))}
  safetensors.numpy.save_file({k: v.astype(np.float32) for k, v in pair.items()}, tmp_path / "a.safetensors")
  flags = (
    f"--workdir={model}",
    "--prompt=a ball",
    "--size=16,16",
    "--frames=1",
    f"--lora={tmp_path}/a.safetensors",
  )
  done = run_program("sample", *flags, "--times=1000,500", "--sampler=renoise", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  assert "2 steps and guidance 4.0; adapters for few steps are made for guidance 1" in done.stderr
  (line,) = files.read_jsonl(tmp_path / "out" / "manifest.jsonl")
  assert line["times"] == [1000.0, 500.0] and line["steps"] == 2
