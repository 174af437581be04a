"""Tables for the terminal: aligned, whole, at any width."""

from launch.reports import tables


def test_nothing_is_wrapped_or_cut():
  """Text to the left, numbers to the right; a cell of 300 characters is printed whole, whatever the
  terminal.
  """
  long = "x" * 300
  lines = tables.lines(("name", "value"), [("a", "1"), (long, "22")])
  assert [line.split() for line in lines] == [["name", "value"], ["a", "1"], [long, "22"]]
  assert len({len(line) for line in lines}) == 1  # numbers end in one column


def test_no_header_and_what_looks_like_markup():
  assert tables.lines((), [("[red]a", "b")], left=(0, 1)) == ["[red]a  b"]
