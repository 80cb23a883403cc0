"""What binds a backward pass to a binary of the Hopper backward kernel: constants, arguments, grid. Needs no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Argument, Pointer, TensorMap, TensorName
from flashcore.kernels.hopper.backward_config import HEAD_DIMS
from flashcore.kernels.hopper.backward_factors import factor_arguments, factor_parameters
from flashcore.kernels.hopper.backward_features import band_name, needs_band
from flashcore.kernels.hopper.head_dims import padded_head_dims
from flashcore.kernels.program import Launch
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation
from flashcore.spec import AttentionSpec

KERNEL = "hopper_backward"
# The files that a binary is made of.
SOURCES = tuple(
    f"kernels/hopper/{name}.py"
    for name in (
        "backward",
        "backward_consumer",
        "backward_producer",
        "backward_shared",
        "backward_softcap",
        "backward_sums",
        "backward_turns",
        "progress",
        "exchange",
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
    "kv_heads",
    "heads_k",
    "heads_per_kv",
    "seqlen_q",
    "seqlen_k",
    "blocks_per_head",
    "first_query",
    "first_key",
    "band_lo",
    "band_hi",
    "group_heads",
)
# Head dims that it is built for, of q, k and v alike, with the rows of a query block.
BLOCK_ROWS = {64: 128, 128: 64}
WARPGROUP_KEYS = 64
BLOCK_KEYS = 2 * WARPGROUP_KEYS
SLOTS = 2
# Of the forms that sum dq: see backward_shared.py.
ROUNDING = ("lag", "pairs_per_tile")
# Of those in which blocks may share tiles.
SHARING = ("shared_tiles", "sharers")
# At most so many blocks share a tile, and none takes fewer query blocks of it: what they add to memory costs more than it
# brings.
MAX_SHARERS = 4
MIN_SHARED_BLOCKS = 16
# Heads of keys are taken together, in groups: their first tiles, their second ones, and so on, where keys differ in their rows
# those with the most first. The queries of a group, their output gradients and sums of dq are to stay in L2.
GROUP_BYTES = 32 * 2**20
# Where tiles add in turn, one that begins too soon after the one before it has to wait. The rows between two tiles of a head,
# of all heads of a group, are to stay in L2; more of them pay where tiles begin at later and later rows: {banded: bytes}.
TRAIL_BYTES = {False: 4 * 2**20, True: 16 * 2**20}
# Keys of a head whose rows are counted to know how long its tiles are.
SAMPLED_KEYS = 64
_MAPS: tuple[TensorName, ...] = ("q", "do", "k", "v", "dk", "dv")
# setmaxnreg for (consumers, producer)
REGISTERS = (240, 24)
# Row numbers and sums of dq are padded to this many rows a head.
ROW_PADDING = 128


@dataclass(frozen=True, slots=True)
class MainFeatures:
    """What a pass needs compiled in. `banded`: some rows may not attend some keys. `dq`: dq is summed, by atomics; `ordered`:
    these in one order.

    A softcap shares the code of a band, as in the forward kernel.
    """

    dtype: torch.dtype
    head_dim: int
    banded: bool
    dq: bool
    softcap: bool = False
    ordered: bool = False

    @property
    def shares_tiles(self) -> bool:
        """Whether blocks may share a tile of keys, whose dk and dv they then sum by atomics as dq.

        At head dim 64 a launch has twice as many tiles, so that the last of them cost half as much.
        """
        return self.dq and not self.ordered and not self.banded and self.head_dim == 128

    @property
    def own_last(self) -> bool:
        """Whether the last query block of a tile has a step of its own. It takes registers, which only this form can spare."""
        return self.head_dim == 64 and not self.banded and not self.ordered and self.dtype == torch.float16

    @property
    def name(self) -> str:
        """A short readable id."""
        band = band_name(self.banded, self.softcap)
        gradients = "ordered" if self.ordered else "fused" if self.dq else "dkdv"
        return f"{TYPE_NAMES[self.dtype]}-d{self.head_dim}-{band}-{gradients}"

    @classmethod
    def of(cls, spec: BackwardSpec, *, fused: bool) -> MainFeatures:
        call = spec.call
        head_dim, _ = padded_head_dims(HEAD_DIMS, call.head_dim, call.head_dim_v)
        return cls(call.dtype, head_dim, needs_band(call), fused, call.softcap != 0, fused and spec.deterministic)


def padded_rows(seqlen_q: int) -> int:
    """Rows a head that row_lse, delta and dq_sum have."""
    return -(-seqlen_q // ROW_PADDING) * ROW_PADDING


def attended_queries(call: AttentionSpec) -> tuple[int, int]:
    """[first, last) of the rows that may attend some key by their position; first >= last where there are none."""
    first = 0 if call.band.hi is None else max(0, -call.band.hi)
    last = call.seqlen_q if call.band.lo is None else min(call.seqlen_q, call.seqlen_k - call.band.lo)
    return first, last


def specialise(features: MainFeatures) -> Specialisation:
    """The binary for these features."""
    element = TYPE_NAMES[features.dtype]
    consumer_registers, producer_registers = REGISTERS
    rows = {"q": BLOCK_ROWS[features.head_dim], "do": BLOCK_ROWS[features.head_dim]}
    maps = [*_MAPS, *(["dq"] if features.dq else [])]
    parameters = [
        Parameter(f"{tensor}_map", f"tensormap<{element}[1,1,{rows.get(tensor, WARPGROUP_KEYS)},{features.head_dim}]>")
        for tensor in maps
    ]
    parameters += [Parameter(f"{tensor}_ptr", "*fp32", 16) for tensor in ("row_lse", "delta", "dq_sum")]
    if features.shares_tiles:
        parameters.append(Parameter("dkv_sum_ptr", "*fp32", 16))
    parameters.append(Parameter("progress_ptr", "*i32", 16))
    parameters += [Parameter(name, "i32") for name in INTEGERS]
    factors, constants = factor_parameters(softcap=features.softcap)
    if features.dq:
        parameters += [Parameter(name, "i32") for name in ROUNDING]
    else:
        constants |= dict.fromkeys(("dq_map", *ROUNDING))
    if features.shares_tiles:
        parameters += [Parameter(name, "i32") for name in SHARING]
    else:
        constants |= dict.fromkeys(("dkv_sum_ptr", *SHARING))
    parameters += factors
    constants |= {
        "OWN_LAST": features.own_last,
        "SHARE_TILES": features.shares_tiles,
        "SLOTS": SLOTS,
        "DQ": features.dq,
        "ORDERED": features.ordered,
        "HAS_LO": features.banded,
        "HAS_HI": features.banded,
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
    }
    return Specialisation(
        kernel=KERNEL,
        name=f"{KERNEL}-{features.name}",
        parameters=tuple(parameters),
        constants=tuple(sorted(constants.items())),
        num_warps=4,
        num_stages=1,
    )


def tensor_maps(spec: BackwardSpec) -> dict[TensorName, TensorMap]:
    """What a kernel of dk and dv sees of each tensor: of queries and keys those that take part in anything."""
    call = spec.call
    first_query, last_query = attended_queries(call)
    first_key, last_key = call.attended_keys
    queries = (call.batch, call.heads_q, last_query - first_query)
    keys = (call.batch, call.heads_k, last_key - first_key)
    all_keys = (call.batch, call.heads_k, call.seqlen_k)
    return {
        "q": TensorMap("q", (*queries, call.head_dim), (*call.q_strides, 1), first_query * call.q_strides[2]),
        "do": TensorMap("do", (*queries, call.head_dim_v), (*spec.do_strides, 1), first_query * spec.do_strides[2]),
        "k": TensorMap("k", (*keys, call.head_dim), (*call.k_strides, 1), first_key * call.k_strides[2]),
        "v": TensorMap("v", (*keys, call.head_dim_v), (*call.v_strides, 1), first_key * call.v_strides[2]),
        "dk": TensorMap("dk", (*all_keys, call.head_dim), (*spec.dk_strides, 1)),
        "dv": TensorMap("dv", (*all_keys, call.head_dim_v), (*spec.dv_strides, 1)),
    }


def integers(spec: BackwardSpec, block_rows: int, group: int = 1) -> tuple[int, ...]:
    """INTEGERS of a kernel of dk and dv, whose query blocks have so many rows."""
    call = spec.call
    return (
        call.batch * call.heads_k,
        call.heads_k,
        call.heads_q // call.heads_k,
        call.seqlen_q,
        call.seqlen_k,
        padded_rows(call.seqlen_q) // block_rows,
        attended_queries(call)[0],
        call.attended_keys[0],
        *_band_of_a_key(call),
        group,
    )


def group_heads(call: AttentionSpec, features: MainFeatures, sm_count: int) -> int:
    """Heads of keys whose tiles are taken together; one where all tiles are as long and none waits for another of its head."""
    if not features.banded and not features.ordered:
        return 1
    heads, heads_per_kv = call.batch * call.heads_k, call.heads_q // call.heads_k
    bytes_of_row = heads_per_kv * ((call.head_dim + call.head_dim_v) * call.dtype.itemsize + call.head_dim * 4)
    if features.ordered:
        # in a group of n heads a tile is n / sm_count of a tile's length ahead of the next
        fit = math.isqrt(int(TRAIL_BYTES[features.banded] * sm_count / (_rows_of_a_key(call) * bytes_of_row)))
    else:
        fit = GROUP_BYTES // (call.seqlen_q * bytes_of_row)
    # every block has a tile of a group, because the last group begins with long tiles
    least = -(-sm_count // key_tiles(call))
    return -(-heads // max(1, heads // max(fit, least)))


def _rows_of_a_key(call: AttentionSpec) -> float:
    """Query rows of one head that a key takes part in, on average; at least one."""
    lo, hi = _band_of_a_key(call)
    keys = range(0, call.seqlen_k, -(-call.seqlen_k // SAMPLED_KEYS))
    rows = (max(0, min(call.seqlen_q, key + hi + 1) - max(0, key + lo)) for key in keys)
    return max(1, sum(rows) / len(keys))


def _band_of_a_key(call: AttentionSpec) -> tuple[int, int]:
    """(lo, hi): key j is attended by rows j + lo to j + hi; limits that exclude nothing, where there are none."""
    band = call.band
    lo = -call.seqlen_k if band.hi is None else max(-call.seqlen_k, -band.hi)
    return lo, call.seqlen_q if band.lo is None else min(call.seqlen_q, -band.lo)


def key_tiles(call: AttentionSpec) -> int:
    """Tiles of a head's keys."""
    return -(-call.seqlen_k // BLOCK_KEYS)


def shared_tiles(spec: BackwardSpec, sm_count: int) -> tuple[int, int]:
    """(tiles, sharers): how many tiles blocks share, the last, so that all end at about the same time, and how many a tile."""
    call, features = spec.call, MainFeatures.of(spec, fused=True)
    last = key_tiles(call) * call.batch * call.heads_k % sm_count
    if not features.shares_tiles or last == 0:
        return 0, 1
    most = min(-(-call.seqlen_q // BLOCK_ROWS[features.head_dim]) // MIN_SHARED_BLOCKS, MAX_SHARERS)
    # Blocks come to the last tiles one after another: what all of them do takes last / sm_count of a tile's time, and the end
    # finds them in the middle of a part.
    length = {sharers: last / sm_count + 0.5 / sharers for sharers in range(2, most + 1)} | {1: 1.0}
    sharers = min(length, key=length.__getitem__)
    return (last, sharers) if sharers > 1 else (0, 1)


def launch(spec: BackwardSpec, sm_count: int, *, fused: bool) -> Launch:
    """The launch of a pass: dk and dv, and sums of dq where it is fused. One block a multiprocessor, at most one a tile."""
    call, features = spec.call, MainFeatures.of(spec, fused=fused)
    group = group_heads(call, features, sm_count)
    items = key_tiles(call) * call.batch * call.heads_k
    maps = list(tensor_maps(spec).values())
    pointers: list[TensorName] = ["row_lse", "delta", "dq_sum"]
    work: list[int] = []
    if fused:
        maps.append(TensorMap("dq", (call.batch, call.heads_q, call.seqlen_q, call.head_dim), (*spec.dq_strides, 1)))
        pairs = call.heads_q // call.heads_k * padded_rows(call.seqlen_q) // ROW_PADDING
        # Which rows to round after a tile is decided before it begins, when those of the blocks' tiles before it are reported.
        work += [2 * sm_count + (group + 1) * key_tiles(call), -(-pairs // key_tiles(call))]
    if features.shares_tiles:
        shared, sharers = shared_tiles(spec, sm_count)
        pointers.append("dkv_sum")
        work += [shared, sharers]
        items += shared * (sharers - 1)
    arguments: tuple[Argument, ...] = (
        *maps,
        *(Pointer(name) for name in (*pointers, "progress")),
        *integers(spec, BLOCK_ROWS[features.head_dim], group),
        *work,
        *factor_arguments(call),
    )
    return Launch(specialise(features), min(sm_count, items), arguments)
