"""Building a set of binaries with a progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flashcore.build.sets import BuiltSet, build_set, matching


def build_with_progress(arch: str, only: str = "*") -> BuiltSet:
    """Build the shipped set of an arch, or what of it matches a glob, showing how far it is on stderr."""
    columns = (TextColumn("building for {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(arch, total=len(matching(arch, only)))
        return build_set(arch, only=only, done=lambda name: progress.advance(task))
