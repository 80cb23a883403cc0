"""What the cases reach between them: every binary of a wheel, and in the tile cases every feature at every head dim."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from flashcore.kernels.registry import BINDINGS, SHIPPED_ARCHS
from flashcore.spec import AttentionSpec
from flashcore.verify import inputs
from flashcore.verify.cases import Case, select
from flashcore.verify.short_cases import HALF as SHORT_HALF
from flashcore.verify.short_cases import HEAD_DIMS, OTHER_HEAD_DIMS, short_cases
from flashcore.verify.subject import spec_of
from flashcore.verify.tile_cases import BETWEEN_DIMS, DIMS, HALF, KEYS, QUERIES, tile_cases

# The GPUs that evidence may come from, with their multiprocessors: which tiles a call takes depends on these.
SM_COUNTS = {"sm_90a": 132}


@cache
def _specs() -> dict[str, AttentionSpec]:
    """Each case's spec by its name, from tensors that have a shape and no memory, the gigabytes of the largest too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_values", _no_values)
        return {case.name: spec_of(case, inputs.build(_described(case), torch.device("meta"))) for case in select("all")}


def _described(case: Case) -> Case:
    # what the keys hold is no part of a spec
    return replace(case, dead_nan=False)


def _no_values(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    batch = min(1, case.batch) if case.storage == "expanded" else case.batch
    sizes = (
        (case.seqlen_q, case.heads_q, case.head_dim),
        (case.seqlen_k, case.heads_k, case.head_dim),
        (case.seqlen_k, case.heads_k, case.dim_v),
    )
    return tuple(torch.empty(batch, *size, dtype=case.dtype, device="meta") for size in sizes)


def _taken(impl: str, arch: str) -> Iterator[AttentionSpec]:
    binding = BINDINGS[impl]
    return (spec for spec in _specs().values() if binding.reject(spec, arch, False) is None)


def test_a_spec_of_no_memory_is_that_of_the_real_tensors() -> None:
    for case in select("edge", "storage-*"):
        real = spec_of(case, inputs.build(case, torch.device("cpu")))
        described = replace(_specs()[case.name], device=real.device)
        # an address is part of the alignment, and only an unaligned view has one that is odd
        assert replace(described, aligned=real.aligned) == real
        assert described.aligned == real.aligned or case.storage == "unaligned"


@pytest.mark.parametrize("impl", BINDINGS)
@pytest.mark.parametrize("arch", [arch for arch in SHIPPED_ARCHS if arch in SM_COUNTS])
def test_every_shipped_binary_runs_in_some_case(impl: str, arch: str) -> None:
    binding = BINDINGS[impl]
    reached = {binding.specialise_call(spec, arch, SM_COUNTS[arch]) for spec in _taken(impl, arch)}
    assert [one.name for one in binding.shipped(arch) if one not in reached] == []


@pytest.mark.parametrize("impl", ["hopper", "portable"])
def test_every_kernel_for_any_length_takes_every_tile_case(impl: str) -> None:
    binding = BINDINGS[impl]
    refusals = {case.name: binding.reject(_specs()[case.name], "sm_90a", False) for case in tile_cases()}
    assert {name: reason for name, reason in refusals.items() if reason is not None} == {}


def test_every_feature_meets_every_head_dim_and_both_dtypes() -> None:
    by_feature: dict[tuple[str, ...], list[Case]] = {}
    for case in tile_cases():
        group, *feature, _, _ = case.name.split("-")
        if group in ("feature", "many"):
            by_feature.setdefault((group, *feature), []).append(case)
    assert len(by_feature) > 30
    for feature, cases in by_feature.items():
        assert {(case.head_dim, case.dim_v) for case in cases} == set(DIMS), feature
        assert {case.dtype for case in cases} == set(HALF.values()), feature


def test_every_length_meets_every_head_dim_and_both_dtypes() -> None:
    cases = [case for case in tile_cases() if case.name.startswith("tile-")]
    for dims in DIMS:
        of_dims = [case for case in cases if (case.head_dim, case.dim_v) == dims]
        assert {case.seqlen_q for case in of_dims} == set(QUERIES) and {case.seqlen_k for case in of_dims} == set(KEYS)
        assert {(case.dtype, case.causal) for case in of_dims} == {(d, c) for d in HALF.values() for c in (False, True)}
    # no pair of lengths twice
    assert len({(case.seqlen_q, case.seqlen_k) for case in cases}) == len(cases)


def test_head_dims_between_the_tiles_come_with_nan_beyond_them() -> None:
    cases = [case for case in tile_cases() if case.name.startswith("between-")]
    for head_dim in BETWEEN_DIMS:
        padded = [case for case in cases if case.head_dim == head_dim and case.storage == "padded"]
        assert {case.dtype for case in padded} == set(HALF.values())


def test_persistent_blocks_take_several_tiles_of_192_rows() -> None:
    cases = [case for case in tile_cases() if case.name.startswith("many-")]
    assert all(case.batch * case.heads_q * -(-case.seqlen_q // 192) > 4 * 132 for case in cases)
    assert any(case.batch * case.heads_q % 2 and case.heads_q > case.heads_k and case.causal for case in cases)


def _tiles(case: Case) -> int:
    return case.batch * case.heads_q * -(-case.seqlen_q // 64)


@pytest.mark.parametrize("impl", BINDINGS)
def test_every_kernel_takes_the_short_cases_that_are_small_with_a_positive_scale(impl: str) -> None:
    # a kernel of tiles that share a cluster may leave more keys and more tiles to others
    few = [case for case in short_cases() if case.seqlen_k <= 512 and _tiles(case) <= 132]
    small = [case for case in few if case.scale is None or case.scale > 0]
    assert len(small) > 200
    refusals = {case.name: BINDINGS[impl].reject(_specs()[case.name], "sm_90a", False) for case in small}
    assert {name: reason for name, reason in refusals.items() if reason is not None} == {}


def test_the_short_cases_have_every_odd_length_causal_and_not_with_their_lse() -> None:
    cases = [case for case in short_cases() if case.name.startswith("short-self-")]
    assert {case.seqlen_q for case in cases} == set(range(1, 130, 2))
    assert all(case.seqlen_q == case.seqlen_k and case.return_lse and case.head_dim == 64 for case in cases)
    # neither causal nor its absence keeps to a residue, nor to an end of the range
    for causal in (False, True):
        lengths = [case.seqlen_q for case in cases if case.causal == causal]
        assert {length % 16 for length in lengths} == set(range(1, 16, 2)) and {1, 63, 65, 127, 129} <= set(lengths)


def test_short_lengths_that_differ_leave_rows_without_keys_and_keys_without_rows() -> None:
    cases = [case for case in short_cases() if case.seqlen_q != case.seqlen_k and max(case.seqlen_k, case.seqlen_q) < 300]
    kinds = {(case.seqlen_q > case.seqlen_k, case.seqlen_k % 2, case.causal) for case in cases}
    assert kinds == {(more, odd, causal) for more in (False, True) for odd in (0, 1) for causal in (False, True)}
    assert max(case.seqlen_q - case.seqlen_k for case in cases if case.causal) > 64


def test_every_edge_of_tiles_and_shares_is_met_from_both_sides() -> None:
    pairs = {(case.seqlen_q, case.seqlen_k) for case in short_cases()}
    for edge in (64, 128, 256, 512, 1024):
        assert {edge - 1, edge, edge + 1} <= {q for q, _ in pairs} & {k for _, k in pairs}


def test_short_head_dims_come_with_nan_beyond_them_and_in_both_dtypes() -> None:
    cases = [case for case in short_cases() if case.name.startswith("short-dim-") and case.head_dim == case.dim_v]
    assert {case.head_dim for case in cases} == set(range(8, 129, 8)) == {*HEAD_DIMS, *OTHER_HEAD_DIMS}
    assert {(case.head_dim, case.dtype) for case in cases} >= {(d, t) for d in HEAD_DIMS for t in SHORT_HALF.values()}
    assert {case.head_dim for case in cases if case.storage == "padded"} == set(range(8, 129, 8))


def test_short_grids_are_below_and_above_the_multiprocessors_for_each_size_of_cluster() -> None:
    tiles = sorted({_tiles(case) for case in short_cases() if case.name.startswith("short-heads-")})
    for cluster in (1, 2, 4):
        blocks = [cluster * number for number in tiles]
        assert SM_COUNTS["sm_90a"] in blocks and blocks[0] < 132 < 264 <= blocks[-1]


def test_short_cases_are_few_and_cheap() -> None:
    cases = short_cases()
    assert len(cases) <= 280
    scores = sorted(case.batch * case.heads_q * case.seqlen_q * case.seqlen_k for case in cases)
    assert scores[-1] < 2**22 and scores[len(scores) // 2] < 2**17
    # what takes Triton's interpreter long is for GPUs
    assert all(case.needs_bytes or _tiles(case) <= 132 for case in cases)
