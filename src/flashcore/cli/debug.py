"""`flashcore debug`: what a kernel's stages made of one input, each by its own oracle, and where the first wrong tile lies."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.debug.views import VIEWS, View
from flashcore.errors import ArgumentValueError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flashcore.bench.shapes import Shape
    from flashcore.debug.artifact import DebugArtifact, ViewVerdict
    from flashcore.debug.compare import PartVerdict

# A file or a pipe has no width; the tables are then as wide as they need to be.
PIPED_WIDTH = 120
# What the interpreter does in seconds.
GPU_SHAPE, CPU_SHAPE = "mission", "small"
INTERPRETED = "no GPU: it ran in Triton's interpreter, which proves the maths and not the binaries"
BUILD_ARCH = "sm_90a"


def register(app: typer.Typer) -> None:
    """Add `debug` to the command line."""
    app.command(name="debug")(debug)


def debug(
    subject: Annotated[str | None, typer.Argument(help="A step of the ladder, or portable, hopper or small.")] = None,
    view: Annotated[list[str] | None, typer.Option(help="scores, softmax or pv. Repeatable; default: all three.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="As B,H,S,D, or the name of one. Default: mission; without a GPU small.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal; the production kernels alone take that.")] = False,
    seed: Annotated[int, typer.Option(help="What the inputs are drawn from.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the JSON artifact here.")] = None,
    binaries: Annotated[Path | None, typer.Option(help="Take the binaries from this folder, which --build made.")] = None,
    build: Annotated[
        Path | None, typer.Option(help="Build the binaries of every subject into this folder, and run nothing.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="With --build: for which GPUs. Default: sm_90a.")] = None,
) -> None:
    """Record the scores, the weights and the output of a kernel, in float32 and over all tiles, and judge each by its oracle.

    Exit code 1 when a tile is wrong, 2 for a bad argument.
    """
    _check(subject, view, causal, out, binaries, build, arch)
    import torch
    from rich.console import Console

    from flashcore.bench.shapes import override, parse_shape

    console = Console(width=None if Console().is_terminal else PIPED_WIDTH, highlight=False)
    has_gpu = torch.cuda.is_available()
    (chosen,) = override((parse_shape(shape or (GPU_SHAPE if has_gpu or build else CPU_SHAPE)),), causal=causal, dtype=None)
    if build is not None:
        _build(build, arch or BUILD_ARCH, chosen, console)
        return
    if not has_gpu:
        # Triton reads it when it is first imported, which nothing above has done.
        os.environ["TRITON_INTERPRET"] = "1"
        # The interpreter computes with numpy, which warns of what a kernel means to do: exp2 of -inf, inf - inf.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    from flashcore.debug.run import Request, run

    assert subject is not None
    views: list[View] = [one for one in VIEWS if view is None or one in view]
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    found = run(Request(subject, chosen, views, seed, binaries), device)
    if out is not None:
        found.save(out)
    _show(found, console)
    if not found.right:
        raise typer.Exit(1)


def _check(
    subject: str | None,
    view: list[str] | None,
    causal: bool,
    out: Path | None,
    binaries: Path | None,
    build: Path | None,
    arch: str | None,
) -> None:
    """Everything that can be refused before torch is imported or a GPU minute is spent."""
    if (subject is None) == (build is None):
        raise ArgumentValueError(f"subject: got {subject!r} with --build {build}; allowed: one of the two")
    for one in view or ():
        if one not in VIEWS:
            raise ArgumentValueError(f"view: got {one!r}; allowed: {', '.join(VIEWS)}")
    given = (("view", view), ("out", out), ("binaries", binaries), ("causal", causal or None))
    for name, value in given if build is not None else (("arch", arch),):
        if value is not None:
            why = "a subject; --build makes both causal and not" if build is not None else "--build"
            raise ArgumentValueError(f"{name}: got {value}; allowed: with {why}")
    if out is not None and (not out.parent.is_dir() or out.is_dir()):
        raise ArgumentValueError(f"out: {out} cannot be written; allowed: a file in a folder that exists")
    if binaries is not None and not binaries.is_dir():
        raise ArgumentValueError(f"binaries: got {binaries}; allowed: a folder that `flashcore debug --build` made")


def _build(folder: Path, arch: str, shape: Shape, console: Console) -> None:
    from flashcore.bench.shapes import override
    from flashcore.debug.binaries import build

    def say(words: str) -> None:
        console.print(words, markup=False, soft_wrap=True)

    with console.status("compiling"):
        place = build(folder, arch, (shape, *override((shape,), causal=True, dtype=None)), say)
    console.print(f"in {place}: flashcore debug SUBJECT --binaries {folder}", markup=False, soft_wrap=True)


def _show(found: DebugArtifact, console: Console) -> None:
    """A table of the parts of each view, and a map of what is wrong."""
    from rich.text import Text

    console.print(f"{found.subject} on {found.shape.label}, seed {found.seed}: {', '.join(found.kernels)}", soft_wrap=True)
    for view in found.views:
        console.print(_table(view))
        for part in view.parts:
            if part.first is not None:
                console.print(_wrong(part), style="red", markup=False, soft_wrap=True)
                for line in part.map:
                    console.print(Text(f"  {line}"), soft_wrap=True)
    if found.interpreted:
        console.print(INTERPRETED, style="yellow", soft_wrap=True)
    verdict = "every tile is right" if found.right else "wrong"
    console.print(f"{found.subject}: {verdict}", style="green" if found.right else "red")


def _table(view: ViewVerdict) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=f"view {view.view}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    for column in ("tile", "tiles", "wrong", "error", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in view.parts:
        error = "no number" if part.error is None else f"{part.error:.2e}"
        wrong = f"[red]{part.wrong}[/red]" if part.wrong else "0"
        table.add_row(part.name, _tile(part), str(part.tiles), wrong, error, f"{part.bound:.2e}")
    return table


def _tile(part: PartVerdict) -> str:
    rows, keys = part.tile
    return f"{rows}x{keys}" if keys else f"{rows} rows"


def _wrong(part: PartVerdict) -> str:
    return f"{part.name}: {part.wrong} of {part.tiles} tiles of {_tile(part)} are wrong; the first: {part.first}. Its head:"
