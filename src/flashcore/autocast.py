"""Under torch.autocast a call's inputs are cast as PyTorch casts those of its own attention."""

from __future__ import annotations

import torch


def under_autocast(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensors of a call in the dtype that autocast has on their device, where it is on there.

    As the policy `lower_precision_fp` of ATen/autocast_mode.h has it: all floating tensors but float64, a mask among them.
    Gradients come back in the dtype of what was given. What is not a tensor stays as it is: validation names it.
    """
    return _cast(q), _cast(k), _cast(v), None if attn_mask is None else _cast(attn_mask)


def _cast(t: torch.Tensor) -> torch.Tensor:
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    device = t.device.type
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return t
    return t.to(torch.get_autocast_dtype(device))
