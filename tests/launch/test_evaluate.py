"""launch.evaluate on a VAE and on videos: right, wrong, and not to be judged. Nothing is done twice."""

import json

import jax
import numpy as np
import pytest

from data.sources import shapes
from sora_jax import metrics, parts, video
from sora_jax.models import vae

PROMPTS = {
  "a": "a red ball moves left",
  "b": "a blue square moves up",
  "c": "an orange triangle moves right",
  "d": "a green ball",
  "e": "a purple ball left of a red square",
}


@pytest.fixture
def sampled(tmp_path):
  """A folder as launch.sample writes it: true renderings; `b` is reversed, one is missing, one is foreign."""
  lines = []
  for name, prompt in PROMPTS.items():
    scene = shapes.parse(prompt)
    clip = shapes.render(scene, (64, 64), 1 if scene.kind in ("still", "relation") else 9, 0)
    path = f"{name}.png" if len(clip) == 1 else f"{name}.mp4"
    if len(clip) == 1:
      video.write_png(tmp_path / path, clip[0])
    else:
      video.write_mp4(tmp_path / path, clip[::-1] if name == "b" else clip, shapes.FPS)
    lines.append({"id": name, "status": "ok", "path": path, "prompt": prompt})
  lines += [
    {"id": "f", "status": "failed", "error": "no size", "prompt": "a red ball moves up"},
    {"id": "g", "status": "ok", "path": "a.mp4", "prompt": "a cat on a sofa"},
    {"id": "h", "status": "ok", "path": "gone.mp4", "prompt": "a red ball moves up"},
  ]
  (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return tmp_path


def test_a_folder_of_videos_is_judged(sampled, run_program):
  """Scores are right; videos that cannot be judged are named. Only a new video makes a second run judge."""
  out = sampled / "report" / "scores.json"
  done = run_program("evaluate", f"--videos={sampled}", f"--out={out}")
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  assert report["scores"]["direction"] == {"right": 2, "of": 3, "share": 2 / 3, "chance": 0.25}
  assert all(
    report["scores"][name]["share"] == 1
    for name in ("colour", "shape", "relation", "two colours", "two shapes")
  )
  assert report["videos"]["b"] == {"colour": True, "shape": True, "direction": False}
  assert set(report["passed_over"]) == {"f", "g", "h"}
  assert (
    "2/3" in done.stdout and "25.0 %" in done.stdout and "3 of 8 videos could not be judged" in done.stdout
  )

  before = out.stat().st_mtime_ns
  again = run_program("evaluate", f"--videos={sampled}", f"--out={out}")
  assert again.returncode == 0 and "nothing to do" in again.stdout and "2/3" in again.stdout
  assert out.stat().st_mtime_ns == before
  with open(sampled / "manifest.jsonl", "a") as f:
    f.write(json.dumps({"id": "i", "status": "ok", "path": "c.mp4", "prompt": PROMPTS["c"]}) + "\n")
  assert run_program("evaluate", f"--videos={sampled}", f"--out={out}").returncode == 0
  assert json.loads(out.read_text())["scores"]["direction"]["of"] == 4


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((), "--workdir=W"),
    (("--videos=.",), ".json"),
    (("--videos=/nowhere", "--out=r.json"), "/nowhere"),
    (("--workdir=/nowhere", "--out=r.json"), "/nowhere"),
    (("--videos=.", "--out=r.json", "--clips=0"), "clips"),
  ],
)
def test_bad_input_is_one_line(tmp_path, run_program, arguments, says):
  done = run_program("evaluate", *arguments, cwd=tmp_path)
  assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
  assert not list(tmp_path.iterdir())


def test_a_vae_is_measured(tmp_path, run_program):
  """On a folder of clips, the means are those of the reconstructions that the library makes."""
  cfg = vae.SIZES["tiny"]
  params = vae.init(jax.random.key(0), cfg)
  workdir, source = tmp_path / "w", tmp_path / "clips"
  parts.save_part(workdir / "vae", vae.config_to_dict(cfg, "tiny"), jax.device_get(params))
  source.mkdir()
  pixels = shapes.render(shapes.parse("a red ball"), (48, 48), 1, 0)[0]
  for name in "ab":
    video.write_png(source / f"{name}.png", pixels)
    (source / f"{name}.txt").write_text("a red ball")
  (source / "broken.png").write_bytes(b"no image")
  done = run_program("evaluate", f"--workdir={workdir}", f"--source={source}", f"--out={tmp_path / 'r.json'}")
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "r.json").read_text())
  clip = pixels[None, None] / np.float32(127.5) - 1
  again = np.asarray(vae.decode(params, vae.encode(params, clip, cfg)[0], cfg))
  wanted = metrics.psnr((clip + 1) / 2, (again + 1) / 2), metrics.ssim((clip[0] + 1) / 2, (again[0] + 1) / 2)
  assert (report["vae"]["psnr"], report["vae"]["ssim"]) == pytest.approx(wanted, abs=0.02) and report["vae"][
    "clips"
  ] == 2
  assert "broken.png is skipped" in done.stdout and "loss_by_sigma" not in report
  shown = report["reconstructions"]
  assert shown and all(
    (tmp_path / entry[name]).exists() for entry in shown for name in ("original", "reconstruction")
  )
