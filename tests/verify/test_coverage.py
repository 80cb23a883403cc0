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


@pytest.mark.parametrize("impl", BINDINGS)
def test_every_kernel_for_hopper_takes_every_tile_case(impl: str) -> None:
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
