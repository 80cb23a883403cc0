"""Building a set of binaries with a progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flashcore.build.sets import BuiltSet, build_set
from flashcore.kernels.registry import shipped_set


def build_with_progress(arch: str) -> BuiltSet:
    """Build the shipped set of an arch, showing how far it is on stderr."""
    columns = (TextColumn("building for {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(arch, total=len(shipped_set(arch)))
        return build_set(arch, done=lambda name: progress.advance(task))
