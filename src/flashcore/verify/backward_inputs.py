"""The gradients that come into a case's backward pass."""

from dataclasses import dataclass

import torch

from flashcore.reference_gradients import Call
from flashcore.verify.cases import Case
from flashcore.verify.inputs import Inputs, attended_by, build, place_like_inputs, spoilt_rows

# Added to a case's seed: what comes in is independent of the inputs.
_SEED = 7_000_003


@dataclass(frozen=True)
class BackwardInputs:
    """A case's tensors; do (B,Sq,Hq,Dv) or heads first, in the inputs' dtype and the case's storage; dlse (B,Hq,Sq) float32,
    where the case returns its log-sum-exp."""

    case: Case
    inputs: Inputs
    do: torch.Tensor
    dlse: torch.Tensor | None

    @property
    def call(self) -> Call:
        """The same for the oracle."""
        x, case = self.inputs, self.case
        return Call(x.q, x.k, x.v, self.do, self.dlse, x.attn_mask, **case.options, layout=case.layout, top_left=case.top_left)


def build_backward(case: Case, device: torch.device) -> BackwardInputs:
    """The tensors of `case` on `device`, and the gradients of its outputs, standard normal by a seed of their own."""
    inputs = build(case, device)
    if device.type == "meta":
        return _described(case, inputs)
    generator = torch.Generator().manual_seed(case.seed + _SEED)
    batch = min(1, case.batch) if case.storage == "expanded" else case.batch
    do = torch.randn(batch, case.seqlen_q, case.heads_q, case.dim_v, generator=generator).to(case.dtype)
    dlse = torch.randn(batch, case.heads_q, case.seqlen_q, generator=generator) if case.return_lse else None
    if case.dead_rows:
        q, do = _spoil_rows(case, inputs, do)
        inputs = Inputs(q, inputs.k, inputs.v, inputs.attn_mask)
    if case.layout == "bhsd":
        do = do.transpose(1, 2)
    if dlse is not None:
        dlse = dlse.to(device).expand(case.batch, -1, -1)
    return BackwardInputs(case, inputs, place_like_inputs(case, do, device), dlse)


def _described(case: Case, inputs: Inputs) -> BackwardInputs:
    """The same on "meta", without memory."""
    do = torch.empty(*inputs.q.shape[:3], case.dim_v, dtype=case.dtype, device="meta")
    rows = torch.empty(case.batch, case.heads_q, case.seqlen_q, device="meta")
    return BackwardInputs(case, inputs, do, rows if case.return_lse else None)


def _spoil_rows(case: Case, inputs: Inputs, do: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (in its layout) and do (B,S,H,D) with NaN, inf and -inf in turn in the rows that attend nothing.

    Raises ValueError when there are none: the case would test nothing.
    """
    mask = None if inputs.attn_mask is None else inputs.attn_mask.cpu()
    allowed = attended_by(case, mask)
    # [B, Hq, Sq] -> [B, Sq, Hq, 1]
    empty = ~allowed.any(dim=-1).transpose(1, 2)[..., None]
    if not empty.any():
        raise ValueError(f"case {case.name} has no row that attends nothing")
    bad = spoilt_rows(case, case.seqlen_q)
    rows = empty if case.layout == "bshd" else empty.transpose(1, 2)
    bad_rows = bad[..., : case.head_dim] if case.layout == "bshd" else bad[..., : case.head_dim].transpose(0, 1)
    q = torch.where(rows.to(inputs.q.device), bad_rows.to(inputs.q.device), inputs.q)
    return q, torch.where(empty, bad[..., : case.dim_v], do)
