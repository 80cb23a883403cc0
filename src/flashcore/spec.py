"""AttentionSpec: what a call asks for. The only validation of inputs, and the only place where defaults are resolved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from flashcore.errors import ArgumentTypeError, ArgumentValueError
from flashcore.memory_order import dense_strides

Layout = Literal["bshd", "bhsd"]
LAYOUTS: tuple[str, ...] = ("bshd", "bhsd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# Kernels take factors as float32, some of them multiplied by log2(e).
MAX_FACTOR = 1e38
_UNDER = f"under {MAX_FACTOR:g}"  # made here, because Dynamo formats no global float
# Row and key indices, and their distances, are 32-bit in the kernels.
MAX_SEQLEN = 2**30


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of a call that are not tensors, checked and with the scale still open (it needs the head dim)."""

    causal: bool
    scale: float | None
    window: tuple[int, int]
    softcap: float
    layout: Layout
    # Row i is aligned with key i (SDPA) instead of the last row with the last key (FlashAttention).
    top_left: bool = False
    # gradients are to be bitwise equal from run to run
    deterministic: bool = False

    @classmethod
    def check(
        cls,
        *,
        causal: bool,
        scale: float | None,
        window: Sequence[int] | None,
        softcap: float,
        layout: str,
        top_left: bool = False,
        deterministic: bool | None = None,
    ) -> Options:
        """Check the arguments that need no tensor.

        Args:
            deterministic: None is what torch.use_deterministic_algorithms says now.

        Raises:
            ArgumentTypeError: causal not a bool, scale or softcap not a real number, window not a pair of ints, deterministic
                neither a bool nor None.
            ArgumentValueError: NaN or infinite scale, negative, NaN or infinite softcap, window under -1, unknown layout.
        """
        if not isinstance(causal, bool):
            name = "is_causal" if top_left else "causal"
            raise ArgumentTypeError(f"{name}: got {shown(causal)} of type {type(causal).__name__}; allowed: True or False")
        if layout not in LAYOUTS:
            raise ArgumentValueError(f"layout: got {layout!r}; allowed: {' or '.join(map(repr, LAYOUTS))}")
        if scale is not None:
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise ArgumentTypeError(f"scale: got {shown(scale)} of type {type(scale).__name__}; allowed: None or a number")
            # against inf first: Dynamo traces no math.isfinite of a dynamic float, and no comparison of NaN with another number
            if not abs(scale) < math.inf or abs(scale) >= MAX_FACTOR:
                raise ArgumentValueError(f"scale: got {shown(scale)}; allowed: None or a finite number {_UNDER}")
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise ArgumentTypeError(f"softcap: got {shown(softcap)} of type {type(softcap).__name__}; allowed: a number >= 0")
        if not 0 <= softcap < math.inf or softcap >= MAX_FACTOR:
            allowed = f"allowed: a finite number >= 0 (0 means no cap) {_UNDER}"
            raise ArgumentValueError(f"softcap: got {shown(softcap)}; {allowed}")
        if deterministic is not None and not isinstance(deterministic, bool):
            got = f"got {shown(deterministic)} of type {type(deterministic).__name__}"
            raise ArgumentTypeError(f"deterministic: {got}; allowed: None, True or False")
        return cls(
            causal=causal,
            scale=None if scale is None else float(scale),
            window=_check_window(window),
            softcap=float(softcap),
            layout=layout,  # type: ignore[arg-type]  # membership in LAYOUTS was checked above
            top_left=top_left,
            deterministic=torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        )


def _check_window(window: Sequence[int] | None) -> tuple[int, int]:
    allowed = "allowed: None or (left, right), each an int >= -1, where -1 means unlimited"
    if window is None:
        return (-1, -1)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ArgumentTypeError(f"window: got {shown(window)}; {allowed}")
    for side in window:
        if isinstance(side, bool) or not isinstance(side, int):
            raise ArgumentTypeError(f"window: got {shown(window)}; {allowed}")
        if side < -1:
            raise ArgumentValueError(f"window: got {shown(window)}; {allowed}")
    return (window[0], window[1])


@dataclass(frozen=True, slots=True)
class Band:
    """Which keys a row may attend by position: row i attends key j iff i + lo <= j <= i + hi. None: no limit."""

    lo: int | None
    hi: int | None

    @classmethod
    def of(cls, options: Options, seqlen_q: int, seqlen_k: int) -> Band:
        """Turn causal, window and alignment into a band; a limit that excludes nothing becomes None."""
        left, right = options.window
        if options.causal:
            right = 0  # a wider right side would look into the future; causal caps it
        offset = 0 if options.top_left else seqlen_k - seqlen_q
        lo = None if left == -1 else offset - left
        hi = None if right == -1 else offset + right
        if lo is not None and lo + seqlen_q - 1 <= 0:
            lo = None
        if hi is not None and hi >= seqlen_k - 1:
            hi = None
        return cls(lo, hi)


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A mask broadcast to (B, Hq, Sq, Sk): strides in elements, 0 along broadcast dimensions."""

    kind: Literal["bool", "additive"]
    dtype: torch.dtype
    strides: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """All that planning needs to know of a call: shapes, strides (as bhs_strides has them), dtypes and options."""

    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    q_strides: tuple[int, int, int]
    k_strides: tuple[int, int, int]
    v_strides: tuple[int, int, int]
    contiguous_last: bool
    # Every pointer and stride allows 16-byte loads.
    aligned: bool
    scale: float
    band: Band
    # The band is the plain causal one, aligned as SDPA's is_causal would align it.
    square_causal: bool
    softcap: float
    mask: MaskSpec | None
    return_lse: bool
    # The user told torch that float32 products may be rounded to TF32.
    allow_tf32: bool

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(B, S, H, Dv) or (B, H, S, Dv), as the layout says."""
        if self.layout == "bshd":
            return (self.batch, self.seqlen_q, self.heads_q, self.head_dim_v)
        return (self.batch, self.heads_q, self.seqlen_q, self.head_dim_v)

    @property
    def output_strides(self) -> tuple[int, int, int, int]:
        """The output's, in elements: dense, and in memory in the order of q."""
        return dense_strides(self.output_shape, in_layout(self.q_strides, self.layout))

    @property
    def o_strides(self) -> tuple[int, int, int]:
        """Those of the output's batch, head and sequence dimensions."""
        return in_layout(self.output_strides[:3], self.layout)

    @property
    def attended_keys(self) -> tuple[int, int]:
        """[first, last) of the keys that some row may attend by its position; first >= last where there are none."""
        first = 0 if self.band.lo is None else max(0, self.band.lo)
        last = self.seqlen_k if self.band.hi is None else min(self.seqlen_k, self.seqlen_q + self.band.hi)
        return first, last

    @property
    def lse_shape(self) -> tuple[int, int, int]:
        """(B, H, Sq) in both layouts."""
        return (self.batch, self.heads_q, self.seqlen_q)

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        options: Options,
        *,
        return_lse: bool,
    ) -> AttentionSpec:
        """Validate the tensors of a call.

        Raises:
            ArgumentTypeError: not tensors, mixed or unsupported dtypes.
            ArgumentValueError: rank, shape, head count, head dim, device or mask shape not allowed.
        """
        shape = check_tensors(q, k, v, attn_mask, options.layout, sdpa=options.top_left)
        batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v = shape
        strides = [bhs_strides(t, options.layout) for t in (q, k, v)]
        contiguous_last = all(t.stride(3) == 1 or t.shape[3] == 1 for t in (q, k, v))
        vector = 16 // q.element_size()
        aligned = all(t.data_ptr() % 16 == 0 for t in (q, k, v)) and all(
            number % vector == 0 for number in (head_dim, head_dim_v, *strides[0], *strides[1], *strides[2])
        )
        band = Band.of(options, seqlen_q, seqlen_k)
        return cls(
            batch=batch,
            heads_q=heads_q,
            heads_k=heads_k,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=q.dtype,
            device=q.device,
            layout=options.layout,
            q_strides=strides[0],
            k_strides=strides[1],
            v_strides=strides[2],
            contiguous_last=contiguous_last,
            aligned=aligned,
            scale=1.0 / math.sqrt(head_dim) if options.scale is None else options.scale,
            band=band,
            square_causal=band == Band(None, 0) and (options.top_left or seqlen_q == seqlen_k),
            softcap=options.softcap,
            mask=None if attn_mask is None else _mask_spec(attn_mask, (batch, heads_q, seqlen_q, seqlen_k)),
            return_lse=return_lse,
            allow_tf32=q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        )


def numbers(shape: Sequence[int]) -> str:
    """A shape as text."""
    return "(" + ", ".join([str(number(size)) for size in shape]) + ")"


def shown(value: object) -> str:
    """A value as an error message shows it: repr, but for numbers, which torch.compile may hold as symbols."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(number(value))
    if isinstance(value, float):
        return f"{float(value)}"
    if isinstance(value, tuple):
        return "(" + ", ".join([shown(part) for part in value]) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join([shown(part) for part in value]) + "]"
    return repr(value)


def needs_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    wanted = q.requires_grad or k.requires_grad or v.requires_grad or (attn_mask is not None and attn_mask.requires_grad)
    return wanted and torch.is_grad_enabled()


def number(size: int) -> int:
    """The size itself; while torch.compile traces, a symbolic size made concrete, which an error message needs."""
    return range(size).stop


def in_layout(three: tuple[int, int, int], layout: Layout) -> tuple[int, int, int]:
    """Numbers of the batch, head and sequence dimensions in the order of the layout's dimensions, or back."""
    batch, heads, rows = three
    return (batch, rows, heads) if layout == "bshd" else three


def bhs_strides(t: torch.Tensor, layout: Layout) -> tuple[int, int, int]:
    """Strides of the batch, head and sequence dimensions, in elements; 0 where there is one element or none.

    PyTorch lets such a stride be anything. Nothing is ever multiplied by it but 0, and it must not make a tensor unaligned.
    """
    b, first, second = (stride if size > 1 else 0 for size, stride in zip(t.shape[:3], t.stride()[:3], strict=True))
    return (b, second, first) if layout == "bshd" else (b, first, second)


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, layout: Layout, *, sdpa: bool = False
) -> tuple[int, int, int, int, int, int, int]:
    """Check everything about the tensors but their memory (so that it serves symbolic shapes as well).

    Args:
        sdpa: name them in errors as SDPA's signature does.

    Returns:
        (batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v)
    """
    nq, nk, nv = ("query", "key", "value") if sdpa else ("q", "k", "v")
    dims = "(B, S, H, D)" if layout == "bshd" else "(B, H, S, D)"
    for name, t in ((nq, q), (nk, k), (nv, v)):
        if not isinstance(t, torch.Tensor):
            raise ArgumentTypeError(f"{name}: got {type(t).__name__}; allowed: a torch.Tensor")
        if t.layout != torch.strided or t.is_nested:
            raise ArgumentTypeError(f"{name}: got a sparse or nested tensor; allowed: a dense (strided) one")
        if t.dim() != 4:
            raise ArgumentValueError(f"{name}: got rank {t.dim()}, shape {numbers(t.shape)}; allowed: rank 4, {dims}")
        if t.dtype not in DTYPES:
            raise ArgumentTypeError(f"{name}: got dtype {t.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    heads, seq = (2, 1) if layout == "bshd" else (1, 2)
    batch, heads_q, heads_k = q.shape[0], q.shape[heads], k.shape[heads]
    seqlen_q, seqlen_k, head_dim, head_dim_v = q.shape[seq], k.shape[seq], q.shape[3], v.shape[3]
    for name, t in ((nk, k), (nv, v)):
        if t.dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: got dtype {t.dtype} with {nq} of {q.dtype}; allowed: {nq}'s dtype")
        if t.device != q.device:
            raise ArgumentValueError(f"{name}: got device {t.device} with {nq} on {q.device}; allowed: {nq}'s device")
        if t.shape[0] != batch:
            got = f"got batch {number(t.shape[0])} with {nq} of {number(batch)}"
            raise ArgumentValueError(f"{name}: {got}; allowed: {nq}'s batch")
    if k.shape[3] != head_dim:
        got = f"got head dim {number(k.shape[3])} with {nq} of {number(head_dim)}"
        raise ArgumentValueError(f"{nk}: {got}; allowed: {nq}'s head dim")
    if v.shape[heads] != heads_k:
        got = f"got {number(v.shape[heads])} heads with {nk} of {number(heads_k)}"
        raise ArgumentValueError(f"{nv}: {got}; allowed: {nk}'s heads")
    if v.shape[seq] != seqlen_k:
        got = f"got length {number(v.shape[seq])} with {nk} of {number(seqlen_k)}"
        raise ArgumentValueError(f"{nv}: {got}; allowed: {nk}'s length")
    for name, d in ((nq, head_dim), (nv, head_dim_v)):
        if d < 1 or d > MAX_HEAD_DIM:
            raise ArgumentValueError(f"{name}: got head dim {number(d)}; allowed: 1 to {MAX_HEAD_DIM}")
    if heads_q < 1 or heads_k < 1 or heads_q % heads_k != 0:
        got = f"got {number(heads_k)} heads with {nq} of {number(heads_q)}"
        raise ArgumentValueError(f"{nk}: {got}; allowed: a divisor of {nq}'s, both at least 1")
    for name, s in ((nq, seqlen_q), (nk, seqlen_k)):
        if s >= MAX_SEQLEN:
            raise ArgumentValueError(f"{name}: got length {number(s)}; allowed: under {MAX_SEQLEN}")
    if attn_mask is not None:
        _check_mask(attn_mask, q, (batch, heads_q, seqlen_q, seqlen_k))
    return batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v


def _check_mask(mask: torch.Tensor, q: torch.Tensor, shape: tuple[int, int, int, int]) -> None:
    if not isinstance(mask, torch.Tensor):
        raise ArgumentTypeError(f"attn_mask: got {type(mask).__name__}; allowed: None or a torch.Tensor")
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        raise ArgumentTypeError(f"attn_mask: got dtype {mask.dtype}; allowed: torch.bool, q's {q.dtype} or torch.float32")
    if mask.device != q.device:
        raise ArgumentValueError(f"attn_mask: got device {mask.device} with q on {q.device}; allowed: q's device")
    fits = mask.dim() <= 4 and all(
        size == 1 or size == want for size, want in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ArgumentValueError(
            f"attn_mask: got shape {numbers(mask.shape)}; allowed: one that broadcasts to (B, Hq, Sq, Sk) = {numbers(shape)}"
        )


def _mask_spec(mask: torch.Tensor, shape: tuple[int, int, int, int]) -> MaskSpec:
    b, h, m, n = mask.expand(shape).stride()
    return MaskSpec("bool" if mask.dtype == torch.bool else "additive", mask.dtype, (b, h, m, n))
