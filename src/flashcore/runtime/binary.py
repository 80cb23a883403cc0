"""A kernel binary and what a host must know to launch it: the record that manifests and caches hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from flashcore.errors import BinaryError


class KernelParameter(BaseModel):
    """One parameter of the entry point, in order: Triton's name of its type ("*fp16", "i64", "fp32") and its bytes."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    size: int


class BinaryInfo(BaseModel):
    """Everything but the machine code. docs/manifest.md explains each field to a host in another language."""

    model_config = ConfigDict(frozen=True)

    kernel: str
    name: str
    key: str
    arch: str
    symbol: str
    parameters: list[KernelParameter]
    threads: int
    shared: int
    sha256: str
    size: int
    source_sha256: str
    triton: str


@dataclass(frozen=True, slots=True)
class Binary:
    """A cubin and its record."""

    cubin: bytes
    info: BinaryInfo

    def check(self, origin: str) -> None:
        """Raise BinaryError, naming where it came from, unless the machine code is the one that the record names."""
        found = hashlib.sha256(self.cubin).hexdigest()
        if len(self.cubin) != self.info.size or found != self.info.sha256:
            raise BinaryError(
                f"{origin}: {self.info.name} is damaged: {len(self.cubin)} bytes with SHA-256 {found}, "
                f"its record says {self.info.size} bytes with {self.info.sha256}"
            )
