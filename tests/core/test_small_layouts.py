"""The small kernel's layouts, as tables of places: what a block sends lies where it is sent from, and stores are 16 bytes."""

import numpy as np
import pytest

pytest.importorskip("triton")

from flashcore.kernels.small.cluster import WARP_ROWS
from flashcore.kernels.small.config import FORMS, ROWS
from flashcore.kernels.small.layouts import exchanged, stored

# columns of a block's result, and of the part of it that each block stores
PARTS = sorted({(head_dim, head_dim // form.cluster) for head_dim, forms in FORMS.items() for form in forms})
SHARED = [(columns, part) for columns, part in PARTS if part < columns]


def _places(bases: list[list[int]]) -> np.ndarray:
    """[2^bits, 2]: the (row, column) that a linear layout has at each number; bases are those of its bits, lowest first."""
    numbers = np.arange(2 ** len(bases))
    bits = (numbers[:, None] >> np.arange(len(bases))) & 1
    return np.bitwise_xor.reduce(bits[:, :, None] * np.array(bases), axis=1)


def _offsets(columns: int, part: int) -> np.ndarray:
    """[64, columns]: where in shared memory each number of a result lies, in elements."""
    places = _places(exchanged(columns, part).offset_bases)
    offsets = np.full((ROWS, columns), -1)
    offsets[places[:, 0], places[:, 1]] = np.arange(len(places))
    return offsets


def _one_to_one(places: np.ndarray, columns: int) -> bool:
    inside = (places >= 0).all() and (places < (ROWS, columns)).all()
    return bool(inside) and len(places) == ROWS * columns == len(np.unique(places, axis=0))


def test_parts_of_several_sizes_are_in_use() -> None:
    assert len(SHARED) > 3 and min(part for _, part in SHARED) == 8 and max(columns for columns, _ in PARTS) == 128


@pytest.mark.parametrize(("columns", "part"), SHARED)
def test_every_number_that_is_exchanged_has_one_place(columns: int, part: int) -> None:
    for width in (columns, part):
        assert _one_to_one(_places(exchanged(width, part).offset_bases), width)


@pytest.mark.parametrize(("columns", "part"), SHARED)
def test_what_a_warp_holds_of_a_part_lies_where_it_is_sent_from(columns: int, part: int) -> None:
    whole, alone = _offsets(columns, part), _offsets(part, part)
    # send_tile takes so many bytes for each warp, one after the other
    numbers = WARP_ROWS.value * part
    for peer in range(columns // part):
        of_peer = whole[:, peer * part : (peer + 1) * part] - peer * ROWS * part
        # the whole and the parts are two views of one memory
        assert np.array_equal(of_peer, alone)
        for warp in range(4):
            rows = slice(warp * WARP_ROWS.value, (warp + 1) * WARP_ROWS.value)
            assert sorted(of_peer[rows].flat) == list(range(warp * numbers, (warp + 1) * numbers))


@pytest.mark.parametrize(("columns", "part"), SHARED)
def test_a_thread_of_an_accumulator_writes_16_bytes_beside_the_next_lanes(columns: int, part: int) -> None:
    # a wgmma's result (PTX ISA, "Register Fragments"): of every 8 columns lane l holds 2, the first of them 2 * (l % 4), in the
    # rows l // 4 and l // 4 + 8 of the warp's 16
    offsets = _offsets(columns, part)
    for warp in range(4):
        for column in range(0, columns, 8):
            lanes = [
                [offsets[16 * warp + lane // 4 + row, column + 2 * (lane % 4) + beside] for row in (0, 8) for beside in (0, 1)]
                for lane in range(32)
            ]
            first = lanes[0][0]
            assert first % 4 == 0 and np.array_equal(np.array(lanes).flat, first + np.arange(128))


@pytest.mark.parametrize("columns", sorted({part for _, part in PARTS}))
def test_stores_are_of_16_bytes_where_there_are_as_many_and_stay_in_their_warp(columns: int) -> None:
    layout = stored(columns)
    registers, lanes, warps = layout.reg_bases, layout.lane_bases, layout.warp_bases
    assert (len(lanes), len(warps), layout.block_bases, layout.shape) == (5, 2, [], [ROWS, columns])
    places = _places([*registers, *lanes, *warps])
    assert _one_to_one(places, columns)
    places = places.reshape(4, 32, -1, 2)
    assert np.array_equal(places[..., 0] // WARP_ROWS.value, np.broadcast_to(np.arange(4)[:, None, None], places.shape[:-1]))
    # a thread's registers in vectors of half-precision numbers: each in one row, of columns beside each other, aligned
    vector = min(8, places.shape[2])
    assert vector == (8 if columns >= 16 else 4)
    vectors = places.reshape(4, 32, -1, vector, 2)
    assert (vectors[..., 0] == vectors[..., :1, 0]).all() and (vectors[..., 0, 1] % vector == 0).all()
    assert np.array_equal(vectors[..., 1] - vectors[..., :1, 1], np.broadcast_to(np.arange(vector), vectors.shape[:-1]))
    # lanes beside each other continue a row as far as 4 of them reach
    beside = min(4, columns // vector)
    runs = vectors[:, :, :, 0].reshape(4, 32 // beside, beside, -1, 2)
    assert (runs[..., 0] == runs[:, :, :1, :, 0]).all()
    assert (np.diff(runs[..., 1], axis=2) == vector).all()
