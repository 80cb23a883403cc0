"""make_plan: what is chosen, what is refused, and that every refusal has its reason."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashcore
from flashcore import evidence
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.evidence import Index, Timing
from flashcore.plan import Plan, make_plan
from flashcore.runtime import store
from flashcore.sources import kernel_hash
from flashcore.target import ARCH_OF_CAPABILITY, Target

SHA256 = "5" * 64
CPU = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=False)
INTERPRETER = Target(name="cpu", arch=None, capability=None, sm_count=0, interpreted=True)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every binary there is, is shipped."""
    location = store.Location("shipped", SimpleNamespace(sha256=SHA256), Path("somewhere.cubin"))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)


def _evidence(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    index = Index(
        gpu="NVIDIA H200",
        arch="sm_90a",
        sources={"portable_forward": kernel_hash("portable_forward")},
        verified={SHA256: ("portable_forward-anything", 15)},
        peaks=None,
        timings=[],
    )
    monkeypatch.setattr(evidence, "indexes", lambda: (index.model_copy(update=changes),))


def _timing(ours: float, torchs: float, **shape: object) -> Timing:
    sizes = {"batch": 1, "heads": 8, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64, "causal": False}
    return Timing(
        **{**sizes, "precision": "half", "mask": "none", **shape}, us={"flashcore-portable": ours, "sdpa-auto": torchs}
    )


def test_on_a_cpu_auto_is_torch_and_says_why() -> None:
    q = torch.zeros(1, 4, 2, 8)
    plan = flashcore.explain(q, q, q)
    assert (plan.impl, plan.kernel, plan.specialisation, plan.evidence) == ("torch", None, None, "none")
    (rejected,) = plan.rejected
    assert rejected[0] == "portable" and "NVIDIA GPU" in rejected[1] and rejected[1] in plan.reason
    assert f"rejected    portable: {rejected[1]}" in str(plan)


def test_torch_by_name_rejects_nothing(make_spec, h200, shipped) -> None:
    assert make_plan(make_spec(), h200, "torch") == Plan("torch", "asked for by name")


def test_what_can_run_runs_what_is_verified(make_spec, h200, shipped, monkeypatch) -> None:
    _evidence(monkeypatch)
    spec = make_spec(2, 4, 4, 300, 128)
    for impl in ("auto", "portable"):
        plan = make_plan(spec, h200, impl)
        assert (plan.impl, plan.kernel, plan.evidence, plan.origin) == ("portable", "portable_forward", "verified", "shipped")
        assert plan.binary_sha256 == SHA256 and not plan.interpreted and not plan.rejected
        block_m = dict(plan.specialisation.constants)["BLOCK_M"]
        assert plan.grid == -(-300 // block_m) * 2 * 4
        assert plan.specialisation.name in str(plan) and "evidence    verified" in str(plan) and SHA256 in str(plan)


def test_what_the_kernel_cannot_do_is_refused(make_spec, h200, shipped, monkeypatch) -> None:
    _evidence(monkeypatch)
    turned = torch.zeros(1, 4, 8, 2, dtype=torch.float16).transpose(2, 3)
    from flashcore.spec import AttentionSpec, Options

    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bshd")
    strided = AttentionSpec.from_tensors(turned, turned, turned, None, options, return_lse=False)
    for spec, words in ((strided, "stride 1 in the last dimension"), (make_spec(needs_grad=True), "no backward pass")):
        plan = make_plan(spec, h200, "auto")
        assert plan.impl == "torch" and words in plan.reason and words in plan.rejected[0][1]
        with pytest.raises(UnsupportedError, match=f"impl 'portable': .*{words}"):
            make_plan(spec, h200, "portable")


def test_a_gpu_that_no_kernel_is_built_for_is_refused(make_spec) -> None:
    volta = Target(name="V100", arch=ARCH_OF_CAPABILITY.get((7, 0)), capability=(7, 0), sm_count=80, interpreted=False)
    assert make_plan(make_spec(), volta, "auto").impl == "torch"
    with pytest.raises(NotImplementedError, match="sm_80"):
        make_plan(make_spec(), volta, "portable")


def test_the_interpreter_is_used_by_name_only(make_spec) -> None:
    plan = make_plan(make_spec(), INTERPRETER, "portable")
    assert plan.interpreted and plan.impl == "portable" and plan.binary_sha256 is None and plan.evidence == "none"
    assert "interpreter" in str(plan)
    auto = make_plan(make_spec(), INTERPRETER, "auto")
    assert auto.impl == "torch" and "interpreter" in auto.reason


def test_an_experimental_kernel_is_never_chosen_by_auto(make_spec, h200, shipped, monkeypatch) -> None:
    _evidence(monkeypatch, sources={"portable_forward": "0" * 64})
    plan = make_plan(make_spec(), h200, "auto")
    assert plan.impl == "torch" and "no evidence" in plan.reason
    assert make_plan(make_spec(), h200, "portable").evidence == "experimental"


def test_strict_mode_refuses_what_was_not_verified_on_this_arch(make_spec, h200, shipped, monkeypatch) -> None:
    _evidence(monkeypatch, verified={})
    assert (make_plan(make_spec(), h200, "auto").impl, make_plan(make_spec(), h200, "auto").evidence) == (
        "portable",
        "compiled",
    )
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    plan = make_plan(make_spec(), h200, "auto")
    assert plan.impl == "torch" and "FLASHCORE_STRICT=1" in plan.reason and "sm_90a" in plan.reason
    assert make_plan(make_spec(), h200, "portable").impl == "portable"
    _evidence(monkeypatch)
    assert make_plan(make_spec(), h200, "auto").impl == "portable"


def test_no_binary_and_no_triton(make_spec, h200, cache_dir, monkeypatch) -> None:
    monkeypatch.setattr(store, "triton_version", lambda: None)
    plan = make_plan(make_spec(), h200, "auto")
    assert plan.impl == "torch" and "pip install flashcore[compile]" in plan.reason and "sm_90a" in plan.reason
    with pytest.raises(UnsupportedError, match=r"impl 'portable': .*pip install flashcore\[compile\]"):
        make_plan(make_spec(), h200, "portable")


def test_a_binary_still_to_be_compiled(make_spec, h200, cache_dir, monkeypatch) -> None:
    _evidence(monkeypatch)
    plan = make_plan(make_spec(), h200, "auto")
    assert (plan.impl, plan.origin, plan.binary_sha256, plan.evidence) == ("portable", "compile", None, "compiled")
    assert not cache_dir.exists() and "known once it is compiled" in str(plan)


@pytest.mark.parametrize("impl", ["", "cuda", "Portable", None])
def test_an_unknown_impl(impl, make_spec, h200) -> None:
    with pytest.raises(ArgumentValueError, match=r"impl: got .*; allowed: 'auto', 'portable', 'torch'"):
        make_plan(make_spec(), h200, impl)


def _slower(spec, h200) -> str | None:
    return evidence.slower_than_torch(spec, h200)


def test_torch_is_chosen_where_it_was_measured_to_be_faster(make_spec, h200, shipped, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_timing(20.0, 10.0)])
    spec = make_spec(1, 8, 8, 512, 512)
    plan = make_plan(spec, h200, "auto")
    assert plan.impl == "torch" and "20.0 us against 10.0" in plan.reason and "(1,8,512,64) on NVIDIA H200" in plan.reason
    assert make_plan(spec, h200, "portable").impl == "portable"


def test_the_margin_keeps_noise_from_deciding(make_spec, h200, monkeypatch) -> None:
    spec = make_spec(1, 8, 8, 512, 512)
    for torchs, slower in ((9.6, True), (9.75, False), (10.0, False), (12.0, False)):
        _evidence(monkeypatch, timings=[_timing(10.0, torchs)])
        assert (_slower(spec, h200) is not None) == slower, torchs


def test_the_nearest_shape_decides(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_timing(20.0, 10.0), _timing(30.0, 60.0, seqlen_q=2048, seqlen_k=2048)])
    assert "(1,8,512,64)" in _slower(make_spec(1, 8, 8, 600, 600), h200)
    assert _slower(make_spec(1, 8, 8, 1800, 1800), h200) is None
    assert _slower(make_spec(2, 4, 4, 512, 512), h200) is not None  # as many heads in all


def test_far_from_every_measured_shape_nothing_is_claimed(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_timing(20.0, 10.0)])
    for near in ((1, 8, 8, 2048, 2048), (1, 8, 8, 128, 128), (4, 8, 8, 512, 512)):
        assert _slower(make_spec(*near), h200) is not None, near
    for far in ((1, 8, 8, 2100, 2100), (1, 8, 8, 120, 120), (5, 8, 8, 512, 512), (2, 8, 8, 1536, 1536), (1, 8, 8, 1, 65536)):
        assert _slower(make_spec(*far), h200) is None, far


SIZES = {"batch": 1, "heads_q": 8, "heads_k": 8, "seqlen_q": 512, "seqlen_k": 512}
MASK = torch.ones(512, 512, dtype=torch.bool)


def test_what_was_not_measured_is_not_claimed(make_spec, h200, monkeypatch) -> None:
    timings = [_timing(20.0, 10.0), _timing(20.0, 10.0, causal=True)]
    _evidence(monkeypatch, timings=timings)

    def slower(**options: object) -> bool:
        return _slower(make_spec(**{**SIZES, **options}), h200) is not None

    assert slower() and slower(causal=True) and slower(dtype=torch.bfloat16)
    for options in (
        {"dtype": torch.float32},
        {"head_dim": 128},
        {"head_dim": 96},
        {"softcap": 5.0},
        {"window": (100, 0)},
        {"mask": MASK},
        {"causal": True, "seqlen_k": 600},
        {"seqlen_q": 0},
        {"seqlen_k": 0},
    ):
        assert not slower(**options), options
    _evidence(monkeypatch, timings=timings, gpu="NVIDIA H100")
    assert not slower()
    _evidence(monkeypatch, timings=timings[:1])
    assert not slower(causal=True)
    _evidence(monkeypatch, timings=[timings[0].model_copy(update={"us": {"flashcore-portable": 20.0}})])
    assert not slower()


def test_masks_precisions_and_head_dims_are_compared_with_their_like(make_spec, h200, monkeypatch) -> None:
    for shape, like, unlike in (
        ({"mask": "bool"}, {"mask": MASK}, {"mask": MASK.half()}),
        ({"mask": "bool"}, {"mask": MASK, "causal": True}, {}),
        ({"mask": "additive"}, {"mask": MASK.half()}, {"mask": MASK}),
        ({"precision": "fp32"}, {"dtype": torch.float32}, {}),
        ({"head_dim": 96}, {"head_dim": 80}, {"head_dim": 128}),
        ({"head_dim": 128}, {"head_dim": 128}, {"head_dim": 96}),
    ):
        _evidence(monkeypatch, timings=[_timing(20.0, 10.0, **shape)])
        assert _slower(make_spec(**{**SIZES, **like}), h200) is not None, shape
        assert _slower(make_spec(**{**SIZES, **unlike}), h200) is None, shape


@pytest.mark.parametrize("options", [{"return_lse": True}, {"mask": MASK.float()}], ids=["lse", "float32 mask"])
def test_a_call_that_sdpa_cannot_say_is_not_judged_by_sdpas_time(options: dict, make_spec, h200, monkeypatch) -> None:
    # torch_backend takes matrix products and a softmax for these, which nobody measured
    _evidence(monkeypatch, timings=[_timing(20.0, 10.0), _timing(20.0, 10.0, mask="additive")])
    assert _slower(make_spec(**{**SIZES, **options}), h200) is None


def test_a_narrow_value_is_not_judged_by_the_code_of_whole_blocks(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_timing(20.0, 10.0)])
    assert _slower(make_spec(**{**SIZES, "head_dim_v": 32}), h200) is None


def test_a_target_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Target.of(torch.device("cpu")) == CPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Target.of(torch.device("cpu")) == INTERPRETER
    assert not Target.of(torch.device("meta")).interpreted
