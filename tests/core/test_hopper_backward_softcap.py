"""Softcap in the Hopper backward pass: the kernels' own arithmetic (backward_softcap.py) on tensors of the CPU, and the factors
that it is given. What a GPU makes of it is verified there (flashcore verify --direction bwd)."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.hopper import backward_binding as binding
from flashcore.kernels.hopper.backward_factors import Factors
from flashcore.spec import MAX_FACTOR, AttentionSpec
from flashcore.verify.backward_suite import judge_backward, prepare_backward
from flashcore.verify.cases import Case, select
from flashcore.verify.mutations import tiled_attention
from flashcore.verify.suite import CaseResult, Implementation, run_case

MakeSpec = Callable[..., AttentionSpec]
LOG2_E = math.log2(math.e)


@pytest.fixture
def softcap(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of backward_softcap.py on tensors of torch. As on the GPU, a maximum drops NaN."""
    import flashcore.kernels.hopper.backward_softcap as source

    names = {
        "exp2": torch.exp2,
        "maximum": lambda x, least: torch.fmax(x, torch.tensor(least, dtype=x.dtype)),
        "inline_asm": lambda asm, constraints, arguments, *_: 1.0 / arguments[0],
    }
    monkeypatch.setattr(source, "gl", SimpleNamespace(**names))
    return SimpleNamespace(cap_scores=source.cap_scores.fn, weights_and_slopes=source.weights_and_slopes.fn)


def _spec(call: AttentionSpec, **changes: bool) -> BackwardSpec:
    plain = BackwardSpec(call, call.o_strides, True, dq=True, dkv=True, dmask_shape=None, dlse=False, deterministic=False)
    return replace(plain, **changes)


def _slopes(softcap: SimpleNamespace, s: torch.Tensor, lse: torch.Tensor, scale: float, cap: float, one: float = 1.0):
    """(t, p, p * slope) of raw scores by the kernels' way."""
    factors = Factors(lse=-LOG2_E, exponent=cap * LOG2_E, cap=min(2 * LOG2_E * scale / cap, MAX_FACTOR))
    t = softcap.cap_scores(s, factors.cap, one)
    return (t, *softcap.weights_and_slopes(t, factors.exponent, lse * factors.lse))


@pytest.mark.parametrize("cap", [0.5, 1.5, 20.0, 50.0])
def test_weights_and_slopes(cap: float, softcap: SimpleNamespace) -> None:
    s = torch.arange(-2000, 2001) * (0.006 * cap)
    lse = torch.full_like(s, 0.9 * cap)
    t, p, sloped = _slopes(softcap, s, lse, 0.5, cap)
    exact = torch.tanh(s.double() * 0.5 / cap)
    weights = torch.exp(cap * exact - lse.double())
    torch.testing.assert_close(t.double(), exact, atol=3e-7, rtol=0.0)
    # what t is off by, and how an exponent of up to 150 rounds: far within half of float16's last place, 2.4e-4
    relative = 3e-7 * cap + 5e-6
    torch.testing.assert_close(p.double(), weights, atol=1e-37, rtol=relative)
    torch.testing.assert_close(sloped.double(), weights * (1 - exact**2), atol=4e-7 * weights.max().item(), rtol=relative)
    assert (sloped >= 0).all() and t[2000] == 0 and sloped[2000] == p[2000]


def test_what_is_not_attended_gives_nothing(softcap: SimpleNamespace) -> None:
    s = torch.tensor([-3e38, -5.0, 0.0, 5.0, 3e38, math.inf, -math.inf])
    finite = torch.zeros_like(s)
    # a key past the end: whatever its row's log-sum-exp is, p is 0, where 2^row_lse would be infinite
    for lse in (finite, finite - 300.0, finite + 300.0):
        _, p, sloped = _slopes(softcap, s, lse, 1.0, 10.0, one=-math.inf)
        assert p.eq(0).all() and sloped.eq(0).all()
    # a row that attends nothing, or past the end
    assert all(x.eq(0).all() for x in softcap.weights_and_slopes(finite, 14.0, finite - math.inf))
    # a pair outside the band, for which mask_scores leaves -inf
    assert all(x.eq(0).all() for x in softcap.weights_and_slopes(finite - math.inf, 14.0, finite + 3.0))


def test_scores_beyond_every_number_reach_the_cap_and_nan_stays(softcap: SimpleNamespace) -> None:
    s = torch.tensor([-3e38, -1e-3, 0.0, 1e-3, 3e38])
    for scale, cap in ((1.0, 1e-37), (1e37, 1.0)):
        t, p, sloped = _slopes(softcap, s, torch.zeros(5), scale, cap)
        assert t.tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0] and p.isfinite().all()
        assert sloped.tolist() == [0.0, 0.0, p[2].item(), 0.0, 0.0]
    _, p, sloped = _slopes(softcap, torch.tensor([math.nan, 1.0]), torch.zeros(2), 1.0, 2.0)
    assert p.isnan().tolist() == sloped.isnan().tolist() == [True, False]
    _, p, sloped = _slopes(softcap, torch.ones(1), torch.tensor([math.nan]), 1.0, 2.0)
    assert p.isnan().all() and sloped.isnan().all()


def test_factors(make_spec: MakeSpec) -> None:
    plain, capped = Factors.of(make_spec(scale=0.25)), Factors.of(make_spec(scale=0.25, softcap=20.0))
    assert (plain.lse, plain.cap) == (-4.0, None) and plain.exponent == pytest.approx(0.25 * LOG2_E)
    assert capped.lse == pytest.approx(-LOG2_E) and capped.exponent == pytest.approx(20 * LOG2_E)
    assert capped.cap == pytest.approx(2 * LOG2_E * 0.25 / 20)
    # float32 has neither factor where both are extreme
    assert Factors.of(make_spec(scale=1e37, softcap=1e-30)).cap == MAX_FACTOR
    # nothing is divided by the scale
    tiny = make_spec(scale=1e-35, softcap=20.0)
    assert binding.reject(_spec(tiny), "sm_90a", False) is None


@pytest.mark.parametrize(
    ("head_dims", "deterministic", "kernels"),
    [((64, 64), False, 1), ((64, 64), True, 1), ((192, 128), False, 2), ((256, 256), True, 2)],
    ids=["fused", "in order", "d192v128", "d256"],
)
def test_a_softcap_takes_binaries_of_its_own_with_any_band(
    head_dims: tuple[int, int], deterministic: bool, kernels: int, make_spec: MakeSpec
) -> None:
    dims = dict(zip(("head_dim", "head_dim_v"), head_dims, strict=True))
    capped = {"scale": 0.25, "softcap": 20.0, **dims}
    calls = [make_spec(**capped, **options) for options in ({}, {"causal": True}, {"window": (9, 3)})]
    for call in calls:
        assert binding.reject(_spec(call, deterministic=deterministic), "sm_90a", False) is None
    programs = [binding.program(_spec(call, deterministic=deterministic), "sm_90a", 132) for call in calls]
    taken = [[x for x in program.launches if binding.matrix_instruction(x.specialisation, "sm_90a")] for program in programs]
    for launches in taken:
        assert len(launches) == kernels
        for launch in launches:
            constants = dict(launch.specialisation.constants)
            assert constants["HAS_LO"] is constants["HAS_HI"] is True and "cap_scale" not in constants
            assert "window-softcap" in launch.specialisation.name
            values = dict(zip((p.name for p in launch.specialisation.parameters), launch.arguments, strict=True))
            assert values["scale"] == 0.25 and values["exponent_scale"] == pytest.approx(20 * LOG2_E)
            assert values["cap_scale"] == pytest.approx(2 * LOG2_E / 80)
            # in the order of the kernel's parameters: after the numbers, before maps of columns from 128 on
            names = [name for name in values if not name.endswith("_tail_map")]
            assert names[-3:] == ["exponent_scale", "scale", "cap_scale"] and list(values)[: len(names)] == names
    assert len({launch.specialisation for launches in taken for launch in launches}) == kernels
    for program in programs:
        prepare = program.launches[0]
        values = dict(zip((p.name for p in prepare.specialisation.parameters), prepare.arguments, strict=True))
        assert values["lse_factor"] == pytest.approx(-LOG2_E)
    uncapped = _spec(make_spec(window=(9, 3), **dims), deterministic=deterministic)
    for launch in binding.program(uncapped, "sm_90a", 132).launches:
        constants = dict(launch.specialisation.constants)
        assert constants.get("cap_scale") is None and "softcap" not in launch.specialisation.name


class _Emulated(torch.autograd.Function):
    """A forward pass, and a backward pass with the numbers and the rounding of the Hopper kernels."""

    @staticmethod
    def forward(ctx, softcap, options, q, k, v):
        o, lse = tiled_attention(q, k, v, return_lse=True, **options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.softcap, ctx.options = softcap, options
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        options, (q, k, v, o, lse) = ctx.options, ctx.saved_tensors
        dtype, scale, cap = q.dtype, options["scale"] or q.shape[-1] ** -0.5, options["softcap"]
        if options["layout"] == "bshd":
            q, k, v, o, do = (x.transpose(1, 2) for x in (q, k, v, o, do))
        group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        q, k, v, o, do = (x.float() for x in (q, k, v, o, do))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
        left, right = options["window"] or (-1, -1)
        right = 0 if options["causal"] else right
        outside = (distance < -left if left >= 0 else False) | (distance > right if right >= 0 else distance > keys)
        t = ctx.softcap.cap_scores(q @ k.mT, 2 * LOG2_E * scale / cap, 1.0).masked_fill(outside, -math.inf)
        p, sloped = ctx.softcap.weights_and_slopes(t, cap * LOG2_E, (lse * -LOG2_E)[..., None])
        p, sloped = (x.to(dtype).float() for x in (p, sloped))
        delta = dlse - (do * o).sum(dim=-1)
        ds = (sloped * (do @ v.mT + delta[..., None])).to(dtype).float()
        dq, dk, dv = scale * (ds @ k), scale * (ds.mT @ q), p.mT @ do
        dk, dv = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (dk, dv))
        found = (x.to(dtype) for x in (dq, dk, dv))
        return None, None, *(x.transpose(1, 2) if options["layout"] == "bshd" else x for x in found)


def _judge(softcap: SimpleNamespace, case: Case) -> CaseResult:
    def attention(q, k, v, *, attn_mask=None, return_lse=False, **options):
        o, lse = _Emulated.apply(softcap, options, q, k, v)
        return (o, lse) if return_lse else o

    steps = (prepare_backward, judge_backward)
    return run_case(case, [Implementation("emulated", attention)], torch.device("cpu"), steps)[0]


CASES = {
    case.name: case
    for case in select("all", "*softcap*", backward=True)
    if case.mask is None
    and case.dtype in (torch.float16, torch.bfloat16)
    and (case.scale or 1.0) > 0
    and not (case.dead_nan or case.dead_rows or case.needs_bytes)
    # what is rounded is the same in wide heads: of these a few, which take longer
    and (max(case.head_dim, case.dim_v) <= 128 or case.name.startswith("backward-"))
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_kept_in_16_bits_keeps_the_bound_of_a_gradient(case: Case, softcap: SimpleNamespace) -> None:
    result = _judge(softcap, case)
    assert (result.verdict, result.reason) == ("passed", "")


def test_the_bound_sees_a_slope_that_is_left_out(softcap: SimpleNamespace) -> None:
    case = CASES["backward-softcap-d64-fp16"]
    whole = softcap.weights_and_slopes
    softcap.weights_and_slopes = lambda *arguments: (whole(*arguments)[0],) * 2
    result = _judge(softcap, case)
    assert result.verdict == "failed" and "dq" in result.reason and "dk" in result.reason and "dv" not in result.reason
