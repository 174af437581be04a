"""The sampling job: requests in; mp4 files (png for one frame) and manifest.jsonl out. What is there already
is kept.

Used by launch.sample, launch.evaluate, and for samples during training. Several processes share the work in
one of two ways, as the model's devices say:

  apart     each has a model of its own, and makes its share of the requests: no process waits for another
  together  all devices hold one model; all denoise the same rows, and the first decodes and writes
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import time
import zlib

import jax
from etils import epath

from launch.common import processes, program, progress
from sora_jax import files, multihost, tasks, video
from sora_jax.errors import BadInput

MANIFEST = "manifest.jsonl"
PART = "manifest.part-{:03d}.jsonl"  # of a process other than the first, until the job ends


def read_requests(path):
  """A file of one JSON object a line -> (list of dicts with ids, list of (line number, what is wrong)).

  A request without an id gets the number of its line.
  """
  path = epath.Path(path)
  if not path.exists():
    raise BadInput(f"--requests={path} does not exist; give a file of one JSON object a line")
  requests, broken = [], []
  for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").split("\n"), 1):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
      if not isinstance(fields, dict):
        raise ValueError("not an object in braces")
      requests.append({"id": f"{number:05d}", **fields})
    except ValueError as error:
      broken.append((number, f"not valid JSON: {error}"))
  return requests, broken


def read_manifest(out):
  """OUT/manifest.jsonl -> {id: its last line}.

  A line cut short by a kill counts nothing: its request is done again.
  """
  names = [MANIFEST, *_parts(out)]
  return {
    line["id"]: line for name in names for line in files.read_jsonl(epath.Path(out) / name) if "id" in line
  }


def _parts(out):
  """Names of the parts of the manifest that processes left."""
  return sorted(path.name for path in epath.Path(out).glob(PART.replace("{:03d}", "*")))


def _gather(out):
  """Puts what processes left into the one manifest."""
  for name in _parts(out):
    if lines := list(files.read_jsonl(epath.Path(out) / name)):
      files.append_jsonl(epath.Path(out) / MANIFEST, *lines)
    (epath.Path(out) / name).unlink()


def run(pipe, requests, out, *, quiet=False, stop=program.stop_requested):
  """Makes what is missing of `requests` (dicts) in `out` -> counts {"ok", "kept", "failed", "stopped"}.

  A request that cannot be done gets a manifest line with its error; the others are done.
  """
  todo, counts = processes.from_first(f"what {out} lacks", lambda: _missing(pipe, requests, out))
  index, count = jax.process_index(), jax.process_count()
  apart = count > 1 and pipe.is_of_this_process
  if apart:
    todo, counts = shares(pipe, todo, count)[index], counts if not index else dict.fromkeys(counts, 0)
  writes, finished, stop = apart or not index, 0, stop if apart else processes.Stop(stop)
  name = PART.format(index) if apart and index else MANIFEST
  with progress.Bar("sampling", 0) as bar:

    def on_step(done, total):
      if not quiet:
        bar.update(done, total=total)

    for result in pipe.run(todo, stop=stop, progress=on_step):
      finished += 1
      counts["failed" if result.error else "ok"] += 1
      if result.error and writes:
        note_failure(out, result.request.id, result.error, dataclasses.asdict(result.request), name)
        progress.say(f"request {result.request.id}: {result.error}")
      elif writes:
        write(pipe, result, out, name)
  counts["stopped"] = len(todo) - finished
  processes.wait(f"{out} is written")  # a collective does not wait as long as decoding may take
  if apart:
    if not index:
      _gather(out)
    of_each = multihost.from_all(counts)
    counts = {key: sum(each[key] for each in of_each) for key in counts}
  return counts


def shares(pipe, requests, count):
  """Requests -> `count` lists of them, with about as much to do in each: the largest first, each to whom has
  least.
  """
  cost = [request.steps * math.prod(pipe.latent_size(request)) for request in requests]
  lists, load = [[] for _ in range(count)], [0] * count
  for i in sorted(range(len(requests)), key=lambda i: -cost[i]):
    least = load.index(min(load))
    lists[least].append(i)
    load[least] += cost[i]
  return [[requests[i] for i in sorted(part)] for part in lists]


def _missing(pipe, requests, out):
  """-> (Requests that OUT lacks, counts so far). Those that cannot be parsed get their manifest line."""
  epath.Path(out).mkdir(parents=True, exist_ok=True)
  _gather(out)
  manifest, counts = read_manifest(out), {"ok": 0, "kept": 0, "failed": 0, "stopped": 0}
  todo, names = [], set()
  for fields in requests:
    name = str(fields.get("id", ""))
    try:
      if name in names:
        name += " (again)"
        raise BadInput(f"two requests have the id {fields['id']!r}; each needs its own")
      names.add(name)
      request = pipe.parse(fields)
      if _is_made(pipe, request, manifest.get(name, {}), out):
        counts["kept"] += 1
      else:
        todo.append(request)
    except BadInput as error:
      counts["failed"] += 1
      note_failure(out, name, str(error), fields)
      progress.say(f"request {name}: {error}")
  return todo, counts


def _is_made(pipe, request, line, out):
  """Does the manifest say that this very request was made by this very model, and is the file there?"""
  return line.get("request") == digest(pipe, request) and (epath.Path(out) / line["path"]).exists()


def write(pipe, result, out, manifest=MANIFEST):
  """Decodes a result, writes its file and its line of the manifest, which it returns."""
  began, request = time.monotonic(), result.request
  image = request.frames == 1
  name = request.id + (".png" if image else ".mp4")
  with contextlib.nullcontext(out) if files.is_local(out) else tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, name)
    if image:
      video.write_png(path, next(result.frames))
      size = result.size
    else:
      size = video.write_mp4(path, result.frames, request.fps)
    if not files.is_local(out):
      files.copy(path, epath.Path(out) / name)
  line = {
    "id": request.id,
    "status": "ok",
    "path": name,
    "seed": request.seed,
    "size": list(size),
    "frames": result.count,
    "fps": request.fps,
    "seconds_taken": round(result.seconds + time.monotonic() - began, 3),
    "error": None,
    "prompt": request.prompt,
    "task": request.task,
    "steps": request.steps,
    "sampler": request.sampler,
    "guidance": request.guidance,
    "shift": request.shift,
    "step": pipe.step,
    "request": digest(pipe, request),
  }
  more = ("cache", "times", "category", "strength", "given", "shots", *tasks.FILES)
  line |= {name: value for name in more if (value := getattr(request, name)) not in (None, 1.0)}
  files.append_jsonl(epath.Path(out) / manifest, line)
  return line


def digest(pipe, request):
  """A checksum of all that must be the same for a file to count as made: model, request, and the files that
  it names.
  """
  fields = {name: value for name, value in dataclasses.asdict(request).items() if name != "category"}
  crc = zlib.crc32(json.dumps(fields, sort_keys=True).encode(), zlib.crc32(pipe.identity.encode()))
  for path in filter(None, (getattr(request, name) for name in tasks.FILES)):
    for piece in files.pieces_of(path) if os.path.isfile(path) else ():
      crc = zlib.crc32(piece, crc)
  return f"{crc:08x}"


def note_failure(out, name, error, fields, manifest=MANIFEST):
  """A line of the manifest for a request (or a line of the file) that cannot be done."""
  given = {field: fields.get(field) for field in ("seed", "size", "frames", "fps")}
  prompt = str(fields.get("prompt", ""))[:200].encode("utf-8", "backslashreplace").decode()
  line = {
    "id": name,
    "status": "failed",
    "path": None,
    **given,
    "seconds_taken": None,
    "error": error,
    "prompt": prompt,
  }
  files.append_jsonl(epath.Path(out) / manifest, line)
