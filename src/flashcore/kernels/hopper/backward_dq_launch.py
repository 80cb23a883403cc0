"""What binds a backward pass to a binary of the Hopper dq kernel: constants, arguments, grid. Needs no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Pointer, TensorMap
from flashcore.kernels.hopper.backward_config import DQ_CONFIGS, DqConfig
from flashcore.kernels.hopper.backward_main import padded_head_dim, padded_rows
from flashcore.kernels.hopper.binding import group_heads
from flashcore.kernels.hopper.config import REGISTERS, WARPGROUP_ROWS
from flashcore.kernels.program import Launch
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation

KERNEL = "hopper_backward_dq"
# The files that a binary is made of.
SOURCES = tuple(
    f"kernels/hopper/{name}.py"
    for name in ("backward_dq", "gluon_api", "launches", "layouts", "mask", "operand", "ring", "tiles")
)
INTEGERS = (
    "heads",
    "heads_q",
    "heads_per_kv",
    "seqlen_q",
    "seqlen_k",
    "padded_rows",
    "band_lo",
    "band_hi",
    "group_heads",
)


@dataclass(frozen=True, slots=True)
class DqFeatures:
    """What a pass needs compiled in. `banded`: some rows may not attend some keys."""

    dtype: torch.dtype
    head_dim: int
    banded: bool

    @classmethod
    def of(cls, spec: BackwardSpec) -> DqFeatures:
        call = spec.call
        banded = call.band.lo is not None or call.band.hi is not None
        return cls(call.dtype, padded_head_dim(max(call.head_dim, call.head_dim_v)), banded)

    @property
    def name(self) -> str:
        """A short readable id."""
        return f"{TYPE_NAMES[self.dtype]}-d{self.head_dim}-{'window' if self.banded else 'none'}"


def specialise(features: DqFeatures, config: DqConfig | None = None) -> Specialisation:
    """The binary for these features, in the table's form for them unless another is given.

    Raises:
        ValueError: the form does not fit the GPU.
    """
    head_dim = features.head_dim
    config = config or DQ_CONFIGS[head_dim, features.banded]
    if not config.fits(head_dim):
        raise ValueError(f"{config.name} does not fit head dim {head_dim}")
    element = TYPE_NAMES[features.dtype]
    consumer_registers, producer_registers = REGISTERS[config.warpgroups]
    parameters = [
        Parameter(f"{tensor}_map", f"tensormap<{element}[1,1,{rows},{head_dim}]>")
        for tensor, rows in (
            ("q", WARPGROUP_ROWS),
            ("do", WARPGROUP_ROWS),
            ("k", config.block_n),
            ("v", config.block_n),
            ("dq", WARPGROUP_ROWS),
        )
    ]
    parameters += [Parameter(f"{tensor}_ptr", "*fp32", 16) for tensor in ("row_lse", "delta")]
    parameters += [Parameter(name, "i32") for name in INTEGERS]
    parameters += [Parameter("exponent_scale", "fp32"), Parameter("scale", "fp32")]
    constants: dict[str, int | bool | str | None] = {
        "WARPGROUPS": config.warpgroups,
        "SLOTS": config.slots,
        "Q_REGISTERS": config.q_registers,
        "DO_REGISTERS": config.do_registers,
        "HAS_LO": features.banded,
        "HAS_HI": features.banded,
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
    }
    return Specialisation(
        kernel=KERNEL,
        name=f"{KERNEL}-{features.name}-{config.name}",
        parameters=tuple(parameters),
        constants=tuple(sorted(constants.items())),
        num_warps=4,
        num_stages=1,
    )


def launch(spec: BackwardSpec) -> Launch:
    """The launch of a pass: all of dq."""
    call = spec.call
    features = DqFeatures.of(spec)
    config = DQ_CONFIGS[features.head_dim, features.banded]
    first, last = call.attended_keys
    queries = (call.batch, call.heads_q, call.seqlen_q)
    keys = (call.batch, call.heads_k, last - first)
    return Launch(
        specialise(features, config),
        -(-call.seqlen_q // config.block_m) * call.batch * call.heads_q,
        (
            TensorMap("q", (*queries, call.head_dim), (*call.q_strides, 1)),
            TensorMap("do", (*queries, call.head_dim_v), (*spec.do_strides, 1)),
            TensorMap("k", (*keys, call.head_dim), (*call.k_strides, 1), first * call.k_strides[2]),
            TensorMap("v", (*keys, call.head_dim_v), (*call.v_strides, 1), first * call.v_strides[2]),
            TensorMap("dq", (*queries, call.head_dim), (*spec.dq_strides, 1)),
            Pointer("row_lse"),
            Pointer("delta"),
            call.batch * call.heads_q,
            call.heads_q,
            call.heads_q // call.heads_k,
            call.seqlen_q,
            last - first,
            padded_rows(call.seqlen_q),
            # limits that exclude nothing, where there are none
            -call.seqlen_q if call.band.lo is None else max(-call.seqlen_q, call.band.lo - first),
            call.seqlen_k if call.band.hi is None else min(call.seqlen_k, call.band.hi - first),
            group_heads(call),
            call.scale * math.log2(math.e),
            call.scale,
        ),
    )
