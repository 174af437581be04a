"""A web page on this machine to try prompts: a form for every task, a queue, and what was made.

  python -m launch.serve                          # the small model that ships, at http://127.0.0.1:8000
  python -m launch.serve --workdir=W --port=8080 --out=out/served

Only this machine reaches it, unless --host says otherwise; there is no password. Results are in OUT, with a
manifest as of launch.sample. Ctrl-C ends it after the step that is being computed.
"""

import fcntl
import ipaddress
import os
import pathlib
import socket
import threading
import time

from absl import flags

from launch.common import program
from launch.common.progress import say
from launch.serve.uploads import Uploads
from launch.serve.worker import Queue
from sora_jax import files, workdir as workdirs
from sora_jax.errors import BadInput, Failure
from sora_jax.pipeline import Pipeline

FLAGS = flags.FLAGS


def define_flags():
  program.define_lora()
  flags.DEFINE_string("workdir", "", "work directory of launch.train; without it, the small model that ships")
  flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
  flags.DEFINE_integer("port", 8000, "port to listen at; 0 takes a free one", 0, 65535)
  flags.DEFINE_string("out", "out/served", "where the files go")
  flags.DEFINE_integer("max_upload_mb", 64, "the largest file that is taken, in MB", 1)


def main():
  try:
    from launch.serve import app as web
  except ImportError as error:
    raise BadInput(f"{error}; install the extra: pip install '.[serve]'") from None
  listener, out = listen(FLAGS.host, FLAGS.port), own(FLAGS.out)
  pipe = Pipeline.open(
    FLAGS.workdir or workdirs.shipped(), say=say, lora=FLAGS.lora, lora_ignore=FLAGS.lora_ignore
  )
  uploads = Uploads(out / "uploads")
  queue = Queue(pipe, out, uploads.shown)
  name = os.path.basename(os.path.normpath(FLAGS.workdir)) if FLAGS.workdir else "the small model that ships"
  app = web.make_app(
    pipe, queue, uploads, FLAGS.max_upload_mb << 20, FLAGS.host, f"{name}, {pipe.step:,} steps of training"
  )
  server = web.make_server(app)
  address, port = listener.getsockname()[:2]
  ip = ipaddress.ip_address(address)
  host = socket.gethostname() if ip.is_unspecified else f"[{address}]" if ip.version == 6 else address
  say(f"open http://{host}:{port} in a browser; results go to {FLAGS.out}; Ctrl-C ends it")
  if not ip.is_loopback:
    program.warn(
      f"--host={FLAGS.host}: every machine that reaches this one can send requests and see what was made"
    )
  worker = threading.Thread(target=queue.work, name="queue")
  serving = threading.Thread(target=server.run, args=([listener],), name="web")
  worker.start()
  serving.start()
  while serving.is_alive() and not program.stop_requested():
    time.sleep(0.1)
  left = queue.close()
  server.should_exit = True
  serving.join()
  worker.join()
  if not program.stop_requested():
    raise Failure("the web server ended by itself; what it printed says why")
  say(f"ended{f'; {left} requests were not made' if left else ''}; see {FLAGS.out}/manifest.jsonl")
  return program.STOPPED if left else program.OK


def listen(host, port):
  """A socket at an address of this machine; BadInput where it cannot be had."""
  try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family)
  except OSError as error:
    raise BadInput(
      f"cannot listen at {host}:{port}: {error.strerror}; give another --port or --host"
    ) from None


def own(out):
  """The folder OUT, made, for this program alone; BadInput where another one serves from it."""
  if not files.is_local(out):
    raise BadInput(f"--out={out}: results are shown from a folder of this machine; give its path")
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  lock = os.open(out / ".lock", os.O_CREAT | os.O_WRONLY, 0o644)  # held until the program ends
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    raise BadInput(f"--out={out}: another launch.serve writes here; give another folder") from None
  return out


if __name__ == "__main__":
  program.run(main, define_flags)
