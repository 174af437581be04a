"""Tables of text for the terminal, laid out by rich."""

import io

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def lines(header, rows, left=(0,)) -> list:
  """Names of the columns, or (), and rows of strings -> lines of a table.

  Columns are as wide as their longest cell: nothing is wrapped or cut, whatever the width of the terminal.
  left: the columns that are set to the left; the others, which hold numbers, are set to the right.
  """
  grid = [header, *rows] if header else list(rows)
  columns = list(zip(*grid, strict=True))
  table = Table(box=None, show_header=bool(header), pad_edge=False, padding=(0, 2, 0, 0))
  for i, name in enumerate(header or [""] * len(columns)):
    table.add_column(name, justify="left" if i in left else "right", no_wrap=True)
  for row in rows:
    table.add_row(*row)
  width = sum(max(map(cell_len, column)) + 2 for column in columns)
  console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
  console.print(table)
  return [line.rstrip() for line in console.file.getvalue().splitlines()]
