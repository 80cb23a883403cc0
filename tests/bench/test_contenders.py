"""Contenders: each gives the right result where it applies, and says why where it does not."""

import pytest
import torch

from flashcore.bench.contenders import contenders, select
from flashcore.bench.gate import Oracle
from flashcore.bench.inputs import Inputs, InputSets
from flashcore.bench.shapes import Shape, parse_shape
from flashcore.errors import ArgumentValueError
from flashcore.kernels.registry import BINDINGS

CPU = torch.device("cpu")
SHAPES = {
    "plain": Shape(2, 4, 4, 33, 33, 32, 32, dtype="fp32"),
    "causal": Shape(2, 4, 4, 33, 33, 32, 32, causal=True, dtype="fp32"),
    "grouped": Shape(2, 6, 2, 17, 40, 32, 32, dtype="fp32"),
    "grouped causal": Shape(2, 6, 2, 17, 40, 32, 32, causal=True, dtype="fp32"),
}


def _inputs(shape: Shape) -> Inputs:
    return InputSets(shape, CPU, seed=0)[0]


@pytest.mark.parametrize("name", ["flashcore", "sdpa-flash", "sdpa-math", "sdpa-auto", "unfused"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_right_on_a_cpu_or_refused_with_a_reason(name: str, shape: Shape) -> None:
    contender, inputs = contenders()[name], _inputs(shape)
    if name.startswith("sdpa") and shape.causal and shape.seqlen_q != shape.seqlen_k:
        assert "top-left" in (contender.unavailable_reason(inputs) or "")
        return
    assert contender.unavailable_reason(inputs) is None
    with contender.context():
        assert Oracle(inputs, seed=0).check(contender.prepare(inputs)()).reason == ""


@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-efficient", "flex", "flash-attn", "flashinfer", "xformers"])
def test_gpu_only_contenders_say_so_on_a_cpu(name: str) -> None:
    reason = contenders()[name].unavailable_reason(_inputs(SHAPES["plain"]))
    assert reason is not None and ("CUDA only" in reason or "not installed" in reason)


def test_interpreted_kernel_is_never_timed(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = contenders()["flashcore-portable"].unavailable_reason(_inputs(SHAPES["plain"]))
    assert reason is not None and reason.startswith("interpreted")


@pytest.mark.parametrize("impl", BINDINGS)
def test_every_kernel_of_ours_is_a_contender_that_says_why_it_cannot_run_on_a_cpu(impl: str, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    contender = contenders()[f"flashcore-{impl}"]
    assert contender.kind == "ours" and f"impl '{impl}'" in (contender.unavailable_reason(_inputs(SHAPES["plain"])) or "")


def test_scores_that_do_not_fit_are_refused_by_estimate() -> None:
    shape = parse_shape("64,64,65536,1")
    stub = torch.empty(1)
    reason = contenders()["unfused"].unavailable_reason(Inputs(shape, stub, stub, stub))
    assert reason is not None and "GiB" in reason


def test_selection() -> None:
    chosen, left_out = select([], "fa")
    # sdpa-auto among them: the planner compares with it (evidence/__init__.py)
    assert {"flashcore", "flashcore-portable", "sdpa-flash", "sdpa-cudnn", "sdpa-auto"} <= {c.name for c in chosen}
    assert not set(left_out) & {c.name for c in chosen}
    assert "compiles anew" in left_out["flex"] and "--impl sdpa-efficient" in left_out["sdpa-efficient"]
    # what the planner's comparisons need
    crossover = {c.name for c in select([], "crossover")[0]}
    assert {"sdpa-auto", *(f"flashcore-{impl}" for impl in BINDINGS)} <= crossover
    assert [c.name for c in select(["flex", "flashcore", "flex"], "fa")[0]] == ["flex", "flashcore"]
    assert len(select([], None)[0]) == len(contenders())
    with pytest.raises(ArgumentValueError, match="impl: nonsense is unknown; allowed: flashcore"):
        select(["nonsense"], None)
