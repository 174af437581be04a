"""What all programs share: flags, configs, one-line errors, exit codes, stopping on request, lines and progress bars.

Exit codes: 0 all was done; 2 bad input, one clear line; 75 stopped on request (SIGTERM, Ctrl-C) after saving, run the same command
again; 1 anything else.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
import signal
import sys
import time
import traceback

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch import hosts
from sora_jax.errors import BadInput

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
CPU_FLAGS = (           # of XLA; measured on what launch.benchmark runs
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",                  # the other copies all weights of a VAE before the first use
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE",            # those sums over tokens take 20 times as long
)
WRONG_PATH = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
_stop = {"requested": False}
_locks = []             # open files: a lock lasts as long as the program


class Stopped(Exception):
  """The program was asked to stop, and nothing is lost by it: exit code 75."""


class Failure(RuntimeError):
  """The work cannot go on, and not because of bad input: one line, exit code 1."""


def tune_cpu():
  """Sets CPU_FLAGS for XLA, before those that the user gave, here and in programs that this one starts."""
  os.environ["XLA_FLAGS"] = " ".join([*CPU_FLAGS, os.environ.get("XLA_FLAGS", "")])


def run(main):
  """Runs `main()` as a program and exits with its code (None: 0). Never returns."""
  tune_cpu()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _request_stop)
  logging.set_verbosity(logging.FATAL)          # Orbax logs whole tracebacks of what is told here in one line
  try:
    _parse_flags(sys.argv)
    code = main() or OK
  except (BadInput, flags.Error) as error:
    code = complain(error)
  except Stopped:
    say("stopped on request; run the same command again")
    code = STOPPED
  except Failure as error:
    complain(error)
    code = FAILED
  except OSError as error:
    if error.errno in WRONG_PATH:
      code = complain(f"{error}; give another path, or mend this one")
    elif error.errno in FULL_DISK or "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):
      code = complain(f"{error}; nothing written before is lost: free some space, then run the same command again")
    else:
      traceback.print_exc()
      code = FAILED
  except (Exception, KeyboardInterrupt):         # not left to Python's own end, which would wait for other processes of the job
    traceback.print_exc()
    code = FAILED
  sys.stdout.flush()
  sys.stderr.flush()
  if code in (OK, STOPPED):
    hosts.leave()
  # Threads of the data pipeline and of the checkpointer may still wait for work: all is saved, so leave at once.
  os._exit(code)


def complain(error):
  """Prints one line to stderr: what was given, what is allowed, what to do. Returns exit code 2."""
  print(f"{program()}: {' '.join(str(error).split())}", file=sys.stderr)
  return BAD_INPUT


def warn(line):
  """One line to stderr, by whichever process has something to say."""
  print(f"{program()}: {line}", file=sys.stderr, flush=True)


def program():
  """The name of this program, as `launch.train`."""
  name = os.path.basename(sys.argv[0]).removesuffix(".py")
  return f"launch.{name}"


def stop_requested():
  """True after SIGTERM or Ctrl-C: save, say so, and return STOPPED."""
  return _stop["requested"]


def _request_stop(number, frame):
  del frame
  if _stop["requested"] and number == signal.SIGINT:
    raise KeyboardInterrupt
  if not _stop["requested"]:
    os.write(2, f"{program()}: asked to stop; saving after what is being computed now\n".encode())      # safe in a signal handler
  _stop["requested"] = True


def _parse_flags(argv):
  """absl's parsing, with every mistake in a --config flag told in one line; --help prints the program's flags and exits 0."""
  app.define_help_flags()
  try:
    rest = flags.FLAGS(argv)
  except SystemExit:
    sys.exit(OK)
  except flags.Error:
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise BadInput(f"the config does not take this: {_plainest(error)}; see the config file for its names and types") from None
  except (OSError, ImportError) as error:
    raise BadInput(f"the config file cannot be read: {error}; give --config=FILE.py or --config=FILE.py:variant") from None
  if len(rest) > 1:
    raise BadInput(f"unexpected argument {rest[1]!r}: every option is written --name=value; see --help")


def _plainest(error):
  """Of an error and those behind it the text that says most to a user: ml_collections hides "Did you mean" at the bottom."""
  texts = []
  while error is not None:
    text = str(error.args[0] if error.args else error).replace("\\n", " ").replace("\\'", "'")
    texts.append(" ".join(text.split()).strip("\"'"))
    error = error.__cause__ or error.__context__
  return next((text for text in texts if "Did you mean" in text), texts[0])


def define_config(default):
  """Declares --config=FILE.py[:variant] with --config.a.b=value overrides."""
  config_flags.DEFINE_config_file("config", default, "configuration page, as FILE.py or FILE.py:variant")


def get_config():
  """The parsed ConfigDict; BadInput when its file is missing or broken."""
  try:
    return flags.FLAGS.config
  except (OSError, ImportError, AttributeError) as error:
    raise BadInput(f"the config file cannot be read: {error}; give --config=FILE.py or --config=FILE.py:variant") from None


def checked(build, what):
  """build(), with a ValueError or KeyError of a config dataclass told as bad input; `what` names the part of the config."""
  try:
    return build()
  except BadInput:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f"{what}: {str(error).strip(chr(34))}") from None


def lock_workdir(workdir):
  """One program at a time writes in W: BadInput where another is at work. -> the open file; the lock ends with it, or with the program."""
  os.makedirs(workdir, exist_ok=True)
  lock = open(os.path.join(workdir, ".lock"), "w")
  _locks.append(lock)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    raise BadInput(f"{workdir}: another program is training here; wait for it, or give another --workdir") from None
  return lock


def is_begun(workdir):
  """Does W hold a whole checkpoint, or a model? Until then it belongs to nobody."""
  return os.path.exists(os.path.join(workdir, "model")) or bool(glob.glob(os.path.join(workdir, "manifests", "*.json")))


def claim_workdir(workdir, config, free_to_change):
  """Writes W/config.json, or checks that W belongs to this config: keys (dotted) under `free_to_change` may differ between runs."""
  from sora_jax import checkpoint
  path = os.path.join(workdir, "config.json")
  mine = {"format_version": checkpoint.FORMAT_VERSION, "program": program(), **json.loads(config.to_json_best_effort())}
  if os.path.exists(path) and is_begun(workdir):
    theirs = checkpoint.read_json(path)
    flat = [flat_config(c) for c in (mine, theirs)]
    differ = [k for k in sorted(set(flat[0]) | set(flat[1])) if flat[0].get(k) != flat[1].get(k) and not k.startswith(free_to_change)]
    if differ:
      shown = ", ".join(f"{k} is {flat[1].get(k)!r} there, {flat[0].get(k)!r} here" for k in differ[:3])
      raise BadInput(f"{workdir} belongs to another config ({shown}{', ...' if len(differ) > 3 else ''}); "
                     "give the same config to resume it, or another --workdir")
  checkpoint.write_json(path, mine)


def flat_config(tree, prefix=""):
  """Nested config -> {"a.b": value}."""
  out = {}
  for name, value in tree.items():
    out.update(flat_config(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
  return out


def need_disk(directory, num_bytes, what):
  """BadInput unless the disk of `directory` has that many bytes free."""
  os.makedirs(directory, exist_ok=True)
  free = shutil.disk_usage(directory).free
  if free < num_bytes:
    raise BadInput(f"{directory}: {what}: {_size(num_bytes)} are needed, and {_size(free)} are free; free some space")


def _size(num_bytes):
  return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def unless_stopped(pieces):
  """The same iterator; raises Stopped between two of its items where the program was asked to."""
  for piece in pieces:
    if stop_requested():
      raise Stopped
    yield piece


def need_memory(num_bytes, what):
  """BadInput unless this machine has that much memory available (where it can tell)."""
  try:
    lines = open("/proc/meminfo").read().splitlines()
  except OSError:
    return
  free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), num_bytes)
  if free < num_bytes:
    raise BadInput(f"{what}: {_size(num_bytes)} of memory are needed, and {_size(free)} are free; take a larger machine")


console = Console(highlight=False, soft_wrap=True)


def say(line):
  """One line for the user, above any progress bar."""
  console.print(line, markup=False)


class Bar:
  """Progress: a bar with time left on a terminal, a plain line every `every` seconds elsewhere. Use with `with`."""

  def __init__(self, label, total, *, start=0, every=15.0):
    self.label, self.total, self.done, self.every, self.note = label, total, start, every, ""
    self.first, self.began, self.told = None, None, time.monotonic()
    self.rich = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                         TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                         console=console) if console.is_terminal else None

  def __enter__(self):
    if self.rich:
      self.rich.start()
      self.task = self.rich.add_task(self.label, total=self.total, completed=self.done, note="")
    return self

  def __exit__(self, *_):
    if self.rich:
      self.rich.stop()

  def advance(self, n=1, note=""):
    """n more are done; `note` is shown beside them, until the next one."""
    self.done += n
    self.note = note or self.note
    if self.first is None:          # time left is told from the second on: the first compiles
      self.first, self.began = self.done, time.monotonic()
    if self.rich:
      self.rich.update(self.task, completed=self.done, note=self.note)
      return
    now = time.monotonic()
    if now - self.told >= self.every or self.done == self.total:
      self.told = now
      left = ""
      if self.total and self.done > self.first:
        left = f", {(now - self.began) / (self.done - self.first) * (self.total - self.done):.0f} s left"
      say(f"{self.label}: {self.done}{f' of {self.total}' if self.total else ''}{left}{f', {self.note}' if self.note else ''}")
