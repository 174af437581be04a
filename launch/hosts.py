"""A program as several processes of this machine, as the hosts of a pod would run it.

  python -m launch.hosts --count=4 launch.encode --source=DIR --out=OUT

On a pod the program itself is started, on every host: launch/common/processes.py. The first process speaks
for all; when one fails, all end, and the same command goes on where they were.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys

from launch.common import children

PROGRAMS = ("launch.encode", "launch.sample", "launch.train", "launch.train_vae")


def main():
  parser = argparse.ArgumentParser(
    prog="python -m launch.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--count", type=int, default=2, help="how many processes")
  parser.add_argument("program", choices=PROGRAMS)
  parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the program")
  options = parser.parse_args()
  if options.count < 1:
    parser.error(f"--count={options.count}: at least 1")
  processes, lines = [], children.Lines()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: [process.terminate() for process in processes])
  address = f"127.0.0.1:{free_port()}"
  for number in range(options.count):
    environment = os.environ | {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(options.count),
      "JAX_PROCESS_ID": str(number),
    }
    process = subprocess.Popen(
      [sys.executable, "-m", options.program, *options.arguments],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
      errors="replace",
      preexec_fn=children.end_with_parent,
      start_new_session=True,
    )
    processes.append(process)
    lines.follow(number, process.stderr)
  sys.exit(children.watch(processes, lines))


def free_port():
  """A port of this machine that nobody uses."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


if __name__ == "__main__":
  main()
