"""The steps on a GPU: every case of the mission, every mutation, and graphs, by which they are timed."""

import pytest
import torch

from flashcore import reference
from flashcore.ladder.checks import cases, verify_step
from flashcore.ladder.measure import SHAPES, problem_of
from flashcore.ladder.run import attend
from flashcore.ladder.steps import STEPS, Step
from flashcore.target import Target

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


@pytest.mark.parametrize("step", STEPS[:7], ids=[step.name for step in STEPS[:7]])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "head_dim"), [(1, 1, 16), (63, 129, 32), (257, 511, 128), (1000, 77, 64)])
def test_odd_lengths_and_every_head_dim(step: Step, seqlen_q: int, seqlen_k: int, head_dim: int) -> None:
    q, k, v = (torch.randn(2, 3, length, head_dim, device="cuda").half() for length in (seqlen_q, seqlen_k, seqlen_k))
    o = attend(_step_here(step), q, k, v)
    torch.testing.assert_close(o.double(), reference.attention(q, k, v, layout="bhsd")[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("step", STEPS[:7], ids=[step.name for step in STEPS[:7]])
def test_a_graph_replays_all_of_a_steps_kernels(step: Step) -> None:
    q, k, v = (torch.randn(1, 2, 200, 64, device="cuda").half() for _ in range(3))
    attend(_step_here(step), q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend(step, q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(o.double(), reference.attention(q, k, v, layout="bhsd")[0], atol=2e-3, rtol=2e-3)
