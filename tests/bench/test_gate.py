"""The gate and the run: a contender that is wrong, raises or does not apply has its row, and no time."""

import time

import pytest
import torch
import torch.nn.functional as F

from flashcore.bench import peaks, runner
from flashcore.bench.artifact import Artifact
from flashcore.bench.contender import Attention, Contender, Kind
from flashcore.bench.contenders import contenders
from flashcore.bench.gate import Oracle, _pairs
from flashcore.bench.inputs import Inputs, InputSets
from flashcore.bench.shapes import Shape, parse_shape
from flashcore.errors import UnsupportedError


@pytest.fixture(autouse=True)
def _small_peaks(monkeypatch) -> None:
    """The ceilings are measured in every run; here on little data, as nothing is made of them."""
    monkeypatch.setattr(peaks, "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(peaks, "MATRIX_SIZE", {"cpu": 64})


CPU = torch.device("cpu")
SHAPE = Shape(2, 4, 2, 24, 24, 16, 16, causal=True, dtype="fp32")


def _sdpa(inputs: Inputs) -> torch.Tensor:
    return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=inputs.shape.causal, enable_gqa=True)


def _contender(name: str, kind: Kind, compute) -> Contender:
    def prepare(inputs: Inputs) -> Attention:
        return lambda: compute(inputs)

    return Contender(name, kind, prepare)


def _raise(error: Exception):
    def compute(inputs: Inputs) -> torch.Tensor:
        raise error

    return compute


RIGHT = _contender("right", "sdpa", _sdpa)
SCALED = _contender("scaled", "ours", lambda inputs: _sdpa(inputs) * 0.95)


def _run(*contenders: Contender, shape: Shape = SHAPE) -> Artifact:
    request = runner.Request(shapes=[shape], contenders=contenders, left_out={"gone": "left out"}, iters=10)
    return runner.run(request, CPU, lambda number, what, fraction: None)


def test_wrong_output_of_ours_is_not_timed_and_fails_the_run() -> None:
    artifact = _run(RIGHT, SCALED)
    rows = {c.name: c for c in artifact.shapes[0].contenders}
    assert rows["right"].status == "timed" and len(rows["right"].series[0].samples) == 10
    assert rows["scaled"].status == "wrong" and not rows["scaled"].series
    assert rows["scaled"].correctness is not None and not rows["scaled"].correctness.passed
    assert len(artifact.own_failures) == 1 and "scaled" in artifact.own_failures[0]


def test_peers_that_fail_have_rows_with_reasons_and_do_not_fail_the_run() -> None:
    artifact = _run(
        RIGHT,
        _contender("scaled", "peer", lambda inputs: _sdpa(inputs) * 0.95),
        _contender("nan", "peer", lambda inputs: torch.full_like(inputs.q, float("nan"))),
        _contender("shape", "peer", lambda inputs: _sdpa(inputs)[:, :1]),
        _contender("raises", "peer", _raise(RuntimeError("illegal address"))),
        _contender("refuses", "ours", _raise(UnsupportedError("impl 'x': no GPU"))),
    )
    rows = {c.name: (c.status, c.reason) for c in artifact.shapes[0].contenders}
    assert rows["right"] == ("timed", "")
    assert {rows[name][0] for name in ("scaled", "nan", "shape")} == {"wrong"}
    assert rows["raises"] == ("failed", "RuntimeError: illegal address")
    assert rows["refuses"] == ("not timed", "impl 'x': no GPU")
    assert rows["gone"] == ("not timed", "left out")
    assert artifact.own_failures == []


def test_an_exception_of_ours_fails_the_run() -> None:
    assert _run(RIGHT, _contender("ours", "ours", _raise(RuntimeError("boom")))).own_failures


def test_baseline_is_the_fastest_sdpa_backend_and_ratios_refer_to_it() -> None:
    def known(name: str, kind: Kind, seconds: float) -> Contender:
        def prepare(inputs: Inputs) -> Attention:
            output = _sdpa(inputs)

            def call() -> torch.Tensor:
                time.sleep(seconds)
                return output

            return call

        return Contender(name, kind, prepare)

    record = _run(known("slow", "sdpa", 8e-3), known("right", "sdpa", 2e-3), known("peer", "peer", 8e-3)).shapes[0]
    assert record.baseline == "right"
    ratio = next(c for c in record.contenders if c.name == "peer").series[0].ratio
    assert ratio is not None and ratio.baseline == "right" and 0.1 < ratio.value < 0.6


def test_no_times_at_all_when_nothing_is_right() -> None:
    record = _run(SCALED).shapes[0]
    assert record.baseline is None and not any(c.series for c in record.contenders)


def test_oracle_of_some_pairs_agrees_with_that_of_all_and_sees_an_error_there(monkeypatch) -> None:
    inputs = InputSets(SHAPE, CPU, seed=3)[0]
    whole = Oracle(inputs, seed=3).check(_sdpa(inputs))
    monkeypatch.setattr("flashcore.bench.gate.FULL_CHECK_SCORES", {"cpu": 1})
    oracle = Oracle(inputs, seed=3)
    part = oracle.check(_sdpa(inputs))
    assert whole.checked == "all" and whole.passed and part.passed
    assert part.checked == oracle.pairs and 0 < part.max_abs <= whole.max_abs
    wrong = _sdpa(inputs)
    batch, head = oracle.pairs[-1]
    wrong[batch, head, 5] += 0.1
    assert not oracle.check(wrong).passed


def test_pairs_hold_the_first_and_the_last() -> None:
    shape = parse_shape("4,32,16384,64")
    pairs = _pairs(shape, 32, 2**28, seed=0)
    assert pairs is not None and len(set(pairs)) == 4 and pairs[0] == (0, 0) and pairs[-1] == (3, 31)
    assert _pairs(parse_shape("1,1,65536,64"), 1, 2**28, seed=0) == [(0, 0)]
    assert _pairs(parse_shape("mission"), 8, 2**26, seed=0) is None


def test_inputs_are_seeded_and_independent() -> None:
    first, again, other = InputSets(SHAPE, CPU, 1), InputSets(SHAPE, CPU, 1), InputSets(SHAPE, CPU, 2)
    assert torch.equal(first[0].q, again[0].q) and not torch.equal(first[0].q, other[0].q)
    assert not torch.equal(first[0].k, first[0].v) and not torch.equal(first[1].q, first[0].q)
    assert first[0].k is first[0].k


def test_what_sdpa_refuses_is_not_a_failure_and_has_sdpas_reason() -> None:
    shape = Shape(1, 1, 1, 8, 8, 16, 8, dtype="fp32")
    flash = contenders()["sdpa-flash"]
    record = next(c for c in _run(flash, shape=shape).shapes[0].contenders if c.name == "sdpa-flash")
    assert record.status == "not timed" and "same last dimension" in record.reason and "Triggered" not in record.reason
