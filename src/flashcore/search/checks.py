"""What a candidate must get right before it is timed: the problem itself, and odd calls that the same binary serves.

Judged by the project's one tolerance (verify/tolerance.py). The float64 result of a call and its twin are computed once, for
all candidates; reference.py does so by blocks of heads and rows, so that even 16k x 16k scores of every head fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flashcore import reference
from flashcore.bench.inputs import Inputs, InputSets
from flashcore.bench.shapes import Shape
from flashcore.errors import ArgumentValueError
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Built, Problem
from flashcore.spec import AttentionSpec, Layout, Options
from flashcore.target import Target
from flashcore.verify.cases import CallOptions
from flashcore.verify.poison import poisoned_memory
from flashcore.verify.suite import fingerprint, same_bits
from flashcore.verify.tolerance import compare_lse, compare_output

SEED = 20
# (queries, keys) of the odd calls: single rows, no multiple of any tile, more queries than keys and the reverse, and more keys
# than any ring of blocks holds
ODD_LENGTHS = ((1, 1), (17, 17), (1, 130), (197, 197), (130, 70), (70, 197), (513, 513))
# (heads, key heads, length) of the call with the most tiles: more than 8 rounds of a GPU's multiprocessors
MANY_TILES = (1104, 552, 33)
# Narrower than the odd calls are long, so that they have a band like the problem's.
ODD_WINDOW = (5, 3)

# q, k, v, mask -> o, and the log-sum-exp where the call asks for it
Output = tuple[torch.Tensor, torch.Tensor | None]
Call = Callable[[], Output]


@dataclass(frozen=True)
class Check:
    """A call with its inputs, and what is expected of it. Tensors are on the device; ref and lse float64."""

    problem: Problem
    spec: AttentionSpec
    inputs: Inputs
    # as the call's layout has them
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    before: list[torch.Tensor]
    ref: torch.Tensor
    twin: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, problem: Problem, device: torch.device, *, layout: Layout = "bhsd") -> Check:
        """Draw a problem's inputs and compute what is expected."""
        inputs = InputSets(shape_of(problem), device, SEED)[0]
        q, k, v = inputs.leaves
        if layout == "bshd":
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        options: CallOptions = {
            "causal": problem.causal,
            "scale": None,
            "window": problem.window,
            "softcap": problem.softcap,
        }
        spec = AttentionSpec.from_tensors(q, k, v, inputs.mask, Options.check(**options, layout=layout), return_lse=True)
        ref, lse = reference.attention(q, k, v, **options, attn_mask=inputs.mask, layout=layout)
        twin, _ = reference.twin(q, k, v, **options, attn_mask=inputs.mask, layout=layout)
        return cls(problem, spec, inputs, q, k, v, fingerprint(q, k, v, inputs.mask), ref, twin, lse)

    @property
    def name(self) -> str:
        return f"{self.problem.name} {self.spec.layout}"

    def wrong(self, o: torch.Tensor, lse: torch.Tensor | None) -> str | None:
        """What is wrong with a result, or None."""
        output = compare_output(o, self.ref, self.twin)
        if not output.passed:
            return f"output: {output.reason}"
        if lse is not None:
            compared = compare_lse(lse, self.lse, self.spec.dtype)
            if not compared.passed:
                return f"lse: {compared.reason}"
        return None

    def intact(self) -> bool:
        """Whether the inputs are still those that were drawn."""
        return all(map(same_bits, self.before, fingerprint(self.q, self.k, self.v, self.inputs.mask)))


def checks_of(problem: Problem, device: torch.device, target: Target) -> list[Check]:
    """The problem's own, first, and those of the odd calls that its kernel takes."""
    binding = SEARCHABLE[problem.impl].binding
    found = [Check.of(problem, device)]
    for number, odd in enumerate(odd_problems(problem)):
        try:
            SEARCHABLE[problem.impl].spec(odd)
        except ArgumentValueError:  # a length that the kernel does not take
            continue
        check = Check.of(odd, device, layout="bshd" if number % 2 else "bhsd")
        if binding.reject(check.spec, target.arch, False) is None:
            found.append(check)
    return found


def odd_problems(problem: Problem) -> list[Problem]:
    """Calls of like features: by turns with as many query heads a key head as the problem has, and with another number."""
    group = problem.heads // problem.heads_k
    window = None
    if problem.window is not None:
        left, right = (-1 if side < 0 else odd for side, odd in zip(problem.window, ODD_WINDOW, strict=True))
        window = (left, right)
    heads = ((2 * group, 2), (3, 3) if group > 1 else (4, 2))
    odd = [
        problem.model_copy(
            update={
                "batch": 1 + number % 2,
                "heads": heads[number % 2][0],
                "heads_k": heads[number % 2][1],
                "seqlen_q": seqlen_q,
                "seqlen_k": seqlen_k,
                "window": window,
            }
        )
        for number, (seqlen_q, seqlen_k) in enumerate(ODD_LENGTHS)
    ]
    many_heads, many_heads_k, length = MANY_TILES
    many = {"batch": 1, "heads": many_heads, "heads_k": many_heads_k, "seqlen_q": length, "seqlen_k": length, "window": window}
    return [*odd, problem.model_copy(update=many)]


def serves(built: Built, check: Check) -> bool:
    """Whether a call like the check's would run this very binary, were the candidate's form chosen for it."""
    searchable = SEARCHABLE[check.problem.impl]
    config = searchable.config(**built.config)
    if not searchable.form.fits(check.spec, config):
        return False
    return searchable.form.specialise(check.spec, config).key == built.key


def run_twice(check: Check, first: Call, second: Call, synchronize: Callable[[], None]) -> tuple[Output, str | None]:
    """Two runs of a candidate with poisoned memory, the first one's result, and what is wrong, or None."""
    with poisoned_memory(check.q.device):
        o, lse = first()
        synchronize()
        again, lse_again = second()
        synchronize()
    words = check.wrong(o, lse)
    if words is None and not (same_bits(o, again) and (lse_again is None or same_bits(lse, lse_again))):
        words = "two runs on the same input are not bitwise equal"
    if words is None and not check.intact():
        words = "an input was modified"
    return (o, lse), None if words is None else f"{check.name}: {words}"


def without_lse(spec: AttentionSpec) -> AttentionSpec:
    """The same call, not asking for the log-sum-exp: as it is timed."""
    return replace(spec, return_lse=False)


def shape_of(problem: Problem) -> Shape:
    """The sizes by which inputs are drawn, and SDPA is called."""
    return Shape(
        problem.batch,
        problem.heads,
        problem.heads_k,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.head_dim,
        problem.head_dim_v,
        problem.causal,
        problem.dtype,
        problem.mask,
    )
