"""The short cases, put to attention whose keys are shared among blocks: each mistake in sharing or combining must fail."""

import math
from enum import Enum
from functools import partial

import pytest
import torch

from flashcore.verify.cases import Case, select
from flashcore.verify.suite import Implementation, run_suite

CPU = torch.device("cpu")
CHUNK = 64


class Mistake(Enum):
    """What a cluster's blocks can get wrong between them."""

    NO_GUARD = "a row without a key in a block's share is exp(-inf - -inf) there"
    UNWEIGHTED = "the blocks' outputs are added as if they had one maximum"
    OWN_SUM = "each row is divided by the first block's sum alone"
    FIRST_SHARE = "the other blocks' shares are left out"
    OWN_LSE = "the log-sum-exp is the first block's"
    WHOLE_CHUNKS = "the last chunk is taken to be full"


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    layout: str,
    return_lse: bool,
    blocks: int = 2,
    mistake: Mistake | None = None,
    **_: object,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows to keys in whole chunks, dealt to blocks in runs; each has its own softmax, and all are combined."""
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
    padded = -(-keys // (CHUNK * blocks)) * CHUNK * blocks
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, padded - keys)) for x in (k, v))
    key = torch.arange(padded)
    attended = (key < keys) | (mistake is Mistake.WHOLE_CHUNKS)
    if causal:
        attended = attended & (key <= torch.arange(rows)[:, None] + keys - rows)
    # [B, H, M, N]
    s = (q.float() @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = s.masked_fill(~attended, -math.inf)
    parts = []
    for share in range(blocks):
        mine = slice(share * padded // blocks, (share + 1) * padded // blocks)
        m = s[..., mine].amax(dim=-1, keepdim=True)
        pivot = m if mistake is Mistake.NO_GUARD else m.masked_fill(m == -math.inf, 0.0)
        p = torch.exp(s[..., mine] - pivot)
        parts.append((m, p.sum(dim=-1, keepdim=True), p.to(q.dtype).float() @ v[:, :, mine]))
    if mistake is Mistake.FIRST_SHARE:
        parts = parts[:1]
    m = torch.stack([part[0] for part in parts]).amax(dim=0)
    pivot = m.masked_fill(m == -math.inf, 0.0)
    weights = [torch.ones_like(m) if mistake is Mistake.UNWEIGHTED else torch.exp(part[0] - pivot) for part in parts]
    l = sum(w * part[1] for w, part in zip(weights, parts, strict=True))  # noqa: E741  (the field's name for the sum)
    acc = sum(w * part[2] for w, part in zip(weights, parts, strict=True))
    divisor = weights[0] * parts[0][1] if mistake is Mistake.OWN_SUM else l
    o = (acc / divisor.masked_fill(divisor == 0, 1.0)).to(q.dtype)
    o = o.transpose(1, 2).contiguous() if layout == "bshd" else o.contiguous()
    lse = parts[0][0] + parts[0][1].log() if mistake is Mistake.OWN_LSE else m + l.log()
    return (o, lse.squeeze(-1)) if return_lse else o


def _judged(cases: list[Case], mistake: Mistake | None, blocks: int) -> dict[str, str]:
    """Reason by name of the cases that failed."""
    attention = Implementation("shared", partial(shared_attention, blocks=blocks, mistake=mistake))
    return {result.case.name: result.reason for result in run_suite(cases, [attention], CPU) if result.verdict == "failed"}


@pytest.mark.parametrize(("blocks", "only"), [(2, None), (4, "short-self-*")])
def test_blocks_that_share_keys_rightly_pass_the_short_cases(blocks: int, only: str | None) -> None:
    assert _judged(select("short", only), None, blocks) == {}


@pytest.mark.parametrize("mistake", Mistake)
def test_each_mistake_of_sharing_fails_at_nearly_every_length_that_shows_it(mistake: Mistake) -> None:
    cases = select("short", "short-self-*")
    failed = _judged(cases, mistake, 2)

    def shows(case: Case) -> bool:
        if mistake is Mistake.WHOLE_CHUNKS:
            # a causal row of a square never sees past the last key
            return not case.causal
        if mistake is Mistake.NO_GUARD:
            return case.seqlen_k <= CHUNK or case.causal
        # up to a chunk of keys, all lie with the first block
        return case.seqlen_k > CHUNK

    showing = {case.name for case in cases if shows(case)}
    # where the other block has one key of one row, its weight may be within the bound
    assert len(showing) > 30 and len(showing & failed.keys()) >= 0.9 * len(showing)
