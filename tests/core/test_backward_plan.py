"""The plan of a call that needs a gradient: which implementation runs both passes, and why no other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flashcore
from flashcore import backward_plan, evidence
from flashcore.backward_plan import make_backward_plan, request
from flashcore.backward_spec import BackwardSpec
from flashcore.errors import UnsupportedError
from flashcore.evidence import Comparison, Index, Timing
from flashcore.kernels.arguments import Pointer
from flashcore.kernels.program import Launch, Program, Workspace
from flashcore.kernels.registry import KERNELS, Kernel
from flashcore.kernels.specialisation import Specialisation
from flashcore.plan import make_plan
from flashcore.runtime import store
from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec, Options
from flashcore.target import Target

SHA256 = "5" * 64


class Backward:
    """Two launches; takes no softcap. Reproducible where that is asked for."""

    KERNELS = ("first", "second")

    def __init__(self, impl: str) -> None:
        self.IMPL = impl

    def reject(self, spec: BackwardSpec, arch: str | None, interpreted: bool) -> str | None:
        return "takes no softcap" if spec.call.softcap else None

    def program(self, spec: BackwardSpec, arch: str, sm_count: int) -> Program:
        launches = tuple(
            Launch(Specialisation(kernel, f"{self.IMPL}-{kernel}-{arch}", (), (), 4, 1), sm_count, (Pointer("do"),))
            for kernel in self.KERNELS
        )
        return Program(launches, (Workspace("delta", (2, 3), torch.float32), Workspace("dq_sum", (2**20,), torch.float32)))

    def reproducible(self, spec: BackwardSpec) -> bool:
        return spec.deterministic


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The states of kernels that are not verified, to be written into; every binary there is, is shipped."""
    found: dict[str, str] = {}
    location = store.Location("shipped", SimpleNamespace(sha256=SHA256), Path("somewhere.cubin"))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)
    monkeypatch.setattr(evidence, "state", lambda kernel, sha256, target: found.get(kernel, "verified"))
    monkeypatch.setattr(backward_plan, "BACKWARDS", {impl: Backward(impl) for impl in ("hopper", "portable")})
    for kernel in Backward.KERNELS:
        monkeypatch.setitem(KERNELS, kernel, Kernel(kernel, "nowhere", kernel, (), None))
    return found


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch, states: dict[str, str]) -> dict[frozenset[str], str]:
    """The faster of two by measurements of both passes, by their names; to be written into."""
    found: dict[frozenset[str], str] = {}

    def compare(spec: AttentionSpec, target: Target, first: str, second: str, *, direction: str) -> Comparison | None:
        assert direction == "fwdbwd"
        winner = found.get(frozenset((first, second)))
        return None if winner is None else Comparison(winner, second if winner == first else first, "is slower here")

    monkeypatch.setattr(evidence, "compare", compare)
    return found


def _measured(faster: dict[frozenset[str], str], *order: str) -> None:
    """Each of these was measured to be faster than those after it."""
    faster |= {frozenset((one, other)): one for i, one in enumerate(order) for other in order[i + 1 :]}


def _asked(spec: AttentionSpec, *, deterministic: bool = False) -> BackwardSpec:
    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bshd", deterministic=deterministic)
    return request(spec, options, None, (True, True, True, False), do=None, dlse=False)


def test_the_same_implementation_runs_both_passes(make_spec: Callable, h200: Target, faster: dict) -> None:
    spec = make_spec()
    for order in (("hopper", "torch", "portable"), ("portable", "hopper", "torch")):
        _measured(faster, *order)
        plan = make_plan(spec, h200, "auto", _asked(spec))
        assert plan.impl == plan.backward.impl == order[0] and plan.kernel == f"{order[0]}_forward"
        rejected = dict(plan.rejected)
        assert "has no backward pass" in rejected["small"] and rejected.keys() == {"small", *order} - {order[0]}
        for impl in order:
            if impl != "torch":
                named = make_plan(spec, h200, impl, _asked(spec))
                assert (named.impl, named.backward.impl, named.reason) == (impl, impl, "asked for by name")


def test_without_a_measurement_of_both_passes_a_call_stays_pytorchs(make_spec: Callable, h200: Target, faster: dict) -> None:
    spec = make_spec()
    plan = make_plan(spec, h200, "auto", _asked(spec))
    assert plan.impl == "torch" and plan.backward is None
    assert "has no measurement of forward and backward near this call" in dict(plan.rejected)["hopper"]
    _measured(faster, "portable", "torch")
    assert make_plan(spec, h200, "auto", _asked(spec)).impl == "portable"
    _measured(faster, "torch", "portable")
    assert make_plan(spec, h200, "auto", _asked(spec)).impl == "torch"


@pytest.mark.parametrize("options", [{"window": (5, 0)}, {"return_lse": True}], ids=str)
def test_what_pytorch_has_no_fused_kernel_for_is_ours(options: dict, make_spec: Callable, h200: Target) -> None:
    spec = make_spec(**options)
    plan = make_plan(spec, h200, "auto", _asked(spec))
    assert plan.impl == "hopper" and plan.reason.startswith("the first choice of those that apply")


def test_the_forward_pass_keeps_the_log_sum_exp(make_spec: Callable, h200: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.kernels.hopper import binding

    asked: list[bool] = []
    specialise = binding.specialise_call
    monkeypatch.setattr(
        binding, "specialise_call", lambda spec, *rest: (asked.append(spec.return_lse), specialise(spec, *rest))[1]
    )
    spec = make_spec()
    assert not spec.return_lse and make_plan(spec, h200, "hopper", _asked(spec)).backward
    assert asked == [True]


def test_a_named_one_that_cannot_run_the_backward_pass_raises(make_spec: Callable, h200: Target) -> None:
    capped = make_spec(softcap=5.0)
    with pytest.raises(UnsupportedError, match=r"impl 'portable': takes no softcap \(backward pass\)"):
        make_plan(capped, h200, "portable", _asked(capped))
    with pytest.raises(UnsupportedError, match=r"impl 'portable': takes no softcap \(backward pass\)"):
        make_backward_plan(_asked(capped), h200, "portable")
    assert make_plan(capped, h200, "portable").backward is None
    plan = make_plan(capped, h200, "auto", _asked(capped))
    assert plan.impl == "torch" and "takes no softcap (backward pass)" in plan.reason
    with pytest.raises(UnsupportedError, match="impl 'small': has no backward pass, and a gradient is needed; use 'hopper'"):
        make_plan(make_spec(), h200, "small", _asked(make_spec()))


def test_the_worst_binary_speaks_for_a_pass(
    make_spec: Callable, h200: Target, faster: dict, states: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    _measured(faster, "hopper", "portable", "torch")
    for state, chosen, strictly in (
        ("verified", "hopper", "hopper"),
        ("compiled", "hopper", "torch"),
        ("experimental", "torch", "torch"),
    ):
        states["second"] = state
        assert make_backward_plan(_asked(spec), h200, "hopper").evidence == state
        monkeypatch.delenv("FLASHCORE_STRICT", raising=False)
        assert make_plan(spec, h200, "auto", _asked(spec)).impl == chosen
        monkeypatch.setenv("FLASHCORE_STRICT", "1")
        strict = make_plan(spec, h200, "auto", _asked(spec))
        assert strict.impl == strictly and (strictly == "hopper" or "(backward pass)" in strict.reason)
        assert make_plan(spec, h200, "hopper", _asked(spec)).impl == "hopper"
    states.clear()
    states["hopper_forward"] = "experimental"
    assert make_plan(spec, h200, "auto", _asked(spec)).impl == "portable"


def test_a_binary_that_is_not_there_is_named(make_spec: Callable, h200: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    located = store.locate
    monkeypatch.setattr(store, "locate", lambda s, arch: None if s.kernel == "second" else located(s, arch))
    with pytest.raises(UnsupportedError, match=r"impl 'hopper': has no binary for this: hopper-second-sm_90a is not among"):
        make_plan(make_spec(), h200, "hopper", _asked(make_spec()))


def test_bitwise_equal_gradients_are_ours_wherever_we_have_some(make_spec: Callable, h200: Target, faster: dict) -> None:
    spec = make_spec()
    _measured(faster, "torch", "hopper", "portable")
    assert make_plan(spec, h200, "auto", _asked(spec)).impl == "torch"
    plan = make_plan(spec, h200, "auto", _asked(spec, deterministic=True))
    assert plan.impl == "hopper" and plan.backward.reproducible and "bitwise equal" in dict(plan.rejected)["torch"]
    capped = make_spec(softcap=5.0)
    assert make_plan(capped, h200, "auto", _asked(capped, deterministic=True)).impl == "torch"


def test_where_only_ours_can_be_recorded_pytorch_is_the_last_resort(make_spec: Callable, h200: Target, faster: dict) -> None:
    spec, capped = make_spec(), make_spec(softcap=5.0)
    _measured(faster, "torch", "hopper", "portable")
    assert make_plan(spec, h200, "auto", _asked(spec), ours=True).impl == "hopper"
    assert make_plan(capped, h200, "auto", _asked(capped), ours=True).impl == "torch"


def test_explain_shows_the_backward_pass(make_spec: Callable, h200: Target) -> None:
    spec = make_spec()
    for deterministic, kind in ((False, "by atomics: its last bits vary from run to run"), (True, "bitwise equal")):
        plan = make_plan(spec, h200, "hopper", _asked(spec, deterministic=deterministic))
        lines = str(plan).splitlines()
        assert plan.backward.workspace_bytes == 4 * 2**20 + 24
        (at,) = (i for i, line in enumerate(lines) if line.startswith("gradient    hopper, " + kind))
        assert lines[at].endswith("4.0 MiB of workspace")
        assert lines[at + 1 : at + 5] == [
            "kernel      hopper-first-sm_90a",
            "grid        132 programs",
            f"binary      shipped, SHA-256 {SHA256}",
            "evidence    verified",
        ]
        assert "kernel      hopper-second-sm_90a" in lines and lines[-1].startswith("evidence")
    assert "gradient" not in str(make_plan(spec, h200, "hopper"))


def test_the_cost_of_determinism_is_shown_where_it_was_measured(
    make_spec: Callable, h200: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"batch": 1, "heads": 8, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64, "causal": False}
    us = {"flashcore-hopper": 100.0, "flashcore-hopper-deterministic": 112.0}
    timing = Timing(**sizes, precision="half", mask="none", direction="bwd", us=us)
    sources = {kernel: kernel_hash(kernel) for kernel in evidence.kernels_of("hopper", "bwd")}
    here = Index(gpu=h200.name, arch="sm_90a", sources=sources, verified={}, peaks=None, timings=[timing])
    spec = make_spec(1, 8, 8, 512, 512)

    def line(index: Index, call: AttentionSpec = spec) -> str | None:
        monkeypatch.setattr(evidence, "indexes", lambda: (index,))
        found = str(make_plan(call, h200, "hopper", _asked(call)))
        return next((line for line in found.splitlines() if line.startswith("determinism ")), None)

    assert line(here).startswith(
        "determinism 1.12 times as long, the backward pass alone, at the nearest measured shape (1,8,512,64)"
    )
    for other in (
        {"gpu": "NVIDIA H100"},
        {"sources": {**sources, "hopper_forward": "0" * 64}},
        {"timings": [timing.model_copy(update={"direction": "fwd"})]},
        {"timings": [timing.model_copy(update={"us": {"flashcore-hopper": 100.0}})]},
        {"timings": [timing.model_copy(update={"causal": True})]},
        {"timings": [timing.model_copy(update={"seqlen_q": 4096, "seqlen_k": 4096})]},
    ):
        assert line(here.model_copy(update=other)) is None, other
    assert line(here, make_spec(1, 8, 8, 0, 512)) is None
    monkeypatch.setattr(Backward, "reproducible", lambda self, spec: True)
    assert line(here) is None  # there is nothing to pay for


def test_what_is_asked_follows_from_the_tensors(monkeypatch: pytest.MonkeyPatch, h200: Target) -> None:
    asked: list[BackwardSpec] = []
    monkeypatch.setattr(Backward, "reject", lambda self, spec, *rest: asked.append(spec))
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: h200))
    q, k, v = (torch.zeros(2, 128, 4, 64, dtype=torch.float16) for _ in range(3))
    mask = torch.zeros(128, 128, requires_grad=True)

    def explain(*wanted: torch.Tensor, **options: Any) -> BackwardSpec | None:
        for t in (q, k, v):
            t.requires_grad_(any(t is one for one in wanted))
        asked.clear()
        flashcore.explain(q, k, v, impl="portable", **options)
        return asked[0] if asked else None

    assert explain() is None and explain(attn_mask=mask.detach()) is None
    first = explain(q)
    assert (first.dq, first.dkv, first.dmask_shape, first.dlse, first.deterministic) == (True, False, None, False, False)
    assert first.call.return_lse and first.do_aligned and first.do_strides == first.call.o_strides
    assert explain(v) == replace(first, dq=False, dkv=True) == explain(k)
    assert explain(q, return_lse=True) == replace(first, dlse=True)
    assert explain(q, deterministic=True) == replace(first, deterministic=True)
    assert explain(attn_mask=mask).dmask_shape == (1, 1, 128, 128)
    with torch.no_grad():
        assert explain(q) is None
    try:
        torch.use_deterministic_algorithms(True)
        assert explain(q).deterministic and not explain(q, deterministic=False).deterministic
    finally:
        torch.use_deterministic_algorithms(False)
