"""Poisoned memory: it is NaN, everywhere a kernel's output could come from; it leaves no trace; and it catches."""

import pytest
import torch
import torch.nn.functional as F

from flashcore.verify.cases import mission_cases
from flashcore.verify.mutations import Mutation, implementation, tiled_attention
from flashcore.verify.poison import poisoned_memory
from flashcore.verify.suite import Implementation, run_case

CPU = torch.device("cpu")


def test_uninitialised_memory_is_nan_inside_only() -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory(CPU):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            like = torch.zeros(3, dtype=dtype)
            for made in (
                torch.empty(3, dtype=dtype),
                torch.empty_like(like),
                like.new_empty(3),
                torch.empty_strided((3,), (2,), dtype=dtype),
            ):
                assert made.isnan().all()
        assert torch.empty(3, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
        assert not torch.zeros(3).isnan().any()
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_the_former_state_comes_back_after_an_error() -> None:
    try:
        with poisoned_memory(CPU):
            raise KeyError
    except KeyError:
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_does_not_change_what_sdpa_runs() -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    choice = torch._fused_sdp_choice(q, k, v)
    plain = F.scaled_dot_product_attention(q, k, v)
    with poisoned_memory(CPU):
        assert torch._fused_sdp_choice(q, k, v) == choice
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_it_does_not_change_what_sdpa_runs_on_a_gpu(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = torch.randn(3, 1, 8, 512, 64, dtype=dtype, device="cuda").unbind(0)
    choice = torch._fused_sdp_choice(q, k, v, is_causal=causal)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with poisoned_memory(q.device):
        assert torch._fused_sdp_choice(q, k, v, is_causal=causal) == choice
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=causal), plain)


def test_an_unwritten_row_is_caught_even_after_a_right_run_of_the_same_shape() -> None:
    case = mission_cases()[3]
    # The allocator hands a right result's memory to the next call: without poison the row would hold the right answer.
    right, wrong = run_case(case, [implementation(None), implementation(Mutation.UNWRITTEN_ROW)], CPU)
    assert right.verdict == "passed"
    assert wrong.verdict == "failed" and "never written" in wrong.reason


def test_an_unwritten_lse_is_caught() -> None:
    def forgets_lse(*args, **kwargs):
        o, lse = tiled_attention(*args, **kwargs)
        return o, torch.empty_like(lse)

    (result,) = run_case(mission_cases()[0], [Implementation("forgets lse", forgets_lse)], CPU)
    assert result.verdict == "failed" and result.reason.startswith("lse: not finite")
