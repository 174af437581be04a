"""Tables of text for the terminal, laid out by rich."""

import io

from rich.console import Console
from rich.table import Table


def lines(header, rows, left=(0,)) -> list:
  """A header and rows of strings -> lines. Columns are as wide as their longest cell: nothing is cut.

  left: the columns that are set to the left; the others, which hold numbers, are set to the right.
  """
  table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
  for i, name in enumerate(header):
    table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
  for row in rows:
    table.add_row(*row)
  widths = [max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)]
  console = Console(file=io.StringIO(), width=sum(widths), markup=False, highlight=False)
  console.print(table)
  return [line.rstrip() for line in console.file.getvalue().splitlines()]
