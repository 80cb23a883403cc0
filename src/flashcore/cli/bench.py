"""`flashcore bench`: how fast every attention on this machine is, side by side, on the same inputs, verified first."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from flashcore.errors import ArgumentValueError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from flashcore.bench.artifact import Artifact
    from flashcore.bench.runner import Request
    from flashcore.bench.shapes import Shape
    from flashcore.bench.work import Direction

MIN_ITERS = 10
MAX_ITERS = 100_000
# A file or a pipe has no width; the tables are then as wide as they need to be.
PIPED_WIDTH = 160
REDRAW_SECONDS = 0.2


def register(app: typer.Typer) -> None:
    """Add `bench` to the command line."""
    app.command("bench")(bench)


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="B,H,S,D; or B,Hq/Hk,Sq/Sk,D; or tiny, small, medium, mission, multi_batch. Repeatable."),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="small, fa (16k tokens, hidden 2048), fa-bwd (what a backward pass is held to), decode, features (masks, head "
            "dims, fp32) or crossover (where our kernels change places)."
        ),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Every shape causal, aligned bottom-right.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32. Default: the shape's own (fp16).")] = None,
    mask: Annotated[str | None, typer.Option(help="none, bool or additive: a random mask (B, 1, Sq, Sk).")] = None,
    impl: Annotated[list[str] | None, typer.Option(help="Time only this contender. Repeatable.")] = None,
    direction: Annotated[
        str, typer.Option(help="fwd; bwd: the backward pass alone, after a forward pass; fwdbwd: both.")
    ] = "fwd",
    iters: Annotated[int, typer.Option(help="Samples of each contender.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the JSON artifact here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG here.")] = None,
    eager: Annotated[
        bool | None, typer.Option("--eager/--no-eager", help="Time the Python call too. Default: not for fa's long launches.")
    ] = None,
    cold: Annotated[bool, typer.Option("--cold/--no-cold", help="Time with a cold L2 too.")] = True,
) -> None:
    """Time attention on this machine: ours, every SDPA backend, FlexAttention, unfused, and what else is installed.

    Every contender's output, or gradients, are checked against float64 on the very inputs it is timed on; none is timed that
    failed.
    Exit code 1 when an implementation of ours failed, 2 for a bad argument.
    """
    timed = _direction(direction)
    _check(iters, out, plot)
    shapes = _shapes(shape or [], grid, causal, dtype, mask)

    import torch
    from rich.console import Console

    from flashcore.bench.bar import bars_of
    from flashcore.bench.contenders import select
    from flashcore.bench.report import print_report
    from flashcore.bench.runner import Request

    chosen, left_out = select(impl or [], grid, timed)
    bars = bars_of(grid, timed)
    request = Request(
        shapes=shapes,
        contenders=chosen,
        left_out=left_out,
        iters=iters,
        seed=seed,
        eager=(not bars or any(bar.times_calls for bar in bars)) if eager is None else eager,
        cold=cold,
        grid=grid,
        retime=any(bar.both_orders for bar in bars),
        direction=timed,
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    progress_console, console = Console(stderr=True), Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    if device.type == "cpu":
        progress_console.print("No GPU here: timing the CPU's contenders by wall clock.", style="yellow")
    artifact = _run(request, device, progress_console)
    if out is not None:
        artifact.save(out)
    if plot is not None:
        from flashcore.bench.plot import plot as write_plot

        write_plot(artifact, plot)
    print_report(artifact, console)
    for failure in artifact.own_failures:
        progress_console.print(f"error: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if artifact.own_failures:
        raise typer.Exit(1)


def _direction(text: str) -> Direction:
    from flashcore.bench.work import Direction

    if text not in get_args(Direction):
        raise ArgumentValueError(f"direction: got {text!r}; allowed: {', '.join(get_args(Direction))}")
    return cast("Direction", text)


def _check(iters: int, out: Path | None, plot: Path | None) -> None:
    """Everything that can be refused before a GPU minute is spent."""
    if not MIN_ITERS <= iters <= MAX_ITERS:
        raise ArgumentValueError(f"iters: got {iters}; allowed: {MIN_ITERS} to {MAX_ITERS}")
    for name, path in (("out", out), ("plot", plot)):
        if path is not None and (not path.parent.is_dir() or path.is_dir()):
            raise ArgumentValueError(f"{name}: {path} cannot be written; allowed: a file in a folder that exists")
    if plot is not None:
        from flashcore.bench.plot import require_matplotlib

        require_matplotlib()


def _shapes(texts: list[str], grid: str | None, causal: bool, dtype: str | None, mask: str | None) -> tuple[Shape, ...]:
    from flashcore.bench import shapes

    if texts and grid is not None:
        raise ArgumentValueError("shape and grid: got both; allowed: one of them")
    wanted = shapes.grid(grid) if grid is not None else tuple(shapes.parse_shape(t) for t in texts or ["mission"])
    return shapes.override(wanted, causal=causal, dtype=dtype, mask=mask)


def _run(request: Request, device: torch.device, console: Console) -> Artifact:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from flashcore.bench.runner import run

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    # Drawn by hand between two samples: a thread that draws would take the interpreter's lock in the middle of one.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        drawn = 0.0
        task = bar.add_task("bench", total=float(len(request.shapes)))

        def show(number: int, what: str, fraction: float) -> None:
            label = request.shapes[number].label
            nonlocal drawn
            bar.update(task, completed=number + fraction, description=f"{label}: {what}")
            if time.monotonic() - drawn > REDRAW_SECONDS:
                bar.refresh()
                drawn = time.monotonic()

        return run(request, device, show)
