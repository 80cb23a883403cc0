"""What every kernel that reads its tensors by TMA needs of a call: what it runs on, its dtypes, strides and keys."""

from __future__ import annotations

import torch

from flashcore.spec import AttentionSpec

ARCH = "sm_90a"
DTYPES = (torch.float16, torch.bfloat16)


def refused(spec: AttentionSpec, arch: str | None, interpreted: bool) -> str | None:
    """Why no such kernel can run a call on a device, or None when one can."""
    if interpreted or arch != ARCH:
        return f"needs a Hopper GPU ({ARCH}); got {'the interpreter' if interpreted else arch or f'device {spec.device}'}"
    if spec.dtype not in DTYPES:
        return f"takes float16 and bfloat16; got {str(spec.dtype).removeprefix('torch.')}"
    if spec.mask is not None:
        return "takes no mask"
    if not spec.scale > 0:
        return f"needs a scale > 0; got {spec.scale}"
    if not (spec.contiguous_last and spec.aligned):
        return (
            "needs stride 1 in the last dimension, and head dims, other strides and addresses that are multiples of 16 bytes "
            "(8 elements)"
        )
    first, last = spec.attended_keys
    if first >= last:
        return "needs a key that some query may attend"
    return None
