"""What a program tells its user instead of a traceback."""


class BadInput(ValueError):
  """The user can put this right. The text is one line: `NAME: what was given; what is allowed; what to do`.

  Programs in launch/ print the line to stderr and exit with code 2.
  """
