"""The oracles, for kernels that no interpreter runs: a model in PyTorch of how each takes its keys, right and with mistakes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from flashcore.bench.inputs import Inputs, InputSets
from flashcore.bench.shapes import Shape, parse_shape
from flashcore.debug import bounds, conventions, record, run
from flashcore.debug.compare import PartVerdict
from flashcore.debug.conventions import Convention, of_production
from flashcore.debug.oracles import Operands
from flashcore.debug.record import Head, Record, written
from flashcore.debug.subjects import Recording
from flashcore.debug.views import VIEWS
from flashcore.errors import ArgumentValueError
from flashcore.reference import attended

CPU = torch.device("cpu")
SHAPE = parse_shape("1,2,200/300,64/32")
CAUSAL = replace(SHAPE, causal=True)
HOPPER = of_production("hopper", SHAPE.scale, {"WARPGROUPS": 2, "BLOCK_N": 64, "EMULATE_EXP2": 0})
SMALL = of_production("small", SHAPE.scale, {"KEYS": 128})

# A mistake: (what has just been computed, head, first row, first key, the numbers) -> the numbers.
Mistake = Callable[[str, int, int, int, torch.Tensor], torch.Tensor]


def _none(what: str, head: int, m0: int, n0: int, x: torch.Tensor) -> torch.Tensor:
    return x


def _hopper(to: Head, given: Operands, at: int, wrong: Mistake) -> None:
    """Tile after tile of 128 rows, blocks of 64 keys from the last that a row attends to the first, an online softmax."""
    q, k, v, allowed, factor = given.q, given.k, given.v, given.attended, HOPPER.exponent
    for m0 in range(0, len(q), 128):
        rows = slice(m0, m0 + 128)
        m_i = torch.full((len(q[rows]),), -torch.inf)
        l_i, acc = torch.zeros(len(q[rows])), torch.zeros(len(q[rows]), v.shape[1])
        blocks = [n0 for n0 in range(0, len(k), 64) if allowed[rows, n0 : n0 + 64].any() or n0 == 0]
        for n0 in reversed(blocks):
            keys = slice(n0, n0 + 64)
            s = torch.where(allowed[rows, keys], q[rows].float() @ k[keys].float().T, -torch.inf)
            s = wrong("scores", at, m0, n0, s)
            to.scores[rows, keys] = s
            m_new = wrong("maximum", at, m0, n0, torch.maximum(m_i, s.amax(1)))
            pivot = torch.where(m_new == -torch.inf, 0.0, m_new)
            alpha, p = torch.exp2((m_i - pivot) * factor), torch.exp2(s * factor - (pivot * factor)[:, None])
            p = wrong("weights", at, m0, n0, p)
            to.weights[rows, keys], to.tile_maxima[rows, n0] = p, m_new
            l_i = l_i * wrong("alpha of the sum", at, m0, n0, alpha) + p.sum(1)
            acc = acc * wrong("alpha of the output", at, m0, n0, alpha)[:, None] + p.half().float() @ v[keys].float()
            m_i = m_new
        to.maximum[rows], to.total[rows], to.output[rows] = m_i, l_i, acc


def _small(to: Head, given: Operands, at: int, wrong: Mistake) -> None:
    """Tiles of 64 rows; blocks of 128 keys, each with a softmax of its own, combined at the end."""
    q, k, v, allowed, factor = given.q, given.k, given.v, given.attended, SMALL.exponent
    ranks = range(0, len(k), 128)
    for m0 in range(0, len(q), 64):
        rows = slice(m0, m0 + 64)
        maxima, sums, outputs = [], [], []
        for n0 in ranks:
            keys = slice(n0, n0 + 128)
            s = torch.where(allowed[rows, keys], q[rows].float() @ k[keys].float().T, -torch.inf)
            m = s.amax(1)
            p = torch.exp2(s * factor - (torch.where(m == -torch.inf, 0.0, m) * factor)[:, None])
            to.scores[rows, keys], to.weights[rows, keys], to.tile_maxima[rows, n0] = s, p, m
            maxima.append(m)
            sums.append(p.sum(1))
            outputs.append(p.half().float() @ v[keys].float())
        m_all = torch.stack(maxima).amax(0)
        pivot = torch.where(m_all == -torch.inf, 0.0, m_all)
        weights = [
            wrong("weight of a rank", at, m0, n0, torch.exp2((m - pivot) * factor)) for n0, m in zip(ranks, maxima, strict=True)
        ]
        total = sum(x * w for x, w in zip(sums, weights, strict=True))
        inverse = torch.where(total == 0, 0.0, 1 / total)
        to.maximum[rows], to.total[rows] = m_all, total
        parts = [wrong("output of a rank", at, m0, n0, o) for n0, o in zip(ranks, outputs, strict=True)]
        to.output[rows] = sum(o * (w * inverse)[:, None] for o, w in zip(parts, weights, strict=True))


Model = Callable[[Head, Operands, int, Mistake], None]
MODELS: dict[str, tuple[Model, Convention]] = {"hopper": (_hopper, HOPPER), "small": (_small, SMALL)}


def _judge(kernel: str, shape: Shape, wrong: Mistake = _none) -> dict[str, PartVerdict]:
    """The verdict of every part of a model's record."""
    model, convention = MODELS[kernel]
    found, inputs = _recorded(model, shape, wrong)
    return _verdicts(found, inputs, convention)


def _recorded(model: Model, shape: Shape, wrong: Mistake = _none) -> tuple[Record, Inputs]:
    """What a model records, and what it was given."""
    found, inputs = Record.allocate(shape, CPU), InputSets(shape, CPU, 0)[0]
    for batch in range(shape.batch):
        for head in range(shape.heads_q):
            model(found.head(batch, head), run.operands(inputs, batch, head), head, wrong)
    return found, inputs


def _verdicts(found: Record, inputs: Inputs, convention: Convention) -> dict[str, PartVerdict]:
    judged = run.judge_views(VIEWS, found, inputs, Recording((), convention))
    return {part.name: part for view in judged for part in view.parts}


def _wrong(found: dict[str, PartVerdict]) -> list[str]:
    return [name for name, part in found.items() if part.wrong]


@pytest.mark.parametrize("kernel", MODELS)
@pytest.mark.parametrize(
    "shape", [SHAPE, CAUSAL, parse_shape("2,4/2,65/129,64"), replace(parse_shape("1,1,90/30,64"), causal=True)]
)
def test_a_right_kernel_is_right(kernel: str, shape: Shape) -> None:
    found = _judge(kernel, shape)
    assert not _wrong(found), found
    assert list(found) == ["scores", "tile maxima", "row maxima", "weights", "row sums", "output"]
    assert all(part.error is not None and part.error <= part.bound for part in found.values())


def _at(wanted: str, place: tuple[int, int, int], change: Callable[[torch.Tensor], torch.Tensor]) -> Mistake:
    """A change of one tile's numbers."""
    return lambda what, head, m0, n0, x: change(x) if (what, (head, m0, n0)) == (wanted, place) else x


@pytest.mark.parametrize(
    ("kernel", "mistake", "parts", "where"),
    [
        ("hopper", _at("scores", (1, 128, 64), lambda s: s * 1.001), ["scores"], "head 1, rows 128 to 199, keys 64 to 127"),
        ("hopper", _at("scores", (0, 0, 256), lambda s: s.roll(1, 1)), ["scores"], "head 0, rows 0 to 127, keys 256 to 299"),
        ("hopper", _at("weights", (1, 0, 128), lambda p: p * 1.0001), ["weights"], "head 1, rows 0 to 127, keys 128 to 191"),
        (
            "hopper",
            _at("maximum", (1, 0, 128), lambda m: m * 0.999),
            ["tile maxima", "row maxima"],
            "head 1, rows 0 to 127, keys 128 to 191",
        ),
        ("hopper", _at("alpha of the sum", (1, 128, 64), torch.ones_like), ["row sums"], "head 1, rows 128 to 199"),
        ("hopper", _at("alpha of the output", (0, 128, 64), torch.ones_like), ["output"], "head 0, rows 128 to 199"),
        ("small", _at("weight of a rank", (1, 64, 128), torch.ones_like), ["row sums", "output"], "head 1, rows 64 to 127"),
        ("small", _at("output of a rank", (0, 192, 256), torch.zeros_like), ["output"], "head 0, rows 192 to 199"),
        ("small", _at("output of a rank", (1, 0, 0), lambda o: o.roll(1, 0)), ["output"], "head 1, rows 0 to 63"),
    ],
)
def test_a_mistake_is_seen_in_its_stage_and_located(kernel: str, mistake: Mistake, parts: Sequence[str], where: str) -> None:
    found = _judge(kernel, SHAPE, mistake)
    assert _wrong(found) == list(parts)
    assert str(found[parts[0]].first) == f"batch 0, {where}"
    assert all(str(found[part].first) == f"batch 0, {where.partition(', keys')[0]}" for part in parts[1:])


def test_what_was_never_written_or_is_no_number_is_wrong() -> None:
    right, inputs = _recorded(_hopper, SHAPE)
    assert not _wrong(_verdicts(right, inputs, HOPPER))
    blank = Record.allocate(SHAPE, CPU)
    assert not written(blank.rows).any() and blank.rows.isnan().all()
    assert "scores" in _wrong(_verdicts(blank, inputs, HOPPER)) and "output" in _wrong(_verdicts(blank, inputs, HOPPER))
    for part, value, name in (
        ("scores", torch.nan, "scores"),
        ("weights", torch.nan, "weights"),
        ("maximum", torch.inf, "row maxima"),
        ("total", torch.nan, "row sums"),
        ("output", torch.nan, "output"),
    ):
        spoilt = Record(SHAPE, right.rows.clone())
        getattr(spoilt.head(0, 1), part)[150] = value
        found = _verdicts(spoilt, inputs, HOPPER)
        assert found[name].error is None and str(found[name].first).startswith("batch 0, head 1, rows 128 to 199"), name


def test_the_tiles_that_causality_leaves_out_may_be_blank_and_no_others() -> None:
    visited = _judge("hopper", CAUSAL)
    assert visited["scores"].tiles == 2 * 2 * 5 and not _wrong(visited)
    # rows 0 to 127 attend keys 0 to 227: their last tile, keys 256 to 299, is none of theirs
    found = _judge("hopper", CAUSAL, _at("scores", (0, 128, 256), lambda s: torch.full_like(s, -torch.inf)))
    assert str(found["scores"].first) == "batch 0, head 0, rows 128 to 199, keys 256 to 299"
    allowed = attended(batch=1, heads_q=1, seqlen_q=200, seqlen_k=300, causal=True)[0, 0]
    assert not allowed[:128, 256:].any() and allowed[128:, 256:].any()


def test_emulated_exponentials_are_allowed_their_error_and_no_more() -> None:
    emulating = of_production("hopper", SHAPE.scale, {"WARPGROUPS": 2, "BLOCK_N": 64, "EMULATE_EXP2": 1})
    assert emulating.exp2_error == bounds.EMULATED_EXP2 < 1e-4 and HOPPER.exp2_error == 2.0**-22
    for factor, right in ((1 + 7e-5, True), (1 + 9e-5, False)):
        found, inputs = _recorded(_hopper, SHAPE, _at("weights", (0, 0, 64), lambda p, factor=factor: p * factor))
        assert (_wrong(_verdicts(found, inputs, emulating)) == []) is right


def test_a_record_that_is_too_large_is_refused() -> None:
    with pytest.raises(ArgumentValueError, match="shape: 4,16,4096,64 fp16 takes a record of 12546 MiB; allowed: at most 1024"):
        Record.allocate(parse_shape("4,16,4096,64"), CPU)
    assert Record.allocate(parse_shape("mission"), torch.device("meta")).rows.numel() * 4 < 30 * 2**20


def test_the_layout_is_stated_alike_wherever_it_must_be_stated() -> None:
    from flashcore.kernels import view
    from flashcore.kernels.hopper import view as gluon_view

    assert view.ROW_NUMBERS.value == gluon_view.ROW_NUMBERS.value == record.ROW_NUMBERS == 258


def test_factors_are_the_float32_numbers_that_kernels_are_given() -> None:
    assert conventions.float32(0.1) != 0.1 and conventions.float32(0.125) == 0.125
    assert HOPPER.exponent == conventions.float32(SHAPE.scale * 1.4426950408889634) == HOPPER.pivot_factor
