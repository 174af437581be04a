"""The web side of launch.serve: one page, and what it asks for.

  GET  /                   the page; /page.css, /page.js
  GET  /form               tasks, fields and defaults, from which the page makes its form
  GET  /state?queue=&after=  jobs that changed since
  POST /uploads?name=      a file as the body -> its id
  GET  /uploads/ID         that file
  POST /requests           fields of tasks.FIELDS as JSON, of which those that name a file hold ids of uploads
  DELETE /requests/ID      cancels it
  GET  /results/ID         the file that was made

Whatever goes wrong is {"error": one line}.
"""

import functools
import inspect
import ipaddress
import json
import pathlib
import re
import socket

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from launch.serve.uploads import TYPES, check_pixels, is_inside
from launch.serve.worker import Full
from sora_jax import tasks
from sora_jax.diffusion.samplers import SAMPLERS
from sora_jax.errors import BadInput

HERE = pathlib.Path(__file__).parent
BODY = 1 << 16  # bytes of a request
HEADERS = {
  # everything comes from here, and nothing in the text of a request is run
  "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
}


def make_app(pipe, queue, uploads, max_upload, host="127.0.0.1", model=""):
  """The ASGI application. max_upload: bytes. host: the name that it is served under. model: its name."""
  server = Server(pipe, queue, uploads, max_upload, model)
  page = [Route(path, functools.partial(_page_file, name)) for path, name in PAGE.items()]
  routes = [
    Route("/form", server.form),
    Route("/state", server.state),
    Route("/uploads", server.upload, methods=["POST"]),
    Route("/uploads/{id}", server.uploaded),
    Route("/requests", server.submit, methods=["POST"]),
    Route("/requests/{id}", server.cancel, methods=["DELETE"]),
    Route("/results/{id}", server.result),
  ]
  handlers = {BadInput: _bad_input, Full: _full, HTTPException: _http_error, Exception: _failure}
  guard = Middleware(Guard, names={"localhost", host.lower(), socket.gethostname().lower()})
  return Starlette(routes=[*page, *routes], exception_handlers=handlers, middleware=[guard])


def make_server(app):
  """The web server of the application; its `run` takes sockets, and returns once `should_exit` is true."""
  settings = {"log_level": "warning", "server_header": False, "proxy_headers": False, "ws": "none"}
  return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, loop="asyncio", **settings))


PAGE = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}


async def _page_file(name, request):
  del request
  return FileResponse(HERE / name, headers={"Cache-Control": "no-cache"})


class Guard:
  """Other web sites cannot use this server through the user's browser: the Host header must be an IP address
  or a name of this machine, which a site cannot point elsewhere, and an Origin must be that same host.
  """

  def __init__(self, app, names):
    self.app, self.names = app, names

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      await self.app(scope, receive, send)
      return
    headers = Headers(scope=scope)
    host, origin = headers.get("host", ""), headers.get("origin")

    async def send_with_headers(message):
      if message["type"] == "http.response.start":
        MutableHeaders(scope=message).update(HEADERS)
      await send(message)

    app = self.app
    if not self._is_ours(host) or origin not in (None, f"http://{host}", f"https://{host}"):
      app = _json(
        {"error": f"a page of {origin or host} may not use this server; open its own address"[:300]}, 403
      )
    await app(scope, receive, send_with_headers)

  def _is_ours(self, host):
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:\d+)?", host.lower())
    name = match[1].strip("[]") if match else ""
    return name in self.names or is_address(name)


def is_address(name):
  """Is it an IP address?"""
  try:
    return bool(ipaddress.ip_address(name))
  except ValueError:
    return False


class Server:
  """What the routes do."""

  def __init__(self, pipe, queue, uploads, max_upload, model):
    self.pipe, self.queue, self.uploads, self.max_upload, self.model = pipe, queue, uploads, max_upload, model

  async def form(self, request):
    del request
    return _json(describe(self.pipe) | {"model": self.model, "max_upload": self.max_upload})

  async def state(self, request):
    after = request.query_params.get("after", "")
    after = int(after) if after.isdecimal() and len(after) < 16 else 0
    return _json(self.queue.changes(after, request.query_params.get("queue")))

  async def upload(self, request):
    partial = self.uploads.begin()
    try:
      with open(partial, "wb") as f:
        async for piece in _pieces(request, self.max_upload):
          f.write(piece)
      name = request.query_params.get("name", "")
      upload = await run_in_threadpool(self.uploads.take, partial, name)
    finally:
      partial.unlink(missing_ok=True)
    return _json(upload.view())

  async def uploaded(self, request):
    upload = self.uploads.get(request.path_params["id"])
    return _file(upload and upload.path)

  async def submit(self, request):
    body = b"".join([piece async for piece in _pieces(request, BODY)])
    job = await run_in_threadpool(self._submit, body)
    return _json(job.view())

  def _submit(self, body):
    try:
      fields = json.loads(body)
    except (ValueError, RecursionError):
      fields = None
    if not isinstance(fields, dict):
      raise BadInput("the request is not valid JSON; send one object of fields")
    if "id" in fields:
      raise BadInput("id is chosen here; leave it out")
    named = {}
    for name in tasks.FILES:
      if fields.get(name) is not None:
        upload = self.uploads.get(fields[name])
        if upload is None:
          raise BadInput(f"{name} is not the id of an upload; send the file first")
        fields[name], named[name] = str(upload.path), upload
    try:
      request = self.pipe.parse(fields | {"id": "new"})
    except BadInput as error:
      raise BadInput(self.uploads.shown(str(error))) from None
    check_pixels("the result", request.frames, request.size)
    return self.queue.submit(request, {name: upload.view() for name, upload in named.items()})

  async def cancel(self, request):
    job = self.queue.cancel(request.path_params["id"])
    if job is None:
      raise HTTPException(404, "there is no such request")
    return _json(job.view())

  async def result(self, request):
    name, folder = self.queue.result(request.path_params["id"]), self.queue.out
    return _file(folder / name if name and is_inside(folder, name) else None)


def describe(pipe):
  """tasks.TASKS and tasks.FIELDS as this model has them, for the page.

  only_with: fields that are for the tasks that name them; the others are for all.
  """
  own = {}
  for name, task in tasks.TASKS.items():
    about = inspect.getdoc(task.timeline).split("\n\n")[0]
    listed = {"needs": task.needs, "one_of": task.one_of, "takes": task.takes}
    own[name] = listed | {"help": " ".join(about.split())}
  fields = {
    name: {
      "type": field.type.__name__,
      "help": field.help.removeprefix("path of ") if name in tasks.FILES else field.help,
      "default": pipe.defaults.get(name, field.default),
      "limits": field.limits,
      "file": name in tasks.FILES,
    }
    for name, field in tasks.FIELDS.items()
    if name != "id"
  }
  fields["task"]["choices"], fields["sampler"]["choices"] = list(own), list(SAMPLERS)
  only_with = sorted({name for task in own.values() for name in sum(map(tuple, list(task.values())[:3]), ())})
  return {"tasks": own, "fields": fields, "only_with": only_with}


async def _pieces(request, most):
  """The body of a request; 413 where it has more bytes than `most`."""
  line = f"it has more than {most / (1 << 20):,.4g} MB, which is the most that is taken"
  length = request.headers.get("content-length", "0")
  if not length.isdecimal() or int(length) > most:
    raise HTTPException(413, line)
  size = 0
  try:
    async for piece in request.stream():
      size += len(piece)
      if size > most:
        raise HTTPException(413, line)
      yield piece
  except ClientDisconnect:
    raise HTTPException(400, "the body ended too early") from None


def _file(path):
  """A response with a file; 404 where there is none."""
  if path is None or path.suffix not in TYPES:
    raise HTTPException(404, "there is no such file")
  return FileResponse(path, media_type=TYPES[path.suffix])


def _json(value, status=200):
  # ASCII: half a character in a text is no reason to fail
  return Response(json.dumps(value), status, {"Cache-Control": "no-store"}, "application/json")


async def _bad_input(request, error):
  del request
  return _json({"error": " ".join(str(error).split())}, 400)


async def _full(request, error):
  del request
  return _json({"error": str(error)}, 429)


async def _http_error(request, error):
  del request
  return _json({"error": error.detail}, error.status_code)


async def _failure(request, error):
  del request  # uvicorn prints the traceback
  return _json({"error": f"the server failed: {type(error).__name__}; its terminal says more"}, 500)
