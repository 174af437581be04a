"""The sampling job: a prompt, or a file of requests, in; H.264 mp4 files (png for one frame) and manifest.jsonl out.

  python -m launch.sample --prompt="a red ball moves left" --out=OUT                # the small model that ships
  python -m launch.sample --workdir=W --requests=R.jsonl --out=OUT                  # run again, it does what is missing
"""

import json
import zlib

from absl import flags

from launch import cli, sampling
from sora_jax import checkpoint, tasks
from sora_jax.errors import BadInput

WORKDIR = flags.DEFINE_string("workdir", "", "work directory of launch.train; without it, the small model that ships")
PROMPT = flags.DEFINE_string("prompt", None, "what to show")
REQUESTS = flags.DEFINE_string("requests", None, "file of requests, one JSON object a line")
OUT = flags.DEFINE_string("out", "out", "where the files go")
WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "running mean of the weights, or the last ones")
FIELDS = {name: flags.DEFINE_string(name, None, f"{name} of the request (with --prompt)")
          for name in tasks.FIELDS if name not in ("id", "prompt")}


def main():
  requests, broken = chosen_requests()
  workdir = WORKDIR.value or checkpoint.shipped()
  bundle = sampling.Bundle.open(workdir, WEIGHTS.value)
  cli.say(f"sampling {len(requests)} request{'s' * (len(requests) != 1)} with {WORKDIR.value or 'the model that ships'} "
          f"(step {bundle.step}) into {OUT.value}")
  if PROMPT.value is not None:
    bundle.canvas(tasks.parse_request(requests[0], bundle.defaults, sampling.SAMPLERS))      # a bad flag is told before anything runs
  for number, error in broken:
    cli.say(f"line {number} of {REQUESTS.value} is {error}")
    sampling.note_failure(OUT.value, f"{number:05d}", error, {})
  counts = sampling.run_job(bundle, requests, OUT.value)
  failed = counts["failed"] + len(broken)
  kept = f", {counts['kept']} were there already" if counts["kept"] else ""
  cli.say(f"{counts['ok']} made{kept}{f', {failed} could not be done' if failed else ''}; see {OUT.value}/manifest.jsonl")
  if counts["stopped"]:
    cli.say("stopped on request; run the same command again for the rest")
    return cli.STOPPED
  if failed:
    first = f"line {broken[0][0]} of {REQUESTS.value} is {broken[0][1]}" if broken else f"see {OUT.value}/manifest.jsonl"
    raise BadInput(f"{failed} of {len(requests) + len(broken)} requests could not be done ({first}); the others were; mend them and run again")
  return cli.OK


def chosen_requests():
  """-> (requests as dicts, broken lines)."""
  if (PROMPT.value is None) == (REQUESTS.value is None):
    raise BadInput("give either --prompt=TEXT or --requests=FILE.jsonl")
  given = {name: flag.value for name, flag in FIELDS.items() if flag.value is not None}
  if REQUESTS.value is not None:
    if given:
      raise BadInput(f"--{next(iter(given))} goes with --prompt; with --requests, give it in each line of {REQUESTS.value}")
    return sampling.read_requests(REQUESTS.value)
  return [{"id": _file_name(given), "prompt": PROMPT.value, **{name: _typed(name, value) for name, value in given.items()}}], []


def _typed(name, value):
  """The text of a flag as the type its field has: 17, 8.0, "64,96" or "[64,96]"."""
  wanted = tasks.FIELDS[name]
  try:
    if wanted is list:
      return json.loads(value if value.startswith("[") else f"[{value.replace('x', ',')}]")
    return wanted(value)
  except ValueError:
    raise BadInput(f"--{name}={value} cannot be read; give {'two numbers as 64,96' if wanted is list else f'a number ({wanted.__name__})'}") from None


def _file_name(given):
  """From the prompt and the flags that were given, so that another size or seed is another file."""
  slug = lambda value: "-".join("".join(c if c.isalnum() or c == "." else " " for c in value.lower()).split())  # noqa: E731
  parts = [slug(PROMPT.value)[:60].strip(".") or "video"]
  parts += [f"{name if name != 'task' else ''}{slug(value.rsplit('/', 1)[-1])[:20]}" for name, value in given.items()]
  name, whole = "-".join(parts)[:200], "\n".join([PROMPT.value, *given.values()])
  cut = len(PROMPT.value) > 60 or any(len(value) > 20 for value in given.values())
  return f"{name}-{zlib.crc32(whole.encode('utf-8', 'replace')):08x}" if cut else name


if __name__ == "__main__":
  cli.run(main)
