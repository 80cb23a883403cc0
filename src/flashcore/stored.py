"""Records in files: JSON artifacts that appear whole or not at all, and are read back with an error that names the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from flashcore.errors import ArgumentValueError


class Stored(BaseModel):
    """A record with a `kind` and a `schema_version`, which says of a file what it is."""

    def save(self, path: Path) -> None:
        """Write the record; the file appears whole or not at all."""
        write_whole(path, self.model_dump_json() + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


Record = TypeVar("Record", bound=Stored)


def read(record: type[Record], path: Path) -> Record:
    """Read a record. Raises ArgumentValueError when it cannot be read, or is not one of this kind and schema version."""
    try:
        return record.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentValueError(f"artifact: {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        kind, schema = (record.model_fields[name].default for name in ("kind", "schema_version"))
        raise ArgumentValueError(
            f"artifact: {path} is not a {kind} artifact of schema {schema}: {where}: {first['msg']}"
        ) from error
