"""The backward pass of a case, run and judged: dq, dk, dv and the mask's gradient, each by the bound of tolerance.py.

`suite.run_case` does the rest, given `prepare_backward` and `judge_backward` for what it does of a forward call.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flashcore.reference_gradients import Call, Terms, gradients, idle, terms, twin_gradients
from flashcore.verify.backward_inputs import BackwardInputs, build_backward
from flashcore.verify.cases import Case
from flashcore.verify.inputs import Inputs
from flashcore.verify.poison import poisoned_memory
from flashcore.verify.suite import (
    RUNS,
    BackwardRan,
    CaseResult,
    Implementation,
    call,
    describe,
    fingerprint,
    same_bits,
    synchronize,
)
from flashcore.verify.tolerance import Comparison, compare_gradient

# Each gradient's name, by what it is the gradient of.
NAMES = {"q": "dq", "k": "dk", "v": "dv", "m": "dmask"}


@dataclass(frozen=True)
class Expected:
    """What a gradient should be: ref in float64, twin in its dtype, and how large the terms of its sum are.

    idle: bool, with 1 for the last dimension: True where nothing takes part, so that it is exactly 0; None of a mask's.
    """

    ref: torch.Tensor
    twin: torch.Tensor
    terms: float
    idle: torch.Tensor | None


@dataclass(frozen=True)
class PreparedBackward:
    """A case's tensors on the device, and each wanted gradient by its name, in the order they are asked for in."""

    case: Case
    given: BackwardInputs
    expected: dict[str, Expected]


def prepare_backward(case: Case, device: torch.device) -> PreparedBackward:
    """Build the inputs of `case` and compute what its gradients should be."""
    given = build_backward(case, device)
    # Entries of an expanded batch are one and the same, so one is computed (the largest case relies on that).
    same = case.storage == "expanded" and case.mask is None
    asked = _first_entry(given.call) if same else given.call
    rows, keys = idle(asked)
    found = zip(Terms._fields, gradients(asked), twin_gradients(asked), terms(asked), (rows, keys, keys, None), strict=True)
    expected = {
        name: Expected(ref, twin, size, zero) for name, ref, twin, size, zero in found if ref is not None and twin is not None
    }
    if same:
        expected = {
            name: Expected(
                _repeat(e.ref, case), _repeat(e.twin, case), e.terms, None if e.idle is None else _repeat(e.idle, case)
            )
            for name, e in expected.items()
        }
    wanted = [NAMES[letter] for letter in case.wrt]
    return PreparedBackward(case, given, {name: expected[name] for name in wanted if name in expected})


def _first_entry(asked: Call) -> Call:
    q, k, v, do = (x[:1] for x in (asked.q, asked.k, asked.v, asked.do))
    return replace(asked, q=q, k=k, v=v, do=do, dlse=None if asked.dlse is None else asked.dlse[:1])


def _repeat(x: torch.Tensor, case: Case) -> torch.Tensor:
    return x.expand(case.batch, -1, -1, -1)


@dataclass
class _Runs:
    """What came of the runs: the first one's gradients, and how the others differ from it by name."""

    first: dict[str, torch.Tensor]
    same: dict[str, bool]
    apart: dict[str, float]


def judge_backward(prepared: PreparedBackward, implementation: Implementation) -> CaseResult:
    """Run forward and backward RUNS times on prepared inputs, memory poisoned, and compare. Never raises.

    Runs must be bitwise equal where the plan of the backward pass says that they are, and where there is no plan; elsewhere no
    further apart than a gradient may be from its reference.
    """
    case, name = prepared.case, implementation.name
    started = time.perf_counter()
    ran: BackwardRan | None = None
    try:
        refusal = implementation.reject(case, prepared.given.inputs)
        if refusal is None and implementation.reject_backward is not None:
            refusal = implementation.reject_backward(prepared.given)
        if refusal is not None:
            return CaseResult(case, name, "rejected", refusal)
        ran = _explain(prepared, implementation)
        if (case.dead_nan or case.dead_rows) and ran is not None and ran.impl == "torch":
            return CaseResult(case, name, "skipped", "run by PyTorch, in which NaN in what is masked may reach a gradient")
        before = _fingerprint(prepared)
        runs = _run(prepared, implementation)
        seconds = time.perf_counter() - started
        # Again: the hash of a binary that was compiled on demand is known only now.
        ran = _explain(prepared, implementation)
        reasons = _breaches(prepared, runs.first, before)
        compared = {
            gradient: compare_gradient(runs.first[gradient], want.ref, want.twin, want.terms)
            for gradient, want in prepared.expected.items()
        }
    except Exception as error:  # a case that raises has failed, and says how
        return CaseResult(case, name, "failed", describe(error), backward=ran, seconds=time.perf_counter() - started)

    reasons += [f"{gradient}: {result.reason}" for gradient, result in compared.items() if not result.passed]
    reasons += [
        f"{gradient}: is not 0 of what takes no part"
        for gradient, want in prepared.expected.items()
        if not _idle(runs.first[gradient], want)
    ]
    reasons += _unequal(runs, compared, reproducible=ran is None or ran.reproducible)
    return CaseResult(
        case,
        name,
        "failed" if reasons else "passed",
        "; ".join(reasons),
        bitwise_equal=all(runs.same.values()),
        gradients=compared,
        backward=ran,
        seconds=seconds,
    )


def _explain(prepared: PreparedBackward, implementation: Implementation) -> BackwardRan | None:
    if implementation.explain_backward is None:
        return None
    return implementation.explain_backward(prepared.given)


def _run(prepared: PreparedBackward, implementation: Implementation) -> _Runs:
    device = prepared.given.do.device
    with poisoned_memory(device):
        first = _gradients(prepared, implementation)
        runs = _Runs(first, dict.fromkeys(first, True), dict.fromkeys(first, 0.0))
        for _ in range(RUNS - 1):
            for gradient, again in _gradients(prepared, implementation).items():
                if same_bits(first[gradient], again):
                    continue
                runs.same[gradient] = False
                runs.apart[gradient] = max(runs.apart[gradient], _apart(first[gradient], again))
    return runs


def _gradients(prepared: PreparedBackward, implementation: Implementation) -> dict[str, torch.Tensor]:
    """One forward and one backward pass, finished on the device."""
    case, given = prepared.case, prepared.given
    letters = [letter for letter in case.wrt if NAMES[letter] in prepared.expected]
    x = given.inputs
    inputs = {"q": x.q, "k": x.k, "v": x.v, "m": x.attn_mask}
    leaves = {
        letter: tensor.detach().requires_grad_(letter in letters) for letter, tensor in inputs.items() if tensor is not None
    }
    o, lse = call(case, Inputs(leaves["q"], leaves["k"], leaves["v"], leaves.get("m")), implementation)
    into = [(o, given.do)]
    if lse is not None and given.dlse is not None:
        into.append((lse, given.dlse))
    found = torch.autograd.grad([x for x, _ in into], [leaves[letter] for letter in letters], [dx for _, dx in into])
    synchronize(given.do.device)
    return dict(zip((NAMES[letter] for letter in letters), found, strict=True))


def _apart(first: torch.Tensor, again: torch.Tensor) -> float:
    """The largest difference; infinite where one of them is not finite. One batch entry at a time to bound memory."""
    differences = [(a.to(torch.float64) - b.to(torch.float64)).abs().max() for a, b in zip(first, again, strict=True)]
    return torch.stack(differences).nan_to_num(nan=torch.inf).max().item()


def _idle(found: torch.Tensor, want: Expected) -> bool:
    """Whether a gradient is exactly 0 where nothing takes part. One batch entry at a time to bound memory."""
    if want.idle is None or found.shape != want.ref.shape:
        return True  # of another shape it has failed already
    return not any(bool(((entry != 0) & zero).any()) for entry, zero in zip(found, want.idle, strict=True))


def _unequal(runs: _Runs, compared: dict[str, Comparison], *, reproducible: bool) -> list[str]:
    """What is wrong with runs that differ."""
    different = [gradient for gradient, same in runs.same.items() if not same]
    if reproducible:
        return [f"{gradient}: {RUNS} runs on the same input are not bitwise equal" for gradient in different]
    return [
        f"{gradient}: {RUNS} runs on the same input are {runs.apart[gradient]:.3g} apart, above {compared[gradient].bound:.3g}"
        for gradient in different
        if not runs.apart[gradient] <= compared[gradient].bound
    ]


def _fingerprint(prepared: PreparedBackward) -> list[torch.Tensor]:
    x = prepared.given.inputs
    return fingerprint(x.q, x.k, x.v, x.attn_mask, prepared.given.do, prepared.given.dlse)


def _breaches(prepared: PreparedBackward, found: dict[str, torch.Tensor], before: Sequence[torch.Tensor]) -> list[str]:
    """What is wrong with the gradients apart from their values: device, memory, and tensors that were written to."""
    given = prepared.given
    breaches = [
        f"{name} is on {gradient.device}, the inputs are on {given.do.device}"
        for name, gradient in found.items()
        if gradient.device != given.do.device
    ]
    storages = {x.untyped_storage().data_ptr() for x in (given.inputs.q, given.inputs.k, given.inputs.v, given.do)}
    breaches += [
        f"{name} shares memory with an input"
        for name, gradient in found.items()
        if gradient.numel() and gradient.untyped_storage().data_ptr() in storages
    ]
    if not all(map(same_bits, before, _fingerprint(prepared))):
        breaches.append("an input, or a gradient that came in, was modified")
    return breaches
