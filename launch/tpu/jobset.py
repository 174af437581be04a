"""Runs a program on TPU or CPU hosts of a GKE cluster, as a JobSet.

  python -m launch.tpu.jobset --name=run1 --topology=v5p:4x4x4 --image=IMAGE \\
    -- launch.train --config=... --workdir=gs://...
  python -m launch.tpu.jobset --name=records --cpu=32 --image=IMAGE \\
    -- launch.encode --source=... --out=gs://...
  python -m launch.tpu.jobset --name=run1 --delete

IMAGE is built from launch/tpu/Dockerfile. kubectl must point at the cluster, which has JobSet and node pools
of this topology. The manifest is launch/tpu/jobset.yaml, filled in; --dry-run prints it, with the commands as
comments, so that `... --dry-run | kubectl apply -f -` does the same. --bucket=BUCKET mounts a bucket at
/gcs/BUCKET. This command ends once the cluster has the job. Run again, it says how that is, and starts a job
that has ended anew, from its last checkpoint.

The cluster restarts the job: after exit code 75 and after disruptions always, after code 2 never, after
others --restarts times. Pods have --grace seconds to save. The default, 600, is for a step, a checkpoint on
its way and one more: a few minutes where a host writes some 15 GB at 100 MB/s. GKE grants it up to an hour
when it upgrades nodes, and up to ten minutes when it removes them; spot capacity is gone after 30 s, whatever
is asked: there the last checkpoint counts (--config.checkpoint_every).

Processes find each other as launch/common/processes.py says. On TPU hosts GKE sets TPU_WORKER_ID and
TPU_WORKER_HOSTNAMES, from the index of the pod and the headless service of the JobSet, and
MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID where --slices is above 1;
jax.distributed.initialize reads them. On CPU hosts the manifest sets JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID.

XPK is deprecated since August 2026. The `gcluster job submit` of cluster-toolkit, which takes its place, runs
the same image: --name=run1 --image=IMAGE --compute-type=tpu-v5p-slice --topology=4x4x4 --grace-period=10m
--restart-on-exit-codes=75 --restarts=100 --command="python -m launch.train ...". There 75 counts among
--restarts, and any other code ends the job.
"""

import json
import re

from absl import flags

from launch.common.progress import say
from launch.tpu import commands, slices
from sora_jax.errors import BadInput, Failure

FLAGS = flags.FLAGS
GRACE = 600
PORT = 8476  # of the first process, where the others join it


def define_flags():
  commands.define_flags()
  flags.DEFINE_boolean("delete", False, "delete the job instead; its pods save first")
  flags.DEFINE_string("topology", "", "of a slice, as v5p:4x4x4; the names of launch.preflight")
  flags.DEFINE_integer("cpu", 0, "so many CPU hosts, instead of a slice", lower_bound=0)
  flags.DEFINE_string("cores", "8", "of a CPU host")
  flags.DEFINE_string("memory", "32Gi", "of a CPU host")
  flags.DEFINE_string("image", "", "container image, built from launch/tpu/Dockerfile")
  flags.DEFINE_integer("slices", 1, "so many slices as one job", lower_bound=1)
  flags.DEFINE_integer("grace", GRACE, "seconds that pods have to save", lower_bound=30, upper_bound=3600)
  flags.DEFINE_string("namespace", "default", "of Kubernetes")
  flags.DEFINE_string("queue", "", "LocalQueue of Kueue; empty: no queue")
  flags.DEFINE_string("service_account", "default", "of Kubernetes; one that may use the bucket")


def main(command):
  commands.check(command)
  kubectl = ["kubectl", f"--namespace={FLAGS.namespace}"]
  delete = [*kubectl, "delete", "jobset", FLAGS.name, "--ignore-not-found"]
  state = [*kubectl, "get", "jobset", FLAGS.name, "--ignore-not-found"]
  apply = [*kubectl, "apply", "-f", "-"]
  text = "" if FLAGS.delete else manifest(command)
  if FLAGS.dry_run:
    show(text, [delete] if FLAGS.delete else [state, apply])
    return
  commands.require("kubectl", "it (gcloud components install kubectl)")
  if FLAGS.delete:
    commands.do(delete)
    return
  was = running(state)
  if was == "Running":
    say(f"{FLAGS.name} is there already, and goes on")
  else:
    if was:
      say(f"{FLAGS.name} has ended ({was}); starting it again")
      commands.do(delete)
    say(f"starting {FLAGS.name} on {hosts_in_words()}")
    commands.do(apply, input=text, text=True)
  pods = f"-l jobset.sigs.k8s.io/jobset-name={FLAGS.name}"
  first = f"{pods},batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0"
  say(f"how it is: {' '.join(state)}; {' '.join(kubectl)} get pods {pods}")
  say(f"what it says: {' '.join(kubectl)} logs -f {first}")
  say(f"to stop it: python -m launch.tpu.jobset --name={FLAGS.name} --namespace={FLAGS.namespace} --delete")


def show(text, lines):
  """Prints the commands as comments, and the manifest: YAML as a whole."""
  for words in lines:
    print(f"# {' '.join(words)}")
  print(text, end="")


def running(state):
  """Of the job in the cluster: "" where there is none, Running, Completed or Failed."""
  words = [*state, "-o", "jsonpath={.metadata.name} {.status.terminalState}"]
  answer = commands.ask(words)
  if answer.returncode:
    raise Failure(f"kubectl cannot tell of {FLAGS.name}: {answer.stderr.strip()}")
  name, _, ended = answer.stdout.strip().partition(" ")
  return name and (ended or "Running")


def hosts_in_words():
  if FLAGS.cpu:
    return f"{FLAGS.cpu} CPU hosts"
  kind = slices.parse(FLAGS.topology)
  several = f"{FLAGS.slices} slices of " if FLAGS.slices > 1 else ""
  return f"{several}{FLAGS.topology}: {kind.chips} chips, {kind.hosts} hosts"


def manifest(command):
  """The template filled in; BadInput where flags are missing or at odds."""
  if bool(FLAGS.cpu) == bool(FLAGS.topology):
    raise BadInput("give either --topology, as v5p:4x4x4, or --cpu, the number of CPU hosts")
  kind = slices.parse(FLAGS.topology) if FLAGS.topology else None
  if FLAGS.slices > 1 and (not kind or kind.hosts == 1):
    raise BadInput(
      f"--slices={FLAGS.slices} is for slices of several hosts; all CPU hosts are given as --cpu"
    )
  if not FLAGS.image:
    raise BadInput(
      "no --image; build one: docker build -f launch/tpu/Dockerfile -t IMAGE . && docker push IMAGE"
    )
  for flag in ("namespace", "queue", "service_account"):
    if not re.fullmatch(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?", FLAGS[flag].value):
      raise BadInput(f"--{flag}={FLAGS[flag].value}: lower-case letters, digits, dashes and dots")
  values = common(command) | storage() | (tpu_hosts(kind) if kind else cpu_hosts())
  values["env"] = [
    *({"name": name, "value": escape(value)} for name, value in map(split_pair, FLAGS.env)),
    *values["env"],
  ]
  if FLAGS.spot:
    label = "cloud.google.com/gke-spot"
    values["node_selector"] = values["node_selector"] | {label: "true"}
    values["tolerations"] = [*values["tolerations"], {"key": label, "operator": "Exists"}]
  template = (commands.folder() / "jobset.yaml").read_text()
  return re.sub(r"\{\{(\w+)\}\}", lambda match: json.dumps(values[match[1]], ensure_ascii=False), template)


def common(command):
  return {
    "name": FLAGS.name,
    "namespace": FLAGS.namespace,
    "labels": {"kueue.x-k8s.io/queue-name": FLAGS.queue} if FLAGS.queue else {},
    "annotations": {},
    "restarts": FLAGS.restarts,
    "slices": FLAGS.slices,
    "grace": FLAGS.grace,
    "service_account": FLAGS.service_account,
    "image": FLAGS.image,
    "command": [escape(word) for word in commands.python(command)],
  }


def storage():
  """Shared memory, and the bucket, by the CSI driver of GKE."""
  # workers of the data pipeline pass batches through it; 64 MB by default
  volumes, mounts = (
    [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    [{"name": "shm", "mountPath": "/dev/shm"}],
  )
  annotations = {}
  if FLAGS.bucket:
    options = {"bucketName": FLAGS.bucket, "mountOptions": "implicit-dirs"}
    csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": options}
    volumes.append({"name": "bucket", "csi": csi})
    mounts.append({"name": "bucket", "mountPath": f"/gcs/{FLAGS.bucket}"})
    # 0: no limit; files are written whole to the disk of the node first
    limits = {f"gke-gcsfuse/{what}-limit": "0" for what in ("cpu", "memory", "ephemeral-storage")}
    annotations = {"gke-gcsfuse/volumes": "true", **limits}
  return {"volumes": volumes, "mounts": mounts, "pod_annotations": annotations}


def tpu_hosts(kind):
  return {
    # each slice on a node pool of its own
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    "hosts": kind.hosts,
    "node_selector": {
      "cloud.google.com/gke-tpu-accelerator": kind.accelerator,
      "cloud.google.com/gke-tpu-topology": kind.topology,
    },
    "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
    "resources": {"google.com/tpu": kind.chips_per_host},
    "env": [],
  }


def cpu_hosts():
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  return {
    "hosts": FLAGS.cpu,
    "node_selector": {},
    "tolerations": [],
    "resources": {"cpu": FLAGS.cores, "memory": FLAGS.memory},
    "env": [
      {"name": "JAX_PLATFORMS", "value": "cpu"},
      # POD.SERVICE, as JobSet names them
      {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{FLAGS.name}-slice-0-0.{FLAGS.name}:{PORT}"},
      {"name": "JAX_NUM_PROCESSES", "value": str(FLAGS.cpu)},
      {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ],
  }


def split_pair(pair):
  name, _, value = pair.partition("=")
  return name, value


def escape(text):
  """Kubernetes replaces $(NAME) in commands and values, and makes $$ one $."""
  return text.replace("$", "$$")


if __name__ == "__main__":
  commands.start(main, define_flags)
