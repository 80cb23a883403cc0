"""Other packages' kernels, where they are installed: flash-attn, flashinfer, xformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata

import torch

from flashcore.bench.contender import Attention, Contender, not_installed, on_cuda
from flashcore.bench.inputs import Inputs

FLASHINFER_WORKSPACE = 128 * 2**20


def library_contenders() -> tuple[Contender, ...]:
    return (
        _library("flash-attn", "flash_attn", _prepare_flash_attn),
        _library("flashinfer", "flashinfer", _prepare_flashinfer),
        _library("xformers", "xformers", _prepare_xformers),
    )


def _library(name: str, module: str, prepare: Callable[[Inputs], Attention]) -> Contender:
    return Contender(name, "peer", prepare, partial(_unavailable, name, module), detail=partial(_version, name))


def _unavailable(name: str, module: str, inputs: Inputs) -> str | None:
    missing = not_installed(module, name)
    if missing:
        return missing
    if not on_cuda(inputs):
        return f"{name} runs on CUDA only"
    if inputs.mask is not None:
        return f"{name} is called without a mask here: its functions take none, or another form of one"
    if name == "xformers" and inputs.shape.heads_q != inputs.shape.heads_k:
        return "xformers takes grouped heads only in five dimensions, which another call would be"
    return None


def _version(name: str, inputs: Inputs) -> str | None:
    for package in (name, f"{name}-python"):
        try:
            return f"{name} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _bshd(x: torch.Tensor) -> torch.Tensor:
    """These packages' own layout, contiguous: a user of theirs has it, so the copy is no part of the call."""
    return x.transpose(1, 2).contiguous()


def _prepare_flash_attn(inputs: Inputs) -> Attention:
    from flash_attn import flash_attn_func

    shape = inputs.shape
    q, k, v = _bshd(inputs.q), _bshd(inputs.k), _bshd(inputs.v)
    return lambda: flash_attn_func(q, k, v, softmax_scale=shape.scale, causal=shape.causal).transpose(1, 2)


def _prepare_flashinfer(inputs: Inputs) -> Attention:
    import flashinfer

    shape = inputs.shape
    device = inputs.q.device
    # [total tokens, H, D]
    q, k, v = (_bshd(x).flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v))
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    wrapper.plan(
        starts * shape.seqlen_q,
        starts * shape.seqlen_k,
        shape.heads_q,
        shape.heads_k,
        shape.head_dim,
        head_dim_vo=shape.head_dim_v,
        causal=shape.causal,
        sm_scale=shape.scale,
        q_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, k, v).unflatten(0, (shape.batch, shape.seqlen_q)).transpose(1, 2)


def _prepare_xformers(inputs: Inputs) -> Attention:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    shape = inputs.shape
    q, k, v = _bshd(inputs.q), _bshd(inputs.k), _bshd(inputs.v)
    bias = LowerTriangularFromBottomRightMask() if shape.causal else None
    return lambda: memory_efficient_attention(q, k, v, attn_bias=bias, scale=shape.scale).transpose(1, 2)
