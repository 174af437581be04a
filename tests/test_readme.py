"""The README says what the code does: its table of request fields, its Python, its files."""

import pathlib
import re
import subprocess
import sys

import pytest

from sora_jax import tasks

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def request_table():
  """tasks.FIELDS in Markdown."""
  lines = ["| field | type | is | allowed | default |", "| --- | --- | --- | --- | --- |"]
  for name, field in tasks.FIELDS.items():
    allowed = f"{field.limits[0]:,} to {field.limits[1]:,}" if field.limits else ""
    default = field.default if field.default not in (None, "") else ""
    default = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    lines.append(f"| `{name}` | {field.type.__name__} | {field.help} | {allowed} | {default} |")
  return "\n".join(lines)


def task_rows():
  """tasks.TASKS in Markdown."""

  def fields(names):
    return " ".join(f"`{name}`" for name in names)

  for name, task in tasks.TASKS.items():
    one_of = " or ".join(f"`{field}`" for field in task.one_of)
    yield f"| `{name}` | {', '.join(filter(None, (fields(task.needs), one_of)))} | {fields(task.takes)} |"


def test_the_tables_of_requests():
  rows = "\n".join(task_rows())
  for table in (request_table(), rows):
    assert table in README, f"README.md, section Requests, must hold:\n{table}"


def test_requests_have_the_fields_of_the_table():
  """Every field becomes a value of a Request, but `seconds`, which becomes `frames`; and flags of
  launch.sample with their help.
  """
  assert set(tasks.Request.__annotations__) == set(tasks.FIELDS) - {"seconds"}
  assert all(field.help for field in tasks.FIELDS.values())


def test_files_that_are_named_are_there():
  """Paths in backticks and links, below the folders of the repository."""
  named = set(re.findall(r"[`(]((?:sora_jax|data|launch|configs|tests)/[\w./-]+)[`)]", README))
  assert len(named) > 10
  assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.slow
def test_the_python_section_runs():
  code = re.search(r"## From Python\n\n```python\n(.*?)```", README, re.S)[1]
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "(17, 64, 96, 3) uint8" in done.stdout and "3 frames is 0" in done.stdout
