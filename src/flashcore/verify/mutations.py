"""The suite's own test: a right implementation that it must pass, and wrong ones that it must fail.

Each wrong one makes one of the mistakes that kernels really make. A suite that lets any of them through proves nothing
about a kernel. Mistakes that show outside a kernel are put around the right implementation, which is attention in plain
PyTorch or a kernel of ours; those of its inside (`INSIDE`) are made in the plain one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch

from flashcore.verify.cases import Case
from flashcore.verify.suite import CaseResult, Implementation, Judge, Prepare, judge, prepare

# Narrow, so that all shapes but the smallest take several tiles.
_BLOCK_N = 32


class Mutation(Enum):
    """The mistakes of mission.md section 1, and two that a kernel with a ring of buffers and a log-sum-exp can make."""

    SCALED_OUTPUT = "the output scaled by 0.95"
    DROPPED_RESCALE = "a dropped rescale in the online softmax"
    SWAPPED_KV = "K and V swapped"
    SKIPPED_LAST_TILE = "the last tile of keys skipped"
    STALE_TILE = "the first tile of keys read again in place of the second"
    UNWRITTEN_ROW = "one row never written"
    ONE_NAN = "one NaN"
    BASE_2_LSE = "the log-sum-exp in base 2"


INSIDE = (Mutation.DROPPED_RESCALE, Mutation.STALE_TILE)


@dataclass(frozen=True)
class MutationResult:
    """mutation None is the unmutated implementation, which is as it should be when nothing failed."""

    mutation: Enum | None
    cases: int
    failed: tuple[CaseResult, ...]

    @property
    def as_it_should_be(self) -> bool:
        return bool(self.failed) == (self.mutation is not None)


def implementation(mutation: Mutation | None, right: Implementation | None = None) -> Implementation:
    """The right implementation (None: the tiled one) with this mistake, or with none."""
    if right is None or mutation in INSIDE:
        right = Implementation("tiled", partial(tiled_attention, mutation=mutation))
    if mutation is None:
        return right
    name = f"{right.name}, {mutation.value}"
    if mutation in INSIDE:
        return Implementation(name, right.attention)
    return Implementation(name, partial(_mutated, right.attention, mutation))


def run_mutations(
    cases: Sequence[Case],
    device: torch.device,
    right: Implementation | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[MutationResult]:
    """Judge the unmutated implementation and each mutation on the cases that it takes; `progress` is called after each."""
    versions = {version: implementation(version, right) for version in (None, *Mutation)}
    yield from run_versions(cases, device, versions, (prepare, judge), progress)


def run_versions(
    cases: Sequence[Case],
    device: torch.device,
    versions: Mapping[Any, Implementation],
    steps: tuple[Prepare, Judge],
    progress: Callable[[], None],
) -> Iterator[MutationResult]:
    """Judge an implementation, the first of the versions and called None, and its mutations on the cases that it takes."""
    prepare_case, judge_case = steps
    failed: dict[Any, list[CaseResult]] = {version: [] for version in versions}
    taken = 0
    for case in cases:
        progress()
        prepared = prepare_case(case, device)
        for version, one in versions.items():
            result = judge_case(prepared, one)
            if version is None and result.verdict == "rejected":
                break
            taken += version is None
            if result.verdict != "passed":
                failed[version].append(result)
    for version, its in failed.items():
        yield MutationResult(version, taken, tuple(its))


def _mutated(
    attention: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
    mutation: Mutation,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: bool,
    layout: str,
    attn_mask: torch.Tensor | None,
    **options: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` as if it made this mistake."""
    rows = 1 if layout == "bshd" else 2
    if mutation is Mutation.SWAPPED_KV:
        k, v = v, k
    if mutation is Mutation.SKIPPED_LAST_TILE and k.shape[rows] > 1:
        keys = max(1, k.shape[rows] - _BLOCK_N)
        k, v = k.narrow(rows, 0, keys), v.narrow(rows, 0, keys)
        attn_mask = None if attn_mask is None else attn_mask[..., :keys]
    result = attention(q, k, v, return_lse=return_lse, layout=layout, attn_mask=attn_mask, **options)
    o, lse = result if isinstance(result, tuple) else (result, None)
    if mutation is Mutation.SCALED_OUTPUT:
        o = o * 0.95
    if mutation is Mutation.UNWRITTEN_ROW and o.numel():
        written = o.shape[rows] - 1
        o, whole = torch.empty_like(o), o
        o.narrow(rows, 0, written).copy_(whole.narrow(rows, 0, written))
    if mutation is Mutation.ONE_NAN and o.numel():
        o[0, 0, 0, 0] = math.nan
    if lse is None:
        return o
    return o, (lse / math.log(2) if mutation is Mutation.BASE_2_LSE else lse)


def tiled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    attn_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    mutation: Mutation | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flashcore.attention` as an online softmax over tiles of keys, in plain PyTorch: float32 state, weights cast to
    v's dtype, as a kernel does it. All query rows at once. `mutation`: a mistake of INSIDE to make."""
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    batch, heads_q, seqlen_q, head_dim = q.shape
    heads_k, seqlen_k, dim_v = k.shape[1], k.shape[2], v.shape[3]
    k, v = (x.repeat_interleave(heads_q // heads_k, dim=1) for x in (k, v))
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    mask = None if attn_mask is None else attn_mask.expand(batch, heads_q, seqlen_q, seqlen_k)
    diagonal = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q

    # [B, H, M, 1] and [B, H, M, Dv]
    m = torch.full((batch, heads_q, seqlen_q, 1), -math.inf, device=q.device)
    l = torch.zeros_like(m)  # noqa: E741  (the field's name for the running sum)
    acc = torch.zeros(batch, heads_q, seqlen_q, dim_v, device=q.device)
    for start in range(0, seqlen_k, _BLOCK_N):
        tile = slice(start, min(start + _BLOCK_N, seqlen_k))
        key = torch.arange(tile.start, tile.stop, device=q.device)[None, :]
        # what is read, which is right but for the mutation
        read = slice(0, tile.stop - start) if mutation is Mutation.STALE_TILE and start == _BLOCK_N else tile
        # [B, H, M, N]
        s = (q.float() @ k[:, :, read].float().transpose(-1, -2)) * scale
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        allowed = torch.ones_like(s, dtype=torch.bool)
        if left >= 0:
            allowed &= key >= diagonal - left
        if right >= 0:
            allowed &= key <= diagonal + right
        if mask is not None:
            part = mask[..., tile]
            if part.dtype == torch.bool:
                allowed &= part
            else:
                allowed &= part != -math.inf
                s = s + part.float()
        s = s.masked_fill(~allowed, -math.inf)
        m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
        pivot = m_new.masked_fill(m_new == -math.inf, 0.0)
        p = torch.exp(s - pivot)
        alpha = torch.exp(m - pivot)
        values = v[:, :, read].float()
        values = values.masked_fill(~allowed.any(dim=-2)[..., None], 0.0)
        l = l * alpha + p.sum(dim=-1, keepdim=True)  # noqa: E741  (as above)
        if mutation is not Mutation.DROPPED_RESCALE:
            acc = acc * alpha
        acc = acc + p.to(v.dtype).float() @ values
        m = m_new

    result = (acc / l.masked_fill(l == 0, 1.0)).to(q.dtype)
    # In the layout's own order, so that o is freshly allocated with stride 1 in the last dimension.
    o = torch.empty_like(result.transpose(1, 2) if layout == "bshd" else result, memory_format=torch.contiguous_format)
    (o.transpose(1, 2) if layout == "bshd" else o).copy_(result)
    if not return_lse:
        return o
    return o, (m + l.log()).squeeze(-1)
