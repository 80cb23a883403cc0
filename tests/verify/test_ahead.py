"""Compiling ahead: what a run will need, no more, and that a failure is left to the case that needs it."""

from types import SimpleNamespace

import pytest
import torch

from flashcore.errors import CompileError
from flashcore.kernels.registry import BINDINGS, EMPTY
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime import store
from flashcore.target import Target
from flashcore.verify.ahead import compile_ahead, missing
from flashcore.verify.backward_subject import backward_implementations
from flashcore.verify.cases import Case
from flashcore.verify.inputs import build
from flashcore.verify.subject import flashcore_implementations, spec_of

H200 = Target(name="NVIDIA H200", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)
NO_GPU = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=True)
CASE = Case(name="plain", seqlen_q=197, seqlen_k=333)


def test_a_forward_case_takes_one_binary_of_each_kernel_that_takes_it() -> None:
    for implementation in flashcore_implementations("ours"):
        binding = BINDINGS[implementation.name]
        (binary,) = implementation.binaries(CASE, H200)
        assert binary == binding.specialise_call(spec_of(CASE, build(CASE, torch.device("cpu"))), "sm_90a", 132)
        assert implementation.binaries(CASE, NO_GPU) == ()
    hopper = flashcore_implementations("hopper")[0]
    assert hopper.binaries(Case(name="single", dtype=torch.float32), H200) == ()


def test_a_backward_case_takes_the_forwards_and_each_launchs() -> None:
    taken = {one.name: [b.kernel for b in one.binaries(CASE, H200)] for one in backward_implementations("ours")}
    assert taken["portable"] == ["portable_forward", *(f"portable_backward_{part}" for part in ("delta", "dkdv", "dq"))]
    hopper = ["hopper_forward", *(f"hopper_backward{part}" for part in ("_prepare", "", "_finish"))]
    assert taken["hopper"] == taken["hopper-deterministic"] == hopper
    assert all(one.binaries(CASE, NO_GPU) == () for one in backward_implementations("ours"))


def test_only_what_nobody_has_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = flashcore_implementations("ours")[0].binaries(CASE, H200) * 3
    shipped = SimpleNamespace(origin="shipped")
    monkeypatch.setattr(store, "locate", lambda one, arch: shipped if one == EMPTY else SimpleNamespace(origin="compile"))
    assert missing([first, EMPTY, second, third], H200) == [first]
    assert missing([first], NO_GPU) == []
    monkeypatch.setattr(store, "locate", lambda one, arch: None)  # no Triton
    assert missing([first], H200) == []


def test_a_failure_is_counted_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def obtain(specialisation: Specialisation, target: Target) -> None:
        if specialisation == EMPTY:
            raise CompileError("ptxas: no")
        compiled.append(specialisation.name)

    monkeypatch.setattr(store, "obtain", obtain)
    needed = [EMPTY, *(one.binaries(CASE, H200)[0] for one in flashcore_implementations("ours"))]
    seen: list[int] = []
    assert compile_ahead(needed, H200, lambda: seen.append(1)) == 1
    assert sorted(compiled) == sorted(one.name for one in needed[1:]) and len(seen) == len(needed)
