"""The steps on a GPU: every case of the mission, every mutation, and graphs, by which they are timed."""

import pytest
import torch

from flashcore import reference
from flashcore.ladder.checks import cases, verify_step
from flashcore.ladder.measure import SHAPES, problem_of
from flashcore.ladder.problem import HEAD_DIMS
from flashcore.ladder.run import attend
from flashcore.ladder.steps import STEPS, Step, find_step
from flashcore.target import Target
from flashcore.verify.watchdog import watchdog

OWN = [step for step in STEPS if step.impl is None]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _step_here(step: Step) -> Step:
    reason = step.refusal(problem_of(SHAPES[0]), Target.of(torch.device("cuda")).arch, False)
    return step if reason is None else pytest.skip(reason)


@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
def test_a_step_passes_the_missions_cases_and_its_mutations_fail(step: Step) -> None:
    found = verify_step(_step_here(step), torch.device("cuda", 0), cases(), interpreted=False)
    assert found.sound and len(found.passed) == 15, found.summary


def _check(step: Step, batch: int, heads: int, seqlen_q: int, seqlen_k: int, head_dim: int) -> None:
    shapes = [(batch, heads, length, head_dim) for length in (seqlen_q, seqlen_k, seqlen_k)]
    q, k, v = (torch.randn(shape, device="cuda").half() for shape in shapes)
    with watchdog(120, f"{step.name} on {shapes}"):
        o = attend(_step_here(step), q, k, v)
        torch.cuda.synchronize()
    torch.testing.assert_close(o.double(), reference.attention(q, k, v, layout="bhsd")[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("step", OWN, ids=[step.name for step in OWN])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "head_dim"), [(1, 1, 16), (63, 129, 32), (257, 511, 128), (1000, 77, 64)])
def test_odd_lengths_and_every_head_dim(step: Step, seqlen_q: int, seqlen_k: int, head_dim: int) -> None:
    _check(step, 2, 3, seqlen_q, seqlen_k, head_dim)


@pytest.mark.parametrize("name", ["tuned_tiles", "async_copies", "warp_specialised"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_tiles_for_many_queries(name: str, head_dim: int) -> None:
    few_rows = 2 * 128 * torch.cuda.get_device_properties(0).multi_processor_count // 64
    _check(find_step(name), 1, 64, few_rows + 19, 1000, head_dim)


@pytest.mark.parametrize("seqlen_k", [*range(1, 161, 31), 4113])
def test_slots_are_reused_in_any_number_of_rounds(seqlen_k: int) -> None:
    """The ring of the warp-specialised step: fewer tiles than slots, as many, and many times as many."""
    for head_dim in HEAD_DIMS:
        _check(find_step("warp_specialised"), 1, 2, 130, seqlen_k, head_dim)


@pytest.mark.parametrize("step", OWN, ids=[step.name for step in OWN])
def test_a_graph_replays_all_of_a_steps_kernels(step: Step) -> None:
    q, k, v = (torch.randn(1, 2, 200, 64, device="cuda").half() for _ in range(3))
    with watchdog(120, f"{step.name} in a graph"):
        attend(_step_here(step), q, k, v)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = attend(step, q, k, v)
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(o.double(), reference.attention(q, k, v, layout="bhsd")[0], atol=2e-3, rtol=2e-3)
