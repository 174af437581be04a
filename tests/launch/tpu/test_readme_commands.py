"""The commands of the README's section "On a pod" run, as far as --dry-run goes."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml

from tests import conftest

SECTION = (conftest.ROOT / "README.md").read_text().split("## On a pod")[1].split("\n## ")[0]
BLOCKS = (
  "".join(re.findall(r"```bash\n(.*?)```", SECTION, re.S)).replace("\\\n", "").replace("BUCKET", "bucket")
)
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith("python -m launch.tpu.")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command):
  words = shlex.split(command)
  dashes = words.index("--")
  words = [sys.executable, *words[1:dashes], "--dry-run", *words[dashes:]]
  done = subprocess.run(words, cwd=conftest.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and not done.stderr, done.stderr
  if "jobset" in command:
    assert yaml.safe_load(done.stdout)["kind"] == "JobSet"


def test_both_ways_are_there():
  assert {command.split()[2] for command in COMMANDS} == {"launch.tpu.queued_resource", "launch.tpu.jobset"}
