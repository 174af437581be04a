"""What the programs of launch/tpu share: the command that they are to start, and the tools to start it with.

python -m launch.tpu.NAME --flags -- launch.train --config=... --workdir=gs://...
"""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from absl import flags

from launch.common import children, program
from sora_jax.errors import BadInput, Failure

FLAGS = flags.FLAGS
LONGEST_NAME = 40  # Kubernetes adds to it, and allows 63 letters
RESTARTS = 3


def define_flags():
  """Those that both programs have."""
  flags.DEFINE_string("name", "", "name of the job: lower-case letters, digits and dashes")
  flags.DEFINE_boolean("spot", False, "spot capacity: cheaper, and taken away at any time")
  flags.DEFINE_string("bucket", "", "of Cloud Storage, mounted at /gcs/BUCKET on every host, by gcsfuse")
  flags.DEFINE_multi_string("env", [], "KEY=VALUE for the program's environment; may be given several times")
  flags.DEFINE_integer(
    "restarts", RESTARTS, "how often it starts again after exit codes other than 0, 2 and 75", lower_bound=0
  )
  flags.DEFINE_boolean("dry_run", False, "print every command and manifest; run nothing")
  flags.DEFINE_alias("dry-run", "dry_run")


def split(argv):
  """Our own arguments, and the command after "--" -> (list, list)."""
  if "--" not in argv:
    return argv, []
  at = argv.index("--")
  return argv[:at], argv[at + 1 :]


def check(command):
  """BadInput where the shared flags or the command cannot be."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", FLAGS.name) or len(FLAGS.name) > LONGEST_NAME:
    raise BadInput(
      f"--name={FLAGS.name}: lower-case letters, digits and dashes, a letter first, at most {LONGEST_NAME}"
    )
  for pair in FLAGS.env:
    if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL):
      raise BadInput(f"--env={pair}: it is KEY=VALUE")
  if not re.fullmatch(r"[a-z0-9._-]*", FLAGS.bucket):
    raise BadInput(f"--bucket={FLAGS.bucket}: the name of a bucket, without gs://")
  if not FLAGS.delete:
    check_command(command)


def check_command(command):
  """BadInput where it is none of our programs; warns of paths that the hosts do not share."""
  if not command:
    raise BadInput("no command; give it after two dashes, as -- launch.train --config=... --workdir=gs://...")
  known = {path.stem for path in (children.root() / "launch").glob("*.py")} - {"__init__"}
  if command[0].removeprefix("launch.") not in known or not command[0].startswith("launch."):
    names = ", ".join(f"launch.{name}" for name in sorted(known))
    raise BadInput(f"{command[0]!r} after -- is none of our programs: {names}")
  for word in command[1:]:
    flag, _, value = word.partition("=")
    shared = ("gs://", *([f"/gcs/{FLAGS.bucket}/"] if FLAGS.bucket else []))
    if flag in ("--workdir", "--out") and not value.startswith(shared):
      program.warn(
        f"{word}: each host has its own disk, which is lost with it; give gs://BUCKET/..., "
        "or --bucket=BUCKET and /gcs/BUCKET/..."
      )


def python(command):
  """The words that start it, where `python` is the one that it was installed for."""
  return ["python", "-m", *command]


def require(tool, whose):
  """BadInput where a command-line tool is not installed."""
  if not shutil.which(tool):
    raise BadInput(
      f"no {tool} on PATH; install {whose}, or add --dry-run to see the commands without running them"
    )


def ask(words, **options):
  """Runs a short command, its output captured -> CompletedProcess."""
  return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def do(words, **options):
  """Runs a command whose lines the user sees; Failure where it fails."""
  done = subprocess.run(words, check=False, **options)
  if done.returncode:
    raise Failure(f"exit code {done.returncode} of: {shlex.join(words)}")


def start(main, define):
  """Runs `main(command)` as a program."""
  sys.argv, command = split(sys.argv)
  program.run(lambda: main(command), define)


def folder():
  return pathlib.Path(__file__).resolve().parent
