"""`flashcore verify`: is attention right on this machine? Exit 0: every case passed; 1: one failed; 2: bad input."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from flashcore.verify.cases import Case
    from flashcore.verify.mutations import MutationResult
    from flashcore.verify.suite import CaseResult, Implementation

INTERPRETED_NOTE = "no GPU: the portable kernel runs in Triton's interpreter; this proves the maths, not the binary"


_STYLES = {"passed": "green", "failed": "red", "skipped": "yellow", "rejected": "dim"}


def register(app: typer.Typer) -> None:
    """Add `verify` to the command line."""
    app.command(name="verify")(verify)


def verify(
    impl: Annotated[
        str, typer.Option(help="What to verify: ours (each kernel, on the cases that it takes), one kernel, torch or auto.")
    ] = "ours",
    suite: Annotated[str, typer.Option(help="Which cases: mission (the 15), edge, tile, short, shipped or all.")] = "all",
    only: Annotated[str | None, typer.Option(help="Only the cases whose names match this glob, e.g. 'mask-*'.")] = None,
    mutations: Annotated[bool, typer.Option("--mutations", help="Test the suite itself: wrong kernels must fail.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases and run nothing.")] = False,
) -> None:
    """Verify attention against float64: each case by both bounds, in poisoned memory, three runs bitwise equal."""
    import torch
    from rich.console import Console

    from flashcore.errors import ArgumentValueError
    from flashcore.verify.cases import select
    from flashcore.verify.subject import OURS, flashcore_implementations

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        # Triton reads it when it is first imported, which nothing above has done.
        os.environ["TRITON_INTERPRET"] = "1"
    implementations = flashcore_implementations(impl)
    cases = select(suite, only)
    console = Console()
    if list_cases:
        for case in cases:
            console.print(case.name, highlight=False, markup=False)
        return
    if mutations and record is not None:
        raise ArgumentValueError("record: --mutations verifies the suite, not a kernel, so there is nothing to record")
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    if mutations:
        # a kernel that is named stands for the right implementation; else plain PyTorch does
        ok = _verify_suite(console, cases, device, None if impl == OURS else implementations[0])
    else:
        ok = _verify_implementations(console, cases, device, impl, implementations, suite=suite, only=only, record=record)
    if not ok:
        raise typer.Exit(1)


def _verify_implementations(
    console: Console,
    cases: Sequence[Case],
    device: torch.device,
    impl: str,
    implementations: Sequence[Implementation],
    *,
    suite: str,
    only: str | None,
    record: Path | None,
) -> bool:
    from flashcore.target import Target
    from flashcore.verify.suite import run_suite

    target = Target.of(device)
    names = [implementation.name for implementation in implementations]
    interpreted = target.interpreted and "portable" in names
    if interpreted:
        console.print(INTERPRETED_NOTE, style="yellow", soft_wrap=True)
        # The interpreter computes with numpy, which warns of what a masked kernel means to do: log2(0), inf - inf.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    results = []
    with _progress(console) as progress:
        task = progress.add_task("verify", total=len(cases) * len(names))
        for result in run_suite(cases, implementations, device):
            results.append(result)
            progress.update(task, advance=1, description=result.case.name)
    _print_results(console, results, names, f"{', '.join(names)} on {target.name}")
    if record is not None:
        from flashcore.verify.record import write

        write(
            record,
            results,
            implementation=impl,
            device=target.name,
            interpreted=interpreted,
            suite=suite,
            only=only,
        )
        console.print(f"recorded in {record}", highlight=False, markup=False, soft_wrap=True)
    # Fail closed: a run in which nothing passed has proved nothing.
    return any(r.verdict == "passed" for r in results) and all(r.verdict != "failed" for r in results)


def _verify_suite(console: Console, cases: Sequence[Case], device: torch.device, right: Implementation | None) -> bool:
    from flashcore.verify.mutations import run_mutations

    # What no tiled PyTorch can be asked: torch's own entry, and the gigabytes of the largest cases.
    cases = [case for case in cases if case.entry == "attention" and not case.needs_bytes]
    with _progress(console) as progress:
        task = progress.add_task("mutations", total=len(cases))
        results = list(run_mutations(cases, device, right, lambda: progress.advance(task)))
    _print_mutations(console, results, "plain PyTorch" if right is None else right.name)
    return all(result.as_it_should_be for result in results)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    return Progress(*columns, console=console, transient=True)


def _print_results(console: Console, results: Sequence[CaseResult], names: Sequence[str], subject: str) -> None:
    """The table, then who failed, was skipped or was rejected and why, then the counts: the last line is the whole run's."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"verify {subject}", box=box.SIMPLE_HEAD)  # narrow enough for 80 columns
    table.add_column("case", no_wrap=True)
    if len(names) > 1:
        table.add_column("kernel", no_wrap=True)
    for column in ("error", "bound", "lse error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for result in results:
        if result.verdict == "rejected":
            continue
        output, lse = result.output, result.lse
        table.add_row(
            Text(result.case.name),
            *([result.implementation] if len(names) > 1 else []),
            *(f"{output.max_abs:.2e} {output.bound:.2e}".split() if output else ("-", "-")),
            f"{lse.max_abs:.2e}" if lse else "-",
            Text(result.verdict, style=_STYLES[result.verdict]),
        )
    console.print(table)
    rejections = Counter((r.implementation, r.reason) for r in results if r.verdict == "rejected")
    for (name, reason), count in rejections.items():
        console.print(Text(f"{name} rejected {count}: {reason}", style=_STYLES["rejected"]), soft_wrap=True)
    for verdict in ("skipped", "failed"):
        for result in results:
            if result.verdict == verdict:
                by = f" by {result.implementation}" if len(names) > 1 else ""
                line = Text(f"{verdict} {result.case.name}{by}: {result.reason}", style=_STYLES[verdict])
                console.print(line, soft_wrap=True)
    if len(names) > 1:
        for name in names:
            console.print(f"{name}: {_counts_text([r for r in results if r.implementation == name])}", highlight=False)
    console.print(_counts_text(results), highlight=False)


def _counts_text(results: Sequence[CaseResult]) -> str:
    from flashcore.verify.record import counts

    # a kernel that rejects nothing need not say so
    found = counts(results)
    return ", ".join(f"{count} {verdict}" for verdict, count in found.items() if count or verdict != "rejected")


def _print_mutations(console: Console, results: Sequence[MutationResult], right: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"the suite, tested by {right} and by wrong implementations")
    table.add_column("implementation")
    table.add_column("cases it failed", justify="right")
    table.add_column("as it should be")
    for result in results:
        name = "a right one" if result.mutation is None else result.mutation.value
        verdict = "passed" if result.as_it_should_be else "failed"
        table.add_row(
            name,
            f"{len(result.failed)} of {result.cases}",
            Text("yes" if result.as_it_should_be else "NO", style=_STYLES[verdict]),
        )
    console.print(table)
