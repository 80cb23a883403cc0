"""What a step may be asked: every wrong argument is refused by name before anything is launched."""

import math

import pytest
import torch

from flashcore.errors import ArgumentTypeError, ArgumentValueError, UnsupportedError
from flashcore.ladder.problem import HEAD_DIMS, Problem
from flashcore.ladder.run import attend, implementation
from flashcore.ladder.steps import STEPS, find_step


def _tensor(*size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(size or (2, 3, 5, 64), dtype=dtype)


def test_a_problem_is_read_off_the_tensors() -> None:
    problem = Problem.of(_tensor(2, 3, 5, 64), _tensor(2, 3, 7, 64), _tensor(2, 3, 7, 64))
    assert problem == Problem(2, 3, 5, 7, 64, 0.125) and problem.rows == 30
    assert Problem.of(_tensor(), _tensor(), _tensor(), 2.0).scale == 2.0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": None}, ArgumentTypeError, "q: got NoneType; allowed: a torch.Tensor"),
        ({"k": _tensor(dtype=torch.bfloat16)}, ArgumentTypeError, "k: got torch.bfloat16; allowed: torch.float16"),
        ({"v": _tensor(3, 5, 64)}, ArgumentValueError, r"v: got shape \(3, 5, 64\); allowed: \(B, H, S, D\)"),
        ({"q": _tensor(2, 5, 3, 64).transpose(1, 2)}, ArgumentValueError, "q: got strides .*; allowed: contiguous"),
        ({"q": _tensor(2 * 3 * 5 * 64 + 1)[1:].view(2, 3, 5, 64)}, ArgumentValueError, "q: got address .* multiple of 16"),
        ({"k": _tensor().to("meta")}, ArgumentValueError, "k: got meta, q is on cpu; allowed: one device"),
        ({"v": _tensor(2, 3, 6, 64)}, ArgumentValueError, "v: got shape .*; allowed: the same shape"),
        ({"q": _tensor(2, 4, 5, 64)}, ArgumentValueError, "k: got shape .*; allowed: q's B, H and D"),
        ({"scale": math.nan}, ArgumentValueError, "scale: got nan; allowed: a finite number above 0"),
        ({"scale": 0.0}, ArgumentValueError, "scale: got 0.0"),
        ({"scale": math.inf}, ArgumentValueError, "scale: got inf"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], error: type[Exception], words: str) -> None:
    given = {"q": _tensor(), "k": _tensor(), "v": _tensor(), "scale": None, **change}
    with pytest.raises(error, match=words):
        attend(STEPS[0], given["q"], given["k"], given["v"], scale=given["scale"])


@pytest.mark.parametrize("size", [(0, 3, 5, 64), (2, 0, 5, 64), (2, 3, 0, 64), (2, 3, 5, 0), (2, 3, 5, 48), (2, 3, 5, 256)])
def test_sizes_that_no_step_takes_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentValueError, match="allowed: "):
        Problem.of(_tensor(*size), _tensor(*size), _tensor(*size))


def test_lengths_past_32_bit_offsets_are_refused() -> None:
    Problem(1, 1, 2**24 - 1, 2**24 - 1, max(HEAD_DIMS), 1.0)
    with pytest.raises(ArgumentValueError, match="seqlen_k: got 16777216; allowed: 1 to 16777215"):
        Problem(1, 1, 1, 2**24, 64, 1.0)
    with pytest.raises(ArgumentValueError, match="rows in all heads"):
        Problem(1, 129, 2**24 - 1, 1, 64, 1.0)


def test_a_step_says_where_it_does_not_run() -> None:
    for step in STEPS:
        with pytest.raises(UnsupportedError, match=f"{step.name}: .*(GPU|sm_90a)"):
            attend(step, _tensor(), _tensor(), _tensor())


def test_what_verify_may_not_ask_of_a_step_is_refused() -> None:
    plain = {"scale": None, "layout": "bhsd", "causal": False, "window": None, "softcap": 0.0, "attn_mask": None}
    for asked in ({"causal": True}, {"return_lse": True}, {"softcap": 1.0}, {"window": (1, 1)}, {"attn_mask": _tensor()}):
        with pytest.raises(UnsupportedError, match="allowed: plain attention"):
            implementation(STEPS[1]).attention(_tensor(), _tensor(), _tensor(), **{**plain, "return_lse": False, **asked})


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(ArgumentValueError, match="step: got 'fast'; allowed: unfused, scalar, vectorised, tensor_core_qk"):
        find_step("fast")
