"""launch.tpu.jobset: what its manifest says, and what it asks kubectl for (a fake one)."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from launch.tpu import slices
from tests import conftest

TOPOLOGIES = ("v5e:16x16", "v5p:2x2x1", "v5p:4x4x4", "v6e:16x16", "tpu7x:2x2x1", "tpu7x:4x4x4")
TRAIN = ("launch.train", "--config=configs/t2v.py:tiny", "--workdir=gs://b/w")
KUBECTL = """#!/bin/sh
echo "$@" >> "$FAKE/calls"
case "$*" in
  *" get "*) cat "$FAKE/state" ;;
  *" apply "*) cat > "$FAKE/applied" ;;
  *" delete "*) : > "$FAKE/state" ;;
esac
"""


def jobset(*arguments, command=TRAIN, code=0, **environment):
  words = [
    sys.executable,
    "-m",
    "launch.tpu.jobset",
    "--name=run1",
    *arguments,
    *(("--", *command) if command else ()),
  ]
  environment = {**os.environ, "PYTHONPATH": str(conftest.ROOT), **environment}
  done = subprocess.run(
    words, cwd=conftest.ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == code, done.stdout[-1500:] + done.stderr[-1500:]
  return done


def manifest(*arguments, **options):
  """The manifest of a dry run, which is YAML as a whole."""
  return yaml.safe_load(jobset("--image=example/image:1", "--dry-run", *arguments, **options).stdout)


def parts(made):
  """A manifest -> (specification of the Jobs, of their pods, the container)."""
  [replicated] = made["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  return job, pod, container


def expand(text):
  """What Kubernetes makes of a word where no variable is set: $$ becomes $, and $(NAME) stays
  (k8s.io/kubernetes, third_party/forked/golang/expansion).
  """
  return re.sub(r"\$\$", "$", text)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_hosts_chips_and_nodes(topology):
  kind = slices.parse(topology)
  job, pod, container = parts(manifest(f"--topology={topology}"))
  assert job["parallelism"] == job["completions"] == kind.hosts and job["completionMode"] == "Indexed"
  assert (
    container["resources"]["limits"]
    == container["resources"]["requests"]
    == {"google.com/tpu": kind.chips_per_host}
  )
  assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == kind.chips
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": kind.accelerator,
    "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
  }
  assert pod["terminationGracePeriodSeconds"] >= 300 and pod["restartPolicy"] == "Never"


def test_cpu_hosts_find_each_other():
  """As launch/common/processes.py reads it."""
  encode = ("launch.encode", "--source=clips", "--out=gs://b/r")
  made = manifest("--cpu=3", "--cores=4", "--memory=8Gi", command=encode)
  job, pod, container = parts(made)
  env = {entry["name"]: entry.get("value") or entry["valueFrom"] for entry in container["env"]}
  assert job["parallelism"] == job["completions"] == 3 and not pod["nodeSelector"]
  assert container["resources"]["limits"] == {"cpu": "4", "memory": "8Gi"}
  first = f"{made['metadata']['name']}-{made['spec']['replicatedJobs'][0]['name']}-0-0"
  assert env["JAX_COORDINATOR_ADDRESS"].split(":")[0] == f"{first}.{made['metadata']['name']}"
  assert env["JAX_NUM_PROCESSES"] == "3" and env["JAX_PLATFORMS"] == "cpu"
  assert "job-completion-index" in env["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]


def test_a_bucket_is_mounted():
  """At the same place on all hosts; a path elsewhere is warned of."""
  encode = ("launch.encode", "--source=/gcs/b/clips", "--out=/gcs/b/records")
  done = jobset("--image=i", "--cpu=2", "--bucket=b", "--dry-run", command=encode)
  _, pod, container = parts(yaml.safe_load(done.stdout))
  volumes = {volume["name"]: volume for volume in pod["volumes"]}
  mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
  assert mounts["/gcs/b"]["csi"]["volumeAttributes"]["bucketName"] == "b"
  assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"} and not done.stderr
  done = jobset("--image=i", "--cpu=2", "--dry-run", command=encode)
  assert "each host has its own disk" in done.stderr and "csi" not in done.stdout


def after(made, code, condition=None):
  """What becomes of the job when a pod ends with this exit code -> action of JobSet.

  The two controllers in short: kubernetes/pkg/controller/job/pod_failure_policy.go writes the message,
  jobset/pkg/controllers/failure_policy.go reads it.
  """
  job, _, container = parts(made)
  assert job["backoffLimit"] == 0
  reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
  for at, rule in enumerate(job["podFailurePolicy"]["rules"]):
    assert rule["action"] == "FailJob"
    if "onExitCodes" in rule:
      assert (
        rule["onExitCodes"]["containerName"] == container["name"] and rule["onExitCodes"]["operator"] == "In"
      )
      if code in rule["onExitCodes"]["values"]:
        what = f"Container {container['name']} for pod default/run1-slice-0-7-x failed with exit code {code}"
        reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {at}"
        break
    elif condition and condition == rule["onPodConditions"][0]["type"]:
      what = f"Pod default/run1-slice-0-7-x has condition {condition}"
      reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {at}"
      break
  for rule in made["spec"]["failurePolicy"]["rules"]:
    if reason in rule["onJobFailureReasons"] and any(
      re.search(p, message) for p in rule["onJobFailureMessagePatterns"]
    ):
      return rule["action"]
  return "RestartJobSet"  # the default, as often as maxRestarts says


def test_exit_codes():
  made = manifest("--topology=v5p:4x4x4", "--restarts=5")
  assert made["spec"]["failurePolicy"]["maxRestarts"] == 5
  assert made["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
  assert after(made, 75) == after(made, 75, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
  assert after(made, 137, "DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
  assert after(made, 2) == "FailJobSet"
  assert {after(made, code) for code in (1, 12, 25, 137, 175, 255)} == {"RestartJobSet"}


def test_words_arrive_as_they_were_given():
  words = ["--p=a \"b\" 'c'", "--q=$HOME $(X) $$ ${Y}", "--r=\\ %s #; é 😀", "--s={{name}} - : [x]", "--t="]
  made = manifest(
    "--topology=v5p:2x2x1", *(f"--env=V{i}={word}" for i, word in enumerate(words)), command=[*TRAIN, *words]
  )
  _, _, container = parts(made)
  assert [expand(word) for word in container["command"]] == ["python", "-m", *TRAIN, *words]
  assert [expand(entry["value"]) for entry in container["env"]] == words


def test_options():
  made = manifest(
    "--topology=v6e:4x4",
    "--slices=3",
    "--queue=team",
    "--namespace=video",
    "--service_account=writer",
    "--spot",
    "--grace=900",
  )
  _, pod, _ = parts(made)
  assert made["spec"]["replicatedJobs"][0]["replicas"] == 3
  assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
  assert made["metadata"]["namespace"] == "video" and pod["serviceAccountName"] == "writer"
  assert (
    pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and pod["terminationGracePeriodSeconds"] == 900
  )


@pytest.mark.parametrize(
  ("arguments", "command", "says"),
  [
    (["--topology=v5p:4x4"], TRAIN, "v5p has no slice"),
    (["--topology=v9:4x4"], TRAIN, "generations"),
    ([], TRAIN, "--cpu"),
    (["--cpu=2", "--topology=v5p:4x4x4"], TRAIN, "either"),
    (["--cpu=2"], (), "after two dashes"),
    (["--cpu=2"], ("launch.trian",), "launch.train_vae"),
    (["--cpu=2"], ("rm", "-rf"), "none of our programs"),
    (["--cpu=2", "--name=Run_1"], TRAIN, "lower-case"),
    (["--cpu=2", "--env=X"], TRAIN, "KEY=VALUE"),
    (["--cpu=2", "--queue=a b"], TRAIN, "--queue"),
    (["--cpu=2", "--slices=2"], TRAIN, "--slices"),
    (["--topology=v5p:2x2x1", "--slices=2"], TRAIN, "several hosts"),
    (["--cpu=2", "--bucket=gs://b"], TRAIN, "--bucket"),
    (["--cpu=2", "--image="], TRAIN, "docker build"),
    (["--cpu=2", "--grace=1"], TRAIN, "grace"),
  ],
)
def test_bad_input(arguments, command, says):
  done = jobset("--image=i", "--dry-run", *arguments, command=command, code=2)
  assert (
    says in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("launch.tpu.jobset: ")
  )


def test_no_kubectl(tmp_path):
  done = jobset("--image=i", "--cpu=2", code=2, PATH=str(tmp_path))
  assert "no kubectl on PATH" in done.stderr and done.stderr.count("\n") == 1


def test_a_job_is_started_once_and_again_when_it_has_ended(tmp_path):
  (tmp_path / "kubectl").write_text(KUBECTL)
  (tmp_path / "kubectl").chmod(0o755)
  fake = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
  state, calls, start = tmp_path / "state", tmp_path / "calls", ("--image=i", "--topology=v5p:4x4x4")
  state.write_text("")
  jobset(*start, **fake)
  assert json.dumps(["python", "-m", *TRAIN]) in (tmp_path / "applied").read_text()
  state.write_text("run1 ")
  assert "goes on" in jobset(*start, **fake).stdout
  assert calls.read_text().count("apply") == 1 and "delete" not in calls.read_text()
  state.write_text("run1 Failed")
  jobset(*start, **fake)
  assert re.search(r"delete jobset run1.*\n.*apply", calls.read_text())
  jobset("--delete", command=(), **fake)
  assert calls.read_text().splitlines()[-1] == "--namespace=default delete jobset run1 --ignore-not-found"
