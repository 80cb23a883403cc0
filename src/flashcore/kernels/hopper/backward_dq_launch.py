"""What binds a backward pass to a binary of the Hopper dq kernel: constants, arguments, grid. Needs no compiler."""

from __future__ import annotations

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Pointer, TensorMap, TensorName
from flashcore.kernels.hopper.backward_config import DQ_CONFIGS, DqConfig
from flashcore.kernels.hopper.backward_factors import factor_arguments
from flashcore.kernels.hopper.backward_features import BackwardFeatures
from flashcore.kernels.hopper.backward_form import specialise_form, tail_maps
from flashcore.kernels.hopper.backward_main import padded_rows
from flashcore.kernels.hopper.binding import group_heads
from flashcore.kernels.hopper.config import REGISTERS, WARPGROUP_ROWS
from flashcore.kernels.program import Launch
from flashcore.kernels.specialisation import Specialisation

KERNEL = "hopper_backward_dq"
_MAPS: tuple[TensorName, ...] = ("q", "do", "k", "v", "dq")
# The files that a binary is made of.
SOURCES = tuple(
    f"kernels/hopper/{name}.py"
    for name in (
        "backward_dq",
        "backward_softcap",
        "gluon_api",
        "launches",
        "layouts",
        "mask",
        "opaque",
        "operand",
        "ring",
        "tiles",
    )
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


def specialise(features: BackwardFeatures, config: DqConfig | None = None) -> Specialisation:
    """The binary for these features, in the table's form for them unless another is given.

    Raises:
        ValueError: the form does not fit the GPU.
    """
    config = config or DQ_CONFIGS[features.head_dims, features.banded]
    return specialise_form(
        KERNEL,
        features,
        config,
        rows={tensor: config.block_n if tensor in ("k", "v") else WARPGROUP_ROWS for tensor in _MAPS},
        integers=INTEGERS,
        registers=REGISTERS[config.warpgroups],
        constants={
            "WARPGROUPS": config.warpgroups,
            "SLOTS": config.slots,
            "Q_REGISTERS": config.q_registers,
            "DO_REGISTERS": config.do_registers,
        },
    )


def launch(spec: BackwardSpec) -> Launch:
    """The launch of a pass: all of dq."""
    call = spec.call
    features = BackwardFeatures.of(spec)
    config = DQ_CONFIGS[features.head_dims, features.banded]
    first, last = call.attended_keys
    queries = (call.batch, call.heads_q, call.seqlen_q)
    keys = (call.batch, call.heads_k, last - first)
    maps: dict[TensorName, TensorMap] = {
        "q": TensorMap("q", (*queries, call.head_dim), (*call.q_strides, 1)),
        "do": TensorMap("do", (*queries, call.head_dim_v), (*spec.do_strides, 1)),
        "k": TensorMap("k", (*keys, call.head_dim), (*call.k_strides, 1), first * call.k_strides[2]),
        "v": TensorMap("v", (*keys, call.head_dim_v), (*call.v_strides, 1), first * call.v_strides[2]),
        "dq": TensorMap("dq", (*queries, call.head_dim), (*spec.dq_strides, 1)),
    }
    specialisation = specialise(features, config)
    return Launch(
        specialisation,
        -(-call.seqlen_q // config.block_m) * call.batch * call.heads_q,
        (
            *maps.values(),
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
            *factor_arguments(call),
            *tail_maps(specialisation, maps),
        ),
    )
