"""The backward suite's own test: a right backward pass that it must pass, and wrong ones that it must fail.

As in mutations.py: mistakes that show outside a kernel are put around the right implementation, which is attention in plain
PyTorch or a kernel of ours; those of its inside (`INSIDE`) are made in the plain one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch

from flashcore.verify.backward_suite import judge_backward, prepare_backward
from flashcore.verify.cases import Case
from flashcore.verify.inputs import Inputs
from flashcore.verify.mutations import MutationResult, run_versions, tiled_attention
from flashcore.verify.suite import Implementation

# As a kernel's tiles of queries and of keys; narrow, so that all shapes but the smallest take several.
_BLOCK = 32


class BackwardMutation(Enum):
    """Mistakes that backward kernels make."""

    MISSING_DELTA = "delta left out of ds"
    CAUSAL_OFF_BY_ONE = "the causal edge off by one"
    SKIPPED_KEYS = "dq without the last tile of keys"
    SKIPPED_QUERIES = "dk and dv without the last tile of queries"
    ONE_HEAD_OF_GROUP = "dk and dv of one head of a group, not of all"
    UNCAPPED = "the softcap's derivative left out"
    UNSCALED_DQ = "dq not scaled"
    UNSCALED_DK = "dk not scaled"
    IGNORED_DLSE = "the log-sum-exp's gradient ignored"
    SWAPPED_DK_DV = "dk and dv swapped"
    UNWRITTEN_ROW = "one row of dk never written"


Mutation = BackwardMutation
INSIDE = (
    Mutation.MISSING_DELTA,
    Mutation.CAUSAL_OFF_BY_ONE,
    Mutation.SKIPPED_KEYS,
    Mutation.SKIPPED_QUERIES,
    Mutation.ONE_HEAD_OF_GROUP,
    Mutation.UNCAPPED,
)
# A function that makes a case's results from (q, k, v) and the keyword arguments of `flashcore.attention`.
Attention = Callable[..., Any]


def implementation(mutation: Mutation | None, right: Implementation | None = None) -> Implementation:
    """The right implementation (None: the plain one) with this mistake in its backward pass, or with none."""
    if right is None or mutation in INSIDE:
        right = Implementation("plain", partial(plain_attention, mutation=mutation), reject=_reject)
    if mutation is None:
        return right
    name = f"{right.name}, {mutation.value}"
    attention = right.attention if mutation in INSIDE else partial(_mutated, right.attention, mutation)
    return Implementation(
        name,
        attention,
        reject=right.reject,
        reject_backward=right.reject_backward,
        # whose runs may differ must not fail for that
        explain_backward=right.explain_backward,
    )


def _reject(case: Case, inputs: Inputs) -> str | None:
    """Why the plain one does not take a case: its weights are exp(s - lse)."""
    mask = case.mask
    if mask is None or mask.kind not in ("add_low", "add_lowest", "add_lows"):
        return None
    if (mask.dtype or case.dtype) == torch.float16:
        return None  # its lowest value leaves the log-sum-exp something to say
    return "rows whose every score is about -1e30 have a float32 log-sum-exp that is no different from the scores"


def run_backward_mutations(
    cases: Sequence[Case],
    device: torch.device,
    right: Implementation | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[MutationResult]:
    """Judge the unmutated implementation and each mutation on the cases that it takes; `progress` is called after each."""
    versions = {version: implementation(version, right) for version in (None, *Mutation)}
    yield from run_versions(cases, device, versions, (prepare_backward, judge_backward), progress)


def _mutated(
    attention: Attention,
    mutation: Mutation,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    return_lse: bool,
    scale: float | None,
    layout: str,
    **options: object,
) -> Any:
    """`attention`, whose gradients are as if its backward pass made this mistake."""

    def run(*leaves: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        asked = {"attn_mask": leaves[3], "return_lse": return_lse, "scale": scale, "layout": layout, **options}
        result = attention(*leaves[:3], **asked)
        return result if isinstance(result, tuple) else (result,)

    factor = q.shape[-1] ** -0.5 if scale is None else scale
    results = _Wrong.apply(run, partial(_spoil, mutation, factor, layout), mutation, q, k, v, attn_mask)
    return results if return_lse else results[0]


class _Wrong(torch.autograd.Function):
    """Runs a differentiable function, and spoils the gradients that autograd has of it."""

    @staticmethod
    def forward(ctx: Any, run: Attention, spoil: Attention, mutation: Mutation, *tensors: torch.Tensor | None) -> Any:
        with torch.enable_grad():
            ctx.leaves = [
                None if x is None else x.detach().requires_grad_(needed)
                for x, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True)
            ]
            ctx.results = run(*ctx.leaves)
        ctx.spoil, ctx.mutation = spoil, mutation
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    def backward(ctx: Any, *into: torch.Tensor) -> Any:
        wanted = [x for x in ctx.leaves if x is not None and x.requires_grad]
        if ctx.mutation is Mutation.IGNORED_DLSE:
            into = (into[0], *map(torch.zeros_like, into[1:]))
        found = iter(torch.autograd.grad(ctx.results, wanted, into))
        gradients = [next(found) if x is not None and x.requires_grad else None for x in ctx.leaves]
        return None, None, None, *ctx.spoil(*gradients)


def _spoil(
    mutation: Mutation,
    scale: float,
    layout: str,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dmask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    if mutation is Mutation.UNSCALED_DQ and dq is not None:
        dq = dq / scale
    if mutation is Mutation.UNSCALED_DK and dk is not None:
        dk = dk / scale
    if mutation is Mutation.SWAPPED_DK_DV:
        dk, dv = dv, dk
    if mutation is Mutation.UNWRITTEN_ROW and dk is not None and dk.numel():
        rows = 1 if layout == "bshd" else 2
        written = dk.shape[rows] - 1
        dk, whole = torch.empty_like(dk), dk
        dk.narrow(rows, 0, written).copy_(whole.narrow(rows, 0, written))
    return dq, dk, dv, dmask


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    mutation: Mutation | None = None,
    **options: Any,
) -> Any:
    """`flashcore.attention` in plain PyTorch, with gradients by the formulas and in the precision of a kernel: of the saved
    output and log-sum-exp, float32 but for what goes into a matrix product. `mutation`: a mistake of INSIDE to make."""
    o, lse = _Plain.apply(options, mutation, q, k, v, attn_mask)
    return (o, lse) if return_lse else o


class _Saved(NamedTuple):
    """What the forward pass keeps."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    o: torch.Tensor
    lse: torch.Tensor


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], mutation: Mutation | None, *tensors: torch.Tensor | None) -> Any:
        q, k, v, mask = tensors
        assert q is not None and k is not None and v is not None
        o, lse = tiled_attention(q, k, v, attn_mask=mask, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, mask, o, lse)
        ctx.options, ctx.mutation = options, mutation
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> Any:
        saved = _Saved(*ctx.saved_tensors)
        return None, None, *_plain_backward(saved, do, dlse, **ctx.options, mutation=ctx.mutation)


def _plain_backward(
    saved: _Saved,
    do: torch.Tensor,
    dlse: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
    layout: str,
    mutation: Mutation | None,
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, mask, o, lse = saved
    dtype, shapes = q.dtype, (q.shape, k.shape, v.shape)
    if layout == "bshd":
        q, k, v, o, do = (x.transpose(1, 2) for x in (q, k, v, o, do))
    heads_k, group, queries, keys = k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    allowed = _allowed(q, keys, causal, window, mask, mutation)
    # What takes part in nothing may hold NaN, and 0 * NaN is NaN.
    empty = ~allowed.any(dim=-1, keepdim=True)
    unattended = ~allowed.any(dim=-2)[..., None]
    q, o, do = (x.float().masked_fill(empty, 0.0) for x in (q, o, do))
    k, v = (x.float().repeat_interleave(group, dim=1).masked_fill(unattended, 0.0) for x in (k, v))

    # [B, H, M, N]
    s = (q @ k.mT) * scale
    slope = torch.ones_like(s)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask.float()
    p = torch.exp((s - lse[..., None]).masked_fill(~allowed, -math.inf))
    delta = (do * o).sum(dim=-1) - dlse.masked_fill(empty[..., 0], 0.0)
    if mutation is Mutation.MISSING_DELTA:
        delta = torch.zeros_like(delta)
    ds = p * (do @ v.mT - delta[..., None])
    dmask = None if mask is None or mask.dtype == torch.bool else ds.sum_to_size(mask.shape).to(mask.dtype)
    if mutation is not Mutation.UNCAPPED:
        ds = ds * slope

    p, ds = (x.to(dtype).float() for x in (p, ds))
    last_keys, last_queries = (max(1, length - _BLOCK) if length else 0 for length in (keys, queries))
    stop = last_keys if mutation is Mutation.SKIPPED_KEYS else keys
    dq = scale * ds[..., :stop] @ k[:, :, :stop]
    stop = last_queries if mutation is Mutation.SKIPPED_QUERIES else queries
    dk = scale * ds[:, :, :stop].mT @ q[:, :, :stop]
    dv = p[:, :, :stop].mT @ do[:, :, :stop]
    heads = 1 if mutation is Mutation.ONE_HEAD_OF_GROUP else group
    dk, dv = (x.unflatten(1, (heads_k, group))[:, :, :heads].sum(dim=2) for x in (dk, dv))
    found = (x.transpose(1, 2) if layout == "bshd" else x for x in (dq, dk, dv))
    written = [torch.empty(shape, dtype=dtype, device=q.device).copy_(x) for shape, x in zip(shapes, found, strict=True)]
    return (*written, dmask)


def _allowed(
    q: torch.Tensor,
    keys: int,
    causal: bool,
    window: tuple[int, int] | None,
    mask: torch.Tensor | None,
    mutation: Mutation | None,
) -> torch.Tensor:
    """Which query of q (B,H,M,D) attends which key: bool [B,H,M,N]."""
    batch, heads, queries, _ = q.shape
    distance = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None] - (keys - queries)
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right + (1 if causal and mutation is Mutation.CAUSAL_OFF_BY_ONE else 0)
    allowed = allowed.expand(batch, heads, queries, keys)
    if mask is None:
        return allowed
    return allowed & (mask if mask.dtype == torch.bool else mask != -math.inf)
