"""Specialisation: the identity of one binary, as data. Nothing here imports a compiler."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter of a kernel: its name, its Triton type ("*fp16", "i64", "fp32") and a divisor known of it."""

    name: str
    type: str
    divisor: int = 1


@dataclass(frozen=True)
class Specialisation:
    """Everything that, with the source and the arch, decides what a binary contains.

    `name` is for people and unique within a kernel's shipped set; `key` is for machines.
    """

    kernel: str
    name: str
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[str, int | bool | str], ...]
    num_warps: int
    num_stages: int

    @cached_property
    def key(self) -> str:
        """A canonical JSON text; equal keys mean the same binary for the same source, arch and compiler."""
        return json.dumps(
            {
                "kernel": self.kernel,
                "name": self.name,
                "parameters": [[p.name, p.type, p.divisor] for p in self.parameters],
                "constants": {name: value for name, value in self.constants},
                "num_warps": self.num_warps,
                "num_stages": self.num_stages,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_key(cls, key: str) -> Specialisation:
        """The inverse of `key`."""
        data = json.loads(key)
        return cls(
            kernel=data["kernel"],
            name=data["name"],
            parameters=tuple(Parameter(*p) for p in data["parameters"]),
            constants=tuple(data["constants"].items()),
            num_warps=data["num_warps"],
            num_stages=data["num_stages"],
        )
