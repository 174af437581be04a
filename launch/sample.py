"""The sampling job: a prompt, or a file of requests, in; H.264 mp4 files (png for one frame) and
manifest.jsonl out.

  python -m launch.sample --prompt="a red ball moves left" --out=OUT   # the small model that ships
  python -m launch.sample --workdir=W --requests=R.jsonl --out=OUT     # run again, it makes what is missing
"""

import collections
import itertools
import json
import zlib

import jax
from absl import flags

from launch.common import processes, program, progress
from launch.common.progress import say
from launch.jobs import sample
from launch.reports import gallery
from sora_jax import tasks, workdir as workdirs
from sora_jax.errors import BadInput
from sora_jax.layout import AXES
from sora_jax.models import eight_bits
from sora_jax.pipeline import Pipeline

FLAGS = flags.FLAGS
FEW = 8  # steps, at most, that adapters for few steps are made for
# flags that describe one request
FIELDS = tuple(name for name in tasks.FIELDS if name not in ("id", "prompt"))


def define_flags():
  flags.DEFINE_string("workdir", "", "work directory of launch.train; without it, the small model that ships")
  flags.DEFINE_string("prompt", None, "what to show")
  flags.DEFINE_string("requests", None, "file of requests, one JSON object a line")
  flags.DEFINE_string("out", "out", "where the files go")
  flags.DEFINE_enum("weights", "ema", ["ema", "params"], "running mean of the weights, or the last ones")
  program.define_lora()
  flags.DEFINE_enum(
    "eight_bits", "", ["", *eight_bits.KINDS], "keep the weights of blocks in 8 bits: half the memory"
  )
  flags.DEFINE_string(
    "mesh", "", "devices that share the work, as fsdp=2,context=2; empty: chosen from the rows"
  )
  flags.DEFINE_bool(
    "together", False, "all hosts share each video, of a model that one alone cannot hold; else each its own"
  )
  flags.DEFINE_string(
    "grid", "", 'with --prompt: a video for each combination, as "steps=10,20 guidance=1,4 seed=0,1"'
  )
  flags.DEFINE_enum(
    "names",
    "id",
    ["id", "vbench"],
    "of files: the id of a request, or as VBench expects, {prompt}-{index}.mp4",
  )
  flags.DEFINE_bool("gallery", False, "also write OUT/index.html: the videos beside what was given")
  for name in FIELDS:
    flags.DEFINE_string(name, None, f"with --prompt: {tasks.FIELDS[name].help}")


def mesh():
  """--mesh -> {axis: devices}; None where it is empty."""
  if not FLAGS.mesh:
    return None
  axes = dict(part.partition("=")[::2] for part in FLAGS.mesh.split(","))
  if not set(axes) <= set(AXES) or not all(number.isdigit() and int(number) for number in axes.values()):
    raise BadInput(f"--mesh={FLAGS.mesh}: axes of {', '.join(AXES)} with numbers, as fsdp=2,context=2")
  return {name: int(number) for name, number in axes.items()}


def main():
  requests, broken = chosen_requests()
  first = processes.join()
  if not first:
    progress.mute()
  devices = None if FLAGS.together else jax.local_devices()
  pipe = Pipeline.open(
    FLAGS.workdir or workdirs.shipped(),
    FLAGS.weights,
    say,
    mesh=mesh(),
    devices=devices,
    lora=FLAGS.lora,
    lora_ignore=FLAGS.lora_ignore,
    eight_bits=FLAGS.eight_bits,
  )
  say(
    f"sampling {len(requests)} request{'s' * (len(requests) != 1)} with "
    f"{FLAGS.workdir or 'the model that ships'} (step {pipe.step}) into {FLAGS.out}"
  )
  if FLAGS.requests is None:
    request = pipe.parse(requests[0])  # a bad flag is an error before anything is written
    pipe.canvas(request)  # and a bad file
  warn_of_guidance(pipe, requests)
  for number, error in broken:
    say(f"line {number} of {FLAGS.requests} is {error}")
    if first:
      sample.note_failure(FLAGS.out, f"{number:05d}", error, {})
  counts = sample.run(pipe, requests, FLAGS.out)
  if FLAGS.gallery and first:
    say(f"look at {gallery.write(FLAGS.out, list(sample.read_manifest(FLAGS.out).values()))}")
  failed = counts["failed"] + len(broken)
  kept = f", {counts['kept']} were there already" if counts["kept"] else ""
  say(
    f"{counts['ok']} made{kept}{f', {failed} could not be done' if failed else ''}; see "
    f"{FLAGS.out}/manifest.jsonl"
  )
  if counts["stopped"]:
    say("stopped on request; run the same command again for the rest")
    return program.STOPPED
  if failed:
    example = (
      f"line {broken[0][0]} of {FLAGS.requests} is {broken[0][1]}"
      if broken
      else f"see {FLAGS.out}/manifest.jsonl"
    )
    raise BadInput(
      f"{failed} of {len(requests) + len(broken)} requests could not be done ({example}); the others were; "
      "mend them and run again"
    )
  return program.OK


def warn_of_guidance(pipe, requests):
  """A line where adapters and few steps meet guidance, which most adapters for few steps have learned."""
  for fields in requests if FLAGS.lora else ():
    values = pipe.defaults | fields
    times = values.get("times")
    steps = len(times) if isinstance(times, (list, tuple)) and times else values["steps"]
    guidance = values["guidance"]
    if isinstance(steps, int) and steps <= FEW and guidance != 1:
      program.warn(
        f"request {fields.get('id')} has {steps} steps and guidance {guidance}; adapters for few steps are "
        "made for guidance 1, which is also half the work: give it, unless yours are others"
      )
      return


def chosen_requests():
  """-> (requests as dicts, broken lines). Their ids are the names of their files."""
  requests, broken = given_requests()
  if FLAGS.names == "vbench":
    counts = collections.Counter()
    for fields in requests:
      prompt = str(fields.get("prompt", ""))
      fields["id"] = f"{prompt}-{counts[prompt]}"
      counts[prompt] += 1
  return requests, broken


def given_requests():
  """--requests, or what the flags say -> (requests as dicts, broken lines)."""
  if (FLAGS.prompt is None and FLAGS["shots"].value is None) == (FLAGS.requests is None):
    raise BadInput("give either --prompt=TEXT (or --shots) or --requests=FILE.jsonl")
  given = {name: FLAGS[name].value for name in FIELDS if FLAGS[name].value is not None}
  if FLAGS.requests is not None:
    if given or FLAGS.grid:
      raise BadInput(
        f"--{next(iter(given), 'grid')} goes with --prompt; with --requests, give it in each line of "
        f"{FLAGS.requests}"
      )
    return sample.read_requests(FLAGS.requests)
  prompt, requests = FLAGS.prompt or "", []
  for values in itertools.product(*grid().values()):
    flags_of_one = given | dict(zip(grid(), values))
    fields = {name: parse_value(name, value) for name, value in flags_of_one.items()}
    requests.append({"id": file_name(prompt, flags_of_one), "prompt": prompt, **fields})
  return requests, []


def grid():
  """--grid -> {field: [texts of its values]}."""
  axes = {}
  for part in FLAGS.grid.split():
    name, _, values = part.partition("=")
    if name not in FIELDS or not values:
      raise BadInput(f'--grid={FLAGS.grid}: {part!r} is no field with values; as "steps=10,20 guidance=1,4"')
    axes[name] = values.split(",")
  return axes


def parse_value(name, value):
  """The text of a flag as the type its field has: 17, 8.0, "64,96" or "[64,96]"."""
  wanted = tasks.FIELDS[name].type
  try:
    if wanted is list:
      return json.loads(value if value.startswith("[") else f"[{value.replace('x', ',')}]")
    return wanted(value)
  except ValueError:
    allowed = f"a number ({wanted.__name__})"
    if wanted is list:
      allowed = "numbers as 64,96, or a list in JSON"
    raise BadInput(f"--{name}={value} cannot be read; give {allowed}") from None


def file_name(prompt, given):
  """From the prompt and the flags that were given, so that another size or seed is another file."""
  parts = [slug(prompt)[:60].strip(".") or "video"]
  for name, value in given.items():
    parts.append(f"{name if name != 'task' else ''}{slug(value.rsplit('/', 1)[-1])[:20]}")
  name = "-".join(parts)[:200]
  if len(prompt) <= 60 and all(len(value) <= 20 for value in given.values()):
    return name
  whole = "\n".join([prompt, *given.values()])  # something was cut off: a checksum of all of it
  return f"{name}-{zlib.crc32(whole.encode('utf-8', 'replace')):08x}"


def slug(text):
  """Letters, digits and dots of a text, its words joined by hyphens."""
  words = "".join(c if c.isalnum() or c == "." else " " for c in text.lower()).split()
  return "-".join(words)


if __name__ == "__main__":
  program.run(main, define_flags)
