"""The JSON artifact of `flashcore debug --out`: what was run, and the verdict of every part of every view."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flashcore.bench.shapes import Shape
from flashcore.debug.compare import PartVerdict
from flashcore.debug.views import View
from flashcore.environment import Environment
from flashcore.stored import Stored, read

SCHEMA_VERSION: Literal[1] = 1


class ViewVerdict(BaseModel):
    """A view's parts, in the order in which the kernel makes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    view: View
    parts: list[PartVerdict]

    @property
    def right(self) -> bool:
        """Whether no tile is wrong, of at least one."""
        return bool(self.parts) and all(part.tiles > 0 and part.wrong == 0 for part in self.parts)


class DebugArtifact(Stored):
    """One run. `kernels`: the specialisations, in order; `binaries`: their SHA-256, none where they were interpreted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["flashcore-debug"] = "flashcore-debug"
    environment: Environment
    subject: str
    shape: Shape
    seed: int
    interpreted: bool
    kernels: list[str]
    sources: dict[str, str]
    binaries: list[str]
    views: list[ViewVerdict]

    @property
    def right(self) -> bool:
        """Whether every view is right, of at least one."""
        return bool(self.views) and all(view.right for view in self.views)


def load(path: Path) -> DebugArtifact:
    """Read an artifact. Raises ArgumentValueError when it cannot be read, or is not one of this schema version."""
    return read(DebugArtifact, path)
