"""`flashcore profile`: where a call's time goes, by Nsight Compute's counters and under the roofline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashcore.errors import ArgumentValueError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from flashcore.bench.artifact import Artifact
    from flashcore.bench.shapes import Shape
    from flashcore.profile.records import ProfileRecord
    from flashcore.profile.roofline import Roofline

ITERS = 100
# A file or a pipe has no width; the tables are then as wide as they need to be.
PIPED_WIDTH = 200


def register(app: typer.Typer) -> None:
    """Add `flashcore profile`."""
    app.command("profile")(profile)


def profile(
    impl: Annotated[
        str | None,
        typer.Argument(
            metavar="[STEP|IMPL]",
            help="auto (default), small, hopper, portable, torch (which bench calls sdpa-auto), or a step of the ladder.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="B,H,S,D; or B,Hq/Hk,Sq/Sk,D; or tiny, small, medium, mission, multi_batch. Repeatable."),
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Every shape causal, aligned bottom-right.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32. Default: fp16.")] = None,
    mask: Annotated[str | None, typer.Option(help="none, bool or additive: a random mask (B, 1, Sq, Sk).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    use_ncu: Annotated[bool, typer.Option("--ncu/--no-ncu", help="Read counters with Nsight Compute where it is.")] = True,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Place what this artifact of bench or ladder recorded; measure nothing.")
    ] = None,
    paper: Annotated[str | None, typer.Option(help="l4: the datasheet's bounds, no measurement.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the plot (PNG) and the records (JSON).")] = None,
) -> None:
    """Profile a call or a step of the ladder under Nsight Compute, and place it under the roofline of this machine.

    Without ncu the call is timed alone; without a GPU its recorded time is taken from the evidence, and that is said.
    Exit code 2 for a bad argument, and where the profiler or the call failed.
    """
    from rich.console import Console

    _check(impl, from_, paper, out)
    if from_ is not None and not shape and (causal or dtype or mask):
        raise ArgumentValueError("causal, dtype and mask with from: they are of a shape; allowed: with --shape only")
    shapes = _shapes(shape or [], causal, dtype, mask)
    console, progress = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    artifact: Artifact | None = None
    records: list[ProfileRecord] = []
    if paper is not None:
        roofline = _paper(paper, shapes)
        name = f"{paper}-paper"
    elif from_ is not None:
        roofline = _from_artifact(from_, impl, shapes if shape else (), progress)
        name = from_.stem
    else:
        roofline, artifact, records = _call(impl or "auto", shapes, seed, use_ncu, progress)
        name = "-".join((impl or "auto", *(_slug(shape) for shape in shapes)))
    _print(roofline, records, console)
    if out is not None:
        _save(roofline, artifact, records, out, name, progress)
    else:
        _say(progress, "`--out FOLDER` writes the plot.")


def _check(impl: str | None, from_: Path | None, paper: str | None, out: Path | None) -> None:
    """Everything that can be refused before anything is measured."""
    from flashcore.profile.subjects import contender_name

    if from_ is not None and paper is not None:
        raise ArgumentValueError("from and paper: got both; allowed: one of them")
    if paper is not None and impl is not None:
        raise ArgumentValueError(f"impl: got {impl!r} with paper; allowed: none, as a datasheet times no implementation")
    if impl is not None:
        contender_name(impl)
    if out is not None:
        from flashcore.bench.plot import require_matplotlib

        require_matplotlib()
        if out.exists() and not out.is_dir():
            raise ArgumentValueError(f"out: {out} is a file; allowed: a folder, which is made where there is none")


def _shapes(texts: list[str], causal: bool, dtype: str | None, mask: str | None) -> tuple[Shape, ...]:
    from flashcore.bench.shapes import override, parse_shape

    return override(tuple(parse_shape(text) for text in texts or ["mission"]), causal=causal, dtype=dtype, mask=mask)


def _paper(name: str, shapes: tuple[Shape, ...]) -> Roofline:
    from flashcore.profile.roofline import paper

    return paper(name, shapes)


def _from_artifact(path: Path, impl: str | None, shapes: tuple[Shape, ...], progress: Console) -> Roofline:
    from flashcore.profile import recorded
    from flashcore.profile.roofline import of_artifact
    from flashcore.profile.subjects import contender_name

    _say(progress, f"Reading {path}: nothing is measured here.")
    return of_artifact(recorded.load(path), contender=contender_name(impl) if impl else None, shapes=shapes)


def _call(
    impl: str, shapes: tuple[Shape, ...], seed: int, use_ncu: bool, progress: Console
) -> tuple[Roofline, Artifact | None, list[ProfileRecord]]:
    """The roofline of one implementation's calls, measured here where that can be; the run and the profiles with it."""
    import torch

    from flashcore.profile import ncu, recorded
    from flashcore.profile.roofline import of_artifact, with_profiles
    from flashcore.profile.subjects import contender_name

    contender = contender_name(impl)
    if not torch.cuda.is_available():
        _say(
            progress, "There is no NVIDIA GPU here: nothing is profiled or timed. What follows was recorded on another machine."
        )
        return of_artifact(recorded.find(contender, shapes), contender=contender, shapes=shapes), None, []
    tool = ncu.find() if use_ncu else None
    if use_ncu and tool is None:
        _say(progress, ncu.absence())
    artifact = _time(impl, shapes, seed, torch.device("cuda", torch.cuda.current_device()), progress)
    roofline = of_artifact(artifact, contender=contender, recorded=False)
    records = []
    for shape in shapes if tool is not None else ():
        _say(progress, f"Nsight Compute: {impl} on {shape.label} (each kernel is replayed, tens of seconds)")
        assert tool is not None
        with progress.status("Nsight Compute runs"):
            records.append(ncu.profile(tool, impl, shape, seed))
    return with_profiles(roofline, records), artifact, records


def _time(impl: str, shapes: tuple[Shape, ...], seed: int, device: torch.device, progress: Console) -> Artifact:
    """Time the calls and the ceilings as `flashcore bench` does. Raises UnsupportedError where a call was not timed."""
    from flashcore.bench.runner import Request, run
    from flashcore.errors import UnsupportedError
    from flashcore.profile.subjects import subject

    contender = subject(impl)
    told: set[tuple[int, str]] = set()

    def show(number: int, what: str, fraction: float) -> None:
        if (number, what) not in told:
            told.add((number, what))
            _say(progress, f"{shapes[number].label}: {what}")

    request = Request(shapes, [contender], {}, iters=ITERS, seed=seed, eager=False, cold=False)
    artifact = run(request, device, show)
    for record in artifact.shapes:
        for timed in record.contenders:
            if timed.name == contender.name and timed.status != "timed":
                raise UnsupportedError(f"{impl} on {record.shape.label}: {timed.status}: {timed.reason}")
    return artifact


def _print(roofline: Roofline, records: list[ProfileRecord], console: Console) -> None:
    from flashcore.profile.view import print_profile, print_roofline

    for record in records:
        print_profile(record, console)
    print_roofline(roofline, console)


def _save(
    roofline: Roofline, artifact: Artifact | None, records: list[ProfileRecord], out: Path, name: str, progress: Console
) -> None:
    from flashcore.profile.plot import save

    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"roofline-{name}.png"]
    save(roofline, written[0])
    for record in records:
        written.append(out / f"profile-{record.impl}-{_slug(record.shape)}.json")
        record.save(written[-1])
    if artifact is not None:
        written.append(out / f"times-{name}.json")
        artifact.save(written[-1])
    for path in written:
        _say(progress, f"wrote {path}")


def _say(progress: Console, text: str) -> None:
    progress.print(text, markup=False, highlight=False, soft_wrap=True)


def _slug(shape: Shape) -> str:
    """A shape as a part of a file's name: 1-8-512-64-fp16-causal."""
    return re.sub(r"[^a-z0-9]+", "-", shape.label.lower())
