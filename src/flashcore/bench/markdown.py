"""The tables of an artifact as Markdown, for documents that are generated."""

from __future__ import annotations

from flashcore.bench.artifact import Artifact
from flashcore.bench.view import View, views


def to_markdown(artifact: Artifact) -> str:
    """Every table of the artifact as GitHub Markdown, each with its title and its notes; ends with a newline."""
    return "\n".join(view_to_markdown(view) for view in views(artifact))


def view_to_markdown(view: View) -> str:
    """One table with its title and its notes."""
    lines = [
        f"**{_cell(view.title)}**",
        "",
        _row(view.columns),
        _row(("---", *("---:" if column != "verdict" else "---" for column in view.columns[1:]))),
        *(_row(row) for row in view.rows),
        "",
        *(f"- {_cell(note)}" for note in view.notes),
        "",
    ]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
