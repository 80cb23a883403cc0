"""Verify before timing: every contender's output, or gradients, on the very inputs it is timed on, against float64.

The reference of a long shape costs more than all the timing, so past a number of scores a few (batch, head) pairs are
checked instead of all, every row of each; which ones is part of the result.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from flashcore import reference
from flashcore.bench.contender import Contender, Run
from flashcore.bench.inputs import Inputs
from flashcore.bench.shapes import Shape
from flashcore.reference_gradients import Call, gradients, terms, twin_gradients
from flashcore.verify.poison import poisoned_memory
from flashcore.verify.tolerance import compare_gradient, compare_output
from flashcore.verify.watchdog import watchdog

Pair = tuple[int, int]

FULL_CHECK_SCORES = {"cuda": 2**28, "cpu": 2**26}
SAMPLED_PAIRS = 4
# A first call may compile (FlexAttention, a specialisation that was not shipped).
FIRST_CALL_SECONDS = 240.0


class Correctness(BaseModel):
    """One output against float64. `checked` is "all", or the pairs of batch entry and query head (of gradients: key
    head) whose every row was compared."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    checked: Literal["all"] | list[Pair]
    max_abs: float
    mean_abs: float
    bound: float
    passed: bool
    reason: str


class Judge(Protocol):
    """Judges what a contender returned."""

    def check(self, output: Any) -> Correctness: ...


class Oracle:
    """The float64 result of one set of inputs and its twin, computed once and used for every contender."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        self._shape = inputs.shape
        self.pairs = _pairs(inputs.shape, inputs.shape.heads_q, FULL_CHECK_SCORES[inputs.q.device.type], seed)
        if self.pairs is None:
            self._ref, self._twin = _reference(inputs.shape, inputs.q, inputs.k, inputs.v, inputs.mask)
            return
        group = inputs.shape.heads_q // inputs.shape.heads_k
        parts = [
            _reference(
                inputs.shape,
                inputs.q[b : b + 1, h : h + 1],
                inputs.k[b : b + 1, h // group : h // group + 1],
                inputs.v[b : b + 1, h // group : h // group + 1],
                None if inputs.mask is None else inputs.mask[b : b + 1],
            )
            for b, h in self.pairs
        ]
        self._ref, self._twin = (torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def check(self, output: torch.Tensor) -> Correctness:
        """Judge an output (B,Hq,Sq,Dv) by the project's tolerance (verify/tolerance.py)."""
        shape = self._shape
        size = (shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim_v)
        if self.pairs is not None and output.shape == size:
            output = torch.stack([output[b, h : h + 1] for b, h in self.pairs])
        result = compare_output(output, self._ref, self._twin)
        return Correctness(
            checked="all" if self.pairs is None else self.pairs,
            max_abs=result.max_abs,
            mean_abs=result.mean_abs,
            bound=result.bound,
            passed=result.passed,
            reason=result.reason,
        )


class GradientOracle:
    """The float64 gradients of one set of inputs and their twins. Of a long shape a few key heads are checked, each with the
    query heads that share it, which its gradients are sums over."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        shape = inputs.shape
        self._shape = shape
        self.pairs = _pairs(shape, shape.heads_k, FULL_CHECK_SCORES[inputs.q.device.type], seed)
        which: list[Pair | None] = [None] if self.pairs is None else [*self.pairs]
        parts = [_gradients(_some_heads(inputs, pair)) for pair in which]
        self._expected = [
            (torch.cat([ref for ref, _, _ in its]), torch.cat([twin for _, twin, _ in its]), max(size for _, _, size in its))
            for its in zip(*parts, strict=True)
        ]

    def check(self, output: tuple[torch.Tensor, ...]) -> Correctness:
        """Judge (dq, dk, dv) by the project's tolerance: the figures are those of the one nearest to its bound or past it."""
        compared = []
        for name, gradient, heads, expected in zip(("dq", "dk", "dv"), output, self._heads(), self._expected, strict=True):
            if self.pairs is not None:
                gradient = torch.stack([gradient[b, h * heads : (h + 1) * heads] for b, h in self.pairs])
            compared.append((name, compare_gradient(gradient, *expected)))
        _, worst = max(compared, key=lambda one: one[1].share)
        return Correctness(
            checked="all" if self.pairs is None else self.pairs,
            max_abs=worst.max_abs,
            mean_abs=worst.mean_abs,
            bound=worst.bound,
            passed=all(result.passed for _, result in compared),
            reason="; ".join(f"{name}: {result.reason}" for name, result in compared if not result.passed),
        )

    def _heads(self) -> tuple[int, int, int]:
        """How many heads of dq, dk and dv belong to one key head."""
        return self._shape.heads_q // self._shape.heads_k, 1, 1


def _some_heads(inputs: Inputs, pair: Pair | None) -> Call:
    """The call on all heads, or on one key head of a batch entry and the query heads that share it."""
    shape, group = inputs.shape, inputs.shape.heads_q // inputs.shape.heads_k
    assert inputs.do is not None
    q, k, v, do = (x.detach() for x in (*inputs.leaves, inputs.do))
    mask = inputs.mask
    if pair is not None:
        b, h = pair
        q, do = (x[b : b + 1, h * group : (h + 1) * group] for x in (q, do))
        k, v = (x[b : b + 1, h : h + 1] for x in (k, v))
        mask = None if mask is None else mask[b : b + 1]
    return Call(q, k, v, do, attn_mask=mask, causal=shape.causal, scale=shape.scale, layout="bhsd")


def _gradients(call: Call) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """The float64 dq, dk and dv, their twins, and how large the terms are that each is a sum of."""
    return list(zip(gradients(call)[:3], twin_gradients(call)[:3], terms(call)[:3], strict=True))


def verify(contender: Contender, call: Run, oracle: Judge, device: torch.device) -> Correctness:
    """Run the contender once and judge what it returned; raises whatever the contender raises.

    Ours runs with poisoned memory, where an output never written is NaN and not the last contender's right answer.
    Peers do not: the poison is a mode of PyTorch for which FlexAttention would compile twice.
    """
    poison = poisoned_memory(device) if contender.kind == "ours" else nullcontext()
    with watchdog(FIRST_CALL_SECONDS, f"{contender.name}: first call"), torch.no_grad(), contender.context(), poison:
        return oracle.check(call())


def _pairs(shape: Shape, heads: int, full_check_scores: int, seed: int) -> list[Pair] | None:
    """The first pair, the last, and others drawn from the seed; None when all of them are few enough to check."""
    if shape.score_elements <= full_check_scores:
        return None
    count = shape.batch * heads
    middle = range(1, count - 1)
    drawn = random.Random(seed).sample(middle, min(SAMPLED_PAIRS - 2, len(middle)))
    return [divmod(number, heads) for number in sorted({0, count - 1, *drawn})]


def _reference(
    shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 result and its twin of these heads, each like q with v's head dim."""
    ref, _ = reference.attention(q, k, v, causal=shape.causal, scale=shape.scale, attn_mask=mask, layout="bhsd")
    twin, _ = reference.twin(q, k, v, causal=shape.causal, scale=shape.scale, attn_mask=mask, layout="bhsd")
    return ref, twin
