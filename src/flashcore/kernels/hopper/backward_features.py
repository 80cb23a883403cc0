"""What a Hopper backward pass needs compiled in, of the kernels that make dq alone, or dk and dv of wide heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.hopper.backward_config import HEAD_DIMS
from flashcore.kernels.hopper.head_dims import HeadDims, head_dims_name, padded_head_dims
from flashcore.kernels.specialisation import TYPE_NAMES
from flashcore.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class BackwardFeatures:
    """`banded`: some rows may not attend some keys, or there is a softcap."""

    dtype: torch.dtype
    head_dims: HeadDims
    banded: bool
    softcap: bool = False

    @classmethod
    def of(cls, spec: BackwardSpec) -> BackwardFeatures:
        call = spec.call
        head_dims = padded_head_dims(HEAD_DIMS, call.head_dim, call.head_dim_v)
        return cls(call.dtype, head_dims, needs_band(call), call.softcap != 0)

    @property
    def name(self) -> str:
        """A short readable id."""
        return f"{TYPE_NAMES[self.dtype]}-{head_dims_name(self.head_dims)}-{band_name(self.banded, self.softcap)}"


def needs_band(call: AttentionSpec) -> bool:
    """Whether a pass takes binaries that look at the band: those with a softcap all do."""
    return call.band.lo is not None or call.band.hi is not None or call.softcap != 0


def band_name(banded: bool, softcap: bool) -> str:
    """What a binary's name says of the two."""
    return ("window" if banded else "none") + ("-softcap" if softcap else "")
