"""What binds a call to a binary of the small forward kernel: constants, arguments, grid. Needs no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore import tuned
from flashcore.kernels.arguments import Argument, Pointer, TensorMap
from flashcore.kernels.hopper.requirements import ARCH, DTYPES, refused
from flashcore.kernels.small.config import (
    FORMS,
    HEAD_DIMS,
    ROWS,
    SmallConfig,
    capacity,
    choose_config,
    padded_head_dim,
)
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation
from flashcore.spec import AttentionSpec
from flashcore.target import SM_COUNTS

KERNEL = "small_forward"
IMPL = "small"
# With more blocks than an H200 takes in two rounds, the Hopper kernel, which shares keys between more rows, is ahead
# (docs/notes/small-forward.md). Below, measurements decide.
MAX_ROUNDS = 2
_FACTOR = 2**30


@dataclass(frozen=True, slots=True)
class Features:
    """What a call needs compiled in."""

    dtype: torch.dtype
    head_dim: int
    causal: bool

    @classmethod
    def of(cls, spec: AttentionSpec) -> Features:
        return cls(spec.dtype, padded_head_dim(max(spec.head_dim, spec.head_dim_v)), spec.band.hi is not None)

    @property
    def name(self) -> str:
        """A short readable id."""
        return f"{TYPE_NAMES[self.dtype]}-{self.untyped}"

    @property
    def untyped(self) -> str:
        """`name` without the dtype, which no form depends on."""
        return f"d{self.head_dim}-{'causal' if self.causal else 'none'}"


def reject(spec: AttentionSpec, arch: str | None, interpreted: bool) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    refusal = refused(spec, arch, interpreted)
    if refusal is not None:
        return refusal
    if spec.band.lo is not None or spec.softcap != 0:
        return "takes no window to the left and no softcap"
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > HEAD_DIMS[-1]:
        return f"takes head dims up to {HEAD_DIMS[-1]}; got {widest}"
    head_dim, keys = padded_head_dim(widest), spec.attended_keys[1]
    if keys > capacity(head_dim):
        return f"takes at most {capacity(head_dim)} keys at head dim {head_dim}; got {keys} that some row attends"
    return refused_by(choose_config(head_dim, keys), spec)


def refused_by(config: SmallConfig, spec: AttentionSpec) -> str | None:
    """Why a call that the kernel takes cannot be run in this form, or None when it can."""
    head_dim, keys = padded_head_dim(max(spec.head_dim, spec.head_dim_v)), spec.attended_keys[1]
    if keys > config.capacity:
        return f"{config.name} takes at most {config.capacity} keys; got {keys} that some row attends"
    blocks, most = config.cluster * _tiles(spec), max_blocks(config, head_dim)
    if blocks > most:
        return f"takes at most {most} blocks for so many keys at head dim {head_dim}; got {blocks} for tiles of {ROWS} rows"
    return None


def max_blocks(config: SmallConfig, head_dim: int) -> int:
    """The most blocks that a call may take in this form."""
    return MAX_ROUNDS * SM_COUNTS[ARCH] * config.resident(head_dim)


def _tiles(spec: AttentionSpec) -> int:
    return -(-spec.seqlen_q // ROWS) * spec.batch * spec.heads_q


def specialise(features: Features, config: SmallConfig) -> Specialisation:
    """The binary for these features in this form.

    Raises:
        ValueError: the form does not fit the GPU.
    """
    if not config.fits(features.head_dim):
        raise ValueError(f"{config.name} does not fit head dim {features.head_dim}")
    element = TYPE_NAMES[features.dtype]
    parameters = [
        Parameter(f"{tensor}_map", f"tensormap<{element}[1,1,{rows},{features.head_dim}]>")
        for tensor, rows in (("q", ROWS), ("k", config.block_n), ("v", config.block_n))
    ]
    parameters += [Parameter("o_ptr", f"*{element}", 16), Parameter("lse_ptr", "*fp32")]
    integers = ("tiles_factor", "tiles", "heads_factor", "heads_q", "group_factor", "seqlen_q", "seqlen_k", "band_hi")
    parameters += [Parameter(name, "i32") for name in integers]
    parameters += [Parameter("head_dim_v", "i32", 8)]
    parameters += [Parameter(f"o_stride_{dimension}", "i64", 8) for dimension in "bhs"]
    parameters += [Parameter("scale", "fp32"), Parameter("store_lse", "i32")]
    return Specialisation(
        kernel=KERNEL,
        name=f"{KERNEL}-{features.name}-{config.name}",
        parameters=tuple(parameters),
        constants=(("CLUSTER", config.cluster), ("HAS_HI", features.causal), ("KEYS", config.keys)),
        num_warps=4,
        num_stages=1,
        cluster=config.cluster,
    )


def hand_chosen(spec: AttentionSpec, arch: str, sm_count: int) -> SmallConfig:
    """The form that the table in config.py has for a call."""
    return choose_config(Features.of(spec).head_dim, spec.attended_keys[1])


def specialise_call(spec: AttentionSpec, arch: str, sm_count: int) -> Specialisation:
    """The binary that a call on a GPU runs."""
    return specialise(Features.of(spec), tuned.config(IMPL, spec, arch, sm_count) or hand_chosen(spec, arch, sm_count))


def features(spec: AttentionSpec) -> str:
    """What forms are tuned for: the features of a call without its dtype."""
    return Features.of(spec).untyped


def grid(spec: AttentionSpec, specialisation: Specialisation, sm_count: int) -> int:
    """Number of blocks of a call: a cluster for each tile."""
    return specialisation.cluster * _tiles(spec)


def arguments(spec: AttentionSpec, specialisation: Specialisation) -> tuple[Argument, ...]:
    """What fills the kernel's parameters, in their order."""
    keys = spec.attended_keys[1]
    of_keys = (spec.batch, spec.heads_k, keys)
    tiles = max(1, -(-spec.seqlen_q // ROWS))
    return (
        TensorMap("q", (spec.batch, spec.heads_q, spec.seqlen_q, spec.head_dim), (*spec.q_strides, 1)),
        TensorMap("k", (*of_keys, spec.head_dim), (*spec.k_strides, 1)),
        TensorMap("v", (*of_keys, spec.head_dim_v), (*spec.v_strides, 1)),
        Pointer("o"),
        Pointer("lse"),
        _factor(tiles),
        tiles,
        _factor(spec.heads_q),
        spec.heads_q,
        _factor(spec.heads_q // spec.heads_k),
        spec.seqlen_q,
        keys,
        # a limit that excludes nothing, where there is none
        keys if spec.band.hi is None else min(keys, spec.band.hi),
        spec.head_dim_v,
        *spec.o_strides,
        spec.scale * math.log2(math.e),
        int(spec.return_lse),
    )


def _factor(divisor: int) -> int:
    """What the kernel divides by a divisor with: n * factor / 2^30, exact for n * divisor < 2^30: far beyond a call's."""
    return -(-_FACTOR // divisor)


def needs_counter(spec: AttentionSpec, specialisation: Specialisation, grid: int) -> bool:
    """Each block knows its tile."""
    return False


def matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """wgmma, always."""
    return "HGMMA"


def shipped(arch: str) -> tuple[Specialisation, ...]:
    """The specialisations that a wheel holds for an arch: every form of every head dim."""
    if arch != ARCH:
        return ()
    found = [Features(dtype, head_dim, causal) for dtype in DTYPES for head_dim in HEAD_DIMS for causal in (False, True)]
    return tuple(
        dict.fromkeys(
            specialise(one, config)
            for one in found
            for config in (*FORMS[one.head_dim], *tuned.configs(IMPL, one.untyped, one.dtype, arch))
        )
    )
