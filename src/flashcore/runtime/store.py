"""Where binaries come from: the set shipped with the package, then the disk cache, then the compiler."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from flashcore.build.compile import triton_version
from flashcore.errors import BinaryError, UnsupportedError
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime.binary import Binary, BinaryInfo
from flashcore.sources import PACKAGE, kernel_hash
from flashcore.target import Target

SHIPPED = PACKAGE / "binaries"
MANIFEST_SCHEMA = 3

Origin = Literal["shipped", "cached", "compile"]


class Manifest(BaseModel):
    """The shipped binaries of one arch; documented for hosts in other languages in docs/manifest.md."""

    schema_version: int
    arch: str
    triton: str
    binaries: list[BinaryInfo]


class _Versioned(BaseModel):
    """What a manifest of any schema says of itself."""

    schema_version: int


@dataclass(frozen=True, slots=True)
class Location:
    """Where a specialisation's binary is, or would come from."""

    origin: Origin
    info: BinaryInfo | None
    path: Path


def cache_folder() -> Path:
    """FLASHCORE_CACHE_DIR, or flashcore under the user's cache folder."""
    given = os.environ.get("FLASHCORE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcore"


@cache
def read_manifest(folder: Path) -> dict[str, BinaryInfo]:
    """The records of a folder of shipped binaries by specialisation key; empty where the folder has no manifest.

    Raises:
        BinaryError: the manifest is there but cannot be read.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        text = path.read_text()
        version = _Versioned.model_validate_json(text).schema_version
        # looked at first, because a record of another schema has other fields
        manifest = Manifest.model_validate_json(text) if version == MANIFEST_SCHEMA else None
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise BinaryError(f"{path}: not a manifest: {error}") from error
    if manifest is None:
        raise BinaryError(
            f"{path}: schema {version}; this FlashCore reads {MANIFEST_SCHEMA}: "
            "reinstall it, or in a checkout run `flashcore build`"
        )
    return {info.key: info for info in manifest.binaries}


def locate(specialisation: Specialisation, arch: str) -> Location | None:
    """Where the binary for the kernel's present source is; None where there is none and no Triton to compile it."""
    source = kernel_hash(specialisation.kernel)
    shipped = read_manifest(SHIPPED / arch).get(specialisation.key)
    if shipped is not None and shipped.source_sha256 == source:
        return Location("shipped", shipped, SHIPPED / arch / f"{shipped.name}.cubin")
    triton = triton_version()
    if triton is None:
        return None
    # the schema too: a record of another is not damaged, and there is none of this one yet
    digest = sha256("\n".join((specialisation.key, arch, source, triton, str(MANIFEST_SCHEMA))).encode()).hexdigest()
    path = cache_folder() / arch / f"{digest[:32]}.cubin"
    info = _cached_info(path)
    return Location("compile" if info is None else "cached", info, path)


def _cached_info(path: Path) -> BinaryInfo | None:
    record = path.with_suffix(".json")
    if not record.exists():
        return None
    try:
        return BinaryInfo.model_validate_json(record.read_text())
    except (ValidationError, UnicodeDecodeError, OSError):
        warnings.warn(f"flashcore: {record} is damaged; compiling the kernel again", RuntimeWarning, stacklevel=2)
        return None


@cache
def obtain(specialisation: Specialisation, target: Target) -> Binary:
    """The binary of a specialisation for a GPU, checked against its record; compiled and cached where it is not there yet.

    Raises:
        UnsupportedError: not shipped, not cached, and no Triton is installed to compile it.
        BinaryError: a shipped binary is damaged (a cached one is compiled again instead, with a warning).
        CompileError: the compiler refused it.
    """
    if target.arch is None:
        raise UnsupportedError(f"{specialisation.name}: no kernel can be built for {target.name}")
    location = locate(specialisation, target.arch)
    if location is None:
        raise UnsupportedError(
            f"{specialisation.name} is not among the binaries shipped for {target.arch}, and Triton, which would compile it, "
            "is not installed: pip install flashcore[compile]"
        )
    binary = read(location)
    if binary is None:
        from flashcore.build.pool import compile_one

        binary = compile_one(specialisation, target.arch)
        keep(location, binary)
    return binary


def read(location: Location) -> Binary | None:
    """The binary that is at a location, checked; None where there is none yet, or where what was cached is damaged.

    Raises:
        BinaryError: a shipped binary is damaged.
    """
    if location.info is None:
        return None
    try:
        binary = Binary(location.path.read_bytes(), location.info)
        binary.check(str(location.path))
    except (BinaryError, OSError) as error:
        if location.origin == "shipped":
            raise BinaryError(f"shipped binary: {error}; reinstall flashcore") from error
        warnings.warn(f"flashcore: {error}; compiling the kernel again", RuntimeWarning, stacklevel=2)
        return None
    return binary


def keep(location: Location, binary: Binary) -> None:
    """Put a compiled binary into the cache, at the location that was found for it."""
    try:
        _write(location.path, binary)
    except OSError as error:  # a full or read-only disk costs the next process a compile, and nothing else
        warnings.warn(f"flashcore: cannot cache a compiled kernel: {error}", RuntimeWarning, stacklevel=2)


def _write(path: Path, binary: Binary) -> None:
    """Put both files in place by renaming, cubin first: another process sees a whole entry or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in (
        (path, binary.cubin),
        (path.with_suffix(".json"), binary.info.model_dump_json().encode()),
    ):
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
