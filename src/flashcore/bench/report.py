"""The tables of an artifact on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashcore.bench.artifact import Artifact
from flashcore.bench.bar_view import bar_views
from flashcore.bench.crossover_view import crossover_view
from flashcore.bench.view import View, views

# Columns of sentences, read from the left; figures are compared from the right.
_SENTENCES = ("verdict", "meaning")


def print_report(artifact: Artifact, console: Console) -> None:
    """Print every table of the artifact with its notes; after some grids also what they were measured for."""
    crossover = crossover_view(artifact)
    for view in [*views(artifact), *bar_views(artifact), *([] if crossover is None else [crossover])]:
        print_view(view, console)


def print_view(view: View, console: Console) -> None:
    """Print a table with its notes; rows of ours stand out."""
    table = Table(title=escape(view.title), title_justify="left", title_style="bold")
    for number, column in enumerate(view.columns):
        left = number == 0 or column in _SENTENCES
        table.add_column(escape(column), justify="left" if left else "right", overflow="fold", no_wrap=number == 0)
    for row in view.rows:
        style = "bold" if row[0].startswith("flashcore") else None
        table.add_row(*(escape(cell) for cell in row), style=style)
    console.print(table)
    for note in view.notes:
        console.print(note, style="dim", markup=False, highlight=False)
