"""What can be searched: each forward kernel's space of configurations, what fits a problem, and the binary that follows.

Nothing is decided here. A space is `CHOICES` beside the kernel's config dataclass, whether a point of it fits is the kernel's
own predicate, and the binary is its binding's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import torch

from flashcore.bench.shapes import DTYPES
from flashcore.errors import ArgumentValueError
from flashcore.kernels.binding import Binding
from flashcore.kernels.hopper import binding as hopper
from flashcore.kernels.hopper.config import CHOICES as HOPPER_CHOICES
from flashcore.kernels.hopper.config import HopperConfig
from flashcore.kernels.portable import binding as portable
from flashcore.kernels.portable.config import CHOICES as PORTABLE_CHOICES
from flashcore.kernels.portable.config import PortableConfig
from flashcore.kernels.small import binding as small
from flashcore.kernels.small.config import CHOICES as SMALL_CHOICES
from flashcore.kernels.small.config import SmallConfig
from flashcore.kernels.specialisation import Specialisation
from flashcore.search.schema import Problem, Value
from flashcore.spec import AttentionSpec, Options

Config = HopperConfig | SmallConfig | PortableConfig
C = TypeVar("C", HopperConfig, SmallConfig, PortableConfig)
# what all searches are for, until there is evidence of another GPU
ARCH = "sm_90a"


class Form(Protocol[C]):
    """What a kernel's package says of its configurations, beside its binding."""

    def fits(self, spec: AttentionSpec, config: C) -> bool:
        """Whether a call can run in this form: the GPU has the memory and the registers, and the form takes the call."""

    def specialise(self, spec: AttentionSpec, config: C) -> Specialisation:
        """The binary of a call in this form."""

    def hand_chosen(self, spec: AttentionSpec, sm_count: int) -> C:
        """What the kernel's own table has for a call."""


class _Hopper:
    def fits(self, spec: AttentionSpec, config: HopperConfig) -> bool:
        return config.fits(*hopper.Features.of(spec).head_dims)

    def specialise(self, spec: AttentionSpec, config: HopperConfig) -> Specialisation:
        return hopper.specialise(hopper.Features.of(spec), config)

    def hand_chosen(self, spec: AttentionSpec, sm_count: int) -> HopperConfig:
        return hopper.hand_chosen(spec, ARCH, sm_count)


class _Small:
    def fits(self, spec: AttentionSpec, config: SmallConfig) -> bool:
        return config.fits(small.Features.of(spec).head_dim) and small.refused_by(config, spec) is None

    def specialise(self, spec: AttentionSpec, config: SmallConfig) -> Specialisation:
        return small.specialise(small.Features.of(spec), config)

    def hand_chosen(self, spec: AttentionSpec, sm_count: int) -> SmallConfig:
        return small.hand_chosen(spec, ARCH, sm_count)


class _Portable:
    def fits(self, spec: AttentionSpec, config: PortableConfig) -> bool:
        return config.fits(ARCH, portable.Features.of(spec).block_d, spec.dtype.itemsize)

    def specialise(self, spec: AttentionSpec, config: PortableConfig) -> Specialisation:
        return portable.specialise(portable.Features.of(spec), config)

    def hand_chosen(self, spec: AttentionSpec, sm_count: int) -> PortableConfig:
        return portable.hand_chosen(spec, ARCH, sm_count)


@dataclass(frozen=True)
class Searchable(Generic[C]):
    """A kernel whose configurations can be searched. `choices`: field of the config dataclass -> what it may be."""

    binding: Binding
    choices: Mapping[str, tuple[Value, ...]]
    config: type[C]
    form: Form[C]

    def configure(self, values: Mapping[str, Value]) -> C:
        """The configuration with these values.

        Raises:
            ArgumentValueError: fields missing, unknown, or with a value that is not among the choices.
        """
        if values.keys() != self.choices.keys():
            raise ArgumentValueError(f"config: got {', '.join(values)}; allowed: exactly {', '.join(self.choices)}")
        for name, value in values.items():
            if value not in self.choices[name]:
                raise ArgumentValueError(f"{name}: got {value!r}; allowed: {', '.join(map(repr, self.choices[name]))}")
        return self.config(**values)  # type: ignore[arg-type]  # each value is one of its field's choices

    def values(self, config: C) -> dict[str, Value]:
        """The inverse of `configure`. A hand-chosen form need not be in the space."""
        return asdict(config)

    def spec(self, problem: Problem) -> AttentionSpec:
        """The call as the kernels know it, made of tensors that are described and not allocated.

        Raises:
            ArgumentValueError: sizes that no attention has, or a call that the kernel does not take.
        """
        dtype: torch.dtype = getattr(torch, DTYPES[problem.dtype])

        def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(size, dtype=of, device="meta")

        mask = None
        if problem.mask != "none":
            of = torch.bool if problem.mask == "bool" else dtype
            mask = empty(problem.batch, 1, problem.seqlen_q, problem.seqlen_k, of=of)
        spec = AttentionSpec.from_tensors(
            empty(problem.batch, problem.seqlen_q, problem.heads, problem.head_dim),
            empty(problem.batch, problem.seqlen_k, problem.heads_k, problem.head_dim),
            empty(problem.batch, problem.seqlen_k, problem.heads_k, problem.head_dim_v),
            mask,
            Options.check(causal=problem.causal, scale=None, window=problem.window, softcap=problem.softcap, layout="bshd"),
            return_lse=False,
        )
        refusal = self.binding.reject(spec, ARCH, False)
        if refusal is not None:
            raise ArgumentValueError(f"shape: got {problem.name}, and {problem.impl} {refusal}; allowed: a call that it takes")
        return spec

    def fits(self, problem: Problem, config: C) -> bool:
        """Whether the problem can run in this form. Raises as `spec`."""
        return self.form.fits(self.spec(problem), config)

    def specialise(self, problem: Problem, config: C) -> Specialisation:
        """The binary of the problem in this form. Raises as `spec`, and ValueError for a form that does not fit."""
        return self.form.specialise(self.spec(problem), config)

    def incumbent(self, problem: Problem, sm_count: int) -> C:
        """The form that the hand-chosen table has for the problem, whatever searches found. Raises as `spec`."""
        return self.form.hand_chosen(self.spec(problem), sm_count)

    def space(self, problem: Problem) -> Iterator[C]:
        """Every configuration that fits the problem, in a fixed order. Raises as `spec`."""
        spec = self.spec(problem)
        for values in itertools.product(*self.choices.values()):
            config = self.configure(dict(zip(self.choices, values, strict=True)))
            if self.form.fits(spec, config):
                yield config


SEARCHABLE: dict[str, Searchable] = {
    one.binding.IMPL: one
    for one in (
        Searchable(hopper, HOPPER_CHOICES, HopperConfig, _Hopper()),
        Searchable(small, SMALL_CHOICES, SmallConfig, _Small()),
        Searchable(portable, PORTABLE_CHOICES, PortableConfig, _Portable()),
    )
}
