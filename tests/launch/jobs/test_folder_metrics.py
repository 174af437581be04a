"""Metrics of folders: what is better scores better, references are found by name, bad files are named."""

import numpy as np
import pytest
from scipy import ndimage

from launch.jobs import cache_curve, folder_metrics
from sora_jax import sample, video
from sora_jax.errors import BadInput


def clip(rng, step=2, frames=9):
  """A texture that moves."""
  still = ndimage.gaussian_filter(rng.random((48, 64, 3)), (3, 3, 0))
  still = 255 * (still - still.min()) / np.ptp(still)
  moved = [ndimage.shift(still, (0, step * i, 0), mode="nearest", order=1) for i in range(frames)]
  return np.stack(moved).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Three videos: as they are, with noise, with frames that jump; and the folder of the first once more."""
  root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
  for i in range(3):
    plain = clip(rng)
    noisy = np.clip(plain + rng.normal(0, 12, plain.shape), 0, 255).astype(np.uint8)
    jumping = plain[[0, 3, 1, 4, 2, 6, 5, 8, 7]]
    for name, frames in {"plain": plain, "noisy": noisy, "jumping": jumping}.items():
      (root / name).mkdir(exist_ok=True)
      video.write_mp4(root / name / f"{i}.mp4", frames, 8, crf=1)
  return root


def measure(folders, name, reference=""):
  return folder_metrics.measure(folders / name, reference and folders / reference, "", lambda: None)


def test_better_scores_better(folders):
  """Alone and beside references: noise flickers, jumps are not smooth, a folder equals itself."""
  plain, noisy = measure(folders, "plain", "plain"), measure(folders, "noisy", "plain")
  jumping = measure(folders, "jumping")
  assert plain["quality"]["psnr"] == 100 and plain["quality"]["ssim"] == pytest.approx(1)
  assert 20 < noisy["quality"]["psnr"] < 32 and noisy["quality"]["ssim"] < 0.9
  assert abs(plain["quality"]["frechet_vae"]) < 1e-3 < noisy["quality"]["frechet_vae"]
  smooth = [one["quality"]["motion_smoothness"] for one in (plain, noisy, jumping)]
  flicker = [one["quality"]["temporal_flickering"] for one in (plain, noisy, jumping)]
  assert smooth[0] > 99 and smooth[0] > max(smooth[1:]) + 1 and flicker[0] > max(flicker[1:])
  assert plain["by_category"]["all"]["videos"] == 3 and set(plain["quality_of"]) == {"0", "1", "2"}


def test_what_cannot_be_measured_is_named(folders, tmp_path):
  """No reference, another size, another length, a broken file: passed over; the others are measured."""
  rng = np.random.default_rng(1)
  for name in ("ours", "theirs"):
    (tmp_path / name).mkdir()
  for i, (ours, theirs) in {"same": (9, 9), "shorter": (5, 9), "longer": (9, 5)}.items():
    video.write_mp4(tmp_path / "ours" / f"{i}.mp4", clip(rng, frames=ours), 8)
    video.write_mp4(tmp_path / "theirs" / f"{i}.mp4", clip(rng, frames=theirs), 8)
  video.write_mp4(tmp_path / "ours" / "alone.mp4", clip(rng), 8)
  video.write_mp4(tmp_path / "ours" / "small.mp4", clip(rng)[:, :32], 8)
  video.write_mp4(tmp_path / "theirs" / "small.mp4", clip(rng), 8)
  (tmp_path / "ours" / "broken.mp4").write_bytes(b"nothing")
  report = folder_metrics.measure(tmp_path / "ours", tmp_path / "theirs", "", lambda: None)
  assert set(report["quality_of"]) == {"same"}
  why = report["not_measured"]
  assert "as many frames" in why["shorter"] and "as many frames" in why["longer"]
  assert "holds no video of this name" in why["alone"] and "its reference (48, 64)" in why["small"]
  assert "broken" in why and "frechet_vae" not in report["quality"]
  (tmp_path / "empty").mkdir()
  for nothing in (tmp_path / "empty", tmp_path / "none"):
    with pytest.raises(BadInput, match="holds no video"):
      folder_metrics.find(nothing)


def test_vmaf_is_asked_of_ffmpeg(folders, monkeypatch, tmp_path):
  """Where an ffmpeg has it, its score is taken; where none has, there is no such number."""
  program = tmp_path / "ffmpeg"
  program.write_text(
    '#!/bin/sh\ncase "$*" in *-filters*) echo " ... libvmaf VV->V";; *) echo "VMAF score: 87.25" >&2;; esac\n'
  )
  program.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  assert measure(folders, "noisy", "plain")["quality"]["vmaf"] == 87.25
  monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
  assert "vmaf" not in measure(folders, "noisy", "plain")["quality"]


def test_the_saving_of_a_cache_is_counted():
  """The goal of 2.2 times fewer block FLOPs is within the curve."""
  saved = {cache: 40 / sample.computed_steps(40, cache).sum() for cache in cache_curve.VALUES}
  assert list(saved.values()) == sorted(saved.values()) and saved[2.25] > 2.2 and saved[4.0] == 4
