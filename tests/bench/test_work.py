"""Work counts against brute force over every (query, key) pair."""

import pytest

from flashcore.bench import work
from flashcore.bench.shapes import Shape, parse_shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (5, 5), (3, 8), (8, 3), (1, 9), (9, 1)])
def test_pairs_are_those_that_attend(seqlen_q: int, seqlen_k: int, causal: bool) -> None:
    shape = Shape(2, 6, 3, seqlen_q, seqlen_k, 16, 8, causal)
    allowed = sum(not causal or j <= i + seqlen_k - seqlen_q for i in range(seqlen_q) for j in range(seqlen_k))
    assert work.attended_pairs(shape) == 2 * 6 * allowed
    # Each pair: a multiply and an add for each of D (scores) and of Dv (output).
    assert work.flops(shape) == 2 * 6 * allowed * 2 * (16 + 8)


def test_minimal_bytes_read_shared_keys_once() -> None:
    shape = parse_shape("2,8/2,1/100,64")
    assert work.min_bytes(shape) == 2 * (2 * 8 * 64 + 2 * (2 * 2 * 100 * 64) + 2 * 8 * 64)


def test_rates_of_the_mission_shape() -> None:
    mission = parse_shape("mission")
    assert work.flops(mission) == 4 * 8 * 512 * 512 * 64
    assert work.tflops(mission, 10.0) == pytest.approx(53.687, rel=1e-4)
    assert work.tbytes(mission, 10.0) == pytest.approx(4 * 8 * 512 * 64 * 2 / 10e-6 / 1e12)


def test_roofline_takes_the_ceiling_that_is_lower() -> None:
    long, decode = parse_shape("1,16,16384,128"), parse_shape("16,32/8,1/8192,128")
    compute = work.roofline(long, peak_tflops=650, peak_tbytes=4.0)
    memory = work.roofline(decode, peak_tflops=650, peak_tbytes=4.0)
    assert compute.limit == "compute" and work.tflops(long, compute.us) == pytest.approx(650)
    assert memory.limit == "memory" and work.tbytes(decode, memory.us) == pytest.approx(4.0)
