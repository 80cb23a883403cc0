"""`flashcore verify`: is attention right on this machine? Exit 0: every case passed; 1: one failed; 2: bad input."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from flashcore.target import Target
    from flashcore.verify.cases import Case
    from flashcore.verify.mutations import MutationResult
    from flashcore.verify.record import Direction
    from flashcore.verify.suite import CaseResult, Implementation, Judge, Prepare
    from flashcore.verify.tolerance import Comparison

INTERPRETED_NOTE = "no GPU: the portable kernel runs in Triton's interpreter; this proves the maths, not the binary"
# Seconds between two lines on how far a run is, where no terminal has a bar.
LOG_SECONDS = 15.0


_STYLES = {"passed": "green", "failed": "red", "skipped": "yellow", "rejected": "dim"}


def register(app: typer.Typer) -> None:
    """Add `verify` to the command line."""
    app.command(name="verify")(verify)


def verify(
    impl: Annotated[
        str, typer.Option(help="What to verify: ours (each kernel, on the cases that it takes), one kernel, torch or auto.")
    ] = "ours",
    suite: Annotated[
        str,
        typer.Option(
            help="Which cases: mission (the 15), edge, tile, short, shipped, tuned (fwd only), backward (bwd only), all."
        ),
    ] = "all",
    only: Annotated[str | None, typer.Option(help="Only the cases whose names match this glob, e.g. 'mask-*'.")] = None,
    mutations: Annotated[bool, typer.Option("--mutations", help="Test the suite itself: wrong kernels must fail.")] = False,
    direction: Annotated[str, typer.Option(help="fwd: the output; bwd: the gradients; both: one after the other.")] = "fwd",
    record: Annotated[
        Path | None,
        typer.Option(help="Write the results to this JSON file; the backward pass's of both beside it, NAME-bwd.json."),
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="List the cases and run nothing.")] = False,
) -> None:
    """Verify attention against float64: each case by both bounds, in poisoned memory, three runs bitwise equal."""
    import torch
    from rich.console import Console

    from flashcore.errors import ArgumentValueError

    if direction not in _DIRECTIONS:
        raise ArgumentValueError(f"direction: got {direction!r}; allowed: {', '.join(_DIRECTIONS)}")
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        # Triton reads it when it is first imported, which nothing above has done.
        os.environ["TRITON_INTERPRET"] = "1"
        # The interpreter computes with numpy, which warns of what a masked kernel means to do: log2(0), inf - inf.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    runs = [_asked(one, impl, suite, only) for one in _DIRECTIONS[direction]]
    console = Console()
    if list_cases:
        for name in dict.fromkeys(case.name for run in runs for case in run.cases):
            console.print(name, highlight=False, markup=False)
        return
    if mutations and record is not None:
        raise ArgumentValueError("record: --mutations verifies the suite, not a kernel, so there is nothing to record")
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    ok = True
    for run in runs:
        if mutations:
            ok = _verify_suite(console, run, device) and ok
            continue
        beside = record is not None and len(runs) > 1 and run.direction == "bwd"
        path = record.with_name(f"{record.stem}-bwd{record.suffix}") if record is not None and beside else record
        ok = _verify_implementations(console, run, device, path) and ok
    if not ok:
        raise typer.Exit(1)


_DIRECTIONS: dict[str, tuple[Direction, ...]] = {"fwd": ("fwd",), "bwd": ("bwd",), "both": ("fwd", "bwd")}


@dataclass(frozen=True)
class _Run:
    """What is asked for, in one direction. `steps` and `mutate` are those of that direction's suite."""

    direction: Direction
    impl: str
    suite: str
    only: str | None
    implementations: Sequence[Implementation]
    cases: Sequence[Case]
    steps: tuple[Prepare, Judge]
    mutate: Callable[..., Iterator[MutationResult]]


def _asked(direction: Direction, impl: str, suite: str, only: str | None) -> _Run:
    from flashcore.verify.cases import select

    if direction == "fwd":
        from flashcore.verify.mutations import run_mutations
        from flashcore.verify.subject import flashcore_implementations
        from flashcore.verify.suite import judge, prepare

        implementations = flashcore_implementations(impl)
        return _Run(direction, impl, suite, only, implementations, select(suite, only), (prepare, judge), run_mutations)
    from flashcore.verify.backward_mutations import run_backward_mutations
    from flashcore.verify.backward_subject import backward_implementations
    from flashcore.verify.backward_suite import judge_backward, prepare_backward

    implementations = backward_implementations(impl)
    cases, steps = select(suite, only, backward=True), (prepare_backward, judge_backward)
    return _Run(direction, impl, suite, only, implementations, cases, steps, run_backward_mutations)


def _verify_implementations(console: Console, run: _Run, device: torch.device, record: Path | None) -> bool:
    from flashcore.target import Target
    from flashcore.verify.suite import run_suite

    target = Target.of(device)
    names = [implementation.name for implementation in run.implementations]
    interpreted = target.interpreted and "portable" in names
    if interpreted:
        console.print(INTERPRETED_NOTE, style="yellow", soft_wrap=True)
    _compile_ahead(console, run, target)
    results = []
    with _progress(console) as progress:
        total = len(run.cases) * len(names)
        task = progress.add_task("verify", total=total)
        log = _Log(console)
        for result in run_suite(run.cases, run.implementations, device, run.steps):
            results.append(result)
            progress.update(task, advance=1, description=result.case.name)
            if result.verdict == "failed":
                # once more at the end, with what the others did
                log.say(f"{result.implementation}: {result.case.name} fails: {result.reason}")
            if log.due():
                counted = f"{len(results)} of {total} done ({_counts_text(results)})"
                log.say(f"{counted}, at {result.implementation}: {result.case.name}")
    backward = ", backward" if run.direction == "bwd" else ""
    _print_results(console, results, names, f"{', '.join(names)} on {target.name}{backward}")
    if record is not None:
        from flashcore.verify.record import write

        write(
            record,
            results,
            implementation=run.impl,
            device=target.name,
            interpreted=interpreted,
            suite=run.suite,
            only=run.only,
            direction=run.direction,
        )
        console.print(f"recorded in {record}", highlight=False, markup=False, soft_wrap=True)
    # Fail closed: a run in which nothing passed has proved nothing.
    return any(r.verdict == "passed" for r in results) and all(r.verdict != "failed" for r in results)


class _Log:
    """What a run says on its way where no terminal has a bar, so that the log of one that was cut off says what it found."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to say how far the run is; then not again for LOG_SECONDS."""
        due = time.monotonic() - self._told >= LOG_SECONDS
        if due:
            self._told = time.monotonic()
        return due

    def say(self, line: str) -> None:
        """Print a line, but to a terminal."""
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _compile_ahead(console: Console, run: _Run, target: Target) -> None:
    """On a GPU, compile what the cases need and nobody has yet."""
    from flashcore.verify.ahead import compile_ahead, missing

    if target.arch is None:
        return
    needed = missing((one for i in run.implementations for case in run.cases for one in i.binaries(case, target)), target)
    if needed:
        _Log(console).say(f"compiling {len(needed)} binaries")
    with _progress(console) as progress:
        task = progress.add_task("compile", total=len(needed))
        failed = compile_ahead(needed, target, lambda: progress.advance(task))
    if needed:
        console.print(f"compiled {len(needed) - failed} binaries; {failed} failed to", highlight=False)


def _verify_suite(console: Console, run: _Run, device: torch.device) -> bool:
    from flashcore.verify.subject import OURS

    # a kernel that is named stands for the right implementation; else plain PyTorch does
    right = None if run.impl == OURS else run.implementations[0]
    # What no plain PyTorch can be asked: torch's own entry, and the gigabytes of the largest cases.
    cases = [case for case in run.cases if case.entry == "attention" and not case.needs_bytes]
    with _progress(console) as progress:
        task = progress.add_task("mutations", total=len(cases))
        log, begun = _Log(console), itertools.count(1)

        def advance() -> None:
            progress.advance(task)
            at = next(begun)
            if log.due():
                log.say(f"at case {at} of {len(cases)}")

        results = list(run.mutate(cases, device, right, advance))
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
    backward = any(result.gradients for result in results)
    for column in ("error", "bound", "of" if backward else "lse error"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for result in results:
        if result.verdict == "rejected":
            continue
        output, beside = _worst(result)
        table.add_row(
            Text(result.case.name),
            *([result.implementation] if len(names) > 1 else []),
            *(f"{output.max_abs:.2e} {output.bound:.2e}".split() if output else ("-", "-")),
            beside,
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


def _worst(result: CaseResult) -> tuple[Comparison | None, str]:
    """The output's comparison and the log-sum-exp's error; of a backward pass, the gradient nearest to its bound or past it."""
    if not result.gradients:
        return result.output, f"{result.lse.max_abs:.2e}" if result.lse else "-"
    name = max(result.gradients, key=lambda name: result.gradients[name].share)
    return result.gradients[name], name


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
