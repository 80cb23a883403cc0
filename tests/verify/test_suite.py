"""The suite: what it lets pass, what it must not, and that its cases are what they say."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from flashcore.errors import ArgumentValueError, UnsupportedError
from flashcore.kernels.registry import BINDINGS
from flashcore.verify.cases import Case, MaskCase, mission_cases, select
from flashcore.verify.inputs import build
from flashcore.verify.mutations import INSIDE, Mutation, implementation, run_mutations, tiled_attention
from flashcore.verify.subject import flashcore_implementations
from flashcore.verify.suite import Implementation, prepare, run_case, run_suite
from flashcore.verify.watchdog import EXIT_CODE

CPU = torch.device("cpu")
TINY = mission_cases()[0]


def _result(function, case: Case = TINY):
    return run_case(case, [Implementation("stand-in", function)], CPU)[0]


def test_the_mission_has_its_fifteen_cases() -> None:
    cases = mission_cases()
    assert len(cases) == 15 and {case.seed for case in cases} == {0, 42, 12345}
    assert {(c.batch, c.heads_q, c.seqlen_q, c.head_dim) for c in cases} == {
        (1, 1, 32, 64),
        (1, 2, 64, 64),
        (1, 4, 128, 64),
        (1, 8, 512, 64),
        (4, 8, 256, 64),
    }
    assert all(c.dtype == torch.float16 and not c.causal and c.scale == 0.125 for c in cases)


def test_names_are_unique_and_selectable() -> None:
    cases = select("all")
    assert max(Counter(case.name for case in cases).values()) == 1
    assert len(cases) == sum(len(select(suite)) for suite in ("mission", "edge", "tile", "short", "shipped", "tuned"))
    assert [case.name for case in select("all", "tiny-seed0")] == ["tiny-seed0"]
    with pytest.raises(ArgumentValueError, match="matches none"):
        select("mission", "mask-*")
    with pytest.raises(ArgumentValueError, match="allowed: mission"):
        select("everything")


def test_every_case_can_be_built_as_it_says() -> None:
    for case in select("all"):
        if case.needs_bytes:
            continue
        x = build(case, CPU)
        batch_first = (case.batch, case.seqlen_q, case.heads_q, case.head_dim)
        want = batch_first if case.layout == "bshd" else (batch_first[0], batch_first[2], batch_first[1], batch_first[3])
        assert tuple(x.q.shape) == want and x.v.shape[-1] == case.dim_v
        assert x.q.dtype == x.k.dtype == x.v.dtype == case.dtype
        assert all(t.stride(-1) == 1 for t in (x.q, x.k, x.v) if t.numel() and t.shape[-1] > 1)
        if case.mask is not None:
            assert torch.broadcast_shapes(x.attn_mask.shape, (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k))
        # What a kernel may read is finite, but for the keys that are spoiled on purpose.
        assert x.q.isfinite().all() and (case.dead_nan or (x.k.isfinite().all() and x.v.isfinite().all()))


def test_inputs_are_independent_and_repeatable() -> None:
    x, again = build(TINY, CPU), build(TINY, CPU)
    assert torch.equal(x.q, again.q) and torch.equal(x.v, again.v)
    assert not torch.equal(x.q, x.k) and not torch.equal(x.k, x.v) and not torch.equal(x.q, x.v)


@pytest.mark.parametrize("storage", ["contiguous", "transposed", "strided", "packed", "unaligned", "padded"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_storage_changes_the_memory_and_not_the_values(storage, layout) -> None:
    case = Case(name="x", batch=2, heads_q=3, heads_k=3, seqlen_q=17, seqlen_k=17, head_dim=8, layout=layout)
    plain, other = build(case, CPU), build(replace(case, storage=storage), CPU)
    for a, b in ((plain.q, other.q), (plain.k, other.k), (plain.v, other.v)):
        assert torch.equal(a, b)
        assert a.stride() != b.stride() or storage == "contiguous"


@pytest.mark.parametrize("storage", ["far_batch", "far_sequence"])
def test_far_storages_reach_past_2_31(storage, monkeypatch) -> None:
    from flashcore.verify import inputs

    case = next(case for case in select("edge", "far-*") if case.storage == storage)
    heads = {"far_batch": inputs._FAR_BATCH_STRIDE, "far_sequence": inputs._FAR_SEQUENCE_STRIDE}
    steps = {"far_batch": case.batch, "far_sequence": min(case.seqlen_q, case.seqlen_k)}
    assert heads[storage] * (steps[storage] - 1) >= 2**31
    # The same code at a size that fits here.
    monkeypatch.setattr(inputs, "_FAR_BATCH_STRIDE", 2**16)
    monkeypatch.setattr(inputs, "_FAR_SEQUENCE_STRIDE", 2**10)
    far, near = build(case, CPU), build(replace(case, storage="contiguous"), CPU)
    assert all(torch.equal(a, b) for a, b in ((far.q, near.q), (far.k, near.k), (far.v, near.v)))


def test_a_case_with_no_dead_key_is_refused() -> None:
    with pytest.raises(ValueError, match="no key"):
        build(replace(TINY, dead_nan=True), CPU)


def test_the_right_implementation_passes_every_case_it_can_run() -> None:
    results = list(run_suite(select("all"), [implementation(None)], CPU))
    assert [f"{r.case.name}: {r.reason}" for r in results if r.verdict == "failed"] == []
    skipped = {r.case.name for r in results if r.verdict == "skipped"}
    assert skipped == {c.name for c in select("all") if c.entry == "sdpa" or c.needs_bytes}
    assert all(r.reason for r in results if r.verdict == "skipped")


def test_each_mutation_fails_the_mission_suite_and_the_right_one_passes() -> None:
    by_mutation = {result.mutation: result for result in run_mutations(mission_cases(), CPU)}
    assert set(by_mutation) == {None, *Mutation}
    assert all(result.as_it_should_be for result in by_mutation.values())
    assert by_mutation[None].failed == ()
    # One tile of keys has nothing to rescale and no second tile, so the smallest shape is the only one that may miss that.
    for mutation in Mutation:
        missed = 3 if mutation in INSIDE else 0
        assert len(by_mutation[mutation].failed) == 15 - missed, mutation


def test_a_case_that_raises_fails_with_the_words_and_the_rest_goes_on() -> None:
    calls = []

    def sometimes(q, k, v, **options):
        calls.append(q.shape)
        if q.shape[1] == 64:
            raise RuntimeError("illegal memory access")
        return tiled_attention(q, k, v, **options)

    results = list(run_suite(mission_cases()[:7], [Implementation("sometimes", sometimes)], CPU))
    assert [r.verdict for r in results] == ["passed"] * 3 + ["failed"] * 3 + ["passed"]
    assert "RuntimeError: illegal memory access" in results[3].reason and "test_suite.py" in results[3].reason


def test_a_mutated_kernel_fails_and_the_cases_it_does_not_take_are_left_out() -> None:
    right = Implementation("kernel", tiled_attention, reject=lambda case, inputs: "no" if case.seed else None)
    by_mutation = {result.mutation: result for result in run_mutations(mission_cases()[6:9], CPU, right)}
    assert all(result.as_it_should_be and result.cases == 1 for result in by_mutation.values())
    outside = by_mutation[Mutation.SCALED_OUTPUT].failed[0]
    assert outside.implementation == "kernel, the output scaled by 0.95"
    # of its own inside, a kernel can be asked nothing: those mistakes are made in the tiled one
    assert by_mutation[Mutation.STALE_TILE].failed[0].implementation.startswith("tiled")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("impl", BINDINGS)
def test_a_mutated_kernel_of_ours_fails_on_a_gpu(impl: str) -> None:
    (kernel,) = flashcore_implementations(impl)
    results = list(run_mutations(mission_cases(), torch.device("cuda", 0), kernel))
    if not results[0].cases:
        pytest.skip(f"{impl} runs on no such GPU")
    assert [result.mutation for result in results if not result.as_it_should_be] == []


def test_each_case_runs_under_every_implementation_that_takes_it() -> None:
    calls = []

    def kernel(name: str):
        def attention(q, k, v, **options):
            calls.append((name, q.shape[1]))
            return tiled_attention(q, k, v, **options)

        return attention

    def no_more_than_32_rows(case, inputs):
        return "takes 32 rows at most" if inputs.q.shape[1] > 32 else None

    picky = Implementation("picky", kernel("picky"), reject=no_more_than_32_rows)
    results = list(run_suite([TINY, mission_cases()[3]], [picky, Implementation("any", kernel("any"))], CPU))
    assert [(r.case.name, r.implementation, r.verdict, r.reason) for r in results] == [
        ("tiny-seed0", "picky", "passed", ""),
        ("tiny-seed0", "any", "passed", ""),
        ("small-seed0", "picky", "rejected", "takes 32 rows at most"),
        ("small-seed0", "any", "passed", ""),
    ]
    assert ("picky", 64) not in calls and {("picky", 32), ("any", 32), ("any", 64)} == set(calls)


def test_a_kernel_that_takes_a_case_and_then_refuses_it_has_failed() -> None:
    def refuses(q, k, v, **options):
        raise UnsupportedError("impl 'hopper': has no binary for this")

    assert _result(refuses).verdict == "failed"


def test_a_rejection_that_breaks_is_a_failure() -> None:
    def broken(case, inputs):
        raise KeyError("head_dim")

    (result,) = run_case(TINY, [Implementation("broken", tiled_attention, reject=broken)], CPU)
    assert result.verdict == "failed" and "KeyError" in result.reason


def test_runs_that_differ_fail() -> None:
    turn = iter(range(10))

    def drifts(q, k, v, **options):
        o, lse = tiled_attention(q, k, v, **options)
        if next(turn) == 2:
            o[0, 0, 0, 0] = torch.nextafter(o[0, 0, 0, 0], torch.tensor(9.0, dtype=o.dtype))
        return o, lse

    result = _result(drifts)
    assert result.verdict == "failed" and result.bitwise_equal is False and "bitwise" in result.reason


def test_broken_promises_fail() -> None:
    def modifies(q, k, v, **options):
        result = tiled_attention(q, k, v, **options)
        k[0, -1] *= 1.5
        return result

    def returns_an_input(q, k, v, **options):
        o, lse = tiled_attention(q, k, v, **options)
        q.copy_(o)
        return q, lse

    def strided(q, k, v, **options):
        o, lse = tiled_attention(q, k, v, **options)
        return o.transpose(1, 3).contiguous().transpose(1, 3), lse

    def float32(q, k, v, **options):
        o, lse = tiled_attention(q, k, v, **options)
        return o.float(), lse

    def no_lse(q, k, v, **options):
        return tiled_attention(q, k, v, **options)[0]

    for function, words in (
        (modifies, "an input was modified"),
        (returns_an_input, "shares memory"),
        (strided, "has stride"),
        (float32, "is torch.float32"),
        (no_lse, "not (o, lse)"),
    ):
        result = _result(function)
        assert result.verdict == "failed" and words in result.reason, (function.__name__, result.reason)


def test_dead_keys_are_really_checked() -> None:
    def leaks(q, k, v, **options):
        o, lse = tiled_attention(q, k, v, **options)
        return o + 0 * v[:, -1:, :, :], lse

    case = Case(name="dead", seqlen_k=96, mask=MaskCase("bool_padding"), dead_nan=True)
    assert _result(tiled_attention, case).verdict == "passed"
    assert _result(leaks, case).verdict == "failed"


def test_a_scale_rounded_into_a_half_query_fails_by_its_lse() -> None:
    case = next(case for case in select("edge") if case.name == "scale-uneven-fp16")

    def rounds(q, k, v, *, scale, **options):
        return tiled_attention((q * scale).to(q.dtype), k, v, scale=1.0, **options)

    result = _result(rounds, case)
    assert result.verdict == "failed" and "LSE error" in result.reason


def test_tf32_products_fail_a_float32_case() -> None:
    def tf32(x):
        # Round to TF32's 10 bits of mantissa.
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def approximates(q, k, v, **options):
        return tiled_attention(tf32(q), tf32(k), tf32(v), **options)

    case = next(case for case in select("edge") if case.name == "dtype-fp32")
    assert _result(tiled_attention, case).verdict == "passed"
    result = _result(approximates, case)
    assert "output:" in result.reason and "lse:" in result.reason


def test_an_expanded_batch_is_expected_to_repeat() -> None:
    case = Case(name="x", batch=3, storage="expanded")
    prepared = prepare(case, CPU)
    assert prepared.ref.shape[0] == prepared.lse.shape[0] == 3
    assert _result(tiled_attention, case).verdict == "passed"


def test_the_watchdog_ends_a_hanging_process_and_names_the_case() -> None:
    program = (
        "import time\nfrom flashcore.verify.watchdog import watchdog\n"
        "with watchdog(5, 'quick'): pass\n"
        "with watchdog(0.2, 'case slow'): time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert done.returncode == EXIT_CODE
    assert "case slow did not finish in 0.2 s" in done.stderr and "quick" not in done.stderr
