"""What commands print for people, in one place: what is stored cannot move the cursor or turn a line around.

Left out: what is printed for programs, which is JSON and escaped as its encoder does.
"""

from collections.abc import Iterable, Sequence

import click

from runtime.characters import shown


def say(line: str, *, err: bool = False) -> None:
    """One line, with an escape for what nobody sees."""
    click.echo(shown(line), err=err)


def say_table(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> None:
    """Rows as wide as their widest cells; with `numbers`, what is behind the first column stands to the right."""
    table = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
