"""`flashcore search`: let the machine find a kernel's configuration: run, measure, report, retest, promote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
import typer.core

from flashcore.errors import ArgumentValueError

if TYPE_CHECKING:
    from rich.console import Console

    from flashcore.search.run import Order, Progress
    from flashcore.search.sampling import Sampler
    from flashcore.search.schema import Problem, SearchResult

# A file or a pipe has no width; the tables are then as wide as they need to be.
PIPED_WIDTH = 160
INTERRUPTED, WAITING = 130, 3


class _KernelFirst(typer.core.TyperGroup):
    """What is no subcommand is a kernel, and means `run`: `flashcore search hopper --shape ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0].startswith("-"))
        return super().parse_args(ctx, args if named or not args else ["run", *args])


search = typer.Typer(
    cls=_KernelFirst,
    help="Search for a forward kernel's configuration: build without a GPU, judge on one, compare with the hand-chosen.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add `search` to the command line."""
    app.add_typer(search, name="search")


@search.command("run")
def run(
    kernel: Annotated[str, typer.Argument(help="portable, hopper or small.")],
    out: Annotated[Path, typer.Option(help="Folder of the search; one that is there goes on.")],
    shape: Annotated[
        list[str] | None,
        typer.Option(help="B,H,S,D; or B,Hq/Hk,Sq/Sk,D; or tiny, small, medium, mission, multi_batch. Repeatable."),
    ] = None,
    grid: Annotated[str | None, typer.Option(help="A grid of `flashcore bench`, in place of shapes.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Every shape causal, aligned bottom-right.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32. Default: the shape's own (fp16).")] = None,
    mask: Annotated[str | None, typer.Option(help="none, bool or additive.")] = None,
    window: Annotated[str, typer.Option(help="left,right; -1 is unlimited. Empty: none.")] = "",
    softcap: Annotated[float, typer.Option(help="Cap of the scaled scores; 0: none.")] = 0.0,
    budget: Annotated[int | None, typer.Option(help="Candidates to evaluate. Default: as many as fit the problem.")] = None,
    sampler: Annotated[str, typer.Option(help="evolutionary, random or exhaustive.")] = "evolutionary",
    seed: Annotated[int, typer.Option(help="What proposals are drawn from.")] = 0,
    generation: Annotated[
        int | None, typer.Option(help="Candidates that are built and judged together. Default: 16; exhaustive: all.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Compilers at once. Default: one a core.")] = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Judge on another machine, though there is a GPU here.")
    ] = False,
) -> None:
    """Search for the configuration of a kernel at a shape, or at each of several. Ctrl-C loses nothing: run it again to go on.

    Where there is a GPU, each generation is judged on it. Where there is none, the search stops with a batch in a folder and
    says what to run on a machine that has one. Exit code 3 when a batch waits, 130 when interrupted, 2 for a bad argument.
    """
    if budget is not None and budget < 1:
        raise ArgumentValueError(f"budget: got {budget}; allowed: at least 1")
    if jobs is not None and jobs < 1:
        raise ArgumentValueError(f"jobs: got {jobs}; allowed: at least 1")
    if out.is_file():
        raise ArgumentValueError(f"out: {out} is a file; allowed: a folder, or the name of one that is to be made")
    chosen = _sampler(sampler)
    from rich.console import Console

    console = Console(stderr=True)
    problems = _problems(kernel, shape or [], grid, causal, dtype, mask, window, softcap, console)
    from flashcore.search.measurers import AwaitingGpu
    from flashcore.search.run import Order

    awaited = []
    for problem in problems:
        order = Order.of(problem, chosen, seed, budget, generation)
        place = out if len(problems) == 1 else out / problem.name
        try:
            result = _search(order, place, jobs, elsewhere, console)
        except AwaitingGpu as waiting:
            awaited.append(str(waiting))
            continue
        except KeyboardInterrupt:
            console.print(f"interrupted; {place} has what was found. Run it again to go on", soft_wrap=True, highlight=False)
            raise typer.Exit(INTERRUPTED) from None
        _show(result, place)
    for words in awaited:
        console.print(words, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if awaited:
        raise typer.Exit(WAITING)


def _sampler(text: str) -> Sampler:
    from flashcore.search.sampling import Sampler

    if text not in get_args(Sampler):
        raise ArgumentValueError(f"sampler: got {text!r}; allowed: {', '.join(get_args(Sampler))}")
    return cast("Sampler", text)


def _problems(
    kernel: str,
    texts: list[str],
    grid: str | None,
    causal: bool,
    dtype: str | None,
    mask: str | None,
    window: str,
    softcap: float,
    console: Console,
) -> list[Problem]:
    """What to search for: of a grid what the kernel takes, of shapes given one by one all."""
    from flashcore.bench import shapes
    from flashcore.search.kernels import SEARCHABLE
    from flashcore.search.schema import Problem

    if kernel not in SEARCHABLE:
        raise ArgumentValueError(f"kernel: got {kernel!r}; allowed: {', '.join(SEARCHABLE)}")
    if bool(texts) == (grid is not None):
        raise ArgumentValueError("shape and grid: got both or neither; allowed: one of them")
    try:
        sides = [int(side) for side in window.split(",")] if window else None
    except ValueError:
        sides = [0]
    if sides is not None and len(sides) != 2:
        raise ArgumentValueError(f"window: got {window!r}; allowed: left,right, two integers >= -1")
    wanted = shapes.grid(grid) if grid is not None else tuple(shapes.parse_shape(text) for text in texts)
    problems = [
        Problem(
            impl=kernel,  # type: ignore[arg-type]  # membership in SEARCHABLE was checked above
            batch=one.batch,
            heads=one.heads_q,
            heads_k=one.heads_k,
            seqlen_q=one.seqlen_q,
            seqlen_k=one.seqlen_k,
            head_dim=one.head_dim,
            head_dim_v=one.head_dim_v,
            dtype=one.dtype,  # type: ignore[arg-type]  # Shape has checked it
            causal=one.causal,
            window=None if sides is None else (sides[0], sides[1]),
            softcap=softcap,
            mask=one.mask,
        )
        for one in shapes.override(wanted, causal=causal, dtype=dtype, mask=mask)
    ]
    taken = []
    for problem in problems:
        try:
            SEARCHABLE[kernel].spec(problem)
            taken.append(problem)
        except ArgumentValueError as error:
            if grid is None or (problem is problems[-1] and not taken):
                raise
            console.print(f"left out: {error}", style="dim", markup=False, highlight=False, soft_wrap=True)
    return taken


def _search(order: Order, place: Path, jobs: int | None, elsewhere: bool, console: Console) -> SearchResult:
    """One search, to its end or as far as it goes without a GPU."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from flashcore.search.measurers import FolderMeasurer, LocalMeasurer
    from flashcore.search.run import ARCH, JUDGED, CompilerBuilder, Search
    from flashcore.target import SM_COUNTS, Target

    target = Target.of(torch.device("cuda")) if torch.cuda.is_available() and not elsewhere else None
    if target is not None and target.arch != ARCH:
        raise ArgumentValueError(
            f"GPU: got {target.name}, {target.arch}; allowed: {ARCH}, or --elsewhere to judge on such a one"
        )
    sm_count = SM_COUNTS[ARCH] if target is None else target.sm_count
    search = Search(order, place, sm_count)
    measurer = FolderMeasurer(place / JUDGED) if target is None else LocalMeasurer(place / JUDGED)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(order.problem.name, total=order.budget)
        best = ""

        def heard(progress: Progress) -> None:
            nonlocal best
            found = "" if progress.best is None else _described(progress.best.name, progress.best.judged)
            bar.update(task, completed=progress.evaluations, description=f"{order.problem.name}: {progress.doing}")
            if found != best:
                best = found
                bar.console.print(f"best so far: {found}", highlight=False, soft_wrap=True)

        def said(words: str) -> None:
            bar.update(task, description=f"{order.problem.name}: {words}")

        return search.run(CompilerBuilder(order.problem, sm_count, jobs, said), measurer, heard)


def _described(name: str, judged: object) -> str:
    from flashcore.search.schema import Judged

    assert isinstance(judged, Judged)
    return f"{name}: {judged.ratio:.3f} ({judged.ratio_low:.3f} to {judged.ratio_high:.3f}) of the hand-chosen form's speed"


def _show(result: SearchResult, place: Path) -> None:
    """What a search came to."""
    from collections import Counter

    from flashcore.search.run import RESULT, best_of

    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(trial.verdict for trial in result.trials).items())
    typer.echo(
        f"{result.problem.name}, {result.sampler}, seed {result.seed}: {len(result.trials)} of {result.fitting}: {verdicts}"
    )
    best = best_of(result)
    typer.echo("nothing was measured" if best is None else f"best: {_described(best.name, best.judged)}")
    typer.echo(f"in {place / RESULT}")


@search.command("measure")
def measure(
    folders: Annotated[list[Path], typer.Argument(help="Folders of batches.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where results are written, a file for each batch and visit. Default: where a batch's search has them."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin no candidate after so many seconds.")] = None,
) -> None:
    """Judge batches of candidates on this machine's GPU: right first, then timed. Goes on where the last visit ended."""
    from rich.console import Console

    from flashcore.search.measure import run

    run(folders, out, seconds, Console(stderr=True))


@search.command("report")
def report(
    results: Annotated[list[Path], typer.Argument(help="Results of searches, or their folders.")],
    out: Annotated[Path | None, typer.Option(help="Write the JSON record here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here: the best so far against evaluations.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each sampler over the times of an exhaustive search.")] = 50,
) -> None:
    """What searches found against the hand-chosen forms, and how the samplers do against an exhaustive search.

    Results that do not hold together are refused, and nothing is written.
    """
    for name, path in (("out", out), ("plot", plot)):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise ArgumentValueError(f"{name}: {path} cannot be written; allowed: a file in a folder that exists")
    if plot is not None:
        from flashcore.bench.plot import require_matplotlib

        require_matplotlib()
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flashcore.search.report import make_report
    from flashcore.search.report_view import views

    with Console(stderr=True).status("comparing") as status:
        made = make_report(
            [_result(path) for path in results], seeds, lambda words: status.update(f"comparing: {escape(words)}")
        )
    if plot is not None:
        from flashcore.search.plot import plot as write_plot

        write_plot(made, plot)
        made = made.model_copy(update={"plot": plot.name})
    if out is not None:
        made.save(out)
    console = Console(width=None if Console().is_terminal else PIPED_WIDTH, highlight=False)
    for view in views(made):
        table = Table(title=escape(view.title), title_justify="left")
        for column in view.columns:
            table.add_column(escape(column), overflow="fold")
        for row in view.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in view.notes:
            console.print(note, style="dim", markup=False)


@search.command("retest")
def retest(
    results: Annotated[list[Path], typer.Argument(help="Results of searches, or their folders.")],
    out: Annotated[Path, typer.Option(help="Where the batches are written, a folder for each shape.")],
    jobs: Annotated[int | None, typer.Option(help="Compilers at once. Default: one a core.")] = None,
) -> None:
    """Make batches of the fastest forms, at their shape and at shapes that the search did not see, for `measure` to judge."""
    from rich.console import Console

    from flashcore.search.retest import make_retests
    from flashcore.search.schema import SearchResult
    from flashcore.stored import read

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = [read(SearchResult, _result(path)) for path in results]
    made = [folder for result in found for folder in make_retests(result, out, jobs=jobs, say=console.print)]
    if made:
        console.print(f"where there is a GPU: flashcore search measure {' '.join(map(str, made))} --out RESULTS")


@search.command("promote")
def promote(
    result: Annotated[Path, typer.Argument(help="The result of a search, or its folder.")],
    retests: Annotated[list[Path] | None, typer.Argument(help="What `measure` wrote of its retests.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Pass records of this GPU only, such as nvidia-h200.")] = None,
) -> None:
    """Put the fastest form that held in its retests into the table that the planner reads, or that none did."""
    from flashcore.search.promote import promote as enter
    from flashcore.search.promote import unmeasured

    entry = enter(_result(result), retests or [], gpu)
    typer.echo(f"{entry.problem.name}: {entry.why}")
    for name in unmeasured(entry):
        typer.echo(f"{name} takes it too, and was neither searched nor retested: search there, or let a benchmark tell")


def _result(path: Path) -> Path:
    from flashcore.search.run import RESULT

    return path / RESULT if path.is_dir() else path
