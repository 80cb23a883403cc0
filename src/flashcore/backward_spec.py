"""BackwardSpec: what a backward pass is asked for, as AttentionSpec says it of a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.memory_order import dense_strides
from flashcore.spec import AttentionSpec, bhs_strides, in_layout


@dataclass(frozen=True, slots=True)
class BackwardSpec:
    """The call whose gradients are wanted, which of them, and how the gradient of its output lies in memory.

    Gradients are dense, in the layout of the call, and in dtype and order in memory as what they are the gradient of. `o` is as
    our kernels leave it (AttentionSpec.o_strides), and the log-sum-exp contiguous (B, Hq, Sq) float32.
    """

    call: AttentionSpec
    # of its batch, head and sequence dimensions; the last has stride 1
    do_strides: tuple[int, int, int]
    # address and strides of the output's gradient allow 16-byte loads
    do_aligned: bool
    # which gradients; dk and dv are made together
    dq: bool
    dkv: bool
    # of an additive mask: its shape with leading ones to rank 4, or None where it is not asked for
    dmask_shape: tuple[int, int, int, int] | None
    # a gradient of the log-sum-exp comes in as well, contiguous (B, Hq, Sq) float32
    dlse: bool
    # bitwise equal results run to run
    deterministic: bool

    @classmethod
    def of(
        cls,
        call: AttentionSpec,
        do: torch.Tensor,
        *,
        dq: bool,
        dkv: bool,
        mask: torch.Tensor | None,
        dlse: bool,
        deterministic: bool,
    ) -> BackwardSpec:
        """`mask` where its gradient is wanted. `do` has stride 1 in its last dimension."""
        strides = bhs_strides(do, call.layout)
        vector = 16 // do.element_size()
        return cls(
            call=call,
            do_strides=strides,
            do_aligned=do.data_ptr() % 16 == 0 and all(stride % vector == 0 for stride in strides),
            dq=dq,
            dkv=dkv,
            # a mask's rank is at most 4, which a tuple's type cannot say
            dmask_shape=None if mask is None else (1,) * (4 - mask.dim()) + tuple(mask.shape),  # type: ignore[arg-type]
            dlse=dlse,
            deterministic=deterministic,
        )

    @property
    def aligned(self) -> bool:
        """Every pointer and stride that the kernels read allows 16-byte loads."""
        return self.call.aligned and self.do_aligned

    @property
    def dq_shape(self) -> tuple[int, int, int, int]:
        """In the call's layout."""
        call = self.call
        return self._shape(call.heads_q, call.seqlen_q, call.head_dim)

    @property
    def dk_shape(self) -> tuple[int, int, int, int]:
        """The same of dk."""
        call = self.call
        return self._shape(call.heads_k, call.seqlen_k, call.head_dim)

    @property
    def dv_shape(self) -> tuple[int, int, int, int]:
        """The same of dv."""
        call = self.call
        return self._shape(call.heads_k, call.seqlen_k, call.head_dim_v)

    @property
    def dq_strides(self) -> tuple[int, int, int]:
        """Strides of dq's batch, head and sequence dimensions, in elements: dense, and in memory in the order of q."""
        return self._strides(self.dq_shape, self.call.q_strides)

    @property
    def dk_strides(self) -> tuple[int, int, int]:
        """The same of dk, in the order of k."""
        return self._strides(self.dk_shape, self.call.k_strides)

    @property
    def dv_strides(self) -> tuple[int, int, int]:
        """The same of dv, in the order of v."""
        return self._strides(self.dv_shape, self.call.v_strides)

    def _shape(self, heads: int, seqlen: int, head_dim: int) -> tuple[int, int, int, int]:
        return (self.call.batch, *((seqlen, heads) if self.call.layout == "bshd" else (heads, seqlen)), head_dim)

    def _strides(self, shape: tuple[int, int, int, int], like: tuple[int, int, int]) -> tuple[int, int, int]:
        layout = self.call.layout
        return in_layout(dense_strides(shape, in_layout(like, layout))[:3], layout)
