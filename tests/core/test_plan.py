"""make_plan: what is chosen, what is refused, and that every refusal has its reason."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashcore
from flashcore import evidence, plan, planned_binary
from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.evidence import Index, Timing
from flashcore.kernels.registry import KERNELS, Kernel
from flashcore.kernels.specialisation import Specialisation
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


@pytest.fixture(autouse=True)
def only_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel of ours, where a test asks for no second one."""
    _implementations(monkeypatch, KERNELS["portable_forward"])


def _implementations(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel) -> None:
    bindings = {kernel.binding.IMPL: kernel.binding for kernel in kernels}
    for module in (plan, evidence):
        monkeypatch.setattr(module, "BINDINGS", bindings)
    monkeypatch.setattr(plan, "IMPLS", ("auto", *bindings, "torch"))
    for kernel in kernels:
        monkeypatch.setitem(KERNELS, kernel.id, kernel)


def _evidence(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    index = Index(
        gpu="NVIDIA H200",
        arch="sm_90a",
        sources={kernel: kernel_hash(kernel) for kernel in KERNELS},
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
        assert plan.binary_sha256 == SHA256 and not plan.interpreted
        block_m = dict(plan.specialisation.constants)["BLOCK_M"]
        assert plan.grid == -(-300 // block_m) * 2 * 4
        assert plan.specialisation.name in str(plan) and "evidence    verified" in str(plan) and SHA256 in str(plan)


def test_what_the_kernel_cannot_do_is_refused(make_spec, h200, shipped, monkeypatch) -> None:
    _evidence(monkeypatch)
    turned = torch.zeros(1, 4, 8, 2, dtype=torch.float16).transpose(2, 3)
    from flashcore.spec import AttentionSpec, Options

    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bshd")
    strided = AttentionSpec.from_tensors(turned, turned, turned, None, options, return_lse=False)
    words = "stride 1 in the last dimension"
    plan = make_plan(strided, h200, "auto")
    assert plan.impl == "torch" and words in plan.reason and words in plan.rejected[0][1]
    with pytest.raises(UnsupportedError, match=f"impl 'portable': .*{words}"):
        make_plan(strided, h200, "portable")


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


def _slower(spec, target: Target) -> str | None:
    """Why the portable kernel is not the choice, where the measurements say that PyTorch is faster."""
    found = evidence.compare(spec, target, "portable", "torch")
    return None if found is None or found.winner == "portable" else found.why


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
        # a head dim is like another where the kernel runs both with one binary
        ({"head_dim": 96}, {"head_dim": 80}, {"head_dim": 128}),
        ({"head_dim": 96}, {"head_dim": 72, "head_dim_v": 120}, {"head_dim": 40}),
        ({"head_dim": 128}, {"head_dim": 128}, {"head_dim": 96}),
        ({"head_dim": 128, "mask": "bool"}, {"head_dim": 96, "mask": MASK}, {"head_dim": 64, "mask": MASK}),
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


class Fast:
    """A second kernel of ours, preferred to the portable one, for sm_90a and without masks; head dims fill 64 or 128."""

    KERNEL, IMPL = "fast_forward", "fast"

    def reject(self, spec, arch, interpreted) -> str | None:
        if arch != "sm_90a":
            return f"needs sm_90a; got {arch}"
        return "takes no mask" if spec.mask is not None else None

    def specialise_call(self, spec, arch, sm_count) -> Specialisation:
        name = f"fast-d{64 if spec.head_dim <= 64 else 128}"
        return Specialisation(self.KERNEL, name, parameters=(), constants=(), num_warps=4, num_stages=1)

    def grid(self, spec, specialisation, sm_count) -> int:
        return sm_count


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, shipped) -> None:
    kernel = Kernel("fast_forward", "nowhere", "fast_forward", ("kernels/empty.py",), Fast())
    _implementations(monkeypatch, kernel, KERNELS["portable_forward"])


def _times(fast: float, portable: float, torchs: float, **shape: object) -> Timing:
    us = {"flashcore-fast": fast, "flashcore-portable": portable, "sdpa-auto": torchs}
    return _timing(0, 0, **shape).model_copy(update={"us": us})


H100 = Target(name="NVIDIA H100 80GB HBM3", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)
A100 = Target(name="NVIDIA A100", arch="sm_80", capability=(8, 0), sm_count=108, interpreted=False)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("times", "chosen"),
    [((5, 10, 8), "fast"), ((10, 5, 8), "portable"), ((10, 8, 5), "torch"), ((8, 10, 5), "torch"), ((5, 5, 5), "fast")],
)
def test_the_fastest_by_measurement_is_chosen_and_the_others_have_their_times(
    times: tuple, chosen: str, make_spec, h200, monkeypatch
) -> None:
    _evidence(monkeypatch, timings=[_times(*times, causal=True)])
    plan = make_plan(make_spec(**SIZES, causal=True), h200, "auto")
    assert plan.impl == chosen
    rejected = dict(plan.rejected)
    assert list(rejected) == [impl for impl in ("fast", "portable", "torch") if impl != chosen]
    measured = dict(zip(("fast", "portable", "torch"), times, strict=True))
    for impl, why in rejected.items():
        assert f": {measured[impl]:.1f} us against " in why and "shape (1,8,512,64, causal) on NVIDIA H200" in why
        assert ("is slower here by measurement" in why) == (measured[impl] > measured[chosen])
        assert f"rejected    {impl}: {why}" in str(plan)
        assert (why in plan.reason) == (chosen == "torch")


@pytest.mark.usefixtures("fast")
def test_a_kernel_that_loses_to_another_of_ours_is_told_against_which(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_times(10, 8, 5)])
    rejected = dict(make_plan(make_spec(**SIZES), h200, "auto").rejected)
    assert "10.0 us against 8.0 for portable at" in rejected["fast"]
    assert "8.0 us against 5.0 for PyTorch's SDPA at" in rejected["portable"]


@pytest.mark.usefixtures("fast")
def test_without_measurements_the_order_of_preference_decides(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch)
    plan = make_plan(make_spec(), h200, "auto")
    assert (plan.impl, plan.kernel, plan.grid) == ("fast", "fast_forward", 132) and "nothing near this call" in plan.reason
    assert [impl for impl, why in plan.rejected if "comes after fast" in why] == ["portable", "torch"]
    masked = make_plan(make_spec(mask=MASK[:128, :128]), h200, "auto")
    assert masked.impl == "portable" and masked.rejected[0] == ("fast", "takes no mask")
    assert make_plan(make_spec(), A100, "auto").impl == "portable"


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": (100, 0)}, "(1,8,512,64, causal) without window and cap on NVIDIA H200"),
        ({"window": (100, -1)}, "(1,8,512,64) without window and cap on NVIDIA H200"),
        ({"softcap": 5.0}, "(1,8,512,64) without window and cap on NVIDIA H200"),
        ({"return_lse": True}, "(1,8,512,64) on NVIDIA H200"),
        ({"seqlen_k": 600, "causal": True}, "(1,8,512,64, causal) on NVIDIA H200"),
    ],
)
def test_ours_are_compared_by_plain_shapes_where_torch_is_not(options: dict, words: str, make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_times(10, 5, 1), _times(10, 5, 1, causal=True)])
    plan = make_plan(make_spec(**{**SIZES, **options}), h200, "auto")
    assert plan.impl == "portable" and words in dict(plan.rejected)["fast"]
    assert "no measurement says" in dict(plan.rejected)["torch"]


@pytest.mark.usefixtures("fast")
def test_on_another_gpu_of_the_arch_only_ours_are_compared_by_the_measured_one(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_times(10, 8, 5)])
    assert make_plan(make_spec(**SIZES), h200, "auto").impl == "torch"
    plan = make_plan(make_spec(**SIZES), H100, "auto")
    assert plan.impl == "portable" and "on NVIDIA H200, whose arch is sm_90a too" in dict(plan.rejected)["fast"]
    _evidence(monkeypatch, timings=[_times(10, 8, 5)], arch="sm_100a")
    assert make_plan(make_spec(**SIZES), H100, "auto").impl == "fast"


@pytest.mark.usefixtures("fast")
def test_a_gpus_own_measurements_come_before_anothers(make_spec, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_times(10, 8, 5)])
    (other,) = evidence.indexes()
    own = other.model_copy(update={"gpu": H100.name, "timings": [_times(8, 10, 9, seqlen_q=1024, seqlen_k=1024)]})
    monkeypatch.setattr(evidence, "indexes", lambda: (other, own))
    plan = make_plan(make_spec(**SIZES), H100, "auto")
    assert plan.impl == "fast" and f"(1,8,1024,64) on {H100.name}" in dict(plan.rejected)["portable"]


@pytest.mark.usefixtures("fast")
def test_two_are_compared_only_where_both_were_measured_with_the_binaries_of_the_call(make_spec, h200, monkeypatch) -> None:
    only_ours = _times(10, 5, 1).model_copy(update={"us": {"flashcore-fast": 10, "flashcore-portable": 5}})
    _evidence(monkeypatch, timings=[only_ours, _times(1, 9, 9, seqlen_q=1024, seqlen_k=1024)])
    assert make_plan(make_spec(**SIZES), h200, "auto").impl == "portable"
    # fast runs 40 with the binary of 64, and portable does not
    _evidence(monkeypatch, timings=[_times(10, 5, 8)])
    call = make_spec(**{**SIZES, "head_dim": 40})
    assert evidence.compare(call, h200, "fast", "torch") and not evidence.compare(call, h200, "fast", "portable")
    assert not evidence.compare(make_spec(**{**SIZES, "head_dim": 72}), h200, "fast", "torch")


@pytest.mark.usefixtures("fast")
def test_each_kernel_is_held_to_its_own_evidence(make_spec, h200, monkeypatch) -> None:
    current = {"portable_forward": kernel_hash("portable_forward")}
    _evidence(monkeypatch, sources=current)
    plan = make_plan(make_spec(), h200, "auto")
    assert plan.impl == "portable" and "no evidence for its present source" in dict(plan.rejected)["fast"]
    assert make_plan(make_spec(), h200, "fast").evidence == "experimental"
    _evidence(monkeypatch, verified={})
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    plan = make_plan(make_spec(), h200, "auto")
    assert plan.impl == "torch" and all("FLASHCORE_STRICT=1" in why for _, why in plan.rejected) and len(plan.rejected) == 2


@pytest.mark.usefixtures("fast")
def test_times_of_a_source_that_has_changed_since_decide_nothing(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_times(10, 8, 5)])
    (current,) = evidence.indexes()
    stale = current.model_copy(update={"sources": {**current.sources, "fast_forward": "0" * 64}})
    elsewhere = current.model_copy(update={"gpu": "another", "timings": []})  # vouches for the present sources
    monkeypatch.setattr(evidence, "indexes", lambda: (stale, elsewhere))
    spec = make_spec(**SIZES)
    assert not evidence.compare(spec, h200, "fast", "portable") and evidence.compare(spec, h200, "portable", "torch")
    assert make_plan(spec, h200, "auto").impl == "fast"


@pytest.mark.usefixtures("fast")
def test_a_named_kernel_runs_whatever_was_measured_or_raises(make_spec, h200, monkeypatch) -> None:
    _evidence(monkeypatch, timings=[_times(10, 8, 5)])
    for impl in ("fast", "portable", "torch"):
        named = make_plan(make_spec(**SIZES), h200, impl)
        assert (named.impl, named.reason, named.rejected) == (impl, "asked for by name", ())
    with pytest.raises(UnsupportedError, match=r"^impl 'fast': needs sm_90a; got sm_80$"):
        make_plan(make_spec(), A100, "fast")
    with pytest.raises(UnsupportedError, match=r"^impl 'fast': takes no mask$"):
        make_plan(make_spec(mask=MASK[:128, :128]), h200, "fast")
    with pytest.raises(ArgumentValueError, match=r"allowed: 'auto', 'fast', 'portable', 'torch'"):
        make_plan(make_spec(), h200, "hopper2")


def test_auto_compiles_with_no_triton_that_a_kernel_is_not_written_for(make_spec, h200, fast, monkeypatch) -> None:
    monkeypatch.setattr(planned_binary, "triton_version", lambda: "3.7.0")
    monkeypatch.setitem(KERNELS, "fast_forward", Kernel("fast_forward", "nowhere", "f", ("kernels/empty.py",), Fast(), "3.9.0"))
    _evidence(monkeypatch)
    assert make_plan(make_spec(), h200, "auto").impl == "fast"  # it is shipped
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: store.Location("compile", None, Path("cache")))
    found = make_plan(make_spec(), h200, "auto")
    assert found.impl == "portable" and "only Triton 3.9.0" in found.rejected[0][1] and "3.7.0" in found.rejected[0][1]
    assert make_plan(make_spec(), h200, "fast").origin == "compile"
    monkeypatch.setattr(planned_binary, "triton_version", lambda: "3.9.0")
    assert make_plan(make_spec(), h200, "auto").impl == "fast"
