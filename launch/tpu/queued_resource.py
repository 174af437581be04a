"""Runs a program on all hosts of a Cloud TPU slice, requested as a queued resource by gcloud.

  python -m launch.tpu.queued_resource --name=run1 --type=v5p-128 --zone=us-east5-a \\
    -- launch.train --config=... --workdir=gs://...
  python -m launch.tpu.queued_resource --name=run1 --zone=us-east5-a --delete

Asks for the slice, waits until it is there, installs this repository on its hosts (or pulls --image), and
runs the command on all of them: they find each other by the metadata of the slice. Starts the command again
after exit code 75 where nobody here asked to stop, and after failures --restarts times; where the slice was
taken away (spot), it asks for another one first. Ends with the program's exit code: 0, 2, 75, or 1 for all
others. The slice stays, and costs, until --delete.

Ctrl-C asks the program to save and to end, with 75. Killed, or cut off from the network, this command leaves
the program running: the same command follows it again. Before the first time: `gcloud auth login`,
`gcloud config set project PROJECT`, and `ssh-add ~/.ssh/google_compute_engine`, which gcloud needs for more
than one host. launch/tpu/host.sh is what runs there.

--type is gcloud's: v5p-128 counts cores, and has 64 chips; v5litepod-256 and v6e-256 count chips. TPU7x has
no queued resources: use launch.tpu.jobset. --bucket=BUCKET mounts a bucket at /gcs/BUCKET. --dry-run prints
every command.
"""

import hashlib
import pathlib
import shlex
import subprocess
import tempfile
import time

from absl import flags

from launch.common import children, program
from launch.common.progress import say
from launch.tpu import commands, slices
from sora_jax.errors import BadInput, Failure

FLAGS = flags.FLAGS
SHIPPED = ("LICENSE", "README.md", "setup.py", "requirements.lock", "configs", "data", "launch", "sora_jax")
# docs.cloud.google.com/tpu/docs/queued-resources
COMING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "DELETING")
UNREACHED = 255  # as of ssh
LOST = ("PREEMPTED", "TERMINATED", "STOPPING", "STOPPED", "DELETING", "")  # states of the node itself


def define_flags():
  commands.define_flags()
  flags.DEFINE_boolean("delete", False, "delete the slice instead; Ctrl-C first, if a program is to save")
  flags.DEFINE_string("type", "", "accelerator type of gcloud, as v5p-128")
  flags.DEFINE_string("zone", "", "where, as us-east5-a")
  flags.DEFINE_string("project", "", "empty: that of gcloud's configuration")
  flags.DEFINE_string("runtime_version", "", "empty: the one that goes with the type")
  flags.DEFINE_multi_string("create", [], "another flag of gcloud's `create`, as --create=--reserved")
  flags.DEFINE_string("image", "", "run in this container image instead; see launch/tpu/Dockerfile")
  flags.DEFINE_float("every", 30.0, "seconds between two looks at the slice", lower_bound=0.1)


class Pod:
  """A queued resource with one node, both called --name: the words of every command."""

  def __init__(self, command):
    self.name = FLAGS.name
    self.where = [f"--zone={FLAGS.zone}"] + ([f"--project={FLAGS.project}"] if FLAGS.project else [])
    self.delete = self._tpus("queued-resources", "delete", self.name, "--force", "--quiet")
    self.describe = self._tpus("queued-resources", "describe", self.name, "--format=value(state.state)")
    self.node = self._tpus("tpu-vm", "describe", self.name, "--format=value(state)")
    if FLAGS.delete:
      return
    kind = slices.parse_type(FLAGS.type)
    self.create = self._tpus("queued-resources", "create", self.name, f"--node-id={self.name}")
    self.create += [
      f"--accelerator-type={kind.name}",
      f"--runtime-version={FLAGS.runtime_version or kind.runtime}",
    ]
    self.create += [*(["--spot"] if FLAGS.spot else []), *FLAGS.create]
    self.summary = f"{kind.name}: {kind.chips} chips in {FLAGS.zone}"
    root = children.root()
    tree = f"sora_jax-{digest(root)}"
    archive = pathlib.Path(tempfile.gettempdir()) / f"{tree}.tgz"
    self.pack = ["tar", "-czf", str(archive), "--exclude=__pycache__", "-C", str(root), *SHIPPED]
    self.copy = self._tpus("tpu-vm", "scp", str(archive), f"{self.name}:{archive.name}", "--worker=all")
    host = f"bash {tree}/launch/tpu/host.sh"
    unpack = f"mkdir -p {tree} && tar -xzf {archive.name} -C {tree}"
    image = f" {shlex.quote(FLAGS.image)}" if FLAGS.image else ""
    mount = f" && {host} mount {FLAGS.bucket}" if FLAGS.bucket else ""
    self.install = self._on_all(f"{unpack} && {host} install{image}{mount}")
    self.stop = self._on_all(f"{host} stop {self.name}")
    self._start = f"{host} run {self.name} {{}} {shlex.join(program_words(command))}"

  def run(self, attempt):
    """attempt: another one for every start."""
    head, tail = self._start.split("{}", 1)
    return self._on_all(f"{head}{attempt}{tail}")

  def _on_all(self, line):
    return self._tpus("tpu-vm", "ssh", self.name, "--worker=all", f"--command={line}")

  def _tpus(self, *words):
    return ["gcloud", "compute", "tpus", *words, *self.where]


def program_words(command):
  """The command as a host starts it, with --env, in the container where there is one."""
  words = commands.python(command)
  if FLAGS.image:
    settings = [word for pair in FLAGS.env for word in ("--env", pair)]
    settings += [f"--volume=/gcs/{FLAGS.bucket}:/gcs/{FLAGS.bucket}"] if FLAGS.bucket else []
    alone = [
      "sudo",
      "docker",
      "run",
      "--rm",
      f"--name={FLAGS.name}",
      "--privileged",
      "--net=host",
      "--ipc=host",
    ]
    return [*alone, *settings, FLAGS.image, *words]
  return ["env", *FLAGS.env, *words] if FLAGS.env else words


def digest(root):
  """Of what is shipped: another version goes into another folder, beside the one that may be running."""
  total = hashlib.sha256()
  for top in SHIPPED:
    inside = sorted((root / top).rglob("*")) if (root / top).is_dir() else [root / top]
    for path in inside:
      if path.is_file() and "__pycache__" not in path.parts:
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
  return total.hexdigest()[:12]


def main(command):
  commands.check(command)
  if not FLAGS.zone:
    raise BadInput("no --zone; give the zone of the slice, as us-east5-a")
  pod = Pod(command)
  if FLAGS.dry_run:
    for line in plan(pod):
      print(line)
    return program.OK
  commands.require("gcloud", "the Google Cloud CLI")
  if FLAGS.delete:
    commands.do(pod.delete)
    return program.OK
  return drive(pod)


def plan(pod):
  """Every command, in their order -> lines for a shell."""
  if FLAGS.delete:
    return [shlex.join(pod.delete)]
  return [
    shlex.join(pod.pack),
    f"# {pod.summary}; where there is none of this name yet:",
    shlex.join(pod.create),
    f"# every {FLAGS.every:g} s until the first says ACTIVE and the second READY:",
    shlex.join(pod.describe),
    shlex.join(pod.node),
    "# then, and again after every restart:",
    shlex.join(pod.copy),
    shlex.join(pod.install),
    shlex.join(pod.run("1")),
    "# on Ctrl-C:",
    shlex.join(pod.stop),
    "# where the first says SUSPENDED, before another one is created; and with --delete:",
    shlex.join(pod.delete),
  ]


def drive(pod):
  """Brings the slice up and runs the command, as often as it takes -> exit code."""
  failures = 0
  commands.do(pod.pack)
  while bring_up(pod):
    code = attempt(pod)
    if code in (program.OK, program.BAD_INPUT):
      return code
    if program.stop_requested():
      return program.STOPPED if code == program.STOPPED else program.FAILED
    pause()  # a slice that is taken away says so a little later
    if code == program.STOPPED:
      say("it was stopped after saving, not from here; starting it again")
    elif state(pod) != "READY":
      failures = 0
    else:
      failures += 1
      if failures > FLAGS.restarts:
        say(f"exit code {code}, after {FLAGS.restarts} restarts; the slice is still there (--delete)")
        return program.FAILED
      say(f"exit code {code}; restart {failures} of {FLAGS.restarts}")
  return program.STOPPED


def attempt(pod):
  """Installs what is not there yet, and runs the command to its end -> exit code, or UNREACHED."""
  for words in (pod.copy, pod.install):
    if subprocess.run(words, check=False).returncode:
      program.warn(f"this failed: {shlex.join(words)}")
      return UNREACHED
  say(f"running on all hosts of {pod.name}")
  return run(pod)


def run(pod):
  """Starts the command on all hosts, or follows it there -> exit code. Passes a request to stop on."""
  words = pod.run(f"{time.time():.2f}")
  child = subprocess.Popen(
    words, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=children.end_with_parent
  )
  asked = False
  while child.poll() is None:
    if program.stop_requested() and not asked:
      asked = True
      commands.do(pod.stop)
    time.sleep(0.2)
  return child.returncode


def bring_up(pod):
  """Waits for the slice, asking for it where there is none -> is it there? False: asked to stop meanwhile.

  Failure where Google refuses it.
  """
  before = None
  while not program.stop_requested():
    now = state(pod)
    if now != before:
      say(f"{pod.name} ({pod.summary}): {now or 'not there yet'}")
      before = now
    if now == "READY":
      return True
    if now == "FAILED":
      raise Failure(f"the request has failed; see why: {shlex.join(pod.describe[:-1])}; then --delete it")
    if now == "SUSPENDED":
      say("the slice was taken away; asking for another one")
      commands.do(pod.delete)
    elif not now:
      commands.do(pod.create)
    else:
      pause()
  say(f"stopped waiting; {pod.name} keeps its place, and costs once it is there (--delete)")
  return False


def state(pod):
  """Empty where there is none, READY, SUSPENDED where it was taken away, FAILED, or what it waits for."""
  now = answer(pod.describe)
  if now in ("", "FAILED", "SUSPENDED", *COMING):
    return now
  if now != "ACTIVE":
    raise Failure(f"{pod.name} is {now}, which this program does not know; see: {shlex.join(pod.describe)}")
  node = answer(pod.node)
  return "SUSPENDED" if node in LOST else node


def answer(words):
  """What gcloud prints; empty where there is no such thing. Failure where it cannot be asked."""
  done = commands.ask(words)
  if done.returncode and "NOT_FOUND" not in done.stderr:
    raise Failure(f"gcloud: {' '.join(done.stderr.split()[:60])}; the command was: {shlex.join(words)}")
  return "" if done.returncode else done.stdout.strip()


def pause():
  """Sleeps until the next look, or until asked to stop."""
  until = time.monotonic() + FLAGS.every
  while time.monotonic() < until and not program.stop_requested():
    time.sleep(0.1)


if __name__ == "__main__":
  commands.start(main, define_flags)
