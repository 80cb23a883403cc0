"""`flashcore evidence`: make, or check, what follows from the recorded runs: the index and the generated tables."""

from __future__ import annotations

from typing import Annotated

import typer

from flashcore.errors import ArgumentValueError


def register(app: typer.Typer) -> None:
    """Add `flashcore evidence`."""
    app.command()(evidence)


def evidence(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit 1 if anything is stale or any shipped binary is unproved.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(help="With --check: build only what has a name that matches this glob, and say so.")
    ] = None,
) -> None:
    """Remake the evidence's index and the tables in the documents from the recorded runs.

    With --check, also build every binary shipped for a GPU that there is evidence of and compare it with what was verified.
    """
    if only is not None and not check:
        raise ArgumentValueError(f"only: got {only!r} without --check; allowed: with it")
    from rich.console import Console

    from flashcore import tuned
    from flashcore.cli.building import build_with_progress
    from flashcore.documents import render_all
    from flashcore.evidence.build import folders, make_index, unproved, unproved_entries

    console = Console(soft_wrap=True, highlight=False)
    problems = []
    proved = set()
    for folder in folders():
        index = make_index(folder)
        proved.add(index.gpu)
        text = index.model_dump_json(indent=1) + "\n"
        path = folder / "index.json"
        if not check:
            path.write_text(text)
            console.print(f"wrote {path}")
        elif not path.exists() or path.read_text() != text:
            problems.append(f"{path} is stale: run `flashcore evidence`")
        if check:
            built = build_with_progress(index.arch, only or "*")
            problems += unproved(index, built) + unproved_entries(index, built, whole=only is None)
    if check:
        tables = tuned.tables().items()
        problems += [f"{path}: there is no evidence of {table.gpu}" for path, table in tables if table.gpu not in proved]
    if not folders():
        problems.append("there is no evidence of any GPU")
    for document, text in render_all().items():
        if document.read_text() == text:
            continue
        if check:
            problems.append(f"{document} has stale tables: run `flashcore evidence`")
        else:
            document.write_text(text)
            console.print(f"wrote {document}")
    for problem in problems:
        console.print(problem, style="red", markup=False)
    if problems:
        raise typer.Exit(1)
    said = "the evidence holds" + (f", of {only} as far as binaries go" if only else "")
    console.print(said if check else "done", style="green", markup=False)
