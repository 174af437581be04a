"""The queue of launch.serve: requests wait in order, and one thread makes them with `Pipeline.run` and writes
them as launch.sample does.

A job is `waiting`, `running`, then one of `done`, `failed`, `cancelled`. Every change of a job gets the next
version number, so that a page asks only for what has changed since.
"""

import dataclasses
import secrets
import threading
import traceback

from launch.common.progress import say
from launch.jobs import sample
from sora_jax import tasks
from sora_jax.errors import Stopped, unless_stopped

WAITING = 100  # requests that may wait
HISTORY = 500  # jobs that are remembered; the files of older ones stay where they are
LEFT_OUT = ("id", *tasks.FILES)  # of a request, in what is shown


class Full(Exception):
  """No more requests are taken until one is done."""


@dataclasses.dataclass(eq=False)
class Job:
  """A request and what became of it. settings: its fields as they are shown."""

  id: str
  settings: dict
  request: tasks.Request | None = None  # None: it was made before this program began
  status: str = "waiting"
  stage: str = ""  # of a running one: "denoising" or "decoding"
  done: int = 0  # of `total` steps or frames of the stage
  total: int = 0
  error: str | None = None
  path: str | None = None  # of the result, in the folder of results
  seconds: float | None = None
  order: int = 0  # of its beginning, among all jobs
  version: int = 0
  cancelled: bool = False

  def view(self):
    """What a page is told."""
    hidden = ("request", "settings")
    shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    settings = {name: value for name, value in self.settings.items() if value not in (None, "")}
    return {name: value for name, value in shown.items() if name not in hidden} | {"settings": settings}


class Queue:
  """Jobs of one model. `work` is the one thread's loop; the other methods may be called from any thread.

  shown: text -> text without the names of files of this machine.
  """

  def __init__(self, pipe, out, shown=lambda text: text):
    self.pipe, self.out, self.shown = pipe, out, shown
    self._changed = threading.Condition()
    self._jobs, self._version, self._closing = {}, 0, False
    self._name = secrets.token_hex(8)  # a page starts over when it meets another one
    lines = sample.read_manifest(out)
    for name, line in lines.items():
      self._add(_made_before(name, line, shown))
    taken = [name for name in [*self._jobs, *(path.stem for path in out.iterdir())] if name.isdecimal()]
    self._number = max(map(int, taken), default=0)

  # --- what the page asks

  def submit(self, request, settings):
    """A checked Request -> its Job, which waits. Raises Full."""
    with self._changed:
      if sum(job.status == "waiting" for job in self._jobs.values()) >= WAITING:
        raise Full(f"{WAITING} requests are waiting, and no more can; try again when one of them is done")
      self._number += 1
      request = dataclasses.replace(request, id=f"{self._number:05d}")
      complete = {name: value for name, value in dataclasses.asdict(request).items() if name not in LEFT_OUT}
      job = Job(request.id, complete | settings, request)
      self._add(job)
      self._changed.notify_all()
      return job

  def cancel(self, name):
    """Cancels a job that waits or runs, the latter after the step at work -> the job; None: there is none."""
    with self._changed:
      job = self._jobs.get(name)
      if job and job.status in ("waiting", "running"):
        job.cancelled = True
        self._set(job, status="cancelled" if job.status == "waiting" else job.status)
      return job

  def changes(self, after, name):
    """What changed since the version `after` of the queue called `name`, for a page."""
    with self._changed:
      after = after if name == self._name else 0
      jobs = [job.view() for job in self._jobs.values() if job.version > after]
      return {"queue": self._name, "version": self._version, "jobs": jobs}

  def result(self, name):
    """The path of the file of a job; None where there is none."""
    with self._changed:
      job = self._jobs.get(name)
      return job.path if job else None

  # --- the thread

  def work(self):
    """Makes one request after another until `close`."""
    while job := self._next():
      try:
        self._make(job)
      except Stopped:
        pass
      except Exception as error:  # one request must not end the others
        traceback.print_exc()
        self._fail(job, f"{type(error).__name__}: {error}")
      if job.status == "running":
        self._set(job, status="cancelled")

  def close(self):
    """Ends `work` after the step that is being computed -> how many requests were not made."""
    with self._changed:
      self._closing = True
      self._changed.notify_all()
      return sum(job.status in ("waiting", "running") for job in self._jobs.values())

  def _next(self):
    with self._changed:
      while not self._closing:
        for job in self._jobs.values():
          if job.status == "waiting":
            self._set(job, status="running", stage="denoising")
            return job
        self._changed.wait()
      return None

  def _make(self, job):
    def stop():
      return self._closing or job.cancelled

    def progress(done, total):
      self._set(job, done=done, total=max(done, total))  # `loop` learns later that it has a second round

    say(f"{job.id}: {job.request.task}, {job.request.prompt!r}")
    for result in self.pipe.run([job.request], stop=stop, progress=progress):
      if result.error:
        self._fail(job, result.error)
        return
      self._set(job, stage="decoding", done=0, total=result.count)
      result.frames = self._counted(job, unless_stopped(result.frames, stop))
      line = sample.write(self.pipe, result, self.out)
      self._set(job, status="done", path=line["path"], seconds=line["seconds_taken"])

  def _counted(self, job, frames):
    for number, frame in enumerate(frames, 1):
      self._set(job, done=number)
      yield frame

  def _fail(self, job, error):
    error = " ".join(error.split())
    self._set(job, status="failed", error=self.shown(error))
    say(f"{job.id}: {error}")
    try:
      sample.note_failure(self.out, job.id, error, dataclasses.asdict(job.request))
    except OSError as full:  # the page says it all the same
      say(f"{job.id}: {full}")

  # --- changes, each with its version

  def _add(self, job):
    self._jobs[job.id] = job
    self._set(job)
    job.order = job.version
    over = len(self._jobs) - HISTORY
    old = [name for name, job in self._jobs.items() if job.status not in ("waiting", "running")]
    for name in old[: max(0, over)]:
      del self._jobs[name]

  def _set(self, job, **values):
    with self._changed:
      self._version += 1
      for name, value in (values | {"version": self._version}).items():
        setattr(job, name, value)


def _made_before(name, line, shown):
  """A line of the manifest -> Job."""
  settings = {field: line.get(field) for field in tasks.FIELDS if field not in LEFT_OUT}
  status = "done" if line.get("status") == "ok" else "failed"
  error = shown(str(line["error"])) if line.get("error") else None
  path, seconds = line.get("path"), line.get("seconds_taken")
  return Job(str(name), settings, status=status, error=error, path=path and str(path), seconds=seconds)
