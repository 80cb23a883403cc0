"""`flashcore inspect`: build every kernel of an arch with no GPU and show what its machine code holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flashcore.runtime.binary import BinaryInfo


def register(app: typer.Typer) -> None:
    """Add `flashcore inspect` and `flashcore build`."""
    app.command()(inspect)
    app.command()(build)


def _archs(text: str) -> list[str]:
    from flashcore.errors import ArgumentValueError
    from flashcore.target import SHARED_MEMORY_LIMIT

    archs = text.split(",")
    for arch in archs:
        if arch not in SHARED_MEMORY_LIMIT:
            raise ArgumentValueError(f"--arch: got {arch!r}; allowed: {', '.join(SHARED_MEMORY_LIMIT)}")
    return archs


def inspect(
    arch: Annotated[str, typer.Option(help="Architectures, comma-separated.")] = "sm_80,sm_89,sm_90a,sm_100a,sm_120a",
    gate: Annotated[bool, typer.Option("--gate", help="Exit 1 if any binary breaks a limit.")] = False,
    only: Annotated[str, typer.Option(help="Build, show and gate only names that match this glob.")] = "*",
) -> None:
    """Registers, stack, spills (also those in the innermost loops), shared memory, matrix instructions, what a launch takes."""
    from concurrent.futures import ThreadPoolExecutor

    from rich.console import Console
    from rich.table import Table

    from flashcore.build.gates import violations
    from flashcore.build.machine_code import read_machine_code
    from flashcore.build.sets import matching
    from flashcore.cli.building import build_with_progress
    from flashcore.errors import ArgumentValueError
    from flashcore.kernels.specialisation import Specialisation

    console = Console(width=None if Console().is_terminal else 160)
    broken = 0
    # not every kernel is built for every arch: one that has none of those asked for is passed over
    archs = [one for one in _archs(arch) if matching(one, only)]
    if not archs:
        raise ArgumentValueError(f"--only: {only!r} matches none of the binaries of {arch}")
    for one in archs:
        built = build_with_progress(one, only)
        binaries = built.binaries
        with ThreadPoolExecutor() as pool:
            codes = list(pool.map(read_machine_code, binaries))
        table = Table(title=f"{one}: {len(binaries)} binaries", title_justify="left")
        table.add_column("kernel", overflow="fold")
        for column in ("regs", "stack", "LDL/STL", "in loops", "shared", "KB"):
            table.add_column(column, justify="right")
        table.add_column("matrix")
        table.add_column("launch")
        table.add_column("verdict")
        for binary, code in zip(binaries, codes, strict=True):
            found = violations(Specialisation.from_key(binary.info.key), one, code)
            broken += bool(found)
            table.add_row(
                binary.info.name,
                str(code.registers),
                str(code.stack),
                f"{code.spill_loads}/{code.spill_stores}",
                str(code.spills_in_loops),
                str(code.shared),
                f"{binary.info.size / 1024:.0f}",
                " ".join(f"{count} {name}" for name, count in code.matrix.items()) or "-",
                _launch(binary.info),
                "[red]" + "; ".join(found) if found else "[green]ok",
            )
        console.print(table)
        for name, words in built.failures.items():
            broken += 1
            console.print(f"failed to build: {name}: {words}", style="red", markup=False)
    console.print(f"{broken} binaries break a limit" if broken else "every binary keeps the limits")
    if gate and broken:
        raise typer.Exit(1)


def _launch(info: BinaryInfo) -> str:
    """What a launch of the binary takes beside a grid."""
    taken = [f"cluster {info.cluster}"] * (info.cluster > 1) + ["programmatic"] * info.programmatic
    return ", ".join(taken) or "-"


def build(
    arch: Annotated[str, typer.Option(help="Architectures, comma-separated; default: those a wheel holds.")] = "",
) -> None:
    """Build the binaries that a wheel holds into the package (`make wheel` does this first)."""
    from rich.console import Console

    from flashcore.build.sets import ship
    from flashcore.cli.building import build_with_progress
    from flashcore.kernels.registry import SHIPPED_ARCHS

    for one in _archs(arch) if arch else SHIPPED_ARCHS:
        built = build_with_progress(one)
        folder = ship(built)
        size = sum(b.info.size for b in built.binaries)
        Console().print(f"{one}: {len(built.binaries)} binaries, {size / 1e6:.1f} MB in {folder}")
