"""launch.tpu.queued_resource and host.sh, with a gcloud that is a script and a host that is a folder."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests import conftest

TRAIN = ("launch.train", "--config=configs/t2v.py:tiny", "--workdir=gs://b/w")
FLAGS = ("--name=run1", "--zone=us-east5-a", "--type=v5p-16", "--every=0.1")

# A slice that goes through the states of a queued resource, one at each look; ssh is a shell in a folder.
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
fake = pathlib.Path(os.environ["FAKE"])
words = sys.argv[1:]
with open(fake / "calls", "a") as calls:
  calls.write(json.dumps(words) + "\\n")
action = " ".join(words[2:4])
state, home = fake / "state", fake / "home"
now = state.read_text()
if action == "queued-resources create":
  state.write_text("WAITING_FOR_RESOURCES")
elif action == "queued-resources delete":
  state.write_text("")
elif action == "queued-resources describe":
  if not now:
    sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource")
  print(now)
  steps = dict(WAITING_FOR_RESOURCES="PROVISIONING", PROVISIONING="ACTIVE", SUSPENDING="SUSPENDED")
  state.write_text(steps.get(now, now))
elif action == "tpu-vm describe":
  print("READY" if now == "ACTIVE" else "PREEMPTED")
elif action == "tpu-vm scp":
  shutil.copy(words[4], home / words[5].split(":")[1])
elif action == "tpu-vm ssh":
  line = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
  environment = dict(os.environ, HOME=str(home))
  sys.exit(subprocess.run(["bash", "-c", line], cwd=home, env=environment).returncode)
"""

# The python of the host: each start takes the next line of `outcomes`, and does as it says.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
fake = pathlib.Path(os.environ["FAKE"])
with open(fake / "starts", "a") as starts:
  starts.write(json.dumps([sys.argv[1:], os.environ.get("EXTRA", ""), os.getcwd()]) + "\\n")
outcome, *rest = (fake / "outcomes").read_text().split()
(fake / "outcomes").write_text(" ".join(rest))
print("training", flush=True)
if outcome == "taken":
  (fake / "state").write_text("SUSPENDING")
  outcome = "1"
if outcome == "waits":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  (fake / "waiting").touch()
  while not (fake / "finish").exists():
    time.sleep(0.05)
  outcome = "0"
sys.exit(int(outcome))
"""


class Cloud:
  """The fake, in a folder: what it was asked for, and how programs end there."""

  def __init__(self, folder, *outcomes):
    self.folder = folder
    lock = (
      subprocess.run(["sha256sum", conftest.ROOT / "requirements.lock"], capture_output=True, check=True)
      .stdout[:12]
      .decode()
    )
    for path, text in {
      "bin/gcloud": GCLOUD,
      f"home/.sora_jax/venv-{lock}/bin/python": PYTHON,
      f"home/.sora_jax/venv-{lock}/done": "",  # installed already
      "state": "",
      "calls": "",
      "starts": "",
      "outcomes": " ".join(outcomes),
    }.items():
      (folder / path).parent.mkdir(parents=True, exist_ok=True)
      (folder / path).write_text(text)
      (folder / path).chmod(0o755)
    self.environment = {
      **os.environ,
      "PYTHONPATH": str(conftest.ROOT),
      "PATH": f"{folder}/bin:{os.environ['PATH']}",
      "FAKE": str(folder),
    }

  def begin(self, *arguments, command=TRAIN):
    words = [
      sys.executable,
      "-m",
      "launch.tpu.queued_resource",
      *FLAGS,
      *arguments,
      *(("--", *command) if command else ()),
    ]
    return subprocess.Popen(
      words,
      cwd=conftest.ROOT,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run(self, *arguments, code=0, **options):
    child = self.begin(*arguments, **options)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == code, output[-2500:]
    return output

  def actions(self):
    return [" ".join(call[2:4]) for call in self.calls()]

  def calls(self):
    return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

  def starts(self):
    return [json.loads(line) for line in (self.folder / "starts").read_text().splitlines()]

  def until(self, name):
    deadline = time.monotonic() + 60
    while not (self.folder / name).exists():
      assert time.monotonic() < deadline, f"no {name}"
      time.sleep(0.05)


def test_from_nothing_to_the_end(tmp_path):
  """The words of the command arrive, in the folder of the repository; the program's lines are seen."""
  words = [*TRAIN, "--p=a \"b\" 'c'", "--q=$HOME $(X) `id` \\", "--r=;|& *"]
  cloud = Cloud(tmp_path, "0")
  output = cloud.run("--spot", "--project=p", "--create=--reserved", "--env=EXTRA=x y$Z", command=words)
  [(arguments, extra, folder)] = cloud.starts()
  assert arguments == ["-m", *words] and extra == "x y$Z"
  assert "training" in output and (pathlib.Path(folder) / "configs/t2v.py").exists()
  [create] = [call for call in cloud.calls() if call[3] == "create"]
  expected = (
    "run1",
    "--node-id=run1",
    "--accelerator-type=v5p-16",
    "--runtime-version=v2-alpha-tpuv5",
    "--spot",
    "--reserved",
  )
  assert set(expected) <= set(create)
  assert all({"--zone=us-east5-a", "--project=p"} <= set(call) for call in cloud.calls())
  waits = [
    line.rpartition(": ")[2] for line in output.splitlines() if line.startswith("run1 (v5p-16: 8 chips")
  ]
  assert waits == ["not there yet", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]


def test_it_starts_again_after_75_and_ends_with_0(tmp_path):
  cloud = Cloud(tmp_path, "75", "75", "0")
  cloud.run("--restarts=0")
  assert len(cloud.starts()) == 3 and cloud.actions().count("queued-resources create") == 1


def test_a_slice_that_was_taken_away_is_asked_for_again(tmp_path):
  cloud = Cloud(tmp_path, "taken", "0")
  output = cloud.run("--spot", "--restarts=0")
  actions = [action for action in cloud.actions() if action.split()[1] in ("create", "delete")]
  assert actions == ["queued-resources create", "queued-resources delete", "queued-resources create"]
  assert len(cloud.starts()) == 2 and "taken away" in output


@pytest.mark.parametrize(
  ("outcomes", "code", "starts"), [(["2", "0"], 2, 1), (["1", "9", "1", "0"], 1, 3), (["1", "1", "0"], 0, 3)]
)
def test_other_codes(tmp_path, outcomes, code, starts):
  """Bad input ends it at once, failures after two restarts."""
  cloud = Cloud(tmp_path, *outcomes)
  cloud.run("--restarts=2", code=code)
  assert len(cloud.starts()) == starts


def test_ctrl_c_saves_and_ends_with_75(tmp_path):
  cloud = Cloud(tmp_path, "waits")
  child = cloud.begin()
  cloud.until("waiting")
  child.send_signal(signal.SIGINT)
  output, _ = child.communicate(timeout=60)
  assert child.returncode == 75, output
  assert len(cloud.starts()) == 1 and (tmp_path / "state").read_text() == "ACTIVE"


def test_killed_it_is_found_again(tmp_path):
  """The program goes on without this command, which follows it when run again, and ends with its code."""
  cloud = Cloud(tmp_path, "waits", "1")
  child = cloud.begin()
  cloud.until("waiting")
  child.kill()
  child.wait(60)
  output = cloud.run("--restarts=0", command=("launch.train", "--workdir=gs://b/another"), code=2)
  assert "another command of this name is running" in output
  again = cloud.begin()
  while sum("host.sh run" in word for call in cloud.calls() for word in call) < 3:
    time.sleep(0.05)
  time.sleep(0.5)
  (tmp_path / "finish").touch()
  output, _ = again.communicate(timeout=60)
  assert again.returncode == 0, output
  assert len(cloud.starts()) == 1 and cloud.actions().count("queued-resources create") == 1


def test_a_container(tmp_path):
  """With --image the hosts pull it and start the command in it."""
  output = Cloud(tmp_path).run("--dry-run", "--image=example/image:1", "--bucket=b", "--env=EXTRA=x y")
  lines = [shlex.split(line) for line in output.splitlines() if "host.sh" in line]
  install, run = (word for line in lines[:2] for word in line if word.startswith("--command="))
  assert "host.sh install example/image:1" in install and install.endswith("host.sh mount b")
  words = shlex.split(run)
  assert words[-len(TRAIN) - 2 :] == ["python", "-m", *TRAIN]
  assert {
    "docker",
    "--privileged",
    "--net=host",
    "EXTRA=x y",
    "--volume=/gcs/b:/gcs/b",
    "example/image:1",
  } <= set(words)


def test_dry_run_needs_no_gcloud(tmp_path):
  """It prints every command that a real run makes, and makes none."""
  cloud = Cloud(tmp_path, "0")
  output = cloud.run("--dry-run")
  assert not cloud.calls()
  planned = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("gcloud")]
  cloud.environment["PATH"] = str(tmp_path)
  assert cloud.run("--dry-run") == output
  cloud.environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
  cloud.run()
  assert all(same(call, planned) for call in cloud.calls())
  assert len(planned) == 8 and any(word.startswith("tar -czf") for word in output.splitlines())


def same(call, planned):
  """Is this call among the planned ones, but for the time that names an attempt?"""
  plain = [" ".join(words).replace("run run1 1 ", "run run1 T ") for words in planned]
  text = " ".join(call)
  if "host.sh run run1 " in text:
    head, tail = text.split("run run1 ")
    text = f"{head}run run1 T {tail.partition(' ')[2]}"
  return text in plain


def test_delete(tmp_path):
  cloud = Cloud(tmp_path)
  cloud.run("--delete", command=())
  [call] = cloud.calls()
  assert call[2:] == ["queued-resources", "delete", "run1", "--force", "--quiet", "--zone=us-east5-a"]


@pytest.mark.parametrize(
  ("arguments", "command", "says"),
  [
    (["--type=v5p-9"], TRAIN, "size"),
    (["--type=tpu7x-16"], TRAIN, "launch.tpu.jobset"),
    (["--zone="], TRAIN, "--zone"),
    ([], (), "after two dashes"),
    ([], ("launch.trian",), "launch.train_vae"),
    (["--name="], TRAIN, "--name"),
    (["--workers=2"], TRAIN, "workers"),
  ],
)
def test_bad_input(tmp_path, arguments, command, says):
  output = Cloud(tmp_path).run(*arguments, command=command, code=2)
  assert says in output and output.count("\n") == 1 and output.startswith("launch.tpu.queued_resource: ")


def test_no_gcloud(tmp_path):
  cloud = Cloud(tmp_path)
  cloud.environment["PATH"] = str(tmp_path)
  output = cloud.run(code=2)
  assert "no gcloud on PATH" in output and output.count("\n") == 1


def test_gcloud_that_cannot_ask_is_no_missing_slice(tmp_path):
  """Without a login nothing is created, and its own words are shown."""
  cloud = Cloud(tmp_path)
  (tmp_path / "bin/gcloud").write_text("#!/bin/sh\necho 'ERROR: no credentialed account' >&2\nexit 1\n")
  output = cloud.run(code=1)
  assert "no credentialed account" in output and "create" not in output
