"""launch.encode: its records are what the VAE gives, and a kill loses nothing."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data import records
from sora_jax import parts, video
from sora_jax.models import text, vae
from tests.launch.jobs.test_encode import same_records

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = vae.VAEConfig(
  base_dim=8,
  z_dim=4,
  dim_mult=(1, 1, 1),
  num_res_blocks=1,
  temporal_downsample=(True, True),
  patch_size=4,
  is_residual=True,
  latents_mean=(0.5,) * 4,
  latents_std=(2.0,) * 4,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A work directory with a VAE that was never trained."""
  workdir = tmp_path_factory.mktemp("workdir")
  parts.save_part(workdir / "vae", vae.config_to_dict(TINY), vae.init(jax.random.key(0), TINY))
  return workdir


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Six clips of 32 x 32, one longer than a piece, one picture."""
  root = tmp_path_factory.mktemp("clips")
  for i in range(5):
    y, x = np.mgrid[:32, :32]
    frames = [
      np.stack([(y * 5 + t * 9 + 40 * i) % 256, x * 8 % 256, (x + y) * 4 % 256], -1).astype(np.uint8)
      for t in range(40 if i == 4 else 9)
    ]
    video.write_mp4(root / f"{i}.mp4", frames, 8)
    (root / f"{i}.txt").write_text(f"a moving pattern number {i}")
  video.write_png(root / "5.png", frames[0])
  return root


def test_the_program(run_program, model, clips, tmp_path):
  """Exit code 0, and the records hold normalised latents of the clips; a second run does nothing."""
  arguments = (
    "encode",
    f"--source={clips}",
    f"--out={tmp_path / 'out'}",
    f"--workdir={model}",
    "--max_seconds=2.2",
  )
  first = run_program(*arguments)
  assert first.returncode == 0, first.stderr
  assert "Next: python -m launch.train" in first.stdout and "encoding" in first.stdout
  index = records.RecordIndex.open(tmp_path / "out")
  assert len(index) == 5 + 3
  assert (
    index.header["vae_fingerprint"]
    == parts.fingerprint(tmp_path / "out" / "vae")
    == parts.fingerprint(model / "vae")
  )
  assert index.header["latent_channels"] == 4 and index.header["vae_stride"] == [4, 16, 16]
  tokenizer = text.Tokenizer(tmp_path / "out" / "text" / "tokenizer.model")
  assert index.null_text[0].tolist() == tokenizer.null
  cfg, params = TINY, parts.load_part(model / "vae")[1]
  for i in range(len(index)):
    record = records.read(index, i)
    if record.file == "2.mp4":
      clip, _ = video.load(clips / "2.mp4")
      mean, _ = vae.encode(params, clip[None].astype(np.float32) / 127.5 - 1, cfg)
      np.testing.assert_allclose(
        record.latents_THWC.astype(np.float32), (np.asarray(mean)[0] - 0.5) / 2, atol=2e-2
      )
      assert record.text_ids_S.tolist() == tokenizer.encode("a moving pattern number 2")
      assert np.asarray(mean).std() > 0.05
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}
  second = run_program(*arguments)
  assert second.returncode == 0 and "nothing to do" in second.stdout
  assert before == {
    path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"
  }
  other = run_program(*arguments[:-1], "--max_seconds=1")
  assert other.returncode == 2 and "max_seconds=2.2, now max_seconds=1" in other.stderr


def start(model, source, out):
  command = [
    sys.executable,
    "-u",
    "-m",
    "launch.encode",
    f"--source={source}",
    f"--out={out}",
    f"--workdir={model}",
  ]
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  }
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def test_sigterm_saves_and_says_so(model, clips, tmp_path, run_program):
  process = start(model, clips, tmp_path / "out")
  assert "encoding 6 of 6" in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  rest, errors = process.communicate(timeout=300)
  assert process.returncode == 75 and "run the same command again" in rest, (rest, errors)
  assert (
    run_program("encode", f"--source={clips}", f"--out={tmp_path / 'out'}", f"--workdir={model}").returncode
    == 0
  )
  assert (
    run_program("encode", f"--source={clips}", f"--out={tmp_path / 'whole'}", f"--workdir={model}").returncode
    == 0
  )
  same_records(records.RecordIndex.open(tmp_path / "out"), records.RecordIndex.open(tmp_path / "whole"))


@pytest.mark.faults
@pytest.mark.parametrize("after", [0.0, 1.0, 2.0, 3.0, 5.0])
def test_kill_9_at_any_moment(model, clips, tmp_path, run_program, after):
  process = start(model, clips, tmp_path / "out")
  process.stdout.readline()
  time.sleep(after)
  process.kill()
  process.communicate()
  assert (
    run_program("encode", f"--source={clips}", f"--out={tmp_path / 'out'}", f"--workdir={model}").returncode
    == 0
  )
  index = records.RecordIndex.open(tmp_path / "out")
  assert len(index) == 6 and all(records.read(index, i) for i in range(6))


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--out=OUT",), "no --source"),
    (("--source=SRC",), "no --out"),
    (("--source=nothere", "--out=OUT"), "shapes:4000"),
    (("--source=SRC", "--out=OUT", "--workdir=EMPTY"), "vae"),
    (("--source=SRC", "--out=OUT", "--max_second=3"), "max_second"),
    (("--source=BAD", "--out=OUT", "--workdir=W"), "none of its 1 files could be taken, such as a.mp4"),
  ],
)
def test_bad_input(run_program, model, clips, tmp_path, flags, message):
  """Exit code 2, one line that says what to do, no traceback."""
  (tmp_path / "empty").mkdir()
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "a.mp4").write_bytes(b"x" * 1000)
  paths = {
    "OUT": tmp_path / "out",
    "SRC": clips,
    "EMPTY": tmp_path / "empty",
    "W": model,
    "BAD": tmp_path / "bad",
  }
  arguments = [
    flag.partition("=")[0] + "=" + str(paths.get(flag.partition("=")[2], flag.partition("=")[2]))
    for flag in flags
  ]
  result = run_program("encode", *arguments)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and "Traceback" not in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1, result.stderr
