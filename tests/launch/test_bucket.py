"""All in a bucket: encode, train, kill, go on, sample, against an emulator of Google Cloud Storage.

bash tests/run.sh faults -k bucket
"""

import http
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

from launch import hosts
from tests import conftest
from tests.launch import test_kills

pytestmark = pytest.mark.faults
pytest.importorskip("gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server")


class Bucket:
  """gs://bucket, in the memory of this process."""

  def __init__(self, cache):
    port = hosts.free_port()
    self.url = f"http://127.0.0.1:{port}"
    self.server = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    self.environment = {
      "STORAGE_EMULATOR_HOST": self.url,
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "SORA_JAX_CACHE": str(cache),
      "GCE_METADATA_HOST": "127.0.0.1:1",  # nobody to ask for credentials
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else a call takes a minute
    }

  def names(self, prefix):
    """Names of the objects under a prefix, without it."""
    query = urllib.parse.urlencode({"prefix": f"{prefix}/"})
    with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?{query}") as answer:
      return [item["name"].removeprefix(f"{prefix}/") for item in json.load(answer).get("items", ())]

  def read(self, name):
    with urllib.request.urlopen(
      f"{self.url}/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}?alt=media"
    ) as answer:
      return answer.read()


def keep_generations(monkeypatch):
  """Has the emulator keep what Google promises and it leaves out: generations of what is read, and conditions
  on them. TensorStore relies on both where several of its writers change one file.
  """
  objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
  download, upload = objects.download, objects._media_upload

  def generation(storage, request, name):
    try:
      return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except objects.NotFound:
      return "0"

  def download_with_generation(request, response, storage, *args, **kwargs):
    now = generation(storage, request, request.params["object_id"])
    if request.query.get("ifGenerationNotMatch", [None])[0] == now != "0":
      response.status = http.HTTPStatus.NOT_MODIFIED
      return
    response["x-goog-generation"] = now
    download(request, response, storage, *args, **kwargs)

  def upload_if(request, response, storage):
    wanted = request.query.get("ifGenerationMatch", [None])[0]
    if wanted not in (None, generation(storage, request, request.query["name"][0])):
      response.status = http.HTTPStatus.PRECONDITION_FAILED
      return
    upload(request, response, storage)

  monkeypatch.setattr(objects, "download", download_with_generation)
  monkeypatch.setattr(objects, "_media_upload", upload_if)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  keep_generations(monkeypatch)
  bucket = Bucket(tmp_path / "cache")
  bucket.server.start()
  yield bucket
  bucket.server.stop()


def start(bucket, program, *flags):
  environment = os.environ | bucket.environment | {"XLA_FLAGS": conftest.DEVICES.format(1)}
  environment |= {"PYTHONPATH": str(conftest.ROOT), "PYTHONSAFEPATH": "1"}
  return subprocess.Popen(
    [sys.executable, "-m", f"launch.{program}", *map(str, flags)],
    cwd=conftest.ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(child):
  out, errors = child.communicate(timeout=900)
  assert child.returncode == 0, out[-2000:] + errors[-3000:]
  return out


def curve(content):
  lines = [json.loads(line) for line in content.decode().splitlines()]
  return [(line["step"], line["loss"], line["data_checksum"]) for line in lines]


def test_all_in_a_bucket(tmp_path, bucket):
  """Killed after its first checkpoint, a run goes on, and ends as one on a disk does."""
  for out in (tmp_path / "records", "gs://bucket/records"):
    assert "6 clips of 6 files" in finish(start(bucket, "encode", "--source=shapes:6", f"--out={out}"))
  assert "nothing to do" in finish(start(bucket, "encode", "--source=shapes:6", f"--out={out}"))
  names = {path.name for path in (tmp_path / "records").iterdir()} - {".lock"}
  assert {name.split("/")[0] for name in bucket.names("records")} == names
  (tmp_path / "page.py").write_text(test_kills.PAGE)
  flags = (
    f"--config={tmp_path / 'page.py'}",
    "--config.steps=10",
    "--config.sample.steps=2",
    "--config.sample.frames=5",
  )
  disk = (f"--config.data.path={tmp_path / 'records'}", f"--workdir={tmp_path / 'disk'}")
  finish(start(bucket, "train", *flags, *disk))
  flags += ("--config.data.path=gs://bucket/records", "--workdir=gs://bucket/W")
  child = start(bucket, "train", *flags)
  while "4.json" not in bucket.names("W/manifests"):
    assert child.poll() is None, child.stderr.read()[-3000:]
    time.sleep(0.05)
  child.send_signal(signal.SIGKILL)
  child.communicate()
  assert "going on from the checkpoint of step" in finish(start(bucket, "train", *flags))
  assert curve(bucket.read("W/metrics.jsonl")) == curve((tmp_path / "disk" / "metrics.jsonl").read_bytes())
  assert {"4.json", "8.json", "10.json"} >= set(bucket.names("W/manifests")) > {"10.json"}
  assert any("tfevents" in name for name in bucket.names("W/metrics"))
  prompt = ("--prompt=a red ball moves left", "--out=gs://bucket/out", "--workdir=gs://bucket/W")
  assert "1 made" in finish(start(bucket, "sample", *prompt))
  assert "1 were there already" in finish(start(bucket, "sample", *prompt))
  (name,) = [name for name in bucket.names("out") if name.endswith(".mp4")]
  disk = ("--prompt=a red ball moves left", f"--out={tmp_path / 'out'}", f"--workdir={tmp_path / 'disk'}")
  finish(start(bucket, "sample", *disk))
  assert bucket.read(f"out/{name}") == (tmp_path / "out" / name).read_bytes()


def test_two_processes_in_a_bucket(tmp_path, bucket):
  """Each hashes what it wrote, and both go on from it."""
  test_kills.write_records(tmp_path / "records")
  (tmp_path / "page.py").write_text(test_kills.PAGE)
  flags = (
    f"--config={tmp_path / 'page.py'}",
    f"--config.data.path={tmp_path / 'records'}",
    "--config.mesh.fsdp=2",
    "--workdir=gs://bucket/W",
  )
  for steps in (4, 5):
    said = finish(start(bucket, "hosts", "--count=2", "launch.train", *flags, f"--config.steps={steps}"))
  assert "going on from the checkpoint of step 4" in said
  manifest = json.loads(bucket.read("W/manifests/4.json"))
  assert {name.split("/")[1] for name in manifest if name.startswith("opt/ocdbt")} == {
    "ocdbt.process_0",
    "ocdbt.process_1",
  }
  assert sorted(bucket.names("W/manifests")) == ["4.json", "5.json"]
