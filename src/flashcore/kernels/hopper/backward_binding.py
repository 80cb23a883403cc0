"""The Hopper backward pass: which launches it takes, and what binds them to their binaries. Needs no compiler.

A `BackwardBinding`, as kernels/backward_binding.py describes it. Where dq is wanted with dk and dv, one kernel makes all three
and sums dq by atomics, whose order no two runs share; `deterministic` has them done in one order.
"""

from __future__ import annotations

import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Pointer
from flashcore.kernels.hopper import backward_dq_launch as dq
from flashcore.kernels.hopper import backward_main as main
from flashcore.kernels.hopper import backward_wide_launch as wide
from flashcore.kernels.hopper.backward_config import HEAD_DIMS, PREPARED_ELEMENTS, WIDE_CONFIGS
from flashcore.kernels.hopper.backward_factors import Factors
from flashcore.kernels.hopper.backward_features import BackwardFeatures
from flashcore.kernels.hopper.head_dims import padded_head_dims
from flashcore.kernels.hopper.requirements import ARCH, DTYPES, refused
from flashcore.kernels.program import Launch, Program, Workspace
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation

IMPL = "hopper"
PREPARE = "hopper_backward_prepare"
FINISH = "hopper_backward_finish"
KERNELS: tuple[str, ...] = (PREPARE, main.KERNEL, wide.KERNEL, dq.KERNEL, FINISH)
# Rows and columns of a tile of dq's sums in fragment order.
FRAGMENT = 64
# Tiles of rows of a program of the finish kernel, which has little to do for most. A head has a multiple of them.
FINISH_TILES = 2
MAX_PROGRAMS = 2**30
# Without a softcap the log-sum-exp is divided by the scale, and the quotient must be a float32.
MIN_SCALE = 1e-30


def reject(spec: BackwardSpec, arch: str | None, interpreted: bool) -> str | None:
    """Why it cannot run such a pass on a device, or None when it can."""
    call = spec.call
    refusal = refused(call, arch, interpreted)
    if refusal is not None:
        return refusal
    if not spec.do_aligned:
        return "needs strides and an address of the output's gradient that are multiples of 16 bytes (8 elements)"
    if call.softcap == 0 and call.scale < MIN_SCALE:
        return f"needs a scale of at least {MIN_SCALE:g} backwards; got {call.scale:g}"
    if call.seqlen_q == 0:
        return "needs a query"
    if call.batch * max(call.heads_q * call.seqlen_q, call.heads_k * call.seqlen_k) > FRAGMENT * (MAX_PROGRAMS - 1):
        return f"takes at most {MAX_PROGRAMS} tiles of {FRAGMENT} rows"
    return None


def program(spec: BackwardSpec, arch: str, sm_count: int) -> Program:
    """The launches of a pass, and what memory they need. Bitwise reproducible where the spec asks for it."""
    if not (spec.dq or spec.dkv):
        return Program(())
    call = spec.call
    fused = _is_fused(spec)
    heads, rows = call.batch * call.heads_q, main.padded_rows(call.seqlen_q)
    shared = main.shared_tiles(spec, sm_count)[0] if fused else 0
    launches = [_prepare(spec, shared)]
    workspaces = [Workspace("row_lse", (heads, rows), torch.float32), Workspace("delta", (heads, rows), torch.float32)]
    if progress_size := _progress_size(spec):
        workspaces.append(Workspace("progress", (progress_size,), torch.int32))
    if spec.dkv:
        launches.append(wide.launch(spec) if _is_wide(spec) else main.launch(spec, sm_count, fused=fused))
    if fused:
        launches.append(_finish(spec, shared))
        column_tiles = _head_dims(spec)[0] // FRAGMENT
        tile = (column_tiles, FRAGMENT * FRAGMENT)
        workspaces.append(Workspace("dq_sum", (heads, rows // FRAGMENT, *tile), torch.float32))
        if shared:
            workspaces.append(Workspace("dkv_sum", (shared, 4, *tile), torch.float32))
    elif spec.dq:
        launches.append(dq.launch(spec))
    return Program(tuple(launches), tuple(workspaces))


def _progress_size(spec: BackwardSpec) -> int:
    """Numbers of the progress that a pass keeps, as backward_shared.py has them."""
    call = spec.call
    if not _is_fused(spec):
        return int(spec.dkv and not _is_wide(spec))
    features, rows = main.MainFeatures.of(spec, fused=True), main.padded_rows(call.seqlen_q)
    counts = rows // FRAGMENT + (rows // main.BLOCK_ROWS[features.head_dim] if features.ordered else 0)
    return 1 + call.batch * (call.heads_k + call.heads_q * counts)


def reproducible(spec: BackwardSpec) -> bool:
    """Whether the program of a pass gives bitwise equal results run to run, asked for or not."""
    return spec.deterministic or not _is_fused(spec)


def _is_fused(spec: BackwardSpec) -> bool:
    """Whether one kernel makes all three gradients. Not where heads are wide: a thread has no registers for all their sums."""
    return spec.dq and spec.dkv and not _is_wide(spec)


def _head_dims(spec: BackwardSpec) -> tuple[int, int]:
    return padded_head_dims(HEAD_DIMS, spec.call.head_dim, spec.call.head_dim_v)


def _is_wide(spec: BackwardSpec) -> bool:
    return _head_dims(spec) in WIDE_CONFIGS


def matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """The matrix instruction that a binary must hold; None where it is meant to hold none."""
    return None if specialisation.kernel in (PREPARE, FINISH) else "HGMMA"


def shipped(arch: str) -> tuple[Specialisation, ...]:
    """The specialisations, of all its kernels, that a wheel holds for an arch: all there are."""
    if arch != ARCH:
        return ()
    fused = [(dtype, head_dim) for dtype in DTYPES for head_dim in sorted(main.BLOCK_ROWS)]
    kinds = ((False, False), (True, False), (True, True))
    return (
        *(_specialise_prepare(dtype, head_dim) for dtype in DTYPES for head_dim in sorted({dv for _, dv in HEAD_DIMS})),
        *(
            main.specialise(main.MainFeatures(*form, banded, summed, softcap, ordered))
            for form in fused
            for banded, softcap in kinds
            for summed, ordered in ((False, False), (True, False), (True, True))
        ),
        *(
            wide.specialise(BackwardFeatures(dtype, head_dims, banded, softcap))
            for dtype in DTYPES
            for head_dims in WIDE_CONFIGS
            for banded, softcap in kinds
        ),
        *(
            dq.specialise(BackwardFeatures(dtype, head_dims, banded, softcap))
            for dtype in DTYPES
            for head_dims in HEAD_DIMS
            for banded, softcap in kinds
        ),
        *(_specialise_finish(*form) for form in fused),
    )


def _specialise_prepare(dtype: torch.dtype, head_dim: int) -> Specialisation:
    element = TYPE_NAMES[dtype]
    parameters = [Parameter("o_ptr", f"*{element}", 16), Parameter("do_ptr", f"*{element}", 16)]
    parameters += [Parameter(f"{tensor}_ptr", "*fp32") for tensor in ("lse", "dlse")]
    parameters += [Parameter(f"{tensor}_ptr", "*fp32", 16) for tensor in ("row_lse", "delta", "dq_sum", "dkv_sum")]
    parameters.append(Parameter("progress_ptr", "*i32", 16))
    parameters += [Parameter(f"stride_{tensor}{dimension}", "i64", 8) for tensor in ("o", "do") for dimension in "bhs"]
    parameters += [Parameter("heads_q", "i32"), Parameter("seqlen_q", "i32"), Parameter("padded_rows", "i32", FRAGMENT)]
    parameters += [Parameter("head_dim_v", "i32", 8), Parameter("lse_factor", "fp32")]
    parameters += [
        Parameter("has_dlse", "i32"),
        Parameter("zero_dq_sum", "i32"),
        Parameter("dkv_sum_tiles", "i32"),
        Parameter("progress_size", "i32"),
    ]
    constants = (("BLOCK_DV", head_dim), ("COLUMNS", head_dim), ("ROWS", _prepared_rows(head_dim)))
    return Specialisation(PREPARE, f"{PREPARE}-{element}-d{head_dim}", tuple(parameters), constants, num_warps=4, num_stages=1)


def _prepared_rows(head_dim: int) -> int:
    """Rows of a program of the prepare kernel."""
    return PREPARED_ELEMENTS // head_dim


def _prepare(spec: BackwardSpec, shared: int) -> Launch:
    call = spec.call
    head_dim, rows = _head_dims(spec)[1], main.padded_rows(call.seqlen_q)
    return Launch(
        _specialise_prepare(call.dtype, head_dim),
        call.batch * call.heads_q * (rows // _prepared_rows(head_dim)),
        (
            *(Pointer(name) for name in ("o", "do", "lse", "dlse", "row_lse", "delta", "dq_sum", "dkv_sum", "progress")),
            *call.o_strides,
            *spec.do_strides,
            call.heads_q,
            call.seqlen_q,
            rows,
            call.head_dim_v,
            Factors.of(call).lse,
            int(spec.dlse),
            int(_is_fused(spec)),
            shared * 4 * (head_dim // FRAGMENT),
            _progress_size(spec),
        ),
    )


def _specialise_finish(dtype: torch.dtype, head_dim: int) -> Specialisation:
    element = TYPE_NAMES[dtype]
    parameters = [Parameter(f"{tensor}_ptr", "*fp32", 16) for tensor in ("dq_sum", "dkv_sum")]
    parameters.append(Parameter("progress_ptr", "*i32", 16))
    parameters += [Parameter(f"{tensor}_ptr", f"*{element}", 16) for tensor in ("dq", "dk", "dv")]
    parameters += [Parameter(f"{tensor}_stride_{dimension}", "i64", 8) for tensor in ("dq", "dk", "dv") for dimension in "bhs"]
    counts = ("heads_q", "heads_k", "kv_heads", "seqlen_q", "seqlen_k", "row_tiles", "query_programs", "first_shared")
    parameters += [Parameter(name, "i32") for name in counts]
    parameters += [Parameter("head_dim", "i32", 8), Parameter("head_dim_v", "i32", 8), Parameter("scale", "fp32")]
    name = f"{FINISH}-{element}-d{head_dim}"
    return Specialisation(
        FINISH, name, tuple(parameters), (("COLUMNS", head_dim), ("TILES", FINISH_TILES)), num_warps=4, num_stages=1
    )


def _finish(spec: BackwardSpec, shared: int) -> Launch:
    call = spec.call
    row_tiles = main.padded_rows(call.seqlen_q) // FRAGMENT
    programs = call.batch * call.heads_q * row_tiles // FINISH_TILES
    kv_heads = call.batch * call.heads_k
    return Launch(
        _specialise_finish(call.dtype, _head_dims(spec)[0]),
        programs + 4 * shared,
        (
            *(Pointer(name) for name in ("dq_sum", "dkv_sum", "progress", "dq", "dk", "dv")),
            *spec.dq_strides,
            *spec.dk_strides,
            *spec.dv_strides,
            call.heads_q,
            call.heads_k,
            kv_heads,
            call.seqlen_q,
            call.seqlen_k,
            row_tiles,
            programs,
            kv_heads * main.key_tiles(call) - shared,
            call.head_dim,
            call.head_dim_v,
            call.scale,
        ),
    )
