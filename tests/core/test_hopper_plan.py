"""The Hopper kernel in plans: what it is chosen for, and what it refuses with which words."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashcore import evidence
from flashcore.build.gates import violations
from flashcore.build.machine_code import MachineCode
from flashcore.errors import UnsupportedError
from flashcore.evidence import Index, Timing
from flashcore.kernels.registry import KERNELS
from flashcore.plan import make_plan
from flashcore.runtime import store
from flashcore.sources import kernel_hashes
from flashcore.target import Target

SHA256 = "5" * 64
A100 = Target(name="NVIDIA A100", arch="sm_80", capability=(8, 0), sm_count=108, interpreted=False)
B200 = Target(name="NVIDIA B200", arch="sm_100a", capability=(10, 0), sm_count=148, interpreted=False)
CPU = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=False)
INTERPRETER = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=True)
HOPPER = KERNELS["hopper_forward"]


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every binary there is, is shipped."""
    location = store.Location("shipped", SimpleNamespace(sha256=SHA256), Path("somewhere.cubin"))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)


def _evidence(monkeypatch: pytest.MonkeyPatch, *timings: Timing) -> None:
    verified = {SHA256: ("anything", 15)}
    fields = {"gpu": "NVIDIA H200", "arch": "sm_90a", "sources": kernel_hashes(), "verified": verified, "peaks": None}
    monkeypatch.setattr(evidence, "indexes", lambda: (Index(**fields, timings=list(timings)),))


def _timing(us: tuple[float, float, float], head_dim: int) -> Timing:
    names = ("flashcore-hopper", "flashcore-portable", "sdpa-auto")
    sizes = {"batch": 2, "heads": 4, "seqlen_q": 128, "seqlen_k": 128, "head_dim": head_dim, "causal": False}
    return Timing(**sizes, precision="half", mask="none", us=dict(zip(names, us, strict=True)))


@pytest.mark.parametrize("us", [(5, 10, 8), (10, 5, 8), (10, 8, 5)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_auto_takes_the_fastest_by_evidence(us: tuple, head_dim: int, make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, _timing(us, head_dim))
    for dtype in (torch.float16, torch.bfloat16):
        plan = make_plan(make_spec(head_dim=head_dim, dtype=dtype), h200, "auto")
        assert plan.impl == ("hopper", "portable", "torch")[us.index(5)] and len(plan.rejected) == 2
        assert all("is slower here by measurement" in why for _, why in plan.rejected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (30, 5)},
        {"softcap": 20.0},
        {"heads_q": 8, "heads_k": 2},
        {"seqlen_q": 77, "seqlen_k": 131},
        {"return_lse": True},
        {"layout": "bhsd"},
        {"head_dim": 128, "head_dim_v": 64},
        {"head_dim": 8},
        {"head_dim": 256},
    ],
    ids=str,
)
def test_without_measurements_it_is_preferred_wherever_it_runs(options: dict, make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch)
    plan = make_plan(make_spec(**options), h200, "auto")
    assert (plan.impl, plan.kernel, plan.evidence) == ("hopper", "hopper_forward", "verified") and plan.grid > 0
    assert "rejected    portable: comes after hopper" in str(plan) and plan.specialisation.name in str(plan)
    assert make_plan(make_spec(**options), h200, "hopper").specialisation == plan.specialisation


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": torch.ones(128, 128, dtype=torch.bool)}, "mask"),
        ({"mask": torch.zeros(128, 128)}, "mask"),
        ({"dtype": torch.float32}, "float32"),
        ({"needs_grad": True}, "no backward"),
        ({"scale": -0.5}, "scale"),
        ({"scale": 0.0}, "scale"),
        ({"offset": 1}, "16"),
        ({"head_dim": 60}, "8"),
        ({"head_dim": 64, "head_dim_v": 36}, "8"),
        ({"seqlen_k": 0}, "key"),
    ],
    ids=str,
)
def test_what_it_does_not_take_goes_to_another_and_raises_by_name(options, words, make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch)
    spec = make_spec(**options)
    with pytest.raises(UnsupportedError, match=rf"^impl 'hopper': .*{words}"):
        make_plan(spec, h200, "hopper")
    plan = make_plan(spec, h200, "auto")
    assert plan.impl != "hopper" and words in dict(plan.rejected)["hopper"]


@pytest.mark.parametrize("target", [A100, B200, CPU, INTERPRETER], ids=lambda target: f"{target.arch}-{target.interpreted}")
def test_it_needs_sm_90a(target: Target, make_spec, monkeypatch) -> None:
    _evidence(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"^impl 'hopper': .*sm_90a"):
        make_plan(make_spec(), target, "hopper")
    assert make_plan(make_spec(), target, "auto").impl == ("torch" if target.arch is None else "portable")


def test_it_is_shipped_for_sm_90a_only() -> None:
    assert HOPPER.archs == ("sm_90a",) and len(HOPPER.shipped("sm_90a")) > 1


def test_its_binaries_are_held_to_hgmma_no_spill_in_loops_and_the_shared_memory_of_the_gpu() -> None:
    limit = 227 * 1024
    good = MachineCode(
        registers=168,
        stack=0,
        shared=limit,
        spill_loads=0,
        spill_stores=0,
        spills_in_loops=0,
        matrix={"HGMMA": 8},
        async_copies=8,
    )
    for specialisation in HOPPER.shipped("sm_90a"):
        assert violations(specialisation, "sm_90a", good) == []
        for bad in ({"matrix": {"HMMA": 8}}, {"spill_stores": 1, "spills_in_loops": 1}, {"shared": limit + 1}):
            assert len(violations(specialisation, "sm_90a", replace(good, **bad))) == 1


@pytest.mark.parametrize("arch", ["sm_90a"])
def test_what_is_shipped_is_what_calls_take(arch: str, make_spec, h200) -> None:
    shipped = set(HOPPER.shipped(arch))
    for head_dim in (8, 64, 72, 96, 128, 160, 192, 256):
        for length in (1, 128, 8192):
            for options in ({}, {"causal": True}, {"window": (64, 0)}, {"softcap": 30.0}, {"return_lse": True}):
                spec = make_spec(seqlen_q=length, seqlen_k=length, head_dim=head_dim, **options)
                assert HOPPER.binding.specialise_call(spec, arch, 132) in shipped, (head_dim, length, options)
