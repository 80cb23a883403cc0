"""A kernel binary and what a host must know to launch it: the record that manifests and caches hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from flashcore.errors import BinaryError

# bytes of what a tensor map may be of
ELEMENT_SIZES = {"fp16": 2, "bf16": 2}
# blocks that every GPU with clusters has room for in one; more would need the driver's consent for each function
MAX_CLUSTER = 8


class TensorMapLayout(BaseModel):
    """How a kernel reads or writes memory through a TMA tensor map, as its compiler chose.

    `element` is of ELEMENT_SIZES; `box` is what one copy moves, in elements, outermost dimension first; `swizzle` is the
    span of the pattern in shared memory in bytes: 0 (none), 32, 64 or 128.
    """

    model_config = ConfigDict(frozen=True)

    element: str
    box: tuple[int, ...]
    swizzle: int


class KernelParameter(BaseModel):
    """One parameter of the entry point, in order: name, type, bytes, and where it starts in the parameters' buffer.

    `type` is Triton's name ("*fp16", "i64", "fp32"), or "tensormap<fp16[1,1,64,128]>" for a TMA tensor map with the
    kernel's tile. Only a tensor map has a `tensor_map`; its shape (i32) and strides (i64) are the parameters after it.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    size: int
    offset: int
    tensor_map: TensorMapLayout | None = None


class BinaryInfo(BaseModel):
    """Everything but the machine code. docs/manifest.md explains each field to a host in another language.

    A launch states two things of these by an attribute: the `cluster`, blocks of one along x, where it is more than 1; and
    where the kernel is `programmatic`, which waits itself for the launches before it, that it may start before they end.
    """

    model_config = ConfigDict(frozen=True)

    kernel: str
    name: str
    key: str
    arch: str
    symbol: str
    parameters: list[KernelParameter]
    threads: int
    shared: int
    cluster: int = Field(ge=1, le=MAX_CLUSTER)
    programmatic: bool
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
