"""Exceptions that callers handle, and two checks that turn a mistake in a config into one line."""


class BadInput(ValueError):
  """The user can put this right. The text is one line: `NAME: what was given; what is allowed; what to do`.

  Programs in launch/ print the line to stderr and exit with code 2.
  """


class Stopped(Exception):
  """The caller asked to stop, and nothing is lost: the same call continues the work.

  Programs exit with code 75.
  """


class Failure(RuntimeError):
  """The work cannot continue, and not because of bad input. Programs print one line and exit with code 1."""


def checked(build, what):
  """build(); a ValueError, KeyError or TypeError becomes BadInput, whose line begins with `what`, a part of a
  config.
  """
  try:
    return build()
  except BadInput:
    raise
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f"{what}: {str(error).strip(chr(34))}") from None


def pick(table, name, what):
  """table[name]; BadInput lists the names that the table has."""
  if name not in table:
    raise BadInput(f"{what} is {name!r}; it must be one of {', '.join(table)}")
  return table[name]


def unless_stopped(items, stop):
  """Yields the items; raises Stopped before the next one once stop() is true."""
  for item in items:
    if stop():
      raise Stopped
    yield item
