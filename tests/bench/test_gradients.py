"""Gradients as what is timed: right ones pass, wrong ones have no time, and each direction does what it says."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flashcore.bench import gate, gradients, peaks, runner, work
from flashcore.bench.artifact import Artifact
from flashcore.bench.contender import Attention, Contender, Kind
from flashcore.bench.contenders import contenders, select
from flashcore.bench.gate import GradientOracle
from flashcore.bench.inputs import Inputs, InputSets
from flashcore.bench.shapes import Shape, parse_shape
from flashcore.errors import ArgumentValueError

CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 24, 24, 16, 16, causal=True, dtype="fp32")


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch) -> None:
    monkeypatch.setattr(peaks, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(peaks, "MATRIX_SIZE", {"cpu": 64})


def _sdpa(inputs: Inputs) -> torch.Tensor:
    return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=inputs.shape.causal, enable_gqa=True)


def _contender(name: str, kind: Kind, compute) -> Contender:
    def prepare(inputs: Inputs) -> Attention:
        return lambda: compute(inputs)

    return Contender(name, kind, prepare)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.95


RIGHT = _contender("right", "sdpa", _sdpa)
# right forward, wrong backward
SCALED = _contender("scaled", "ours", lambda inputs: _ScaledGradient.apply(_sdpa(inputs)))


def _run(direction: str, *contenders: Contender) -> Artifact:
    request = runner.Request(shapes=[SHAPE], contenders=contenders, left_out={}, iters=10, direction=direction)
    return runner.run(request, CPU, lambda number, what, fraction: None)


@pytest.mark.parametrize("direction", ["bwd", "fwdbwd"])
def test_a_wrong_gradient_of_ours_is_not_timed_and_fails_the_run(direction: str) -> None:
    artifact = _run(direction, RIGHT, SCALED)
    rows = {c.name: c for c in artifact.shapes[0].contenders}
    assert artifact.settings.direction == direction and artifact.shapes[0].work.flops == work.flops(SHAPE, direction)
    assert rows["right"].status == "timed" and rows["right"].correctness.passed
    assert rows["scaled"].status == "wrong" and not rows["scaled"].series and "dq: max error" in rows["scaled"].reason
    assert len(artifact.own_failures) == 1
    # forward it is right
    assert not _run("fwd", RIGHT, SCALED).own_failures


def test_only_the_backward_pass_is_repeated_where_it_alone_is_timed() -> None:
    calls = []

    def counted(inputs: Inputs) -> torch.Tensor:
        calls.append(1)
        return _sdpa(inputs)

    inputs = InputSets(SHAPE, CPU, seed=0, gradients=True)[0]
    for direction, forwards in (("bwd", 1), ("fwdbwd", 3)):
        calls.clear()
        run = gradients.run_of(direction, lambda given: partial(counted, given), inputs)
        with torch.no_grad():
            first, *others = (run() for _ in range(3))
        assert len(calls) == forwards
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert gradients.run_of("fwd", lambda given: given.q.sum, inputs) == inputs.q.sum


def test_inputs_with_gradients_are_those_without_and_leaves() -> None:
    plain, leaves = InputSets(SHAPE, CPU, 1)[0], InputSets(SHAPE, CPU, 1, gradients=True)[0]
    assert torch.equal(plain.q, leaves.q) and torch.equal(plain.v, leaves.v) and plain.do is None
    assert all(x.is_leaf and x.requires_grad for x in leaves.leaves) and not leaves.do.requires_grad


def test_an_oracle_of_some_key_heads_sees_an_error_there(monkeypatch) -> None:
    inputs = InputSets(SHAPE, CPU, seed=3, gradients=True)[0]
    found = torch.autograd.grad(_sdpa(inputs), inputs.leaves, inputs.do)
    whole = GradientOracle(inputs, seed=3).check(found)
    monkeypatch.setattr(gate, "FULL_CHECK_SCORES", {"cpu": 1})
    monkeypatch.setattr(gate, "SAMPLED_PAIRS", 2)
    oracle = GradientOracle(inputs, seed=3)
    part = oracle.check(found)
    assert whole.passed and whole.checked == "all" and part.passed and part.checked == [(0, 0), (1, 1)]
    for index, name in enumerate(("dq", "dk", "dv")):
        wrong = [x.clone() for x in found]
        # the last head of the last batch entry, of q's or of k's
        wrong[index][1, -1, 5] += 0.1
        result = oracle.check(tuple(wrong))
        assert not result.passed and result.reason.startswith(f"{name}: max error")


def test_contenders_of_gradients_are_ours_and_sdpas() -> None:
    names = set(contenders("bwd"))
    assert {"flashcore", "flashcore-hopper", "flashcore-portable", "flashcore-hopper-deterministic", "sdpa-cudnn"} <= names
    assert not names & {"flashcore-small", "flex", "unfused", "xformers"}
    chosen, left_out = select([], "fa-bwd", "bwd")
    assert set(left_out) == {"sdpa-math"} and {"sdpa-auto", "sdpa-flash", "sdpa-efficient"} <= {c.name for c in chosen}
    assert {c.name for c in select([], "small", "fwdbwd")[0]} == names
    with pytest.raises(ArgumentValueError, match="impl: flex is unknown"):
        select(["flex"], None, "bwd")


@pytest.mark.parametrize("name", ["flashcore", "sdpa-math", "sdpa-auto"])
@pytest.mark.parametrize("direction", ["bwd", "fwdbwd"])
def test_contenders_are_right_on_a_cpu(name: str, direction: str) -> None:
    inputs = InputSets(Shape(2, 4, 2, 33, 33, 32, 32, causal=True, dtype="fp32"), CPU, 0, gradients=True)[0]
    contender = contenders(direction)[name]
    assert contender.unavailable_reason(inputs) is None
    run = gradients.run_of(direction, contender.prepare, inputs)
    assert GradientOracle(inputs, seed=0).check(run()).reason == ""


def test_an_interpreted_backward_pass_is_never_timed(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = InputSets(SHAPE, CPU, 0, gradients=True)[0]
    assert contenders("bwd")["flashcore-portable"].unavailable_reason(inputs).startswith("interpreted")


@pytest.mark.parametrize("causal", [False, True])
def test_work_is_two_and_a_half_times_the_forwards(causal: bool) -> None:
    shape = Shape(2, 8, 8, 96, 96, 64, 64, causal)
    assert work.flops(shape, "bwd") == 2.5 * work.flops(shape)
    assert work.flops(shape, "fwdbwd") == 3.5 * work.flops(shape)
    # five products over each attended pair, two with v's head dim
    uneven = Shape(1, 1, 1, 3, 5, 16, 8)
    assert work.flops(uneven, "bwd") == 15 * 2 * (3 * 16 + 2 * 8)
    assert work.tflops(shape, 10.0, "bwd") == pytest.approx(2.5 * work.tflops(shape, 10.0))


def test_minimal_bytes_of_a_backward_pass() -> None:
    shape = parse_shape("2,8/2,1/100,64")
    q, kv, o = 2 * 8 * 64, 2 * 2 * 2 * 100 * 64, 2 * 8 * 64
    # q, k, v, o and do read, dq, dk and dv written
    assert work.min_bytes(shape, "bwd") == 2 * (2 * (q + kv) + 2 * o)
    assert work.min_bytes(shape, "fwdbwd") == work.min_bytes(shape) + work.min_bytes(shape, "bwd")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("direction", ["bwd", "fwdbwd"])
@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-cudnn", "flashcore-portable", "flashcore-hopper"])
def test_gradients_are_captured_and_right_on_a_gpu(name: str, direction: str) -> None:
    shape = Shape(2, 4, 4, 256, 256, 64, 64, causal=True)
    request = runner.Request(
        shapes=[shape], contenders=[contenders(direction)[name]], left_out={}, iters=10, direction=direction
    )
    (record,) = runner.run(request, torch.device("cuda", 0), lambda number, what, fraction: None).shapes
    found = next(c for c in record.contenders if c.name == name)
    if found.status == "not timed":
        pytest.skip(found.reason)
    assert found.status == "timed" and found.find("device_warm").stats.p50 > 1
    # o, lse, and the three gradients at least
    assert found.peak_bytes >= 4 * shape.output_bytes
