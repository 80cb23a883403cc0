"""The JSON artifact of `flashcore ladder --run`: what was verified, what the binaries hold, and what was timed, raw."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.bench.artifact import Artifact, ContenderRecord
from flashcore.environment import Environment
from flashcore.ladder.checks import StepVerification
from flashcore.ladder.code import KernelCode
from flashcore.stored import Stored, read

SCHEMA_VERSION: Literal[1] = 1


class TimedShape(BaseModel):
    """One shape, as `flashcore bench` records it, and by step the binaries that were timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bench: Artifact
    code: dict[str, list[KernelCode]]

    def find(self, contender: str) -> ContenderRecord | None:
        """What became of a contender."""
        return next((record for record in self.bench.shapes[0].contenders if record.name == contender), None)


class LadderArtifact(Stored):
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


def load(path: Path) -> LadderArtifact:
    """Read an artifact. Raises ArgumentValueError when it cannot be read, or is not one of this schema version."""
    return read(LadderArtifact, path)
