"""The sampling job: requests in; mp4 files (png for one frame) and manifest.jsonl out. What is there already
is kept.

Used by launch.sample, launch.evaluate, and for samples during training. Of several processes all denoise the
same rows, and the first decodes and writes.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
import zlib

import jax
from etils import epath

from launch.common import processes, program, progress
from sora_jax import files, tasks, video
from sora_jax.errors import BadInput

MANIFEST = "manifest.jsonl"


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
  return {line["id"]: line for line in files.read_jsonl(epath.Path(out) / MANIFEST) if "id" in line}


def run(pipe, requests, out, *, quiet=False, stop=program.stop_requested):
  """Makes what is missing of `requests` (dicts) in `out` -> counts {"ok", "kept", "failed", "stopped"}.

  A request that cannot be done gets a manifest line with its error; the others are done.
  """
  todo, counts = processes.from_first(f"what {out} lacks", lambda: _missing(pipe, requests, out))
  first, finished, stop = not jax.process_index(), 0, processes.Stop(stop)
  steps = sum(request.steps for request in todo)
  with progress.Bar("sampling", steps or 1, every=1e9 if quiet else 15.0) as bar:
    for result in pipe.run(todo, stop=stop, progress=lambda done, total: bar.update(done)):
      finished += 1
      counts["failed" if result.error else "ok"] += 1
      if result.error and first:
        note_failure(out, result.request.id, result.error, dataclasses.asdict(result.request))
        progress.say(f"request {result.request.id}: {result.error}")
      elif first:
        write(pipe, result, out)
  counts["stopped"] = len(todo) - finished
  processes.wait(f"{out} is written")  # a collective does not wait as long as decoding may take
  return counts


def _missing(pipe, requests, out):
  """-> (Requests that OUT lacks, counts so far). Those that cannot be parsed get their manifest line."""
  epath.Path(out).mkdir(parents=True, exist_ok=True)
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


def write(pipe, result, out):
  """Decodes a result, writes its file and its manifest line, which it returns."""
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
  more = ("cache", "strength", "given", "shots", *tasks.FILES)
  line |= {name: value for name in more if (value := getattr(request, name)) not in (None, 1.0)}
  files.append_jsonl(epath.Path(out) / MANIFEST, line)
  return line


def digest(pipe, request):
  """A checksum of all that must be the same for a file to count as made: model, request, and the files that
  it names.
  """
  crc = zlib.crc32(
    json.dumps(dataclasses.asdict(request), sort_keys=True).encode(), zlib.crc32(pipe.identity.encode())
  )
  for path in filter(None, (getattr(request, name) for name in tasks.FILES)):
    for piece in files.pieces_of(path) if os.path.isfile(path) else ():
      crc = zlib.crc32(piece, crc)
  return f"{crc:08x}"


def note_failure(out, name, error, fields):
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
  files.append_jsonl(epath.Path(out) / MANIFEST, line)
