"""Building the shipped set of an arch into a folder with a manifest, compiling only what is not there yet."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from flashcore.build.compile import triton_version
from flashcore.build.pool import Request, compile_all
from flashcore.errors import BinaryError, CompileError
from flashcore.kernels.registry import shipped_set
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime.binary import Binary, BinaryInfo
from flashcore.runtime.store import MANIFEST_SCHEMA, SHIPPED, Manifest, cache_folder, read_manifest
from flashcore.sources import kernel_hash


@dataclass(frozen=True, slots=True)
class BuiltSet:
    """The binaries of an arch, and what could not be built (name -> the compiler's words)."""

    arch: str
    binaries: tuple[Binary, ...]
    failures: dict[str, str]


def build_set(
    arch: str, *, only: str = "*", jobs: int | None = None, done: Callable[[str], None] = lambda name: None
) -> BuiltSet:
    """Build what of the shipped set of an arch has a name that matches a glob; `done` hears each name as it is ready."""
    triton = triton_version()
    if triton is None:
        raise CompileError("building kernels needs Triton, which is not installed: pip install flashcore[build]")
    folder = cache_folder() / "sets" / f"{arch}-triton-{triton}-schema-{MANIFEST_SCHEMA}"
    folder.mkdir(parents=True, exist_ok=True)
    read_manifest.cache_clear()
    present = read_manifest(folder)
    ready: dict[str, Binary] = {}
    missing: list[Request] = []
    wanted = matching(arch, only)
    for specialisation in shipped_set(arch):
        info = present.get(specialisation.key)
        binary = None
        if info is not None and info.source_sha256 == kernel_hash(specialisation.kernel):
            binary = _read(folder, info)
        if binary is not None:
            ready[specialisation.key] = binary
        if specialisation in wanted:
            if binary is None:
                missing.append(Request(specialisation, arch))
            else:
                done(specialisation.name)
    outcomes = compile_all(missing, jobs=jobs, done=lambda outcome: done(outcome.request.specialisation.name))
    failures = {o.request.specialisation.name: o.error or "no reason given" for o in outcomes if o.binary is None}
    ready |= {o.request.specialisation.key: o.binary for o in outcomes if o.binary is not None}
    if outcomes:
        # with those that were there and are not asked for
        write_set(folder, arch, tuple(ready[s.key] for s in shipped_set(arch) if s.key in ready))
    return BuiltSet(arch, tuple(ready[s.key] for s in wanted if s.key in ready), failures)


def matching(arch: str, only: str) -> tuple[Specialisation, ...]:
    """The specialisations of the shipped set of an arch whose names match a glob."""
    return tuple(specialisation for specialisation in shipped_set(arch) if fnmatch(specialisation.name, only))


def _read(folder: Path, info: BinaryInfo) -> Binary | None:
    try:
        binary = Binary((folder / f"{info.name}.cubin").read_bytes(), info)
        binary.check(str(folder))
    except (BinaryError, OSError):
        return None  # built again, which gives the same bytes or an error of its own
    return binary


def write_set(folder: Path, arch: str, binaries: tuple[Binary, ...]) -> None:
    """Write the cubins and, last, the manifest that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for binary in binaries:
        (folder / f"{binary.info.name}.cubin").write_bytes(binary.cubin)
    manifest = Manifest(
        schema_version=MANIFEST_SCHEMA,
        arch=arch,
        triton=binaries[0].info.triton if binaries else "",
        binaries=[binary.info for binary in binaries],
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")
    read_manifest.cache_clear()


def ship(built: BuiltSet) -> Path:
    """Put a complete set where the package looks for shipped binaries, in place of what was there.

    Raises:
        CompileError: the set has failures; an incomplete one is not shipped.
    """
    if built.failures:
        name, words = next(iter(built.failures.items()))
        raise CompileError(f"{len(built.failures)} kernels failed to build for {built.arch}; first {name}: {words}")
    folder = SHIPPED / built.arch
    shutil.rmtree(folder, ignore_errors=True)
    write_set(folder, built.arch, built.binaries)
    return folder
