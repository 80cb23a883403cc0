"""The JSON artifact of `flashcore ladder --run`: what was verified, what the binaries hold, and what was timed, raw."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flashcore.bench.artifact import Artifact, ContenderRecord
from flashcore.environment import Environment
from flashcore.errors import ArgumentValueError
from flashcore.ladder.checks import StepVerification
from flashcore.ladder.code import KernelCode

SCHEMA_VERSION: Literal[1] = 1


class TimedShape(BaseModel):
    """One shape, as `flashcore bench` records it, and by step the binaries that were timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bench: Artifact
    code: dict[str, list[KernelCode]]

    def find(self, contender: str) -> ContenderRecord | None:
        """What became of a contender."""
        return next((record for record in self.bench.shapes[0].contenders if record.name == contender), None)


class LadderArtifact(BaseModel):
    """One run. `sources`: the ladder's kernels and the SHA-256 of what they are made of. No shape is timed without a GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["flashcore-ladder"] = "flashcore-ladder"
    environment: Environment
    sources: dict[str, str]
    steps: list[str]
    verification: list[StepVerification]
    shapes: list[TimedShape]

    @property
    def failures(self) -> list[str]:
        """Steps that ran and were wrong, or failed while they were timed, one line each."""
        found = [f"{one.step}: {one.summary}" for one in self.verification if one.refused is None and not one.sound]
        return found + [failure for shape in self.shapes for failure in shape.bench.own_failures]

    def save(self, path: Path) -> None:
        """Write the artifact; the file appears whole or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(self.model_dump_json() + "\n")
        part.replace(path)


def load(path: Path) -> LadderArtifact:
    """Read an artifact. Raises ArgumentValueError when it cannot be read, or is not one of this schema version."""
    try:
        return LadderArtifact.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentValueError(f"artifact: {path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArgumentValueError(
            f"artifact: {path} is not a flashcore-ladder artifact of schema {SCHEMA_VERSION}: {where}: {first['msg']}"
        ) from error
