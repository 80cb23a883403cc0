"""The shapes that are measured: one frozen value, the way it is written on a command line, and the named grids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from flashcore.errors import ArgumentValueError

if TYPE_CHECKING:
    import torch

MaskKind = Literal["none", "bool", "additive"]
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
SHAPE_FORM = "B,H,S,D with H as Hq/Hk, S as Sq/Sk and D as D/Dv where the two differ"


@dataclass(frozen=True)
class Shape:
    """One attention problem: q (B, heads_q, seqlen_q, head_dim), k and v (B, heads_k, seqlen_k, head_dim / head_dim_v).

    `causal` is aligned bottom-right: row i attends keys 0 .. i + seqlen_k - seqlen_q. The scale is 1 / sqrt(head_dim).
    Raises ArgumentValueError for sizes below 1, head counts that do not divide, and an unknown dtype.
    """

    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    dtype: str = "fp16"
    # a random mask (B, 1, Sq, Sk), bool or in the inputs' dtype
    mask: MaskKind = "none"

    def __post_init__(self) -> None:
        sizes = (self.batch, self.heads_q, self.heads_k, self.seqlen_q, self.seqlen_k, self.head_dim, self.head_dim_v)
        if min(sizes) < 1:
            raise ArgumentValueError(f"shape: every size must be at least 1, got {self.label}; allowed: {SHAPE_FORM}")
        if self.heads_q % self.heads_k:
            raise ArgumentValueError(
                f"shape: {self.heads_q} query heads on {self.heads_k} key heads; allowed: a multiple, in {SHAPE_FORM}"
            )
        if self.dtype not in DTYPES:
            raise ArgumentValueError(f"dtype: {self.dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
        if self.mask not in get_args(MaskKind):
            raise ArgumentValueError(f"mask: {self.mask!r} is unknown; allowed: {', '.join(get_args(MaskKind))}")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    @property
    def score_elements(self) -> int:
        """Elements of the full score matrix, B x Hq x Sq x Sk: what an unfused implementation writes to memory."""
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen_k

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k, v and the mask."""
        keys = self.batch * self.heads_k * self.seqlen_k * (self.head_dim + self.head_dim_v)
        mask_size = {"none": 0, "bool": 1, "additive": self.itemsize}[self.mask]
        mask = self.batch * self.seqlen_q * self.seqlen_k * mask_size
        return (self.batch * self.heads_q * self.seqlen_q * self.head_dim + keys) * self.itemsize + mask

    @property
    def output_bytes(self) -> int:
        return self.batch * self.heads_q * self.seqlen_q * self.head_dim_v * self.itemsize

    @property
    def label(self) -> str:
        """The shape as `--shape` reads it, followed by the dtype and, where it is so, `causal`."""
        sizes = ",".join(
            (
                str(self.batch),
                _pair_text(self.heads_q, self.heads_k),
                _pair_text(self.seqlen_q, self.seqlen_k),
                _pair_text(self.head_dim, self.head_dim_v),
            )
        )
        mask = "" if self.mask == "none" else f" {self.mask} mask"
        return f"{sizes} {self.dtype}{' causal' if self.causal else ''}{mask}"


def _pair_text(first: int, second: int) -> str:
    return str(first) if first == second else f"{first}/{second}"


def _plain(batch: int, heads: int, seqlen: int, head_dim: int, *, causal: bool = False, dtype: str = "fp16") -> Shape:
    return Shape(batch, heads, heads, seqlen, seqlen, head_dim, head_dim, causal, dtype)


def _fa_grid() -> tuple[Shape, ...]:
    """16k tokens and a hidden size of 2048 in every cell, as FlashAttention's own benchmarks have it."""
    return tuple(
        _plain(16384 // seqlen, 2048 // head_dim, seqlen, head_dim, causal=causal)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
    )


def _fa_backward_grid() -> tuple[Shape, ...]:
    """The same tokens and hidden size at the lengths that a backward pass is held to."""
    return tuple(shape for shape in _fa_grid() if shape.head_dim in (64, 128) and shape.seqlen_q in (1024, 4096, 16384))


def _train_grid() -> tuple[Shape, ...]:
    """Attention layers of models that many train; the planner looks for the nearest of them."""
    return (
        _plain(64, 6, 1024, 64, causal=True),  # nanoGPT's small model, as examples/train_gpt has it
        _plain(8, 12, 1024, 64, causal=True),  # GPT-2
        _plain(32, 12, 512, 64),  # BERT
        _plain(64, 12, 197, 64),  # ViT-B/16
        Shape(2, 32, 8, 2048, 2048, 128, 128, causal=True),  # Llama 3 8B
        Shape(1, 32, 32, 4096, 4096, 192, 128, causal=True),  # DeepSeek-V3, a quarter of its heads
        Shape(2, 16, 8, 2048, 2048, 256, 256, causal=True),  # Gemma 2 9B
        _plain(4, 8, 4096, 256),
        _plain(1, 8, 512, 64),
    )


def _features_grid() -> tuple[Shape, ...]:
    """What the other grids leave out and the planner must know of: masks, head dims between the blocks, float32."""
    masked = tuple(
        replace(_plain(batch, 2048 // head_dim // 2, seqlen, head_dim), mask=mask)
        for head_dim in (64, 128, 256)
        for mask in ("bool", "additive")
        for batch, seqlen in ((1, 512), (4, 1024))
    )
    dims = tuple(
        _plain(batch, 16, seqlen, head_dim, causal=causal)
        for head_dim in (40, 80, 96, 192)
        for causal in (False, True)
        for batch, seqlen in ((1, 512), (4, 1024))
    )
    single = tuple(_plain(1, 8, 512, head_dim, dtype="fp32") for head_dim in (64, 128, 256))
    return masked + dims + single


# Where our kernels change places, head dim by head dim: (batch * heads, length) of too few tiles to fill a GPU, of about
# enough and of more. A call is planned by the nearest measured shape (evidence/__init__.py), and none of these sizes is far
# from one of them, of the grids small and fa included.
_CROSSOVER = {
    64: ((128, 64), (8, 128), (128, 128), (32, 256), (32, 512), (128, 512), (4, 1024), (32, 1024), (8, 2048)),
    128: ((128, 128), (8, 1024), (32, 1024)),
    32: ((8, 512), (128, 256)),
}


def _crossover_grid() -> tuple[Shape, ...]:
    return tuple(
        _plain(max(1, heads // 8), min(8, heads), seqlen, head_dim, causal=causal)
        for head_dim, places in _CROSSOVER.items()
        for causal in (False, True)
        for heads, seqlen in places
    )


NAMED_SHAPES: dict[str, Shape] = {
    "tiny": _plain(1, 1, 32, 64),
    "small": _plain(1, 2, 64, 64),
    "medium": _plain(1, 4, 128, 64),
    "mission": _plain(1, 8, 512, 64),
    "multi_batch": _plain(4, 8, 256, 64),
}

GRIDS: dict[str, tuple[Shape, ...]] = {
    "small": (
        _plain(1, 8, 512, 64),
        _plain(1, 8, 512, 64, causal=True),
        _plain(1, 12, 197, 64),
        _plain(4, 8, 128, 64),
        _plain(1, 16, 1024, 64),
        _plain(1, 32, 512, 128),
        _plain(32, 8, 512, 64),
    ),
    "fa": _fa_grid(),
    "fa-bwd": _fa_backward_grid(),
    "train": _train_grid(),
    "features": _features_grid(),
    "decode": tuple(
        Shape(batch, 32, 8, 1, seqlen_k, 128, 128, dtype="bf16")
        for batch, seqlen_k in ((1, 8192), (1, 65536), (16, 8192), (64, 4096))
    ),
    "crossover": _crossover_grid(),
}


def parse_shape(text: str) -> Shape:
    """A shape from `1,8,512,64`, `2,32/8,1/8192,128` or one of the names of `NAMED_SHAPES`; fp16, not causal.

    Raises ArgumentValueError that names the forms allowed.
    """
    if text in NAMED_SHAPES:
        return NAMED_SHAPES[text]
    fields = text.split(",")
    try:
        if len(fields) != 4:
            raise ValueError
        batch = int(fields[0])
        (heads_q, heads_k), (seqlen_q, seqlen_k), (head_dim, head_dim_v) = (_pair(field) for field in fields[1:])
    except ValueError:
        raise ArgumentValueError(
            f"shape: {text!r} cannot be read; allowed: {SHAPE_FORM} (such as 1,8,512,64 or 2,32/8,1/8192,128), "
            f"or one of {', '.join(NAMED_SHAPES)}"
        ) from None
    return Shape(batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v)


def _pair(field: str) -> tuple[int, int]:
    parts = [int(part) for part in field.split("/")]
    if len(parts) > 2:
        raise ValueError(field)
    return parts[0], parts[-1]


def grid(name: str) -> tuple[Shape, ...]:
    """The shapes of a named grid. Raises ArgumentValueError for an unknown name."""
    if name not in GRIDS:
        raise ArgumentValueError(f"grid: {name!r} is unknown; allowed: {', '.join(GRIDS)}")
    return GRIDS[name]


def override(shapes: tuple[Shape, ...], *, causal: bool, dtype: str | None, mask: str | None = None) -> tuple[Shape, ...]:
    """The shapes with the command line's causal, dtype and mask put in, each shape once, in order.

    `causal=False` leaves every shape as it is; True makes all of them causal. None leaves the dtype or the mask.
    Raises ArgumentValueError for an unknown dtype or mask.
    """
    # __post_init__ refuses a mask that is not one of its Literal
    changed = (
        replace(s, causal=s.causal or causal, dtype=dtype or s.dtype, mask=mask or s.mask)  # type: ignore[arg-type]
        for s in shapes
    )
    return tuple(dict.fromkeys(changed))
