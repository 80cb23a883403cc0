"""Cases for tuned forms: each entry's form and each hand-chosen one that it displaces is met, in both half dtypes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashcore import tuned
from flashcore.kernels.registry import BINDINGS
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Problem
from flashcore.sources import kernel_hash
from flashcore.spec import AttentionSpec
from flashcore.tuned import Entry, Ratio, Table
from flashcore.verify.cases import BACKWARD_SUITES, Case, select
from flashcore.verify.inputs import build
from flashcore.verify.subject import spec_of
from flashcore.verify.tuned_cases import tuned_cases

SMALL = {"cluster": 4, "keys": 128, "block_n": 64}
PORTABLE = {"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, "edge_stages": 1}
HOPPER = {
    **{"warpgroups": 2, "block_n": 64, "q_slots": 1, "kv_slots": 2},
    **dict.fromkeys(("q_registers", "o_shares_q", "join_tiles", "skip_rescale", "emulate_exp2", "hold_wait"), False),
}
LONGEST = {"heads": 32, "heads_k": 32, "seqlen_q": 16384, "seqlen_k": 16384}


def _entry(impl: str, config: dict | None, **changes: object) -> Entry:
    sizes = {"batch": 1, "heads": 8, "heads_k": 8, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64, "head_dim_v": 64}
    problem = Problem(impl=impl, **{**sizes, **changes})
    searchable = SEARCHABLE[impl]
    dtypes = tuned.DTYPES[tuned.precision(problem)] if config else ()
    return Entry(
        problem=problem,
        features=searchable.binding.features(searchable.spec(problem)),
        config=config,
        ratio=Ratio(value=1.1, low=1.05, high=1.15) if config else None,
        unseen={},
        source_sha256=kernel_hash(searchable.binding.KERNEL),
        sha256={dtype: "0" * 64 for dtype in dtypes},
        search="search-x.json",
        retests=[],
        words="the fastest",
    )


ENTRIES = [
    _entry("small", SMALL),
    _entry("small", SMALL, causal=True, heads=12, heads_k=4, seqlen_q=197, seqlen_k=197),
    _entry("hopper", HOPPER, **LONGEST),
    _entry("hopper", HOPPER, **LONGEST, window=(100, 30)),
    _entry("hopper", HOPPER, softcap=20.0),
    _entry("hopper", HOPPER, head_dim=72, head_dim_v=40),
    _entry("portable", PORTABLE),
    _entry("portable", PORTABLE, mask="bool"),
    _entry("portable", PORTABLE, mask="additive"),
    _entry("portable", {**PORTABLE, "block_m": 16, "block_n": 16}, dtype="fp32"),
]


@pytest.fixture
def table(tuned_folder: Path) -> Callable[..., None]:
    def write(*entries: Entry) -> None:
        path = tuned_folder / "nvidia-h200.json"
        Table(gpu="NVIDIA H200", arch="sm_90a", sm_count=132, entries=list(entries)).save(path)
        tuned.forget()

    return write


def _spec(case: Case) -> AttentionSpec:
    return spec_of(case, build(case, torch.device("meta")))


def _reached(impl: str) -> set:
    binding = BINDINGS[impl]
    taken = [spec for spec in map(_spec, tuned_cases()) if binding.reject(spec, "sm_90a", False) is None]
    return {binding.specialise_call(spec, "sm_90a", 132) for spec in taken}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.problem.name)
def test_a_tuned_form_and_what_it_displaces_are_met(entry: Entry, table: Callable) -> None:
    impl, problem = entry.problem.impl, entry.problem
    binding, searchable = BINDINGS[impl], SEARCHABLE[impl]
    table(entry)
    reached = _reached(impl)
    for dtype in entry.dtypes:
        spec = searchable.spec(problem.model_copy(update={"dtype": dtype}))
        ours = binding.specialise_call(spec, "sm_90a", 132)
        assert ours == searchable.form.specialise(spec, searchable.configure(entry.config))
        # all shipped forms of its features, among them the hand-chosen one of its own sizes
        alike = {one for one in binding.shipped("sm_90a") if one.name.rsplit("-", 1)[0] == ours.name.rsplit("-", 1)[0]}
        assert searchable.form.specialise(spec, binding.hand_chosen(spec, "sm_90a", 132)) in alike
        assert ours in alike and alike <= reached


def test_an_entry_among_others_is_met_at_its_own_sizes(table: Callable) -> None:
    mission = _entry("small", SMALL)
    others = [_entry("small", None, heads=8, heads_k=8, seqlen_q=q, seqlen_k=k) for q, k in ((73, 465), (189, 189), (465, 73))]
    table(mission, *others)
    assert "tuned-small-fp16-b1h8s512d64" in {case.name for case in tuned_cases()}
    table(mission)
    cases = tuned_cases()
    assert "tuned-small-fp16-b1h8s512d64" not in {case.name for case in cases}
    near = [case for case in cases if BINDINGS["small"].specialise_call(_spec(case), "sm_90a", 132).name.endswith("c4k128n64")]
    assert len(near) == 6 and all(case.seqlen_q % 2 and case.seqlen_k % 2 for case in near)
    assert {case.heads_k for case in near} == {8, 4} and all(case.storage == "padded" for case in near)


def test_the_longest_are_verified_by_a_fraction_of_their_scores_and_on_gpus_only(table: Callable) -> None:
    table(_entry("hopper", HOPPER, **LONGEST))
    scores = {case.name: case.batch * case.heads_q * case.seqlen_q * case.seqlen_k for case in tuned_cases()}
    assert max(scores.values()) < 32 * 16384**2 / 7
    assert all(bool(case.needs_bytes) == (scores[case.name] > 2**20) for case in tuned_cases())


def test_nothing_tuned_has_no_cases(table: Callable) -> None:
    assert tuned_cases() == []
    table(_entry("small", None), _entry("hopper", HOPPER).model_copy(update={"source_sha256": "0" * 64}))
    assert tuned_cases() == [] == select("tuned")


def test_the_cases_are_in_the_suite_of_everything_and_not_in_the_backward_pass(table: Callable) -> None:
    table(*ENTRIES)
    names = {case.name for case in tuned_cases()}
    assert len(names) == len(tuned_cases()) == len(select("tuned")) > 30
    assert names <= {case.name for case in select("all")}
    assert "tuned" not in BACKWARD_SUITES and not names & {case.name for case in select("all", backward=True)}
