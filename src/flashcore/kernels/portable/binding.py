"""What binds a call to a binary of the portable forward kernel: constants, arguments, grid. Needs no compiler.

A `Binding`, as kernels/binding.py describes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from flashcore import tuned
from flashcore.kernels.arguments import Argument, Pointer
from flashcore.kernels.portable.config import PortableConfig
from flashcore.kernels.portable.tuning import Kind, choose_config, configurations
from flashcore.kernels.specialisation import TYPE_NAMES, Parameter, Specialisation
from flashcore.spec import AttentionSpec

KERNEL = "portable_forward"
IMPL = "portable"
POINTERS = tuple(Pointer(name) for name in ("q", "k", "v", "mask", "o", "lse"))
STRIDES = tuple(
    f"stride_{t}{d}" for t, dims in (("q", "bhs"), ("k", "bhs"), ("v", "bhs"), ("m", "bhqk"), ("o", "bhs")) for d in dims
)
INTEGERS = ("heads_q", "heads_per_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "band_lo", "band_hi")
FLOATS = ("scale", "softcap")

# Wider than any difference of two positions, and far enough from 2^31 that adding a row index cannot overflow.
UNLIMITED = 2**30

BandKind = Literal["none", "causal", "window"]
MaskKind = Literal["none", "bool", "additive"]


@dataclass(frozen=True, slots=True)
class Features:
    """What a call needs compiled in, reduced to few combinations so that a small shipped set covers most calls."""

    dtype: torch.dtype
    block_d: int
    partial_d: bool
    band: BandKind
    mask: MaskKind
    mask_dtype: torch.dtype | None
    softcap: bool
    fold_scale: bool
    aligned: bool
    precision: str

    @classmethod
    def of(cls, spec: AttentionSpec) -> Features:
        """The features of a call. Only calls in the plainest form get code of their own for each band; the others share
        the most general band, whose empty loops cost them little."""
        widest = max(spec.head_dim, spec.head_dim_v)
        block_d = max(64, 1 << (widest - 1).bit_length())
        plain = spec.mask is None and spec.softcap == 0 and spec.scale > 0
        exact = spec.head_dim == spec.head_dim_v == block_d and spec.aligned
        band: BandKind = "window"
        if plain and exact and spec.dtype != torch.float32 and spec.band.lo is None:
            band = "none" if spec.band.hi is None else "causal"
        return cls(
            dtype=spec.dtype,
            block_d=block_d,
            partial_d=not (plain and exact and spec.dtype != torch.float32),
            band=band,
            mask="none" if spec.mask is None else spec.mask.kind,
            mask_dtype=None if spec.mask is None else spec.mask.dtype,
            softcap=spec.softcap != 0,
            fold_scale=plain and spec.dtype != torch.float32,
            aligned=spec.aligned,
            precision="tf32" if spec.allow_tf32 else "ieee",
        )

    @property
    def kind(self) -> Kind:
        """The row of the tuning table."""
        if self.dtype == torch.float32:
            return "fp32"
        if self.mask != "none":
            return "mask"
        if self.partial_d or not self.fold_scale:
            return "general"
        return "plain" if self.band == "none" else self.band

    @property
    def name(self) -> str:
        """A short readable id; what is usual is left out."""
        parts = [TYPE_NAMES[self.dtype], f"d{self.block_d}" + ("partial" if self.partial_d else ""), self.band]
        if self.mask_dtype is not None:
            parts.append("maskbool" if self.mask == "bool" else f"mask{TYPE_NAMES[self.mask_dtype]}")
        if self.softcap:
            parts.append("softcap")
        elif not self.fold_scale and self.mask == "none" and self.dtype != torch.float32:
            parts.append("anyscale")
        if not self.aligned:
            parts.append("unaligned")
        if self.precision != "ieee":
            parts.append(self.precision)
        return "-".join(parts)

    @property
    def untyped(self) -> str:
        """`name` without the dtype, and without the mask's where that is the same: both half dtypes take the same tiles."""
        dtype = TYPE_NAMES[self.dtype]
        return self.name.removeprefix(f"{dtype}-").replace(f"mask{dtype}", "maskadd")


def reject(spec: AttentionSpec, arch: str | None, interpreted: bool) -> str | None:
    """Why this kernel cannot run a call on a device, or None when it can."""
    if arch is None and not interpreted:
        return f"needs an NVIDIA GPU of sm_80 to sm_121, or TRITON_INTERPRET=1 on a CPU; got device {spec.device}"
    if not spec.contiguous_last:
        return "needs stride 1 in the last dimension of q, k and v; call .contiguous() first"
    return None


def specialise(features: Features, config: PortableConfig) -> Specialisation:
    """The binary for these features and this tile configuration."""
    vector = 16 // features.dtype.itemsize if features.aligned else 1
    element = TYPE_NAMES[features.dtype]
    mask_element = "u8" if features.mask == "bool" else TYPE_NAMES[features.mask_dtype or features.dtype]
    pointer_types = {"mask": f"*{mask_element}", "lse": "*fp32"}
    parameters = [
        Parameter(
            f"{pointer.tensor}_ptr",
            pointer_types.get(pointer.tensor, f"*{element}"),
            16 if features.aligned and pointer.tensor != "mask" else 1,
        )
        for pointer in POINTERS
    ]
    parameters += [Parameter(name, "i64", 1 if name.startswith("stride_m") else vector) for name in STRIDES]
    parameters += [Parameter(name, "i32", vector if name.startswith("head_dim") else 1) for name in INTEGERS]
    parameters += [Parameter(name, "fp32") for name in FLOATS]
    parameters += [Parameter("store_lse", "i32")]
    constants: tuple[tuple[str, int | bool | str], ...] = (
        ("BLOCK_M", config.block_m),
        ("BLOCK_N", config.block_n),
        ("BLOCK_D", features.block_d),
        ("BLOCK_DV", features.block_d),
        ("CHUNK_D", 16 if features.dtype == torch.float32 else 0),
        ("PARTIAL_D", features.partial_d),
        ("HAS_LO", features.band == "window"),
        ("HAS_HI", features.band != "none"),
        ("MASK", features.mask),
        ("SOFTCAP", features.softcap),
        ("FOLD_SCALE", features.fold_scale),
        ("PRECISION", features.precision),
        ("STAGES", config.num_stages),
        ("EDGE_STAGES", config.edge_stages),
    )
    return Specialisation(
        kernel=KERNEL,
        name=f"{KERNEL}-{features.name}-{config.name}",
        parameters=tuple(parameters),
        constants=tuple(sorted(constants)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def hand_chosen(spec: AttentionSpec, arch: str, sm_count: int) -> PortableConfig:
    """The tiles that the table in tuning.py has for a call."""
    features = Features.of(spec)
    rows = spec.batch * spec.heads_q * spec.seqlen_q
    return choose_config(features.kind, features.block_d, arch, rows, sm_count)


def specialise_call(spec: AttentionSpec, arch: str, sm_count: int) -> Specialisation:
    """The binary that a call on a GPU runs."""
    return specialise(Features.of(spec), tuned.config(IMPL, spec, arch, sm_count) or hand_chosen(spec, arch, sm_count))


def features(spec: AttentionSpec) -> str:
    """What tiles are tuned for: the features of a call without its dtype."""
    return Features.of(spec).untyped


def grid(spec: AttentionSpec, specialisation: Specialisation, sm_count: int) -> int:
    """Number of programs of a call: one for each BLOCK_M rows of each head, whatever the GPU's size."""
    block_m = dict(specialisation.constants)["BLOCK_M"]
    assert isinstance(block_m, int)
    return -(-spec.seqlen_q // block_m) * spec.batch * spec.heads_q


def arguments(spec: AttentionSpec, specialisation: Specialisation) -> tuple[Argument, ...]:
    """What fills the kernel's parameters, in their order."""
    fold_scale = dict(specialisation.constants)["FOLD_SCALE"]
    mask_strides = (0, 0, 0, 0) if spec.mask is None else spec.mask.strides
    return (
        *POINTERS,
        *spec.q_strides,
        *spec.k_strides,
        *spec.v_strides,
        *mask_strides,
        *spec.o_strides,
        spec.heads_q,
        spec.heads_q // spec.heads_k,
        spec.seqlen_q,
        spec.seqlen_k,
        spec.head_dim,
        spec.head_dim_v,
        -UNLIMITED if spec.band.lo is None else max(-UNLIMITED, spec.band.lo),
        UNLIMITED if spec.band.hi is None else min(UNLIMITED, spec.band.hi),
        spec.scale * math.log2(math.e) if fold_scale else spec.scale,
        spec.softcap,
        int(spec.return_lse),
    )


def needs_counter(spec: AttentionSpec, specialisation: Specialisation, grid: int) -> bool:
    """Never: a program does its own tile and no other."""
    return False


def matrix_instruction(specialisation: Specialisation, arch: str) -> str | None:
    """The matrix instruction that a binary must hold; None where it is meant to hold none."""
    constants = dict(specialisation.constants)
    element = next(p.type for p in specialisation.parameters if p.name == "q_ptr")
    if element == "*fp32" and constants["PRECISION"] == "ieee":
        return None  # float32 means float32: no matrix unit computes that
    # wgmma and tcgen05 work on 64 rows and four warps; smaller tiles are mma.sync's
    block_m = constants["BLOCK_M"]
    assert isinstance(block_m, int)
    whole_warpgroup = block_m >= 64 and specialisation.num_warps >= 4
    if arch == "sm_90a" and whole_warpgroup:
        return "HGMMA"
    if arch in ("sm_100a", "sm_103a") and whole_warpgroup:
        return "UTCHMMA"
    return "HMMA"


def shipped(arch: str) -> tuple[Specialisation, ...]:
    """The specialisations that a wheel holds for an arch; every other one is compiled on demand."""
    half = (torch.float16, torch.bfloat16)
    block_dims = (64, 128, 256)
    core = Features(torch.float16, 64, False, "none", "none", None, False, True, True, "ieee")
    found = [
        replace(core, dtype=dtype, block_d=block_d, band=band)
        for dtype in half
        for block_d in block_dims
        for band in ("none", "causal", "window")
    ]
    general = replace(core, partial_d=True, band="window")
    for block_d in block_dims:
        for dtype in half:
            partial = replace(general, dtype=dtype, block_d=block_d)
            found += [
                partial,
                replace(partial, softcap=True, fold_scale=False),
                replace(partial, mask="bool", mask_dtype=torch.bool, fold_scale=False),
                replace(partial, mask="additive", mask_dtype=dtype, fold_scale=False),
            ]
        found.append(replace(general, dtype=torch.float32, block_d=block_d, fold_scale=False))
    return tuple(
        dict.fromkeys(
            specialise(one, config)
            for one in found
            for config in (*configurations(one.kind, one.block_d, arch), *tuned.configs(IMPL, one.untyped, one.dtype, arch))
        )
    )
