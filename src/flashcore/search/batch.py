"""A batch on disk: a folder with `batch.json`, and for each binary `<sha256>.cubin` beside its record `<sha256>.json`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from flashcore.errors import BinaryError
from flashcore.runtime.binary import Binary, BinaryInfo
from flashcore.search.schema import Batch, Built
from flashcore.sources import kernel_hash

NAME = "batch.json"


def write_batch(folder: Path, batch: Batch, binaries: Iterable[Binary]) -> Path:
    """Write the binaries and, last, the batch that names them. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for binary in binaries:
        place = folder / f"{binary.info.sha256}.cubin"
        place.write_bytes(binary.cubin)
        place.with_suffix(".json").write_text(binary.info.model_dump_json() + "\n")
    (folder / NAME).write_text(batch.model_dump_json(indent=1) + "\n")
    return folder


def read_batch(folder: Path) -> Batch:
    """A batch, every binary of it checked.

    Raises:
        BinaryError: there is no batch, or it cannot be read; a binary is missing, is not what the batch says, or is of another
            source of the kernel than the present one, whose arguments are another's too.
    """
    try:
        batch = Batch.model_validate_json((folder / NAME).read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise BinaryError(f"{folder}: no batch that can be read: {error}") from error
    for built in (batch.incumbent, *batch.candidates):
        read_binary(folder, built, batch.arch)
    return batch


def read_binary(folder: Path, built: Built, arch: str) -> Binary:
    """One binary of a batch, checked. Raises as `read_batch`."""
    place = folder / f"{built.sha256}.cubin"
    try:
        info = BinaryInfo.model_validate_json(place.with_suffix(".json").read_text())
        binary = Binary(place.read_bytes(), info)
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise BinaryError(f"{folder}: {built.name} cannot be read: {error}") from error
    binary.check(str(folder))
    if info.sha256 != built.sha256 or info.arch != arch:
        raise BinaryError(
            f"{folder}: {built.name} is {info.sha256} for {info.arch}, and the batch says {built.sha256} for {arch}"
        )
    if info.source_sha256 != kernel_hash(info.kernel):
        raise BinaryError(f"{folder}: {built.name} is of another source of {info.kernel} than the present one: build it again")
    return binary
