"""Shapes: what the command line writes, what the grids hold, what is refused."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from flashcore.bench.shapes import GRIDS, NAMED_SHAPES, Shape, grid, override, parse_shape
from flashcore.errors import ArgumentValueError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,8,512,64", Shape(1, 8, 8, 512, 512, 64, 64)),
        ("16,32/8,1/8192,128", Shape(16, 32, 8, 1, 8192, 128, 128)),
        ("2, 4/2, 7, 192/128", Shape(2, 4, 2, 7, 7, 192, 128)),
        ("mission", Shape(1, 8, 8, 512, 512, 64, 64)),
    ],
)
def test_parse(text: str, expected: Shape) -> None:
    assert parse_shape(text) == expected


@pytest.mark.parametrize("shape", [*NAMED_SHAPES.values(), *GRIDS["decode"], Shape(2, 4, 2, 7, 9, 192, 128)])
def test_label_reads_back(shape: Shape) -> None:
    sizes, dtype = shape.label.split()
    assert override((parse_shape(sizes),), causal=False, dtype=dtype) == (shape,)


@pytest.mark.parametrize(
    "text",
    ["", "1,8,512", "1,8,512,64,1", "1,8,x,64", "1,8/4/2,512,64", "1.5,8,512,64", "huge", "0,8,512,64", "1,8/3,9,64"],
)
def test_bad_text_names_what_is_allowed(text: str) -> None:
    with pytest.raises(ArgumentValueError, match=r"B,H,S,D"):
        parse_shape(text)


def test_unknown_grid_and_dtype() -> None:
    with pytest.raises(ArgumentValueError, match="small, fa, fa-bwd, train, features, decode, crossover"):
        grid("large")
    with pytest.raises(ArgumentValueError, match="fp16, bf16, fp32"):
        override((NAMED_SHAPES["mission"],), causal=False, dtype="int8")


def test_fa_grid_holds_16k_tokens_and_hidden_2048() -> None:
    cells = grid("fa")
    assert len(set(cells)) == 36
    assert {(s.head_dim, s.seqlen_q, s.causal) for s in cells} == {
        (d, s, c) for d in (64, 128, 256) for s in (512, 1024, 2048, 4096, 8192, 16384) for c in (False, True)
    }
    assert {s.batch * s.seqlen_q for s in cells} == {16384}
    assert {s.heads_q * s.head_dim for s in cells} == {2048}


def test_crossover_grid_leaves_no_size_between_few_tiles_and_many_far_from_a_measured_shape() -> None:
    cells = grid("crossover")
    assert len(set(cells)) == len(cells) == 28 and all(s.dtype == "fp16" and s.mask == "none" for s in cells)
    assert {s.seqlen_q for s in cells} == {64, 128, 256, 512, 1024, 2048} and {s.head_dim for s in cells} == {32, 64, 128}
    assert {s.batch * s.heads_q for s in cells} == {4, 8, 32, 128}
    assert {replace(s, causal=True) for s in cells} == {s for s in cells if s.causal}
    # as the planner reckons distance, in factors of two (evidence/__init__.py): batch * heads and the lengths weigh alike
    measured = [s for name in ("small", "fa", "crossover") for s in GRIDS[name] if s.head_dim == 64]
    for causal in (False, True):
        places = [(math.log2(s.batch * s.heads_q), math.log2(s.seqlen_q)) for s in measured if s.causal == causal]
        for heads, length in product(range(2, 9), range(6, 12)):
            if 9 <= heads + length <= 16:  # from 8 tiles of 64 rows to 1024
                assert min(abs(heads - h) + abs(length - n) for h, n in places) <= 2


def test_override_causal_keeps_each_shape_once() -> None:
    causal = override(grid("small"), causal=True, dtype="bf16")
    assert len(causal) == 6  # the mission shape is in the grid both ways
    assert all(s.causal and s.dtype == "bf16" for s in causal)


def test_bytes_and_dtype() -> None:
    shape = Shape(2, 4, 2, 8, 16, 64, 32, dtype="fp32")
    q, k, v, o = (torch.empty(n) for n in ((2, 4, 8, 64), (2, 2, 16, 64), (2, 2, 16, 32), (2, 4, 8, 32)))
    assert shape.input_bytes == sum(x.nbytes for x in (q, k, v))
    assert shape.output_bytes == o.nbytes
    assert shape.torch_dtype is torch.float32
