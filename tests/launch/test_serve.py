"""The page of launch.serve: what is made is what launch.sample makes; the queue; and what is refused."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from configs import t2v as page
from launch.jobs import sample
from launch.serve import __main__ as program, app as web, uploads as kept, worker
from sora_jax import layout, pipeline as pipelines, tasks, video, workdir as workdirs
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.errors import BadInput
from sora_jax.models import dit, t2v, text, vae
from tests import conftest
from tests.launch.chromium import Chromium

DEFAULTS = {
  "size": [16, 24], "frames": 5, "fps": 8.0, "steps": 3, "sampler": "euler", "shift": 1.0, "guidance": 1.0
}  # fmt: skip


class Fake:
  """A pipeline that makes noise, a step whenever the test lets it."""

  defaults, step, identity = DEFAULTS, 7, "fake"

  def __init__(self, steps=10_000):
    self.allowed = threading.Semaphore(steps)

  def parse(self, fields):
    return tasks.parse_request(fields, self.defaults, SAMPLERS, pipelines._probe)

  def run(self, requests, stop, progress):
    (request,) = requests
    if request.prompt == "fail":
      yield pipelines.Result(0, request, f"image {request.image!r} cannot be read")
      return
    if request.prompt == "break":
      raise RuntimeError("out of\nmemory")
    for done in range(request.steps):
      while not self.allowed.acquire(timeout=0.02):
        if stop():
          return
      if stop():
        return
      progress(done + 1, request.steps)
    shape = (request.frames, *request.size, 3)
    frames = np.random.default_rng(request.seed).integers(0, 255, shape, np.uint8)
    yield pipelines.Result(0, request, None, None, iter(frames), request.size, request.frames, 0.1)


class Served:
  """A server in this process, and a client of it."""

  def __init__(self, port, queue):
    self.port, self.queue = port, queue

  def ask(self, method, path, body=None, headers=None):
    """-> (status, body): JSON where it is, else bytes. The path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    data = answer.read()
    assert answer.headers["x-content-type-options"] == "nosniff"
    is_json = answer.headers["content-type"] == "application/json"
    connection.close()
    return answer.status, json.loads(data) if is_json else data

  def submit(self, **fields):
    return self.ask("POST", "/requests", json.dumps(fields))

  def upload(self, content, name="ball.png"):
    return self.ask("POST", f"/uploads?name={name}", content)

  def jobs(self):
    return {job["id"]: job for job in self.ask("GET", "/state")[1]["jobs"]}

  def wait(self, name, *status, timeout=60):
    """Until a job has such a status -> the job."""
    end = time.monotonic() + timeout
    while (job := self.jobs()[name])["status"] not in status:
      assert time.monotonic() < end, job
      time.sleep(0.02)
    return job


@pytest.fixture
def serve(tmp_path):
  """serve(pipe, max_upload=...) -> Served, whose results are in tmp_path/out."""
  with contextlib.ExitStack() as ends:

    def start(pipe, max_upload=1 << 20):
      out = tmp_path / "out"
      uploads = kept.Uploads(out / "uploads")
      queue = worker.Queue(pipe, out, uploads.shown)
      listener = program.listen("127.0.0.1", 0)
      server = web.make_server(web.make_app(pipe, queue, uploads, max_upload))
      threads = [
        threading.Thread(target=queue.work), threading.Thread(target=server.run, args=([listener],))
      ]  # fmt: skip
      for thread in threads:
        thread.start()

      def stop():
        queue.close()
        server.should_exit = True
        for thread in threads:
          thread.join(30)
          assert not thread.is_alive()

      ends.callback(stop)
      return Served(listener.getsockname()[1], queue)

    yield start


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A pipeline that was never trained."""
  workdir, config = tmp_path_factory.mktemp("model"), page.get_config("tiny")
  config.sample.update({"row_tokens": 64, "rows": 1, "sampler": "euler"})
  cfg = vae.VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
  workdirs.save_vae(workdir / "vae", cfg, vae.init(jax.random.key(0), cfg))
  (workdir / "text").mkdir()
  text.train_tokenizer(["a red ball moves left", "a blue square"], workdir / "text" / "tokenizer.model")
  encoder = text.TextConfig(
    vocab=text.Tokenizer(workdir / "text" / "tokenizer.model").vocab, width=16, depth=1, heads=2, head_size=8,
    mlp=16,
  )  # fmt: skip
  model = t2v.Model(
    dit.DiTConfig(depth=1, heads=2, head_size=8, mlp=16, channels=16, text_width=16, time_freqs=8), encoder
  )
  params = layout.unbox(jax.jit(model.init)(jax.random.key(2)))
  return pipelines.Pipeline.of(
    workdir, config, model, jax.tree.map(lambda leaf: leaf + 0.05, params), step=3, identity="tiny"
  )


def png(tmp_path, size=(20, 30)):
  """The bytes of an image."""
  video.write_png(tmp_path / "dot.png", np.full((*size, 3), 200, np.uint8))
  return (tmp_path / "dot.png").read_bytes()


def mp4(tmp_path, frames=6, size=(16, 24)):
  """The bytes of a video."""
  video.write_mp4(tmp_path / "clip.mp4", np.full((frames, *size, 3), 90, np.uint8), 8)
  return (tmp_path / "clip.mp4").read_bytes()


# --- what is made


def test_results_are_those_of_launch_sample(tiny, serve, tmp_path):
  """The same bytes and, but for the time taken, the same lines of the manifest."""
  served = serve(tiny)
  _, upload = served.upload(png(tmp_path))
  common = {"prompt": "a red ball", "size": [32, 48], "steps": 2, "guidance": 2.0}
  asked = [
    {**common, "frames": 5, "seed": 3},
    {**common, "task": "text_to_image"},
    {**common, "task": "image_to_video", "image": upload["id"], "frames": 5},
  ]
  for number, fields in enumerate(asked, 1):
    status, job = served.submit(**fields)
    assert (status, job["id"]) == (200, f"{number:05d}")
  jobs = [served.wait(f"{number:05d}", "done", "failed") for number in (1, 2, 3)]
  assert [job["status"] for job in jobs] == ["done"] * 3, jobs
  asked[2]["image"] = str(tmp_path / "out" / "uploads" / f"{upload['id']}.png")
  requests = [{"id": f"{number:05d}", **fields} for number, fields in enumerate(asked, 1)]
  assert sample.run(tiny, requests, tmp_path / "plain", quiet=True)["ok"] == 3
  ours, theirs = sample.read_manifest(tmp_path / "out"), sample.read_manifest(tmp_path / "plain")
  for job in jobs:
    _, content = served.ask("GET", f"/results/{job['id']}")
    assert content == (tmp_path / "plain" / job["path"]).read_bytes()
    both = [manifest[job["id"]] | {"seconds_taken": None} for manifest in (ours, theirs)]
    assert both[0] == both[1]
  assert jobs[2]["settings"]["image"] == upload
  assert sample.run(tiny, requests, tmp_path / "out", quiet=True)["kept"] == 3


def test_the_form_has_every_task_and_field(serve):
  """Made from tasks.TASKS and tasks.FIELDS; what no task names is for all tasks."""
  about = serve(Fake()).ask("GET", "/form")[1]
  assert list(about["tasks"]) == list(tasks.TASKS) == about["fields"]["task"]["choices"]
  assert set(about["fields"]) == set(tasks.FIELDS) - {"id"}
  for name, task in tasks.TASKS.items():
    assert about["tasks"][name]["needs"] == list(task.needs)
    assert {*task.needs, *task.one_of, *task.takes} <= set(about["only_with"])
  assert not {"prompt", "size", "seed"} & set(about["only_with"])
  assert about["fields"]["size"]["default"] == [16, 24] and about["fields"]["steps"]["limits"] == [1, 1000]


# --- the queue


def test_progress_order_and_cancelling(serve):
  """One at a time, in order; a running one ends after its step, a waiting one never begins."""
  pipe = Fake(steps=0)
  served = serve(pipe)
  names = [served.submit(prompt=f"ball {i}", steps=4)[1]["id"] for i in range(4)]
  pipe.allowed.release(2)
  end = time.monotonic() + 30
  while (job := served.jobs()[names[0]])["done"] < 2:
    assert time.monotonic() < end
  assert (job["status"], job["stage"], job["done"], job["total"]) == ("running", "denoising", 2, 4)
  assert [served.jobs()[name]["status"] for name in names[1:]] == ["waiting"] * 3
  assert served.ask("DELETE", f"/requests/{names[1]}")[1]["status"] == "cancelled"
  served.ask("DELETE", f"/requests/{names[0]}")
  served.wait(names[0], "cancelled")
  pipe.allowed.release(100)
  served.wait(names[3], "done")
  assert [served.jobs()[name]["status"] for name in names] == ["cancelled", "cancelled", "done", "done"]
  assert set(sample.read_manifest(served.queue.out)) == set(names[2:])
  assert served.ask("DELETE", f"/requests/{names[3]}")[1]["status"] == "done"
  assert served.ask("DELETE", "/requests/none")[0] == 404


def test_a_page_asks_for_what_changed(serve):
  served = serve(Fake())
  name = served.submit(prompt="a ball")[1]["id"]
  served.wait(name, "done")
  state = served.ask("GET", "/state")[1]
  same = f"/state?queue={state['queue']}&after={state['version']}"
  assert served.ask("GET", same)[1]["jobs"] == []
  assert len(served.ask("GET", f"/state?queue=another&after={state['version']}")[1]["jobs"]) == 1
  assert len(served.ask("GET", "/state?after=-1x")[1]["jobs"]) == 1
  other = served.submit(prompt="a ball")[1]["id"]
  assert [job["id"] for job in served.ask("GET", same)[1]["jobs"]] == [other]


def test_the_queue_is_limited(serve, monkeypatch):
  monkeypatch.setattr(worker, "WAITING", 3)
  served = serve(Fake(steps=0))
  running = served.submit(prompt="a ball")[1]["id"]
  served.wait(running, "running")
  assert [served.submit(prompt="a ball")[0] for _ in range(4)] == [200, 200, 200, 429]
  assert "3 requests are waiting" in served.submit(prompt="a ball")[1]["error"]
  served.ask("DELETE", f"/requests/{running}")
  served.wait("00002", "running")
  assert served.submit(prompt="a ball")[0] == 200


def test_a_failure_costs_itself(serve, tmp_path):
  """What fails while it is made has its error in one line, without paths, on the page and in the manifest."""
  served = serve(Fake())
  _, upload = served.upload(png(tmp_path))
  served.submit(prompt="fail", task="image_to_video", image=upload["id"])
  served.submit(prompt="break")
  served.submit(prompt="a ball")
  assert served.wait("00003", "done")["error"] is None
  jobs = served.jobs()
  assert jobs["00001"]["error"] == "image 'ball.png' cannot be read"
  assert jobs["00002"]["error"] == "RuntimeError: out of memory"
  lines = sample.read_manifest(tmp_path / "out")
  assert [line["status"] for line in lines.values()] == ["failed", "failed", "ok"]
  assert served.ask("GET", "/results/00001")[0] == 404


def test_the_history_outlives_the_program(serve, tmp_path):
  """A new one shows what the manifest says, and takes new numbers."""
  first = serve(Fake())
  first.submit(prompt="a ball", seed=5)
  first.submit(prompt="fail")
  first.wait("00002", "failed")
  content = first.ask("GET", "/results/00001")[1]
  (tmp_path / "out" / "00007.png").write_bytes(b"of someone else")
  second = serve(Fake())
  jobs = second.jobs()
  assert jobs["00001"]["settings"]["seed"] == 5 and jobs["00002"]["status"] == "failed"
  assert second.ask("GET", "/results/00001")[1] == content
  assert second.submit(prompt="another")[1]["id"] == "00008"


# --- what is refused


@pytest.mark.parametrize(
  ("body", "says"),
  [
    ({}, "the prompt is empty"),
    ({"prompt": "a ball", "steps": 0}, "steps is 0; it must be from 1 to 1000"),
    ({"prompt": "a ball", "steps": "many"}, "steps is 'many'; it must be an int"),
    ({"prompt": "a ball", "colour": "red"}, "unknown field 'colour'"),
    ({"prompt": "a ball", "task": "paint"}, "task is 'paint'; it must be one of"),
    ({"prompt": "a ball", "task": "extend_forward"}, "extend_forward needs video"),
    ({"prompt": "a ball", "id": "x"}, "id is chosen here"),
    ({"prompt": "a ball", "size": [16000, 16000], "frames": 9}, "at most 67 million pixels a frame"),
    ({"prompt": "a ball", "size": [2000, 2000], "frames": 999}, "1,074 million in all"),
    ({"prompt": "x" * 5000}, "the prompt has 5000 characters"),
    ("[1]", "not valid JSON"),
    ('{"prompt": ', "not valid JSON"),
    ('{"prompt": "half \\ud800"}', "no character"),
    ("[" * 60_000, "not valid JSON"),
    ('{"prompt": "a", "fps": NaN}', "fps is nan"),
  ],
)
def test_a_bad_request_is_one_line(serve, tmp_path, body, says):
  served = serve(Fake())
  status, answer = served.ask("POST", "/requests", body if isinstance(body, str) else json.dumps(body))
  assert status == 400 and says in answer["error"] and "\n" not in answer["error"]
  assert served.jobs() == {} and not (tmp_path / "out" / "manifest.jsonl").exists()


def test_uploads_are_checked_by_content(serve, tmp_path):
  """What is no image or video, is cut short, or is a playlist that names other files, is not kept."""
  served = serve(Fake(), max_upload=100_000)
  image, clip = png(tmp_path), mp4(tmp_path)
  secret = tmp_path / "secret.mp4"
  secret.write_bytes(clip)
  for content, says in (
    (b"", "is no image or video"),
    (b"<script>alert(1)</script>", "is no image or video"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image or video"),
    (f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode(), "is no image or video"),
    (f"ffconcat version 1.0\nfile {secret}\n".encode(), "is no image or video"),
    (image[:40], "cannot be read"),
    (clip[: len(clip) // 2], "cannot be read"),
    (b"\x89PNG\r\n\x1a\n" + b"nonsense" * 50, "cannot be read"),
    (b"\0\0\0\x18ftypmp42" + b"nonsense" * 50, "cannot be read"),
  ):
    status, answer = served.upload(content, "a%20<ball>.png")
    assert status == 400 and says in answer["error"] and "a _ball_.png" in answer["error"], answer
    assert str(tmp_path) not in answer["error"] and "\n" not in answer["error"]
  assert list((tmp_path / "out" / "uploads").iterdir()) == []

  status, upload = served.upload(image, "../../ball.mp4")  # by content: an image
  assert status == 200 and upload["size"] == [20, 30] and upload["fps"] is None
  assert upload["type"] == "image/png" and upload["path"] is None and "/" not in upload["name"]
  assert served.ask("GET", f"/uploads/{upload['id']}") == (200, image)
  status, upload = served.upload(clip, "clip.png")
  assert status == 200 and (upload["frames"], upload["fps"], upload["type"]) == (6, 8.0, "video/mp4")
  assert served.upload(clip)[1]["id"] == upload["id"]  # the same content is kept once
  assert len(list((tmp_path / "out" / "uploads").iterdir())) == 2


def test_uploads_are_limited(serve, tmp_path, monkeypatch):
  """By bytes, whether their number is said beforehand or not, and by pixels."""
  served = serve(Fake(), max_upload=1000)
  assert served.upload(b"x" * 1001)[0] == 413
  assert served.ask("POST", "/requests", b" " * (web.BODY + 1))[0] == 413
  chunks = iter([b"x" * 600] * 3)  # sent in chunks
  status, answer = served.ask("POST", "/uploads", chunks)
  assert status == 413 and "MB" in answer["error"]
  assert list((tmp_path / "out" / "uploads").iterdir()) == []
  monkeypatch.setattr(kept, "PIXELS", 500)
  status, answer = served.upload(png(tmp_path))
  assert status == 400 and "20 x 30 pixels" in answer["error"]


def test_a_client_names_no_path(serve, tmp_path):
  """File fields take ids of uploads alone, and only results and uploads are served."""
  (tmp_path / "out" / "uploads").mkdir(parents=True)
  secret = tmp_path / "secret.png"
  png(tmp_path)
  (tmp_path / "dot.png").rename(secret)
  (tmp_path / "out" / "other.png").write_bytes(secret.read_bytes())
  key = "0" * 32
  (tmp_path / "out" / "uploads" / f"{key}.png").symlink_to(secret)
  (tmp_path / "out" / "00004.png").symlink_to(secret)
  lines = [{"id": f"{i:05d}", "status": "ok", "path": path} for i, path in enumerate(
    ["../secret.png", str(secret), "uploads/../../secret.png", "00004.png", ".lock", "manifest.jsonl"], 1
  )]  # fmt: skip
  (tmp_path / "out" / ".lock").write_text("")
  (tmp_path / "out" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  served = serve(Fake())
  for name in (str(secret), "../secret.png", "../../secret.png", key, f"{key}.png", "", [str(secret)], {}, 1):
    status, answer = served.submit(prompt="a ball", task="image_to_video", image=name)
    assert status == 400 and "is not the id of an upload" in answer["error"], (name, answer)
  served.submit(prompt="a ball", seed=2)
  served.wait("00007", "done")
  assert served.ask("GET", "/results/00007")[0] == 200  # the others could be there
  paths = [f"/results/{line['id']}" for line in lines]
  for folder in ("results", "uploads"):
    paths += [f"/{folder}/{name}" for name in (
      "other.png", "00007.mp4", "../secret.png", "../../secret.png", "..%2fsecret.png", "%2e%2e/secret.png",
      "%2e%2e%2f%2e%2e%2fsecret.png", str(secret), f"/{secret}", key, f"{key}.png", "..", ".", "%00", "",
      "..\\secret.png", "\\\\host\\secret.png",
    )]  # fmt: skip
  paths += [str(secret), "/../secret.png", "/page.py", "/app.py", "/%2e%2e/serve/app.py", "/out/other.png"]
  for path in paths:
    status, _ = served.ask("GET", path)
    assert status in (404, 405, 307), (path, status)


def test_a_link_in_place_of_an_upload(serve, tmp_path):
  """A file that became a link after it was checked is neither read nor served."""
  served = serve(Fake())
  _, upload = served.upload(png(tmp_path))
  path = tmp_path / "out" / "uploads" / f"{upload['id']}.png"
  path.unlink()
  path.symlink_to(tmp_path / "dot.png")
  assert served.ask("GET", f"/uploads/{upload['id']}")[0] == 404
  assert served.submit(prompt="a ball", task="image_to_video", image=upload["id"])[0] == 400


@pytest.mark.parametrize(
  ("host", "origin", "allowed"),
  [
    ("127.0.0.1:{port}", None, True),
    ("127.0.0.1:{port}", "http://127.0.0.1:{port}", True),
    ("localhost:{port}", "http://localhost:{port}", True),
    ("[::1]:{port}", "http://[::1]:{port}", True),
    ("192.168.1.7:{port}", "http://192.168.1.7:{port}", True),
    ("127.0.0.1:{port}", "http://evil.example", False),
    ("127.0.0.1:{port}", "http://127.0.0.1:1", False),
    ("127.0.0.1:{port}", "null", False),
    ("127.0.0.1:{port}", "http://[", False),
    ("127.0.0.1:{port}", "", False),
    ("evil.example:{port}", "http://evil.example:{port}", False),
    ("evil.example", None, False),
    ("127.0.0.1.evil.example", None, False),
    ("evil.example@127.0.0.1", None, False),
    ("127.0.0.1/evil.example", None, False),
    ("[", None, False),
    ("", None, False),
  ],
)
def test_other_web_sites_are_refused(serve, host, origin, allowed):
  served = serve(Fake())
  headers = {"Host": host.format(port=served.port)}
  headers |= {} if origin is None else {"Origin": origin.format(port=served.port)}
  for method, path, body in (("POST", "/requests", '{"prompt": "a ball"}'), ("GET", "/state", None)):
    status, answer = served.ask(method, path, body, headers)
    assert status == (200 if allowed else 403) or (not host and status == 400)
    assert allowed or "error" in answer
  assert len(served.jobs()) == allowed


# --- the program


@contextlib.contextmanager
def started(out, *arguments):
  """`python -m launch.serve` -> (process, port); killed at the end."""
  environment = {**os.environ, "XLA_FLAGS": conftest.DEVICES.format(1), "PYTHONPATH": str(conftest.ROOT)}
  command = [sys.executable, "-m", "launch.serve", "--port=0", f"--out={out}", *arguments]
  process = subprocess.Popen(
    command, cwd=conftest.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )
  try:
    line = process.stdout.readline()
    assert line.startswith("open http://"), line + process.stdout.read()
    yield process, int(line.split(" in a browser")[0].rpartition(":")[2])
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_cannot_be_had_is_one_line(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as other:
    with pytest.raises(BadInput, match="another --port"):
      program.listen("127.0.0.1", other.getsockname()[1])
  program.own(tmp_path / "out")
  with pytest.raises(BadInput, match="another launch.serve"):
    program.own(tmp_path / "out")
  with pytest.raises(BadInput, match="a folder of this machine"):
    program.own("gs://bucket/out")


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium is installed")
def test_in_a_browser(tmp_path):
  """The program, with the model that ships: a prompt is typed, its progress and its video are seen. An image
  is chosen. SIGTERM ends it.
  """
  with (
    started(tmp_path / "out", "--host=0.0.0.0") as (process, port),
    Chromium(tmp_path / "profile") as browser,
  ):
    assert "every machine that reaches this one" in process.stdout.readline()
    browser.open(f"http://127.0.0.1:{port}/")
    browser.wait("document.querySelector('#prompt')")
    prompt = "a red ball <img src=x onerror='document.title=1'>"
    browser.type("#prompt", prompt)
    browser.type("#size", "32, 32")
    browser.type("#frames", "5")
    browser.type("#steps", "100")
    browser.run("""
      seen = [];
      new MutationObserver(() => seen.push(document.querySelector('.stage').innerText))
        .observe(document.querySelector('#jobs'), {subtree: true, childList: true});
      document.querySelector('#make').click()""")
    browser.wait("document.querySelector('.card.done video')?.readyState >= 2")
    assert any("of 100" in text for text in browser.run("seen"))
    assert browser.run("document.querySelector('.card .prompt').textContent") == prompt
    assert browser.run("document.querySelector('.card video').videoWidth") == 32
    assert browser.run("document.title") == "sora_jax"
    assert browser.run("document.querySelectorAll('.card .prompt *').length") == 0

    # fields follow the task, and what is wrong is said beside the button
    visible = (
      "[...document.querySelectorAll('input[type=file]')].filter(e => e.offsetParent).map(e => e.id).join()"
    )
    assert browser.run(visible) == ""
    browser.run("document.querySelector('#task').value = 'image_to_video'; choose()")
    assert browser.run(visible) == "image,last_image"
    browser.run("document.querySelector('#make').click()")
    browser.wait("document.querySelector('#problem').textContent.startsWith('image_to_video needs image')")
    png(tmp_path)
    browser.choose_file("#image", tmp_path / "dot.png")
    browser.wait("document.querySelector('.thumb img')?.naturalWidth == 30")
    browser.type("#steps", "0")  # 1000: long enough to be stopped
    browser.run("document.querySelector('#make').click()")
    browser.wait("document.querySelector('.card.running .stage')?.innerText.includes('of 1000')")
    browser.size(390, 844, mobile=True)
    assert browser.run("document.documentElement.scrollWidth <= 390")
    assert [text for text in browser.complaints() if "400 (Bad Request)" not in text] == []

    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(30) == 75, rest
    assert "asked to stop" in rest and "1 requests were not made" in rest and "Traceback" not in rest
    browser.wait("!document.querySelector('#lost').hidden")
  (line,) = sample.read_manifest(tmp_path / "out").values()
  assert line["prompt"] == prompt and (tmp_path / "out" / line["path"]).exists()
