"""Problem: what a step of the ladder is asked to compute, checked. Needs no Triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashcore.errors import ArgumentTypeError, ArgumentValueError

HEAD_DIMS = (16, 32, 64, 128)
# Offsets within a head, and within a tile's rows of the unfused scores, are 32 bits.
_MAX_SEQLEN = 2**24 - 1
# The unfused softmax takes a program for each query.
_MAX_ROWS = 2**31 - 1
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """Attention over (B, H, S, D) contiguous float16 tensors, not causal: softmax(scale * q k^T) v.

    Raises ArgumentValueError for a size or a scale that no step takes.
    """

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    scale: float

    def __post_init__(self) -> None:
        for name, size in (("batch", self.batch), ("heads", self.heads)):
            if size < 1:
                raise ArgumentValueError(f"{name}: got {size}; allowed: 1 or more")
        for name, size in (("seqlen_q", self.seqlen_q), ("seqlen_k", self.seqlen_k)):
            if not 1 <= size <= _MAX_SEQLEN:
                raise ArgumentValueError(f"{name}: got {size}; allowed: 1 to {_MAX_SEQLEN}")
        if self.head_dim not in HEAD_DIMS:
            raise ArgumentValueError(f"head_dim: got {self.head_dim}; allowed: {', '.join(map(str, HEAD_DIMS))}")
        if self.rows > _MAX_ROWS:
            raise ArgumentValueError(f"q: got {self.rows} rows in all heads; allowed: at most {_MAX_ROWS}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ArgumentValueError(f"scale: got {self.scale}; allowed: a finite number above 0")

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> Problem:
        """The problem that these tensors pose; `scale` None is 1 / sqrt(D).

        Raises:
            ArgumentTypeError: something is no tensor, or not float16.
            ArgumentValueError: shapes, devices, memory or the scale are not what the steps take.
        """
        tensors = {"q": q, "k": k, "v": v}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise ArgumentTypeError(f"{name}: got {type(tensor).__name__}; allowed: a torch.Tensor")
            if tensor.dtype != torch.float16:
                raise ArgumentTypeError(f"{name}: got {tensor.dtype}; allowed: torch.float16")
            if tensor.dim() != 4:
                raise ArgumentValueError(f"{name}: got shape {tuple(tensor.shape)}; allowed: (B, H, S, D)")
            if tensor.device != q.device:
                raise ArgumentValueError(f"{name}: got {tensor.device}, q is on {q.device}; allowed: one device")
            if not tensor.is_contiguous():
                raise ArgumentValueError(f"{name}: got strides {tensor.stride()}; allowed: contiguous")
            if tensor.data_ptr() % _ALIGNMENT:
                raise ArgumentValueError(
                    f"{name}: got address {tensor.data_ptr():#x}; allowed: a multiple of {_ALIGNMENT} bytes"
                )
        if v.shape != k.shape:
            raise ArgumentValueError(f"v: got shape {tuple(v.shape)}, k has {tuple(k.shape)}; allowed: the same shape")
        batch, heads, seqlen_q, head_dim = q.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_dim):
            raise ArgumentValueError(f"k: got shape {tuple(k.shape)}, q has {tuple(q.shape)}; allowed: q's B, H and D")
        chosen = 1.0 / math.sqrt(head_dim) if scale is None and head_dim else 1.0 if scale is None else scale
        return cls(batch, heads, seqlen_q, k.shape[2], head_dim, chosen)

    @property
    def rows(self) -> int:
        """Query rows in all."""
        return self.batch * self.heads * self.seqlen_q
