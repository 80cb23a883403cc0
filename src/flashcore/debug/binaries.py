"""Binaries that record, built where there is a compiler for where there is none: a folder with a manifest for each arch.

No wheel holds them. Without such a folder they are compiled on demand and cached, as any other binary; for the Gluon kernels
that takes the very Triton that FlashCore is built with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flashcore.bench.shapes import Shape
from flashcore.build.pool import Request, compile_all
from flashcore.build.sets import write_set
from flashcore.debug.subjects import SUBJECTS, specialisations
from flashcore.errors import ArgumentValueError, BinaryError, CompileError, UnsupportedError
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime.binary import Binary
from flashcore.runtime.store import obtain, read_manifest
from flashcore.sources import kernel_hash
from flashcore.target import SM_COUNTS, Target


def build(folder: Path, arch: str, shapes: Sequence[Shape], say: Callable[[str], None] = lambda words: None) -> Path:
    """Compile every subject's binaries for these shapes into folder / arch. What does not take a shape is left out.

    `say` hears each name as it is built, and what is left out and why.

    Raises:
        ArgumentValueError: the number of multiprocessors is known for no GPU of this arch, or nothing takes any shape.
        CompileError: the compiler refused one, and nothing is written.
    """
    if arch not in SM_COUNTS:
        raise ArgumentValueError(f"arch: got {arch!r}; allowed: {', '.join(SM_COUNTS)}")
    wanted: dict[Specialisation, None] = {}
    for shape in shapes:
        for name in SUBJECTS:
            try:
                wanted |= dict.fromkeys(specialisations(name, shape, arch))
            except (ArgumentValueError, UnsupportedError) as error:
                say(f"not for {shape.label}: {name}: {error}")
    if not wanted:
        raise ArgumentValueError(f"shape: no subject takes {', '.join(shape.label for shape in shapes)} on {arch}")
    requests = [Request(specialisation, arch) for specialisation in wanted]
    outcomes = compile_all(requests, done=lambda outcome: say(outcome.request.specialisation.name))
    failures = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failures:
        raise CompileError(f"{len(failures)} of {len(requests)} binaries failed to build; the first: {failures[0]}")
    write_set(folder / arch, arch, tuple(outcome.binary for outcome in outcomes if outcome.binary is not None))
    return folder / arch


def find(specialisation: Specialisation, target: Target, folder: Path | None) -> Binary:
    """A binary from a folder that `build` made or, where none is given, by the product's own way (runtime/store.py).

    Raises:
        BinaryError: the folder does not have it for the kernel's present source, or it is damaged.
        UnsupportedError, CompileError: as `obtain`.
    """
    if folder is None:
        return obtain(specialisation, target)
    assert target.arch is not None
    place = folder / target.arch
    info = read_manifest(place).get(specialisation.key)
    if info is None or info.source_sha256 != kernel_hash(specialisation.kernel):
        why = "not there" if info is None else "of another source than the present one"
        raise BinaryError(f"{place}: {specialisation.name} is {why}; build it with `flashcore debug --build {folder}`")
    try:
        binary = Binary((place / f"{info.name}.cubin").read_bytes(), info)
    except OSError as error:
        raise BinaryError(f"{place}: {info.name} cannot be read: {error}") from error
    binary.check(str(place))
    return binary
