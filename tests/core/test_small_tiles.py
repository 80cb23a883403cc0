"""How a block of the small kernel finds its tile: by multiplications in place of divisions, carried out here."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore.kernels.arguments import Argument
from flashcore.kernels.small import binding
from flashcore.kernels.small.binding import max_blocks
from flashcore.kernels.small.config import FORMS, ROWS, choose_config
from flashcore.spec import AttentionSpec, Options

MAX_BLOCKS = max(max_blocks(form, head_dim) for head_dim, forms in FORMS.items() for form in forms)


def _divided(n: np.ndarray, factor: Argument) -> np.ndarray:
    """The kernel's division: an i32 by an i32 in 64 bits, shifted, cut to 32."""
    assert isinstance(factor, int) and 0 < factor < 2**31
    return ((n.astype(np.int64) * np.int64(factor)) >> 30).astype(np.int32)


def test_factors_divide_exactly_whatever_may_be_divided() -> None:
    numbers = np.arange(MAX_BLOCKS + 1, dtype=np.int32)
    for divisor in range(1, MAX_BLOCKS + 1):
        assert np.array_equal(_divided(numbers, binding._factor(divisor)), numbers // divisor), divisor


@given(st.integers(1, 2**30 - 1), st.data())
def test_factors_divide_exactly_as_far_as_they_are_said_to(divisor: int, data: st.DataObject) -> None:
    most = (2**30 - 1) // divisor
    # where a quotient changes, too
    multiple = data.draw(st.integers(0, most // divisor)) * divisor
    numbers = [data.draw(st.integers(0, most)), most, multiple, max(0, multiple - 1)]
    assert _divided(np.array(numbers), binding._factor(divisor)).tolist() == [n // divisor for n in numbers]


def _described(**sizes: int) -> AttentionSpec:
    """A spec of these sizes, of which no tensor need exist."""
    options = Options.check(causal=False, scale=None, window=None, softcap=0.0, layout="bhsd")
    q = torch.empty(1, 1, 1, 64, dtype=torch.float16)
    return replace(AttentionSpec.from_tensors(q, q, q, None, options, return_lse=False), **sizes)


def _places(spec: AttentionSpec) -> tuple[np.ndarray, ...]:
    """(first row, batch, head, head of keys, rank) of every block, by the kernel's arithmetic on the arguments."""
    specialisation = binding.specialise_call(spec, "sm_90a", 132)
    names = [parameter.name for parameter in specialisation.parameters]
    values = dict(zip(names, binding.arguments(spec, specialisation), strict=True))
    block = np.arange(binding.grid(spec, specialisation, 132), dtype=np.int32)
    tile_of_all = block // specialisation.cluster
    head_of_all = _divided(tile_of_all, values["tiles_factor"])
    m0 = (tile_of_all - head_of_all * values["tiles"]) * ROWS
    batch = _divided(head_of_all, values["heads_factor"])
    head = head_of_all - batch * values["heads_q"]
    return m0, batch, head, _divided(head, values["group_factor"]), block % specialisation.cluster


def _check_places(batch: int, heads_k: int, group: int, seqlen_q: int, keys: int) -> None:
    spec = _described(batch=batch, heads_q=heads_k * group, heads_k=heads_k, seqlen_q=seqlen_q, seqlen_k=keys)
    assert binding.reject(spec, "sm_90a", False) is None
    tiles, cluster = math.ceil(seqlen_q / 64), binding.specialise_call(spec, "sm_90a", 132).cluster
    shape = (batch, heads_k, group, tiles, cluster)
    b, kv_head, member, tile, rank = np.unravel_index(np.arange(math.prod(shape)), shape)
    expected = (tile * 64, b, kv_head * group + member, kv_head, rank)
    for name, found, wanted in zip(("m0", "batch", "head", "kv_head", "rank"), _places(spec), expected, strict=True):
        assert np.array_equal(found, wanted), name


def _most_tiles(keys: int) -> int:
    form = choose_config(64, keys)
    return max_blocks(form, 64) // form.cluster


@settings(deadline=None)
@given(st.data())
def test_every_tile_has_one_cluster_which_finds_its_batch_head_and_rows(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 1024))
    left, sizes = _most_tiles(keys), []
    for _ in range(4):
        sizes.append(data.draw(st.integers(1, left)))
        left //= sizes[-1]
    tiles, batch, heads_k, group = data.draw(st.permutations(sizes))
    seqlen_q = data.draw(st.integers((tiles - 1) * 64 + 1, tiles * 64))
    _check_places(batch, heads_k, group, seqlen_q, keys)


@pytest.mark.parametrize("keys", [64, 512, 1024])
@pytest.mark.parametrize("largest", range(4), ids=["tiles", "batch", "heads_k", "group"])
def test_the_largest_of_each_size_is_found_too(largest: int, keys: int) -> None:
    sizes = [1, 1, 1, 1]
    sizes[largest] = _most_tiles(keys)
    tiles, batch, heads_k, group = sizes
    _check_places(batch, heads_k, group, 64 * tiles, keys)
