"""The loop: what is proposed is built, judged and told; what was interrupted goes on; what does not belong is refused."""

from pathlib import Path

import pytest

from flashcore.errors import ArgumentValueError
from flashcore.search import run as running
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.measurers import AwaitingGpu
from flashcore.search.run import RESULT, Order, Search
from flashcore.search.schema import Problem, SearchResult

HOPPER = Problem(impl="hopper", batch=4, heads=32, heads_k=32, seqlen_q=4096, seqlen_k=4096, head_dim=64, head_dim_v=64)
SMALL = Problem(impl="small", batch=4, heads=8, heads_k=8, seqlen_q=128, seqlen_k=128, head_dim=64, head_dim_v=64)


def search(folder: Path, sampler="evolutionary", budget=48, problem=HOPPER, seed=0, generation=None) -> Search:
    return Search(Order.of(problem, sampler, seed, budget, generation), folder, 132)


def read(folder: Path) -> SearchResult:
    return SearchResult.model_validate_json((folder / RESULT).read_text())


def test_a_search_evaluates_its_budget_of_distinct_points_and_finds_a_good_one(fakes, tmp_path: Path) -> None:
    measurer = fakes.FakeMeasurer()
    result = search(tmp_path, budget=80).run(fakes.FakeBuilder(HOPPER), measurer)
    assert [trial.number for trial in result.trials] == list(range(80)) and measurer.visits == 5
    assert len({tuple(sorted(trial.config.items())) for trial in result.trials}) == 80
    searchable = SEARCHABLE["hopper"]
    assert all(searchable.fits(HOPPER, searchable.configure(trial.config)) for trial in result.trials)
    best = min(fakes.us(searchable.values(config)) for config in searchable.space(HOPPER))
    found = running.best_of(result)
    assert found is not None and fakes.us(found.config) <= best / 0.98
    assert read(tmp_path) == result.model_copy(update={"time": read(tmp_path).time})
    assert len(result.visits) == 5 and result.incumbent == {"warpgroups": 3, **result.incumbent}


def test_an_exhaustive_search_is_one_visit_over_the_whole_space(fakes, tmp_path: Path) -> None:
    measurer = fakes.FakeMeasurer(us=lambda config: 50.0)
    result = search(tmp_path, "exhaustive", None, SMALL).run(fakes.FakeBuilder(SMALL, us=lambda config: 50.0), measurer)
    assert measurer.visits == 1 and len(result.trials) == result.fitting == result.budget
    assert [trial.config for trial in result.trials] == [
        SEARCHABLE["small"].values(c) for c in SEARCHABLE["small"].space(SMALL)
    ]


def test_a_budget_beyond_the_space_ends_with_the_space(fakes, tmp_path: Path) -> None:
    result = search(tmp_path, "random", 1000, SMALL).run(
        fakes.FakeBuilder(SMALL, us=lambda c: 50.0), fakes.FakeMeasurer(us=lambda c: 50.0)
    )
    assert len(result.trials) == result.fitting < 1000


def test_each_candidate_gets_its_verdict_and_the_search_goes_on(fakes, tmp_path: Path) -> None:
    def verdict(config):
        if config["hold_wait"]:
            return "compiler failed" if config["skip_rescale"] else "breaks a limit"
        return {2: "wrong", 4: "hang" if config["emulate_exp2"] else "crash"}.get(config["kv_slots"], fakes.us(config))

    result = search(tmp_path).run(fakes.FakeBuilder(HOPPER, us=verdict), fakes.FakeMeasurer(us=verdict))
    assert {trial.verdict for trial in result.trials} >= {"compiler failed", "breaks a limit", "wrong", "measured"}
    for trial in result.trials:
        said = verdict(trial.config)
        assert trial.verdict == (said if isinstance(said, str) else "measured")
        assert (trial.words == "as told") == isinstance(said, str)
    best = running.best_of(result)
    assert best is not None and best.config["kv_slots"] == 3


def test_the_same_binary_is_judged_once_and_counts_as_its_first(fakes, tmp_path: Path) -> None:
    def same(config):
        return sorted((name, value) for name, value in config.items() if name not in ("hold_wait", "skip_rescale"))

    measurer = fakes.FakeMeasurer()
    going = search(tmp_path, budget=64)
    result = going.run(fakes.FakeBuilder(HOPPER, same=same), measurer)
    twins = [trial for trial in result.trials if trial.verdict == "same binary"]
    assert twins and len(measurer.judged) == 64 - len(twins)
    for twin in twins:
        first = result.trials[twin.same_as]
        assert first.sha256 == twin.sha256 and first.number < twin.number and first.verdict == "measured"
        assert going.score(twin.number) == going.score(first.number) == 1 / first.judged.ratio


@pytest.mark.parametrize("at", ["build", "judge"])
@pytest.mark.parametrize("sampler", ["evolutionary", "random", "exhaustive"])
def test_what_was_interrupted_goes_on_and_nothing_is_lost_or_judged_twice(fakes, tmp_path: Path, at: str, sampler: str) -> None:
    budget = 40 if sampler != "exhaustive" else None
    problem, time = (HOPPER, fakes.us) if sampler != "exhaustive" else (SMALL, lambda config: 50.0)
    stops = {20: KeyboardInterrupt()}
    builder = fakes.FakeBuilder(problem, us=time, stop=stops if at == "build" else {})
    measurer = fakes.FakeMeasurer(us=time, stop=stops if at == "judge" else {})
    first = search(tmp_path, sampler, budget, problem)
    with pytest.raises(KeyboardInterrupt):
        first.run(builder, measurer)
    before = read(tmp_path)
    # another process: nothing of the first is in memory
    result = search(tmp_path, sampler, budget, problem).run(builder, measurer)
    count = 40 if budget else result.fitting
    assert len(result.trials) == count and all(trial.verdict == "measured" for trial in result.trials)
    assert len({tuple(sorted(trial.config.items())) for trial in result.trials}) == count
    finished = [trial for trial in before.trials if trial.verdict == "measured"]
    assert result.trials[: len(finished)] == finished
    if sampler != "exhaustive":
        assert len(finished) == 16
    if at == "judge":
        assert len(builder.built) == count  # built before the interruption, and not again


def test_a_visit_that_ends_early_is_followed_by_another(fakes, tmp_path: Path) -> None:
    measurer = fakes.FakeMeasurer(most=5)
    result = search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), measurer)
    assert measurer.visits == 4 and sorted(measurer.judged) == list(range(16)) and len(result.visits) == 4


def test_without_a_gpu_the_search_stops_and_goes_on_when_there_is_a_result(fakes, tmp_path: Path) -> None:
    builder, measurer = fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer(away=True)
    with pytest.raises(AwaitingGpu, match="16 candidates wait"):
        search(tmp_path, budget=32).run(builder, measurer)
    assert {trial.verdict for trial in read(tmp_path).trials} == {"built"}
    with pytest.raises(AwaitingGpu, match="16 candidates wait"):
        search(tmp_path, budget=32).run(builder, measurer)
    assert len(builder.built) == 16
    measurer.away = False
    assert len(search(tmp_path, budget=32).run(builder, measurer).trials) == 32


def test_a_budget_may_be_raised_later(fakes, tmp_path: Path) -> None:
    search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer())
    result = search(tmp_path, budget=48).run(fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer())
    assert len(result.trials) == result.budget == 48


def test_a_search_is_repeated_by_its_seed(fakes, tmp_path: Path) -> None:
    found = [
        search(tmp_path / str(number), budget=48, seed=seed).run(fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer()).trials
        for number, seed in enumerate((3, 3, 4))
    ]
    assert [t.config for t in found[0]] == [t.config for t in found[1]] != [t.config for t in found[2]]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"sampler": "random"}, "sampler evolutionary, and this one has random"),
        ({"seed": 1}, "seed 0, and this one has 1"),
        ({"problem": HOPPER.model_copy(update={"causal": True})}, "a search with problem"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(fakes, tmp_path: Path, other: dict, words: str) -> None:
    search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer())
    with pytest.raises(ArgumentValueError, match=words):
        search(tmp_path, **{"budget": 16, **other})


def test_another_source_space_or_predicate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search(tmp_path, budget=16)
    with monkeypatch.context() as changed:
        changed.setattr(running, "kernel_hash", lambda kernel: "f" * 64)
        with pytest.raises(ArgumentValueError, match=r"with the kernel's source .* and this one has ffff"):
            search(tmp_path, budget=16)
    with monkeypatch.context() as changed:
        changed.setitem(SEARCHABLE["hopper"].choices, "kv_slots", (2, 3))
        with pytest.raises(ArgumentValueError, match="a search with space"):
            search(tmp_path, budget=16)
    search(tmp_path, budget=16)


def test_a_result_that_does_not_belong_to_the_search_is_refused(fakes, tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match="source ffffffffffff; allowed: of "):
        search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer(source="f" * 64))

    class Stranger(fakes.FakeMeasurer):
        def __init__(self, **change):
            super().__init__()
            self.change = change

        def judge(self, folder, waiting):
            (found,) = super().judge(folder, waiting)
            return [found.model_copy(update=self.change)]

    other = Stranger(problem=SMALL)
    with pytest.raises(ArgumentValueError, match=f"is of {SMALL.name}; allowed: of {HOPPER.name}"):
        search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), other)
    other = Stranger(judged=[fakes.judged(3, "e" * 64, 50.0)])
    with pytest.raises(ArgumentValueError, match="candidate 3 with binary eeeeeeeeeeee; allowed: the candidates"):
        search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), other)
    assert {trial.verdict for trial in read(tmp_path).trials} == {"built"}
    assert len(search(tmp_path, budget=16).run(fakes.FakeBuilder(HOPPER), fakes.FakeMeasurer()).trials) == 16


@pytest.mark.parametrize(("budget", "generation", "words"), [(0, None, "budget: got 0"), (16, 0, "generation: got 0")])
def test_numbers_below_one_are_refused(budget: int, generation: int | None, words: str) -> None:
    with pytest.raises(ArgumentValueError, match=words):
        Order.of(HOPPER, "random", 0, budget, generation)


def test_an_exhaustive_search_of_a_part_is_refused() -> None:
    with pytest.raises(ArgumentValueError, match="budget: got 5 for an exhaustive search; allowed: all"):
        Order.of(SMALL, "exhaustive", 0, 5)
