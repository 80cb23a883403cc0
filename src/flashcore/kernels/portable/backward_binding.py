"""What binds a backward pass to the portable kernels: constants, arguments, grids, and the order of the launches.

A `BackwardBinding`, as kernels/backward_binding.py describes it. Needs no compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Argument, Pointer
from flashcore.kernels.portable.backward_config import ROWS, BackwardConfig, Kind, Tiled, choose_config
from flashcore.kernels.portable.binding import UNLIMITED, Features
from flashcore.kernels.program import Launch, Program, Workspace
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation

IMPL = "portable"
PREFIX = "portable_backward_"
DELTA, REST, DKDV, DQ, DMASK, DMASK_ROWS = (
    f"{PREFIX}delta",
    f"{PREFIX}rest",
    f"{PREFIX}dkdv",
    f"{PREFIX}dq",
    f"{PREFIX}dmask",
    f"{PREFIX}dmask_rows",
)
KERNELS: tuple[str, ...] = (DELTA, REST, DKDV, DQ, DMASK, DMASK_ROWS)


def _strides(tensor: str, dims: str = "bhs") -> tuple[str, ...]:
    return tuple(f"stride_{tensor}{dim}" for dim in dims)


_Q, _K, _V, _MASK, _DO = _strides("q"), _strides("k"), _strides("v"), _strides("m", "bhqk"), _strides("do")
_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "mask_ptr", "do_ptr", "lse_ptr", "delta_ptr", "rest_ptr")
_SIZES = ("heads_q", "heads_per_kv", "seqlen_q", "seqlen_k", "head_dim")
_MASK_SIZES = ("mask_batch", "mask_heads", "mask_rows")
_RULES = ("band_lo", "band_hi", "scale", "softcap")
# The run-time parameters of each kernel, in its order.
PARAMETERS: dict[str, tuple[str, ...]] = {
    DELTA: (
        *("o_ptr", "do_ptr", "dlse_ptr", "delta_ptr", *_strides("o"), *_DO),
        *("heads_q", "seqlen_q", "head_dim_v", "has_dlse"),
    ),
    REST: ("q_ptr", "k_ptr", "mask_ptr", "lse_ptr", "rest_ptr", *_Q, *_K, *_MASK, *_SIZES, *_RULES),
    DKDV: (
        *(*_TENSORS, "dk_ptr", "dv_ptr", *_Q, *_K, *_V, *_MASK, *_DO, *_strides("dk"), *_strides("dv")),
        *(*_SIZES, "head_dim_v", *_RULES),
    ),
    DQ: (*_TENSORS, "dq_ptr", *_Q, *_K, *_V, *_MASK, *_DO, *_strides("dq"), *_SIZES, "head_dim_v", *_RULES),
    DMASK: (
        *(*_TENSORS, "dmask_ptr", *_Q, *_K, *_V, *_MASK, *_DO, "batch", *_SIZES, "head_dim_v"),
        *(*_MASK_SIZES, *_RULES),
    ),
    DMASK_ROWS: ("lse_ptr", "dlse_ptr", "dmask_ptr", "batch", "heads_q", "seqlen_q", *_MASK_SIZES, "has_dlse"),
}
_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "CHUNK_D", "PARTIAL_D", "HAS_LO", "HAS_HI", "MASK", "SOFTCAP", "PRECISION")
# The constants of each kernel.
CONSTANTS: dict[str, tuple[str, ...]] = {
    DELTA: ("BLOCK_M", "BLOCK_D", "PARTIAL_D"),
    REST: _TILE,
    DKDV: (*_TILE, "FOLD_SCALE", "STAGES", "EDGE"),
    DQ: (*_TILE, "FOLD_SCALE", "STAGES", "EDGE"),
    DMASK: (*_TILE, "STAGES", "SUM_M"),
    DMASK_ROWS: ("BLOCK_M",),
}
# What is one float32 a row.
_STATISTICS = ("lse", "dlse", "delta", "rest")
# The workspace of the kernels' `rest`.
_REST_TENSOR: Literal["row_lse"] = "row_lse"


@dataclass(frozen=True, slots=True)
class _Form:
    """What a binary is for: the features of the call, and of dmask, whether the mask is broadcast along the rows."""

    features: Features
    sum_m: bool = False

    @classmethod
    def of(cls, spec: BackwardSpec, kernel: str) -> _Form:
        # Causality is a window without a left side here: one binary for both.
        features = Features.of(spec.call)
        features = replace(features, band="none" if features.band == "none" else "window", aligned=spec.aligned)
        return cls(features, sum_m=kernel == DMASK and _dmask_shape(spec)[2] != spec.call.seqlen_q)

    @property
    def kind(self) -> Kind:
        """The column of the table of configurations."""
        kind = self.features.kind
        return "band" if kind == "causal" or kind == "window" else kind


def reject(spec: BackwardSpec, arch: str | None, interpreted: bool) -> str | None:
    """Why these kernels cannot run a pass on a device, or None when they can."""
    if arch is None and not interpreted:
        return f"needs an NVIDIA GPU of sm_80 to sm_121, or TRITON_INTERPRET=1 on a CPU; got device {spec.call.device}"
    if not spec.call.contiguous_last:
        return "needs stride 1 in the last dimension of q, k and v; call .contiguous() first"
    return None


def reproducible(spec: BackwardSpec) -> bool:
    """Always: every gradient is written once, by one program, which sums in one order."""
    return True


def program(spec: BackwardSpec, arch: str, sm_count: int) -> Program:
    """delta, what the log-sum-exp lost where there is an additive mask, and then each gradient that is asked for."""
    kernels = [DELTA]
    rows = spec.call.lse_shape
    workspaces = [Workspace("delta", rows, torch.float32)]
    if spec.call.mask is not None and spec.call.mask.kind == "additive":
        kernels.append(REST)
        workspaces.append(Workspace(_REST_TENSOR, rows, torch.float32))
    kernels += [DKDV] if spec.dkv else []
    kernels += [DQ] if spec.dq else []
    if spec.dmask_shape is not None:
        kernels.append(DMASK if spec.dmask_shape[3] == spec.call.seqlen_k else DMASK_ROWS)
    return Program(tuple(launch(spec, kernel, arch) for kernel in kernels), tuple(workspaces))


def launch(spec: BackwardSpec, kernel: str, arch: str, config: BackwardConfig | None = None) -> Launch:
    """One launch of a pass; `config` other than the table's is for who measures."""
    form = _Form.of(spec, kernel)
    specialisation = _specialise(kernel, form, config or _config(kernel, form, arch))
    values = _values(spec, bool(dict(specialisation.constants).get("FOLD_SCALE", False)))
    arguments = tuple(values[parameter.name] for parameter in specialisation.parameters)
    return Launch(specialisation, _grid(spec, specialisation), arguments)


def _dmask_shape(spec: BackwardSpec) -> tuple[int, int, int, int]:
    assert spec.dmask_shape is not None  # `program` launches nothing for it otherwise
    return spec.dmask_shape


def _config(kernel: str, form: _Form, arch: str) -> BackwardConfig:
    if kernel in (DELTA, DMASK_ROWS):
        return ROWS
    # the kernels that have tiles are named after them, which a str cannot say
    part: Tiled = kernel.removeprefix(PREFIX)  # type: ignore[assignment]
    return choose_config(part, form.kind, form.features.block_d, arch)


def _specialise(kernel: str, form: _Form, config: BackwardConfig) -> Specialisation:
    constants = _constants(form, config)
    return Specialisation(
        kernel=kernel,
        name=f"{kernel}-{_name(kernel, form, config)}",
        parameters=tuple(_parameter(name, form.features) for name in PARAMETERS[kernel]),
        constants=tuple(sorted((name, constants[name]) for name in CONSTANTS[kernel])),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _name(kernel: str, form: _Form, config: BackwardConfig) -> str:
    features = form.features
    if kernel == DMASK_ROWS:
        return TYPE_NAMES[features.mask_dtype or features.dtype]
    if kernel == DELTA:
        partial, unaligned = "partial" if features.partial_d else "", "" if features.aligned else "-unaligned"
        return f"{TYPE_NAMES[features.dtype]}-d{features.block_d}{partial}{unaligned}"
    return f"{features.name}{'-rows' if form.sum_m else ''}-{config.name}"


def _parameter(name: str, features: Features) -> Parameter:
    vector = 16 // features.dtype.itemsize if features.aligned else 1
    if name.endswith("_ptr"):
        tensor = name.removesuffix("_ptr")
        if tensor in _STATISTICS:
            return Parameter(name, "*fp32")
        if tensor in ("mask", "dmask"):
            element = "u8" if features.mask == "bool" else TYPE_NAMES[features.mask_dtype or features.dtype]
            return Parameter(name, f"*{element}")
        return Parameter(name, f"*{TYPE_NAMES[features.dtype]}", 16 if features.aligned else 1)
    if name.startswith("stride_"):
        return Parameter(name, "i64", 1 if name in _MASK else vector)
    if name in ("scale", "softcap"):
        return Parameter(name, "fp32")
    return Parameter(name, "i32", vector if name.startswith("head_dim") else 1)


def _constants(form: _Form, config: BackwardConfig) -> dict[str, int | bool | str]:
    features = form.features
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": features.block_d,
        "CHUNK_D": 16 if features.dtype == torch.float32 else 0,
        "PARTIAL_D": features.partial_d,
        "HAS_LO": features.band != "none",
        "HAS_HI": features.band != "none",
        "MASK": features.mask,
        "SOFTCAP": features.softcap,
        "FOLD_SCALE": features.fold_scale,
        "PRECISION": features.precision,
        "STAGES": config.num_stages,
        "EDGE": config.edge,
        "SUM_M": form.sum_m,
    }


def _grid(spec: BackwardSpec, specialisation: Specialisation) -> int:
    """Number of programs of a launch."""
    call, constants = spec.call, dict(specialisation.constants)

    def blocks(size: int, block: str) -> int:
        width = constants[block]
        assert isinstance(width, int)
        return -(-size // width)

    if specialisation.kernel == DKDV:
        return blocks(call.seqlen_k, "BLOCK_N") * call.batch * call.heads_k
    if specialisation.kernel in (DMASK, DMASK_ROWS):
        batch, heads, rows, keys = _dmask_shape(spec)
        return batch * heads * blocks(rows, "BLOCK_M") * (blocks(keys, "BLOCK_N") if specialisation.kernel == DMASK else 1)
    return blocks(call.seqlen_q, "BLOCK_M") * call.batch * call.heads_q


def _values(spec: BackwardSpec, fold_scale: bool) -> dict[str, Argument]:
    """What fills the parameters of all the kernels, by their names."""
    call, band = spec.call, spec.call.band
    strides = {
        "q": call.q_strides,
        "k": call.k_strides,
        "v": call.v_strides,
        "o": call.o_strides,
        "do": spec.do_strides,
        "dq": spec.dq_strides,
        "dk": spec.dk_strides,
        "dv": spec.dv_strides,
    }
    values: dict[str, Argument] = {
        name: stride for tensor, found in strides.items() for name, stride in zip(_strides(tensor), found, strict=True)
    }
    values |= dict(zip(_MASK, (0, 0, 0, 0) if call.mask is None else call.mask.strides, strict=True))
    for tensor in ("q", "k", "v", "mask", "o", "do", "lse", "dlse", "delta", "dq", "dk", "dv", "dmask"):
        # a name of TENSORS, which a str cannot say
        values[f"{tensor}_ptr"] = Pointer(tensor)  # type: ignore[arg-type]
    values["rest_ptr"] = Pointer(_REST_TENSOR)
    values |= dict(zip(_MASK_SIZES, (spec.dmask_shape or (0, 0, 0, 0))[:3], strict=True))
    return values | {
        "batch": call.batch,
        "heads_q": call.heads_q,
        "heads_per_kv": call.heads_q // call.heads_k,
        "seqlen_q": call.seqlen_q,
        "seqlen_k": call.seqlen_k,
        "head_dim": call.head_dim,
        "head_dim_v": call.head_dim_v,
        "band_lo": -UNLIMITED if band.lo is None else max(-UNLIMITED, band.lo),
        "band_hi": UNLIMITED if band.hi is None else min(UNLIMITED, band.hi),
        "scale": call.scale * math.log2(math.e) if fold_scale else call.scale,
        "softcap": call.softcap,
        "has_dlse": int(spec.dlse),
    }


def matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """The matrix instruction that a binary must hold; None where it is meant to hold none."""
    constants = dict(specialisation.constants)
    element = {parameter.name: parameter.type for parameter in specialisation.parameters}.get("q_ptr")
    if element is None or (element == "*fp32" and constants["PRECISION"] == "ieee"):
        return None  # no product, or one in float32, which no matrix unit computes
    # wgmma and tcgen05 work on 64 rows, of what the program owns, and four warps; smaller tiles are mma.sync's
    owned = constants["BLOCK_N" if specialisation.kernel == DKDV else "BLOCK_M"]
    assert isinstance(owned, int)
    if owned >= 64 and specialisation.num_warps >= 4:
        return {"sm_90a": "HGMMA", "sm_100a": "UTCHMMA", "sm_103a": "UTCHMMA"}.get(arch, "HMMA")
    return "HMMA"


def shipped(arch: str) -> tuple[Specialisation, ...]:
    """The specialisations that a wheel holds for an arch: half inputs of head dim 64 and 128 with nothing but a band."""
    core = Features(torch.float16, 64, False, "none", "none", None, False, True, True, "ieee")
    forms = [
        _Form(replace(core, dtype=dtype, block_d=block_d, band=band))
        for dtype in (torch.float16, torch.bfloat16)
        for block_d in (64, 128)
        for band in ("none", "window")
    ]
    return tuple(
        dict.fromkeys(_specialise(kernel, form, _config(kernel, form, arch)) for kernel in (DELTA, DKDV, DQ) for form in forms)
    )
