"""Specialisation: the identity of one binary, as data. Nothing here imports a compiler."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch

# Triton's names of the types that tensors of a call have
TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter of a kernel: its name, its type and a divisor known of it.

    `type` is Triton's ("*fp16", "i64", "fp32"), or "tensormap<fp16[1,1,64,128]>": a TMA tensor map and the kernel's tile.
    """

    name: str
    type: str
    divisor: int = 1

    @property
    def tile(self) -> tuple[str, tuple[int, ...]] | None:
        """The element type and the tile of a tensor map, outermost dimension first; None for any other parameter."""
        found = re.fullmatch(r"tensormap<(\w+)\[(\d+(?:,\d+)*)\]>", self.type)
        return None if found is None else (found[1], tuple(map(int, found[2].split(","))))


# By which a kernel is asked to record its stages (kernels/view.py). No binary of the product has it.
VIEW = Parameter("view_ptr", "*fp32", 16)


@dataclass(frozen=True)
class Specialisation:
    """Everything that, with the source and the arch, decides what a binary contains.

    `name` is for people and unique within a kernel's shipped set; `key` is for machines. `cluster` is the number of blocks
    along x that a cluster has, which a launch states; the grid counts blocks and is a multiple of it. The compiler is told
    nothing of it: the kernel addresses the other blocks of its cluster by PTX of its own.
    """

    kernel: str
    name: str
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[str, int | bool | str | None], ...]
    num_warps: int
    num_stages: int
    cluster: int = 1

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
                "cluster": self.cluster,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @property
    def recorded(self) -> bool:
        """Whether the binary records its stages."""
        return VIEW in self.parameters

    def recording(self) -> Specialisation:
        """The same, asked to record its stages."""
        return replace(self, name=f"{self.name}-view", parameters=(*self.parameters, VIEW))

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
            cluster=data["cluster"],
        )
