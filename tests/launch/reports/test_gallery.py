"""The page of a folder of launch.sample: every video, what was given, settings that differ as a table."""

import re

import numpy as np

from launch.reports import gallery
from sora_jax import video

LINE = {
  "status": "ok",
  "task": "text_to_video",
  "prompt": "a <red> ball",
  "size": [8, 8],
  "seed": 0,
  "steps": 5,
}


def test_page(tmp_path):
  video.write_png(tmp_path / "in.png", np.zeros((8, 8, 3), np.uint8))
  lines = [
    {**LINE, "id": f"{steps} {seed}", "path": f"{steps} {seed}.mp4", "steps": steps, "seed": seed}
    for steps in (5, 9)
    for seed in (0, 1, 2)
  ]
  lines += [
    {**LINE, "id": "on", "path": "on.mp4", "task": "image_to_video", "image": str(tmp_path / "in.png")},
    {**LINE, "id": "gone", "path": "gone.png", "task": "image_to_video", "image": "lost.png"},
    {"status": "failed", "id": "bad", "error": "size is <0>", "prompt": "x"},
  ]
  text = gallery.write(tmp_path, lines).read_text()
  assert "<h1>8 videos of launch.sample</h1>" in text and "<red>" not in text and "<0>" not in text
  assert re.findall(r'src="([^"]*[.](?:mp4|png))"', text) == [
    *(f"{steps}%20{seed}.mp4" for steps in (5, 9) for seed in (0, 1, 2)), "on.mp4", "gone.png",
  ]  # fmt: skip
  table = re.search(r"<table>.*?</table>", text, re.S)[0]
  assert table.count("<tr>") == 3 and "<th>seed 2</th>" in table and "<th>steps 9</th>" in table
  assert text.count("data:image/png") == 1 and "lost.png" in text and "bad" in text
  assert "steps 5, seed 0, size 8x8" in text
