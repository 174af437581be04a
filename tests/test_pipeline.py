"""The Python API: one video, many requests, what is wrong with one of them, and memory that does not grow
with their number.
"""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

import sora_jax
from configs import t2v as page
from sora_jax import layout, parts, pipeline as pipelines, tasks, video, workdir as workdirs
from sora_jax.errors import BadInput
from sora_jax.models import dit, t2v, text, vae

SMALL = {"size": [32, 48], "frames": 5, "steps": 2, "guidance": 2.0}
# stride 4 x 8 x 8, 16 channels, as Wan 2.1
VAE = vae.VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
DIT = dit.DiTConfig(
  depth=1, heads=2, head_size=8, mlp=16, channels=16, patch=(1, 2, 2), text_width=16, time_freqs=8,
  text_pad=512, conditioning="replacement",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  """A model that was never trained, whose text encoder is frozen."""
  workdir, config = tmp_path_factory.mktemp("model"), page.get_config("tiny")
  config.sample.update({"row_tokens": 64, "rows": 2, "sampler": "euler"})
  workdirs.save_vae(workdir / "vae", VAE, vae.init(jax.random.key(0), VAE))
  encoder = text.TextConfig(vocab=400, width=16, depth=1, heads=2, head_size=8, mlp=16)
  row = np.zeros((1, 1), np.int32)
  weights = layout.unbox(jax.jit(text.TextEncoder(encoder).init)(jax.random.key(1), row, row)["params"])
  parts.save_part(workdir / "text", dataclasses.asdict(encoder), weights)
  text.train_tokenizer(["a red ball moves left", "a blue square"], workdir / "text" / "tokenizer.model")
  model = t2v.Model(DIT)
  params = layout.unbox(jax.jit(model.init)(jax.random.key(2)))
  params = jax.tree.map(lambda leaf: leaf + 0.05, params)  # the last layer begins at zero
  return pipelines.Pipeline.of(workdir, config, model, params)


def test_one_video(pipe):
  """uint8 [T, H, W, 3]; the same prompt and seed, the same video; a size that the stride does not divide is
  cut to what was asked.
  """
  first = pipe("a red ball", **SMALL, seed=3)
  assert first.shape == (5, 32, 48, 3) and first.dtype == np.uint8 and first.std() > 1
  np.testing.assert_array_equal(pipe("a red ball", **SMALL, seed=3), first)
  assert np.any(pipe("a red ball", **SMALL, seed=4) != first)
  assert pipe("a red ball", **{**SMALL, "size": (30, 45), "frames": 2}).shape == (2, 30, 45, 3)
  assert pipe("a red ball", **SMALL, task="text_to_image").shape == (1, 32, 48, 3)


def test_bad_fields_raise_one_line(pipe, tmp_path):
  (tmp_path / "text.png").write_text("no image")
  for fields, says in (
    ({"frames": 0}, "frames is 0"), ({"size": (4, 4)}, "one stride"), ({"colour": "red"}, "unknown field"),
    ({"guidance_low": 2.0}, "two experts"),
    ({"task": "image_to_video", "image": "nowhere.png"}, "nowhere.png"),
    ({"task": "image_to_video", "image": str(tmp_path / "text.png")}, "cannot be read"),
  ):  # fmt: skip
    with pytest.raises(BadInput, match=says) as error:
      pipe("a ball", **{**SMALL, **fields})
    assert "\n" not in str(error.value)
  assert issubclass(sora_jax.BadInput, ValueError)


def test_one_bad_request_costs_itself(pipe, tmp_path):
  """Of six requests three are good, of unlike sizes; each has one result, with its place in the list, and the
  good ones are what they are alone.
  """
  video.write_png(tmp_path / "dot.png", np.full((20, 30, 3), 200, np.uint8))
  (tmp_path / "broken.png").write_text("no image")
  onwards = {"task": "image_to_video", "prompt": "a ball", "id": "c", **SMALL}
  requests = [
    {"id": "a", "prompt": "a red ball", **SMALL},
    {"id": "b", "prompt": " ", **SMALL},
    {**onwards, "image": str(tmp_path / "dot.png")},
    {**onwards, "image": str(tmp_path / "broken.png")},
    {"id": "d", "prompt": "a blue square", **SMALL, "frames": 9, "steps": 3},
    {"id": "e", "prompt": "a", "promt": "b"},
  ]
  steps = []
  results = {
    result.position: result
    for result in pipe.run(requests, progress=lambda done, total: steps.append((done, total)))
  }
  assert sorted(results) == list(range(6))
  assert {i for i, result in results.items() if result.error} == {1, 3, 5}
  assert results[1].request is None and results[3].request.id == "c"
  # 2 + 2 + 2 + 3: what could not be read counts as done
  assert steps == sorted(steps) and steps[-1] == (9, 9)
  for i in (0, 2, 4):
    (alone,) = pipe.run([requests[i]])
    error = np.mean((results[i].latents_THWC - alone.latents_THWC) ** 2)
    assert error < 1e-6 * np.var(alone.latents_THWC), i
    assert results[i].video().shape == (requests[i]["frames"], 32, 48, 3)


def test_what_callers_do(pipe):
  """No id, numbers of numpy, a Request, no requests; what is no request costs itself; frames are used up."""
  fields = {"prompt": "a ball", **SMALL, "seed": np.int64(3)}
  request = pipe.parse({"id": "x", **fields})
  wrong = dataclasses.replace(request, sampler="ddim")
  results = {result.position: result for result in pipe.run([fields, "a ball", request, wrong])}
  assert "it must be a dict" in results[1].error and "must be one of euler" in results[3].error
  assert results[0].request.id == "00000" and type(results[0].request.seed) is int
  np.testing.assert_allclose(results[0].latents_THWC, results[2].latents_THWC)
  assert results[0].video().shape == (5, 32, 48, 3)
  with pytest.raises(ValueError, match="taken already"):
    results[0].video()
  with pytest.raises(BadInput, match="must be a dict"):
    results[1].video()
  assert list(pipe.run([])) == [] and list(pipe.run(fields for _ in range(0))) == []
  assert pipe != results and isinstance(hash(pipe), int)


def test_it_can_be_stopped(pipe):
  """Results before the stop are whole, none come after it."""
  # each a row of its own
  requests = [{"id": str(i), "prompt": "a ball", "seed": i, **SMALL, "frames": 49} for i in range(3)]
  done = []
  results = pipe.run(requests, stop=lambda: len(done) >= 1)
  for result in results:
    done.append(result.position)
  assert done == [0]


def test_prompts_are_embedded_together(pipe, monkeypatch):
  """Each prompt once, many at a time, and the encoder's weights are freed before anything is denoised."""
  calls, embedder, embed = [], pipe.embedder, type(pipe.embedder).__call__

  def counted(self, ids):
    calls.append(len(ids))
    return embed(self, ids)

  monkeypatch.setattr(type(embedder), "__call__", counted)
  requests = [
    {"id": str(i), "prompt": f"ball {i % 4}", "negative_prompt": "blue", **SMALL} for i in range(12)
  ]
  for result in pipe.run(requests):
    assert embedder._params is None and not result.error
  assert calls == [5]
  kept = dataclasses.replace(pipe, keep_text_encoder=True)
  assert len(list(kept.run(requests[:1]))) == 1 and embedder._params is not None
  monkeypatch.setattr(pipelines, "PROMPT_BYTES", 1)  # as if they were large: row by row
  assert len(list(pipe.run(requests))) == 12 and len(calls) > 3 and embedder._params is None


def test_ten_thousand_requests_in_constant_memory(pipe):
  """Requests of 480 x 832 x 81, 32,760 tokens each, are planned and the first is begun in under 500 MB."""
  requests = [
    {
      "id": str(i),
      "prompt": f"a red ball number {i} moves left",
      "seed": i,
      "size": [480, 832],
      "frames": 81,
      "steps": 2,
    }
    for i in range(10_000)
  ]
  before = _memory("VmRSS", reset=True)
  assert list(pipe.run(requests, stop=lambda: True)) == []
  assert _memory("VmHWM") - before < 500
  canvas = pipe.canvas(pipe.parse(requests[0]))
  assert canvas.latents_THWC.shape == (21, 60, 104, 16)  # 8.4 MB: all of them together would take 84 GB


def _memory(field, reset=False):
  """A field of /proc/self/status in MB; `reset` begins the peak anew."""
  if reset:
    with open("/proc/self/clear_refs", "w") as f:
      f.write("5")
  with open("/proc/self/status") as f:
    return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field + ":"))


def test_the_import_costs_nothing():
  """`import sora_jax` brings no jax; its exports do, when they are used."""
  code = (
    "import sys, sora_jax; assert 'jax' not in sys.modules; sora_jax.Pipeline; assert 'jax' in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
  with pytest.raises(AttributeError, match="Pipeline"):
    sora_jax.Pipelin  # noqa: B018


def test_programs_can_be_imported_together():
  """Their flags are declared when they are run, not when they are imported."""
  names = "encode evaluate export framing hosts import_weights quickstart sample train train_vae"
  names += " benchmark.__main__ packing.__main__ preflight.__main__"
  subprocess.run(
    [sys.executable, "-c", "\n".join(f"import launch.{name}" for name in names.split())], check=True
  )


@pytest.fixture(scope="module")
def media(tmp_path_factory):
  """Files of 32 x 48 pixels, and what is in them: a video of 9 frames, another of 6, an image, a mask."""
  folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
  paths = {name: str(folder / f"{name}.mp4") for name in ("video", "video_b")}
  for path, count in zip(paths.values(), (9, 6)):
    noise = rng.integers(0, 255, (count, 4, 6, 3), np.uint8)
    video.write_mp4(path, noise.repeat(8, 1).repeat(8, 2), 8.0, crf=4)
  for name in ("image", "mask"):
    paths[name] = str(folder / f"{name}.png")
    video.write_png(paths[name], np.full((32, 48, 3), 90, np.uint8))
  half = np.zeros((32, 48, 3), np.uint8)
  half[:, :24] = 255
  video.write_png(paths["mask"], half)
  return paths, {name: video.load(paths[name])[0] for name in ("video", "video_b")}


def test_every_task(pipe, media):
  """As many frames as asked, at the size of the video; what is given comes back as it was; all at once as
  alone.
  """
  paths, clips = media
  take = lambda *names: {name: paths[name] for name in names}  # noqa: E731
  shots = [{"seconds": 0.5, "prompt": "a ball"}, {"seconds": 1.0, "prompt": "a square"}]
  requests = {
    "text_to_image": {}, "image_to_video": take("image") | {"last_image": paths["image"], "frames": 9},
    "text_to_video": {"shots": shots}, "extend_forward": take("video") | {"frames": 15},
    "extend_backward": take("video") | {"frames": 14}, "loop": take("video") | {"frames": 17},
    "connect": take("video", "video_b") | {"frames": 19}, "fill": take("video", "mask"),
    "edit": take("video"), "upscale": take("video") | {"size": [48, 72]},
  }  # fmt: skip
  fields = {"prompt": "a ball", "steps": 2, "fps": 8.0, "size": [32, 48]}
  asked = [{**fields, "task": task, **more} for task, more in requests.items()]
  results = {one.position: one for one in pipe.run(asked)}
  assert not any(one.error for one in results.values()), [one.error for one in results.values()]
  videos = {one.request.task: one.video() for one in results.values()}
  assert set(videos) == set(tasks.TASKS)
  counts = {task: len(frames) for task, frames in videos.items()}
  assert counts == {
    "text_to_image": 1, "image_to_video": 9, "text_to_video": 12, "extend_forward": 15, "extend_backward": 14,
    "loop": 17, "connect": 9 + 4 + 6, "fill": 9, "edit": 9, "upscale": 9,
  }  # fmt: skip
  assert all(results[i].count == counts[asked[i]["task"]] for i in results)
  a, b = clips["video"], clips["video_b"]
  for task, given, part in (
    ("extend_forward", a, slice(0, 9)), ("extend_backward", a, slice(5, 14)), ("loop", a, slice(0, 9)),
    ("connect", a, slice(0, 9)), ("connect", b, slice(13, 19)),
  ):  # fmt: skip
    np.testing.assert_array_equal(videos[task][part], given, task)
    assert np.abs(videos[task][9 if part.start == 0 else 4].astype(int) - given[0]).max() > 0
  np.testing.assert_array_equal(videos["fill"][:, :, 24:], a[:, :, 24:])
  assert np.abs(videos["fill"][:, :, :24].astype(int) - a[:, :, :24]).mean() > 5
  assert videos["upscale"].shape[1:3] == (48, 72) and (videos["image_to_video"][[0, -1]] == 90).all()
  (alone,) = pipe.run([asked[list(requests).index("connect")]])
  assert np.mean((alone.video().astype(float) - videos["connect"]) ** 2) < 0.1


def test_a_long_video_in_windows(pipe, media):
  """Also a loop from words alone. The first window is the short video; progress counts the steps of all."""
  short = dataclasses.replace(pipe, window=9)
  fields = {"prompt": "a ball", **SMALL}
  steps = []
  requests = [{**fields, "frames": 25}, {**fields, "task": "loop", "frames": 17}, fields]
  results = {
    one.position: one for one in short.run(requests, progress=lambda done, total: steps.append((done, total)))
  }
  assert [len(results[i].video()) for i in range(3)] == [25, 17, 5]
  assert results[0].latents_THWC.shape[0] == 7 and steps == sorted(steps)
  assert len({total for _, total in steps}) == 1 and steps[-1][0] == steps[-1][1]
  again = {one.position: one.video() for one in short.run(requests[:1])}
  np.testing.assert_array_equal(again[0][:9], pipe("a ball", **{**SMALL, "frames": 9}))
