"""What all programs share: flags, configs, errors in one line, exit codes, stopping on request.

Exit codes: 0 all was done; 2 bad input, one clear line; 75 stopped on request (SIGTERM, Ctrl-C) after saving,
run the same command again; 1 anything else.
"""

import errno
import os
import pathlib
import platform
import signal
import sys
import time
import traceback
import zlib

from absl import app, flags, logging
from ml_collections import config_flags

from launch.common import processes
from launch.common.progress import say
from sora_jax.errors import BadInput, Failure, Stopped

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
WRONG_PATH = (
  errno.ENOENT,
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.EEXIST,
  errno.EISDIR,
  errno.ENOTDIR,
  errno.ENAMETOOLONG,
)
CPU_FLAGS = (  # of XLA; measured on what launch.benchmark runs
  # the other copies all weights of a VAE before the first use
  "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
  # those sums over tokens take 20 times as long
  "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE",
)
BEGAN = time.monotonic()  # when this program began
_stop = {"requested": False}


def tune_cpu():
  """Sets CPU_FLAGS for XLA, before those that the user gave, here and in programs that this one starts."""
  os.environ["XLA_FLAGS"] = " ".join([*CPU_FLAGS, os.environ.get("XLA_FLAGS", "")])


def keep_compiled():
  """What is compiled is kept in $SORA_JAX_CACHE/compiled (default ~/.cache/sora_jax), so that a second start
  is fast; unless JAX_COMPILATION_CACHE_DIR names another folder, or is empty for none.

  Code for a CPU is for that CPU: machines that share a home have a folder for each kind.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  import jax

  try:
    cpu = [line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line[:5] == "flags"][0]
  except (OSError, IndexError):
    cpu = platform.processor()
  folder = os.environ.get("SORA_JAX_CACHE") or pathlib.Path.home() / ".cache" / "sora_jax"
  kind = f"{platform.machine()}-{zlib.crc32(cpu.encode()):08x}"
  jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled", kind))


def run(main, define_flags):
  """Runs `main()` as a program and exits with its code (None: 0). Never returns.

  define_flags: declares the program's flags; called here alone, so that modules of programs can be imported
  together.
  """
  tune_cpu()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _request_stop)
  logging.set_verbosity(logging.FATAL)  # Orbax logs whole tracebacks of what one line says here
  code = FAILED
  try:
    define_flags()
    _parse_flags(sys.argv)
    keep_compiled()
    code = main() or OK
  except (BadInput, flags.Error) as error:
    code = complain(error)
  except Stopped:
    say("stopped on request; run the same command again")
    code = STOPPED
  except Failure as error:
    complain(error)
  except OSError as error:
    code = _complain_of_files(error)
  # not left to Python's own end, which would wait for other processes of the job
  except (Exception, KeyboardInterrupt):
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  if code in (OK, STOPPED):
    processes.leave()
  # Threads of the data pipeline and of the checkpointer may still wait for work: all is saved, so leave at
  # once.
  os._exit(code)


def _complain_of_files(error):
  """One line for an OSError that the user can put right, else its traceback -> exit code."""
  if error.errno in WRONG_PATH:
    return complain(f"{error}; give another path, or mend this one")
  if error.errno in FULL_DISK or "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):
    return complain(
      f"{error}; nothing written before is lost: free some space, then run the same command again"
    )
  traceback.print_exc()
  return FAILED


def complain(error):
  """Prints one line to stderr: what was given, what is allowed, what to do. Returns exit code 2."""
  print(f"{name()}: {' '.join(str(error).split())}", file=sys.stderr)
  return BAD_INPUT


def warn(line):
  """One line to stderr, by whichever process has something to say."""
  print(f"{name()}: {line}", file=sys.stderr, flush=True)


def name():
  """The name of this program, as `launch.train`."""
  parts = sys.argv[0].removesuffix(".py").removesuffix(f"{os.sep}__main__").split(os.sep)
  folders = [at for at, part in enumerate(parts[:-1]) if part == "launch"]
  return ".".join(parts[folders[-1] :]) if folders else f"launch.{parts[-1]}"


def stop_requested():
  """True after SIGTERM or Ctrl-C: save, say so, and return STOPPED."""
  return _stop["requested"]


def _request_stop(number, frame):
  del frame
  if _stop["requested"] and number == signal.SIGINT:
    raise KeyboardInterrupt
  if not _stop["requested"]:  # os.write is safe in a signal handler
    os.write(2, f"{name()}: asked to stop; saving after what is being computed now\n".encode())
  _stop["requested"] = True


def _parse_flags(argv):
  """absl's parsing; a mistake in a --config flag becomes one line.

  --help prints the program's flags and exits 0.
  """
  app.define_help_flags()
  try:
    rest = flags.FLAGS(argv)
  except SystemExit:
    sys.exit(OK)
  except flags.Error:
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise BadInput(
      f"the config does not take this: {_plainest(error)}; see the config file for its names and types"
    ) from None
  except (OSError, ImportError) as error:
    raise BadInput(
      f"the config file cannot be read: {error}; give --config=FILE.py or --config=FILE.py:variant"
    ) from None
  if len(rest) > 1:
    raise BadInput(f"unexpected argument {rest[1]!r}: every option is written --name=value; see --help")


def _plainest(error):
  """Of an error and those behind it the text that says most to a user: ml_collections hides "Did you mean" at
  the bottom.
  """
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
    raise BadInput(
      f"the config file cannot be read: {error}; give --config=FILE.py or --config=FILE.py:variant"
    ) from None


def define_lora():
  """--lora and --lora_ignore, of programs that sample."""
  flags.DEFINE_multi_string(
    "lora",
    [],
    "file of adapters to add, as style.safetensors:0.8; of two experts one, as high=steps.safetensors; "
    "several times for several",
  )
  flags.DEFINE_bool("lora_ignore", False, "leave out names in --lora that fit no layer")
