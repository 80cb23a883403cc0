"""Runs cases on implementations and judges them. A case that raises has failed; it never stops the rest."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch

from flashcore import reference
from flashcore.verify.cases import Case
from flashcore.verify.inputs import Inputs, build
from flashcore.verify.poison import poisoned_memory
from flashcore.verify.tolerance import Comparison, compare_lse, compare_output
from flashcore.verify.watchdog import watchdog

if TYPE_CHECKING:
    from flashcore.kernels.specialisation import Specialisation as Compilable
    from flashcore.target import Target
    from flashcore.verify.backward_inputs import BackwardInputs

RUNS = 3
# The largest case computes for well under a second; a first call may compile, which takes some tens.
HANG_SECONDS = 180.0

# skipped: this machine cannot run the case. rejected: the implementation says that it does not take such a call. Neither
# proves anything; only rejected is the implementation's own doing.
Verdict = Literal["passed", "failed", "skipped", "rejected"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Specialisation(Protocol):
    """What the suite reads of a plan's specialisation."""

    @property
    def name(self) -> str: ...


class Plan(Protocol):
    """What the suite reads of a `flashcore.explain` plan."""

    @property
    def impl(self) -> str: ...
    @property
    def kernel(self) -> str | None: ...
    @property
    def specialisation(self) -> Specialisation | None: ...
    @property
    def binary_sha256(self) -> str | None: ...


@dataclass(frozen=True)
class Implementation:
    """What is being verified.

    attention has the signature of `flashcore.attention` without impl (already bound), sdpa that of torch's
    scaled_dot_product_attention; explain and explain_sdpa take the same arguments and return the plan of the call.
    Without sdpa the cases of that entry are skipped, without explain results name no binary. reject says why it does not
    take a case, or None when it does; a call that raises in spite of that has failed. Of the backward pass,
    reject_backward says so too, where it differs, and explain_backward what makes the gradients. binaries: those that a case
    takes on a GPU, so that they can be compiled ahead.
    """

    name: str
    attention: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
    sdpa: Callable[..., torch.Tensor] | None = None
    explain: Callable[..., Plan] | None = None
    explain_sdpa: Callable[..., Plan] | None = None
    reject: Callable[[Case, Inputs], str | None] = lambda case, inputs: None
    reject_backward: "Callable[[BackwardInputs], str | None] | None" = None
    explain_backward: "Callable[[BackwardInputs], BackwardRan] | None" = None
    binaries: "Callable[[Case, Target], tuple[Compilable, ...]]" = lambda case, target: ()


@dataclass(frozen=True)
class Ran:
    """What the plan of the call says was run."""

    impl: str
    kernel: str | None
    specialisation: str | None
    binary_sha256: str | None


@dataclass(frozen=True)
class BackwardRan:
    """What made a case's gradients: its launches in order, and whether runs are meant to be bitwise equal."""

    impl: str
    launches: tuple[Ran, ...]
    reproducible: bool


@dataclass(frozen=True)
class CaseResult:
    """What came of one case under one implementation, by name. reason is "" when it passed; output and lse are None where
    nothing was compared. gradients, by name, and backward are of a backward pass, ran is of a forward call."""

    case: Case
    implementation: str
    verdict: Verdict
    reason: str
    output: Comparison | None = None
    lse: Comparison | None = None
    bitwise_equal: bool | None = None
    ran: Ran | None = None
    gradients: dict[str, Comparison] = field(default_factory=dict)
    backward: BackwardRan | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Prepared:
    """A case's tensors on the device, and what is expected: ref and lse in float64, twin in the inputs' dtype."""

    case: Case
    inputs: Inputs
    ref: torch.Tensor
    lse: torch.Tensor
    twin: torch.Tensor


def prepare(case: Case, device: torch.device) -> Prepared:
    """Build the inputs of `case` and compute what its output should be."""
    inputs = build(case, device)
    q, k, v, mask = inputs.q, inputs.k, inputs.v, inputs.attn_mask
    # Entries of an expanded batch are one and the same, so one is computed (the largest case relies on that).
    same = case.storage == "expanded" and mask is None
    if same:
        q, k, v = q[:1], k[:1], v[:1]
    top_left = case.top_left
    ref, lse = reference.attention(q, k, v, **case.options, attn_mask=mask, layout=case.layout, top_left=top_left)
    twin, _ = reference.twin(q, k, v, **case.options, attn_mask=mask, layout=case.layout, top_left=top_left)
    if same:
        ref, twin = (x.expand(case.batch, -1, -1, -1) for x in (ref, twin))
        lse = lse.expand(case.batch, -1, -1)
    return Prepared(case, inputs, ref, lse, twin)


# What is done of a case: its tensors and what is expected, and one implementation's result from these.
Prepare = Callable[[Case, torch.device], Any]
Judge = Callable[[Any, Implementation], CaseResult]


def run_suite(
    cases: Sequence[Case],
    implementations: Sequence[Implementation],
    device: torch.device,
    steps: tuple[Prepare, Judge] | None = None,
) -> Iterator[CaseResult]:
    """Run the cases one after the other, each under every implementation, yielding each result as it comes."""
    for case in cases:
        yield from run_case(case, implementations, device, steps)


def run_case(
    case: Case,
    implementations: Sequence[Implementation],
    device: torch.device,
    steps: tuple[Prepare, Judge] | None = None,
) -> list[CaseResult]:
    """Prepare one case and judge it under each implementation, in order. On a GPU a hang ends the process (watchdog.py).

    `steps` are those of a forward call unless others are given (backward_suite.py).
    """
    prepare_case, judge_case = steps or (prepare, judge)
    reasons = {implementation.name: _why_skip(case, implementation, device) for implementation in implementations}
    if all(reasons.values()):
        return [CaseResult(case, name, "skipped", reason) for name, reason in reasons.items()]
    results = []
    try:
        with _guard(case, "its inputs and the float64 result", device):
            prepared = prepare_case(case, device)
        for implementation in implementations:
            skip = reasons[implementation.name]
            if skip:
                results.append(CaseResult(case, implementation.name, "skipped", skip))
                continue
            with _guard(case, implementation.name, device):
                results.append(judge_case(prepared, implementation))
    except Exception as error:  # the suite goes on to the next case; the text is the result
        results = [CaseResult(case, name, "failed", describe(error)) for name in reasons]
    finally:
        if device.type == "cuda" and case.needs_bytes:
            torch.cuda.empty_cache()
    return results


def _guard(case: Case, what: str, device: torch.device) -> AbstractContextManager[None]:
    return watchdog(HANG_SECONDS, f"case {case.name}: {what}") if device.type == "cuda" else nullcontext()


def judge(prepared: Prepared, implementation: Implementation) -> CaseResult:
    """Run the implementation RUNS times on prepared inputs, memory poisoned, and compare. Never raises."""
    case, inputs, name = prepared.case, prepared.inputs, implementation.name
    device = inputs.q.device
    started = time.perf_counter()
    ran: Ran | None = None
    try:
        refusal = implementation.reject(case, inputs)
        if refusal is not None:
            return CaseResult(case, name, "rejected", refusal)
        explain = implementation.explain_sdpa if case.entry == "sdpa" else implementation.explain
        if explain is not None:
            ran = _ran(explain(inputs.q, inputs.k, inputs.v, **arguments(case, inputs)))
        if case.dead_nan and ran is not None and ran.impl == "torch":
            why = "run by PyTorch, in which NaN in a masked key may reach the output"
            return CaseResult(case, name, "skipped", why, ran=ran)
        before = _fingerprint(inputs)
        with poisoned_memory(device):
            out, lse = call(case, inputs, implementation)
            bitwise_equal = True
            for _ in range(RUNS - 1):
                again, lse_again = call(case, inputs, implementation)
                bitwise_equal = bitwise_equal and same_bits(out, again) and same_bits(lse, lse_again)
                del again, lse_again
        seconds = time.perf_counter() - started
        if explain is not None:
            # Again: the hash of a binary that was compiled on demand is known only now.
            ran = _ran(explain(inputs.q, inputs.k, inputs.v, **arguments(case, inputs)))
        reasons = _contract_breaches(prepared, out, lse, before)
        output = compare_output(out, prepared.ref, prepared.twin)
        lse_result = None if lse is None else compare_lse(lse, prepared.lse, case.dtype)
    except Exception as error:  # a case that raises has failed, and says how
        return CaseResult(case, name, "failed", describe(error), ran=ran, seconds=time.perf_counter() - started)

    if not output.passed:
        reasons.append(f"output: {output.reason}")
    if lse_result is not None and not lse_result.passed:
        reasons.append(f"lse: {lse_result.reason}")
    if not bitwise_equal:
        reasons.append(f"{RUNS} runs on the same input are not bitwise equal")
    return CaseResult(
        case,
        name,
        "failed" if reasons else "passed",
        "; ".join(reasons),
        output=output,
        lse=lse_result,
        bitwise_equal=bitwise_equal,
        ran=ran,
        seconds=seconds,
    )


def _why_skip(case: Case, implementation: Implementation, device: torch.device) -> str:
    if case.needs_bytes:
        need = f"needs {case.needs_bytes / 2**30:.0f} GiB of GPU memory"
        if device.type != "cuda":
            return f"{need}; this is a CPU"
        free = torch.cuda.mem_get_info(device)[0]
        if free < case.needs_bytes:
            return f"{need}; {free / 2**30:.0f} GiB is free"
    if case.entry == "sdpa" and implementation.sdpa is None:
        return f"{implementation.name} has no SDPA entry"
    return ""


def call(case: Case, inputs: Inputs, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One call, finished on the device: (o, lse), or (o, None) where the case asks for no LSE."""
    function = implementation.sdpa if case.entry == "sdpa" else implementation.attention
    assert function is not None, "run_case skips these"
    result = function(inputs.q, inputs.k, inputs.v, **arguments(case, inputs))
    synchronize(inputs.q.device)
    if case.return_lse:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"return_lse=True gave {type(result).__name__}, not (o, lse)")
        return result
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"return_lse=False gave {type(result).__name__}, not a tensor")
    return result, None


def synchronize(device: torch.device) -> None:
    """Wait for what was launched, so that a fault or a hang shows where it was made."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arguments(case: Case, inputs: Inputs) -> dict[str, object]:
    """The keyword arguments of the case's entry."""
    if case.entry == "sdpa":
        return {
            "attn_mask": inputs.attn_mask,
            "is_causal": case.causal,
            "scale": case.scale,
            "enable_gqa": case.heads_q != case.heads_k,
        }
    return {
        **case.options,
        "attn_mask": inputs.attn_mask,
        "return_lse": case.return_lse,
        "layout": case.layout,
    }


def _contract_breaches(
    prepared: Prepared, out: torch.Tensor, lse: torch.Tensor | None, before: list[torch.Tensor]
) -> list[str]:
    """What is wrong with the results apart from their values: memory, device, and inputs that were written to."""
    inputs = prepared.inputs
    breaches = []
    if out.device != inputs.q.device or (lse is not None and lse.device != inputs.q.device):
        breaches.append(f"the output is on {out.device}, the inputs are on {inputs.q.device}")
    if out.numel() and out.shape[-1] > 1 and out.stride(-1) != 1:
        breaches.append(f"the output's last dimension has stride {out.stride(-1)}, not 1")
    storages = {x.untyped_storage().data_ptr() for x in (inputs.q, inputs.k, inputs.v)}
    if out.numel() and out.untyped_storage().data_ptr() in storages:
        breaches.append("the output shares memory with an input")
    if not all(map(same_bits, before, _fingerprint(inputs))):
        breaches.append("an input was modified")
    return breaches


def _fingerprint(inputs: Inputs) -> list[torch.Tensor]:
    return fingerprint(inputs.q, inputs.k, inputs.v, inputs.attn_mask)


def fingerprint(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Copies of the tensors' values (not of their storage, which may span gigabytes; stride 0 is not materialised)."""
    present = [x for x in tensors if x is not None]
    return [x[:1].clone() if x.dim() and x.shape[0] > 1 and x.stride(0) == 0 else x.clone() for x in present]


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bitwise equality, NaN included; one batch entry at a time to bound memory."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype == torch.bool:
        return torch.equal(a, b)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if a.dim() == 0:
        return torch.equal(a.view(bits), b.view(bits))
    return all(torch.equal(x.view(bits), y.view(bits)) for x, y in zip(a, b, strict=True))


def _ran(plan: Plan) -> Ran:
    specialisation = None if plan.specialisation is None else plan.specialisation.name
    return Ran(plan.impl, plan.kernel, specialisation, plan.binary_sha256)


def describe(error: Exception) -> str:
    """The error in words, with the innermost line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}{where}"
