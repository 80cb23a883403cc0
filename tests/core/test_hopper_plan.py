"""The kernels for Hopper in plans: what each is chosen for, and what it refuses with which words."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashcore import evidence
from flashcore.build.gates import SPILL_EXCEPTIONS, violations
from flashcore.build.machine_code import MachineCode
from flashcore.errors import UnsupportedError
from flashcore.evidence import Index, Timing
from flashcore.kernels.registry import KERNELS, Kernel
from flashcore.plan import make_plan
from flashcore.runtime import store
from flashcore.sources import kernel_hashes
from flashcore.target import Target

SHA256 = "5" * 64
A100 = Target(name="NVIDIA A100", arch="sm_80", capability=(8, 0), sm_count=108, interpreted=False)
B200 = Target(name="NVIDIA B200", arch="sm_100a", capability=(10, 0), sm_count=148, interpreted=False)
CPU = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=False)
INTERPRETER = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=True)
SMALL, HOPPER = KERNELS["small_forward"], KERNELS["hopper_forward"]


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every binary there is, is shipped."""
    location = store.Location("shipped", SimpleNamespace(sha256=SHA256), Path("somewhere.cubin"))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)


def _evidence(monkeypatch: pytest.MonkeyPatch, *timings: Timing) -> None:
    verified = {SHA256: ("anything", 15)}
    fields = {"gpu": "NVIDIA H200", "arch": "sm_90a", "sources": kernel_hashes(), "verified": verified, "peaks": None}
    monkeypatch.setattr(evidence, "indexes", lambda: (Index(**fields, timings=list(timings)),))


IMPLS = ("small", "hopper", "portable", "torch")
CONTENDERS = ("flashcore-small", "flashcore-hopper", "flashcore-portable", "sdpa-auto")


def _timing(
    us: tuple[float | None, ...], head_dim: int = 64, length: int = 128, heads: int = 4, causal: bool = False
) -> Timing:
    """The times of the four at one shape, of batch 2; None for one that does not run there."""
    sizes = {"batch": 2, "heads": heads, "seqlen_q": length, "seqlen_k": length, "head_dim": head_dim, "causal": causal}
    times = {name: time for name, time in zip(CONTENDERS, us, strict=True) if time is not None}
    return Timing(**sizes, precision="half", mask="none", us=times)


@pytest.mark.parametrize("us", [(5, 7, 10, 8), (7, 5, 10, 8), (8, 10, 5, 7), (10, 8, 7, 5)])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
def test_auto_takes_the_fastest_by_evidence(us: tuple, head_dim: int, make_spec, h200, monkeypatch) -> None:
    if head_dim > 128:
        us = (None, *us[1:])
    _evidence(monkeypatch, _timing(us, head_dim))
    fastest = min((time, impl) for time, impl in zip(us, IMPLS, strict=True) if time is not None)[1]
    for dtype in (torch.float16, torch.bfloat16):
        plan = make_plan(make_spec(head_dim=head_dim, dtype=dtype), h200, "auto")
        assert plan.impl == fastest
        rejected = dict(plan.rejected)
        assert list(rejected) == [impl for impl in IMPLS if impl != fastest]
        if head_dim > 128:
            assert rejected.pop("small") == f"takes head dims up to 128; got {head_dim}"
        assert all("is slower here by measurement" in why for why in rejected.values())


def test_where_the_kernels_change_places_the_nearest_shape_decides(make_spec, h200, monkeypatch) -> None:
    few, many = _timing((3, 8, 7, 9), length=256), _timing((30, 25, 40, 35), length=256, heads=32)
    _evidence(monkeypatch, few, many)
    verdicts = {"small": ("hopper", "8.0 us against 3.0 for small"), "hopper": ("small", "30.0 us against 25.0 for hopper")}
    for heads, chosen in ((1, "small"), (4, "small"), (11, "small"), (12, "hopper"), (32, "hopper")):
        plan = make_plan(make_spec(2, heads, heads, 256, 256), h200, "auto")
        assert (plan.impl, plan.reason) == (chosen, "the fastest of those measured near this call"), heads
        loser, times = verdicts[chosen]
        assert f"is slower here by measurement: {times} at" in dict(plan.rejected)[loser]
    # too far from both, the order of preference decides
    assert make_plan(make_spec(2, 4, 4, 64, 16), h200, "auto").reason.startswith("the first choice")


def test_who_nothing_compares_with_the_first_is_compared_with_what_beats_it(make_spec, h200, monkeypatch) -> None:
    # the small kernel does not take the second shape, so that it and the hopper kernel were never timed beside one another
    few, many = _timing((9, None, None, 5), length=256), _timing((None, 3, 7, 8), length=256)
    _evidence(monkeypatch, few, many)
    plan = make_plan(make_spec(2, 4, 4, 256, 256), h200, "auto")
    assert (plan.impl, plan.reason) == ("hopper", "the fastest of those measured near this call")
    rejected = dict(plan.rejected)
    assert "9.0 us against 5.0 for PyTorch's SDPA" in rejected["small"]
    assert "8.0 us against 3.0 for hopper" in rejected["torch"] and "7.0 us against 3.0 for hopper" in rejected["portable"]
    assert list(rejected) == ["small", "portable", "torch"]


def test_a_head_dim_that_cannot_hold_the_calls_keys_is_no_measure_of_it(make_spec, h200, monkeypatch) -> None:
    # at head dim 64 the small kernel takes 1024 keys, at 128 no more than 512
    _evidence(monkeypatch, _timing((10, 5, 8, 8), head_dim=128, length=512))
    assert make_plan(make_spec(2, 4, 4, 512, 600), h200, "auto").impl == "small"


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "small"),
        ({"causal": True}, "small"),
        ({"window": (-1, 5)}, "small"),
        ({"heads_q": 8, "heads_k": 2}, "small"),
        ({"seqlen_q": 77, "seqlen_k": 131, "causal": True}, "small"),
        ({"seqlen_q": 131, "seqlen_k": 77, "causal": True}, "small"),
        ({"return_lse": True}, "small"),
        ({"layout": "bhsd", "dtype": torch.bfloat16}, "small"),
        ({"head_dim": 128, "head_dim_v": 64}, "small"),
        ({"head_dim": 8}, "small"),
        ({"seqlen_k": 1024}, "small"),
        ({"seqlen_q": 0}, "small"),
        ({"seqlen_k": 1025}, "hopper"),
        ({"seqlen_k": 513, "head_dim": 128}, "hopper"),
        ({"seqlen_q": 64 * 165}, "small"),
        ({"seqlen_q": 64 * 165 + 1}, "hopper"),
        ({"window": (30, 5)}, "hopper"),
        ({"softcap": 20.0}, "hopper"),
        ({"head_dim": 256}, "hopper"),
        ({"head_dim": 64, "head_dim_v": 136}, "hopper"),
        ({"dtype": torch.float32}, "portable"),
        ({"mask": torch.ones(128, 128, dtype=torch.bool)}, "portable"),
    ],
    ids=str,
)
def test_without_measurements_the_first_that_runs_is_taken(options: dict, chosen: str, make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch)
    plan = make_plan(make_spec(**options), h200, "auto")
    assert (plan.impl, plan.kernel, plan.evidence) == (chosen, f"{chosen}_forward", "verified")
    assert plan.reason == "the first choice of those that apply; nothing near this call was measured"
    assert (plan.grid > 0) == (options.get("seqlen_q") != 0)
    rejected = dict(plan.rejected)
    assert list(rejected) == [impl for impl in IMPLS if impl != chosen]
    for impl in IMPLS[IMPLS.index(chosen) + 1 :]:
        assert rejected[impl] == f"comes after {chosen}, and no measurement says that it is faster here"
    for impl in ("small", "hopper", "portable"):
        if impl in rejected and not rejected[impl].startswith("comes after"):
            with pytest.raises(UnsupportedError, match=rf"^impl '{impl}': {re.escape(rejected[impl])}$"):
                make_plan(make_spec(**options), h200, impl)
        else:
            named = make_plan(make_spec(**options), h200, impl)
            assert named.reason == "asked for by name" and (impl != chosen or named.specialisation == plan.specialisation)


def test_what_explain_says_of_a_small_call(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch)
    assert str(make_plan(make_spec(1, 8, 8, 512, 512, causal=True), h200, "auto")).splitlines() == [
        "impl        small",
        "why         the first choice of those that apply; nothing near this call was measured",
        "kernel      small_forward-fp16-d64-causal-c2k256n128",
        # 64 tiles, of which two blocks share each
        "grid        128 programs",
        f"binary      shipped, SHA-256 {SHA256}",
        "evidence    verified",
        "form        hand-chosen: nothing near this call was searched",
        "rejected    hopper: comes after small, and no measurement says that it is faster here",
        "rejected    portable: comes after small, and no measurement says that it is faster here",
        "rejected    torch: comes after small, and no measurement says that it is faster here",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": torch.ones(128, 128, dtype=torch.bool)}, "mask"),
        ({"mask": torch.zeros(128, 128)}, "mask"),
        ({"dtype": torch.float32}, "float32"),
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


@pytest.mark.parametrize("impl", ["small", "hopper"])
@pytest.mark.parametrize("target", [A100, B200, CPU, INTERPRETER], ids=lambda target: f"{target.arch}-{target.interpreted}")
def test_they_need_sm_90a(target: Target, impl: str, make_spec, monkeypatch) -> None:
    _evidence(monkeypatch)
    with pytest.raises(UnsupportedError, match=rf"^impl '{impl}': .*sm_90a"):
        make_plan(make_spec(), target, impl)
    plan = make_plan(make_spec(), target, "auto")
    assert plan.impl == ("torch" if target.arch is None else "portable") and "sm_90a" in dict(plan.rejected)[impl]


@pytest.mark.parametrize("kernel", [SMALL, HOPPER], ids=lambda kernel: kernel.id)
def test_they_are_shipped_for_sm_90a_only(kernel: Kernel) -> None:
    assert kernel.archs == ("sm_90a",) and len(kernel.shipped("sm_90a")) > 1


@pytest.mark.parametrize("kernel", [SMALL, HOPPER], ids=lambda kernel: kernel.id)
def test_their_binaries_are_held_to_hgmma_no_spill_in_loops_and_the_shared_memory_of_the_gpu(kernel: Kernel) -> None:
    limit = 227 * 1024
    for specialisation in kernel.shipped("sm_90a"):
        good = MachineCode(
            registers=168,
            stack=0,
            shared=limit,
            spill_loads=0,
            spill_stores=0,
            spills_in_loops=0,
            matrix={"HGMMA": 8},
            async_copies=8,
            cluster_barriers=4 if specialisation.cluster > 1 else 0,
            before_wait=0,
            lanes_apart=0,
        )
        assert violations(specialisation, "sm_90a", good) == []
        for bad in (
            {"matrix": {"HMMA": 8}},
            {"spill_stores": 1, "spills_in_loops": 1},
            {"shared": limit + 1},
            {"before_wait": 1},
            {"lanes_apart": 1},
        ):
            assert len(violations(specialisation, "sm_90a", replace(good, **bad))) == 1


def test_no_binary_of_the_small_kernel_may_spill() -> None:
    assert not {name for _, name in SPILL_EXCEPTIONS} & {s.name for s in SMALL.shipped("sm_90a")}


def test_what_is_shipped_is_what_calls_take(make_spec) -> None:
    shipped = set(HOPPER.shipped("sm_90a"))
    for head_dim in (8, 64, 72, 96, 128, 160, 192, 256):
        for length in (1, 128, 8192):
            for options in ({}, {"causal": True}, {"window": (64, 0)}, {"softcap": 30.0}, {"return_lse": True}):
                spec = make_spec(seqlen_q=length, seqlen_k=length, head_dim=head_dim, **options)
                assert HOPPER.binding.specialise_call(spec, "sm_90a", 132) in shipped, (head_dim, length, options)
