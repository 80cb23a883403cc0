"""`flashcore ladder`: how an attention kernel gets fast, one idea a step: list the steps, or verify and time them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.errors import ArgumentValueError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from rich.console import Console

    from flashcore.bench.view import View
    from flashcore.ladder.artifact import LadderArtifact
    from flashcore.ladder.steps import Step

# A file or a pipe has no width; the tables are then as wide as they need to be.
PIPED_WIDTH = 160
# The first GPU this was made for; what a listing compiles for where there is none.
DEFAULT_ARCH = "sm_89"
NO_TRITON = "no Triton here to compile the steps (pip install flashcore[compile]): registers and the rest are not shown"
NOTHING_TIMED = "no GPU: the steps ran in Triton's interpreter, which proves the maths and not the binaries; nothing was timed"


def register(app: typer.Typer) -> None:
    """Add `ladder` to the command line."""
    app.command(name="ladder")(ladder)


def ladder(
    run: Annotated[bool, typer.Option("--run", help="Verify the steps; on a GPU, time those that are right.")] = False,
    step: Annotated[list[str] | None, typer.Option(help="Only this step. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --run: write the JSON artifact here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="With --run or --from: write a PNG here.")] = None,
    artifact: Annotated[Path | None, typer.Option("--from", help="Show what this artifact of --run holds.")] = None,
    arch: Annotated[str | None, typer.Option(help="What the list is compiled for. Default: this GPU's, else sm_89.")] = None,
) -> None:
    """List the steps of the ladder, with what their binaries hold; with --run verify them (15 cases each) and time them.

    Exit code 1 when a step is wrong, 2 for a bad argument.
    """
    _check(run, out, plot, artifact)
    import torch
    from rich.console import Console

    from flashcore.ladder.steps import STEPS, find_step

    console = Console(width=None if Console().is_terminal else PIPED_WIDTH, highlight=False)
    if artifact is not None:
        from flashcore.ladder.artifact import load

        _show(load(artifact), console, plot)
        return
    steps = [find_step(name) for name in dict.fromkeys(step)] if step else list(STEPS)
    if not run:
        _list(steps, arch, console)
        return
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        # Triton reads it when it is first imported, which nothing above has done.
        os.environ["TRITON_INTERPRET"] = "1"
        # The interpreter computes with numpy, which warns of what a kernel means to do: exp2 of -inf, inf - inf.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    found = _run(steps, torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu"))
    if out is not None:
        found.save(out)
    _show(found, console, plot if found.shapes else None)
    if not has_gpu:
        console.print(NOTHING_TIMED, style="yellow", soft_wrap=True)
    for failure in found.failures:
        Console(stderr=True).print(f"error: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if found.failures or not any(one.passed for one in found.verification):
        raise typer.Exit(1)


def _check(run: bool, out: Path | None, plot: Path | None, artifact: Path | None) -> None:
    """Everything that can be refused before a GPU minute is spent."""
    if run and artifact is not None:
        raise ArgumentValueError("run and from: got both; allowed: one of them")
    if out is not None and not run:
        raise ArgumentValueError(f"out: got {out}; allowed: with --run, which is what makes an artifact")
    if plot is not None and not run and artifact is None:
        raise ArgumentValueError(f"plot: got {plot}; allowed: with --run or --from")
    for name, path in (("out", out), ("plot", plot)):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise ArgumentValueError(f"{name}: {path} cannot be written; allowed: a file in a folder that exists")
    if plot is not None:
        from flashcore.bench.plot import require_matplotlib

        require_matplotlib()


def _list(steps: Sequence[Step], arch: str | None, console: Console) -> None:
    """The steps in order, and what a compile shows of each at the mission shape."""
    import torch

    from flashcore.bench.view import View
    from flashcore.build.compile import triton_version
    from flashcore.ladder.measure import SHAPES, problem_of
    from flashcore.target import SHARED_MEMORY_LIMIT, Target

    if arch is not None and arch not in SHARED_MEMORY_LIMIT:
        raise ArgumentValueError(f"arch: got {arch!r}; allowed: {', '.join(SHARED_MEMORY_LIMIT)}")
    own = Target.of(torch.device("cuda")) if torch.cuda.is_available() else None
    wanted = arch or (own and own.arch) or DEFAULT_ARCH
    if triton_version() is None:
        known = tuple((step.name, step.idea, step.where) for step in steps)
        _print(View("the ladder", ("step", "idea", "runs on"), known, (NO_TRITON,)), console)
        return
    from flashcore.ladder.code import compile_steps
    from flashcore.ladder.table import code_cells

    with console.status("compiling"):
        codes = compile_steps(steps, problem_of(SHAPES[0]), wanted, own.sm_count if own and own.arch == wanted else None)
    rows = tuple(
        (
            step.name,
            step.idea,
            step.where,
            codes[step.name][0].arch,
            *code_cells(tuple(codes[step.name])),
            ", ".join(_matrix(code.matrix) for code in codes[step.name]),
        )
        for step in steps
    )
    columns = ("step", "idea", "runs on", "compiled for", "registers", "spills", "shared", "matrix instructions")
    note = f"binaries for {SHAPES[0].label}; of several kernels the most registers and shared memory, and the sum of spills"
    _print(View("the ladder", columns, rows, (note,)), console)


def _matrix(counts: dict[str, int]) -> str:
    return " ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _run(steps: Sequence[Step], device: torch.device) -> LadderArtifact:
    from rich.console import Console

    from flashcore.ladder.checks import cases
    from flashcore.ladder.measure import Request, run

    progress = Console(stderr=True)
    # Drawn only when something else is begun: a thread that draws would take the interpreter's lock in the middle of a sample.
    said = ""

    def show(what: str) -> None:
        nonlocal said
        if what != said:
            said = what
            progress.print(what, style="dim", markup=False, highlight=False, soft_wrap=True)

    return run(Request(steps, cases()), device, show)


def _show(found: LadderArtifact, console: Console, plot: Path | None) -> None:
    """What was verified, the table of each shape, and the plot."""
    from flashcore.ladder.table import view

    for one in found.verification:
        how = " (interpreted)" if one.interpreted and one.refused is None else ""
        console.print(f"{one.step}{how}: {one.summary}", markup=False, soft_wrap=True)
    for shape in found.shapes:
        _print(view(found, shape), console)
    if plot is not None:
        from flashcore.ladder.plot import plot as write_plot

        write_plot(found, plot)


def _print(view: View, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(view.title), title_justify="left", title_style="bold")
    text = ("step", "idea", "runs on", "compiled for", "matrix instructions", "verdict")
    for number, column in enumerate(view.columns):
        table.add_column(escape(column), justify="left" if column in text else "right", overflow="fold", no_wrap=number == 0)
    for row in view.rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for note in view.notes:
        console.print(note, style="dim", markup=False)
