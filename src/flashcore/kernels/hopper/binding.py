"""What binds a call to a binary of the Hopper forward kernel: constants, arguments, grid. Needs no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from flashcore import tuned
from flashcore.kernels.arguments import Argument, Pointer, TensorMap, TensorName
from flashcore.kernels.hopper.config import (
    D64_WIDE,
    HEAD_DIMS,
    REGISTERS,
    WARPGROUP_ROWS,
    HopperConfig,
    choose_config,
    configurations,
)
from flashcore.kernels.hopper.head_dims import head_dims_name, padded_head_dims, tile_columns
from flashcore.kernels.hopper.requirements import ARCH, DTYPES, refused
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation
from flashcore.spec import MAX_FACTOR, AttentionSpec

KERNEL = "hopper_forward"
IMPL = "hopper"
INTEGERS = ("heads", "heads_q", "heads_per_kv", "seqlen_q", "seqlen_k", "band_lo", "band_hi", "group_heads")
# Causal tiles are taken from a group of heads, longest first. The group's keys and values are to stay in L2, of which an H200
# has 50 MB; fewer than 16 heads, or more than 64, cost more than they save (docs/notes/hopper-forward.md).
L2_BUDGET = 32 * 2**20
GROUP_HEADS = (16, 64)
MAX_TILES = 2**30
# Rounds of tiles that blocks take in a fixed order. With more, drawing them from a counter evens out how fast multiprocessors
# are and how long tiles; with fewer it costs more, since zeroing the counter takes 2 us (docs/notes/small-forward.md).
FIXED_ROUNDS = 8
FIXED_CAUSAL_ROUNDS = 2

BandKind = Literal["none", "causal", "window"]


@dataclass(frozen=True, slots=True)
class Features:
    """What a call needs compiled in. A softcap shares the code of the most general band, whose empty loops cost it little."""

    dtype: torch.dtype
    head_dims: tuple[int, int]
    band: BandKind
    softcap: bool

    @classmethod
    def of(cls, spec: AttentionSpec) -> Features:
        band: BandKind = "window"
        if spec.band.lo is None and spec.softcap == 0:
            band = "none" if spec.band.hi is None else "causal"
        return cls(spec.dtype, padded_head_dims(HEAD_DIMS, spec.head_dim, spec.head_dim_v), band, spec.softcap != 0)

    @property
    def name(self) -> str:
        """A short readable id; what is usual is left out."""
        return f"{TYPE_NAMES[self.dtype]}-{self.untyped}"

    @property
    def untyped(self) -> str:
        """`name` without the dtype, which no form depends on."""
        return "-".join([head_dims_name(self.head_dims), self.band, *(["softcap"] if self.softcap else [])])


def reject(spec: AttentionSpec, arch: str | None, interpreted: bool) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    refusal = refused(spec, arch, interpreted)
    if refusal is not None:
        return refusal
    if -(-spec.seqlen_q // WARPGROUP_ROWS) * spec.batch * spec.heads_q > MAX_TILES:
        return f"takes at most {MAX_TILES} tiles of {WARPGROUP_ROWS} rows"
    return None


def specialise(features: Features, config: HopperConfig) -> Specialisation:
    """The binary for these features in this form.

    Raises:
        ValueError: the form does not fit the GPU.
    """
    if not config.fits(*features.head_dims):
        raise ValueError(f"{config.name} does not fit head dims {features.head_dims}")
    element = TYPE_NAMES[features.dtype]
    consumer_registers, producer_registers = REGISTERS[config.warpgroups]
    parameters: list[Parameter] = []
    constants: dict[str, int | bool | str | None] = {
        "WARPGROUPS": config.warpgroups,
        "BLOCK_N": config.block_n,
        "Q_SLOTS": config.q_slots,
        "KV_SLOTS": config.kv_slots,
        "Q_REGISTERS": config.q_registers,
        "O_SHARES_Q": config.o_shares_q,
        "JOIN_TILES": config.join_tiles,
        "SKIP_RESCALE": config.skip_rescale,
        "EMULATE_EXP2": config.emulate_exp2,
        "HOLD_WAIT": config.hold_wait,
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
        "HAS_LO": features.band == "window",
        "HAS_HI": features.band != "none",
        "SOFTCAP": features.softcap,
    }
    for name, _, rows, columns in _maps(features.head_dims, config):
        if columns == 0:
            constants[name] = None
        else:
            parameters.append(Parameter(name, f"tensormap<{element}[1,1,{rows},{columns}]>"))
    parameters += [Parameter("lse_ptr", "*fp32"), Parameter("counter_ptr", "*i32")]
    parameters += [Parameter(name, "i32") for name in INTEGERS]
    parameters += [Parameter("scale", "fp32"), Parameter("cap_scale", "fp32"), Parameter("store_lse", "i32")]
    return Specialisation(
        kernel=KERNEL,
        name=f"{KERNEL}-{features.name}-{config.name}",
        parameters=tuple(parameters),
        constants=tuple(sorted(constants.items())),
        num_warps=4,
        num_stages=1,
    )


def _maps(head_dims: tuple[int, int], config: HopperConfig) -> list[tuple[str, TensorName, int, int]]:
    """(parameter, tensor, rows, columns) of each tensor map in the kernel's order.

    A head dim that is no power of two takes two maps, for the greatest power in it and for the rest; 0 columns: no second map.
    """
    rows = {"q": WARPGROUP_ROWS, "k": config.block_n, "v": config.block_n, "o": WARPGROUP_ROWS}
    tensors: tuple[TensorName, ...] = ("q", "k", "v", "o")
    found = []
    for suffix in ("map", "tail_map"):
        for tensor in tensors:
            head_dim = head_dims[tensor in ("v", "o")]
            main, tail = tile_columns(head_dim)
            found.append((f"{tensor}_{suffix}", tensor, rows[tensor], main if suffix == "map" else tail))
    return found


def hand_chosen(spec: AttentionSpec, arch: str, sm_count: int) -> HopperConfig:
    """The form that the table in config.py has for a call."""
    features = Features.of(spec)
    wide_fill = -(-spec.seqlen_q // D64_WIDE.block_m) * spec.batch * spec.heads_q >= sm_count
    return choose_config(features.head_dims, features.band, spec.seqlen_k, wide_fill=wide_fill)


def specialise_call(spec: AttentionSpec, arch: str, sm_count: int) -> Specialisation:
    """The binary that a call on a GPU runs."""
    return specialise(Features.of(spec), tuned.config(IMPL, spec, arch, sm_count) or hand_chosen(spec, arch, sm_count))


def features(spec: AttentionSpec) -> str:
    """What forms are tuned for: the features of a call without its dtype."""
    return Features.of(spec).untyped


def grid(spec: AttentionSpec, specialisation: Specialisation, sm_count: int) -> int:
    """Number of programs of a call: one a multiprocessor, where there are as many tiles."""
    return min(sm_count, _tiles(spec, specialisation))


def arguments(spec: AttentionSpec, specialisation: Specialisation) -> tuple[Argument, ...]:
    """What fills the kernel's parameters, in their order."""
    first, last = spec.attended_keys
    queries = (spec.batch, spec.heads_q, spec.seqlen_q)
    keys = (spec.batch, spec.heads_k, last - first)
    maps = {
        "q": TensorMap("q", (*queries, spec.head_dim), (*spec.q_strides, 1)),
        "k": TensorMap("k", (*keys, spec.head_dim), (*spec.k_strides, 1), first * spec.k_strides[2]),
        "v": TensorMap("v", (*keys, spec.head_dim_v), (*spec.v_strides, 1), first * spec.v_strides[2]),
        "o": TensorMap("o", (*queries, spec.head_dim_v), (*spec.o_strides, 1)),
    }
    log2_e = math.log2(math.e)
    capped = spec.softcap > 0
    return (
        *(maps[p.name.split("_")[0]] for p in specialisation.parameters if p.tile is not None),
        Pointer("lse"),
        Pointer("counter"),
        spec.batch * spec.heads_q,
        spec.heads_q,
        spec.heads_q // spec.heads_k,
        spec.seqlen_q,
        last - first,
        # limits that exclude nothing, where there are none
        -spec.seqlen_q if spec.band.lo is None else max(-spec.seqlen_q, spec.band.lo - first),
        spec.seqlen_k if spec.band.hi is None else min(spec.seqlen_k, spec.band.hi - first),
        group_heads(spec),
        (spec.softcap if capped else spec.scale) * log2_e,
        # beyond float32 the cap is reached by any score but 0, as by this
        min(2 * log2_e * spec.scale / spec.softcap, MAX_FACTOR) if capped else 0.0,
        int(spec.return_lse),
    )


def group_heads(spec: AttentionSpec) -> int:
    """Query heads whose tiles are taken together: whole groups of those that share keys and values."""
    heads_per_kv = spec.heads_q // spec.heads_k
    if spec.band.hi is None:
        return heads_per_kv  # every tile is as long; then one head after the other is best
    bytes_of_head = spec.seqlen_k * (spec.head_dim + spec.head_dim_v) * spec.dtype.itemsize
    least, most = GROUP_HEADS
    wanted = min(most, max(least, L2_BUDGET // bytes_of_head * heads_per_kv))
    return min(spec.batch * spec.heads_q, -(-wanted // heads_per_kv) * heads_per_kv)


def needs_counter(spec: AttentionSpec, specialisation: Specialisation, grid: int) -> bool:
    """Blocks draw their tiles from it where there are tiles for many rounds."""
    rounds = FIXED_ROUNDS if spec.band.hi is None and spec.band.lo is None else FIXED_CAUSAL_ROUNDS
    return _tiles(spec, specialisation) > rounds * grid


def _tiles(spec: AttentionSpec, specialisation: Specialisation) -> int:
    warpgroups = dict(specialisation.constants)["WARPGROUPS"]
    assert isinstance(warpgroups, int)
    return -(-spec.seqlen_q // (warpgroups * WARPGROUP_ROWS)) * spec.batch * spec.heads_q


def matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """wgmma, always."""
    return "HGMMA"


def shipped(arch: str) -> tuple[Specialisation, ...]:
    """The specialisations that a wheel holds for an arch: all there are."""
    if arch != ARCH:
        return ()
    forms: tuple[tuple[BandKind, bool], ...] = (("none", False), ("causal", False), ("window", False), ("window", True))
    found = [Features(dtype, head_dims, *form) for dtype in DTYPES for head_dims in HEAD_DIMS for form in forms]
    return tuple(
        dict.fromkeys(
            specialise(one, config)
            for one in found
            for config in (*configurations(one.head_dims, one.band), *tuned.configs(IMPL, one.untyped, one.dtype, arch))
        )
    )
