"""Sampling: what fits, once each; evolution finds an optimum that chance does not; a journal forgets nothing."""

import sys
from pathlib import Path
from statistics import median

import pytest

from flashcore.errors import UnsupportedError
from flashcore.search import sampling
from flashcore.search.replay import replay
from flashcore.search.sampling import NO_TIME, Space, Study, point_key

CHOICES = {
    **{name: (False, True) for name in "abcd"},
    "m": (16, 32, 64, 128),
    "n": (16, 32, 64, 128),
    "k": (1, 2, 3),
}


def points() -> list[dict[str, int | bool | str]]:
    found = [{}]
    for name, values in CHOICES.items():
        found = [{**point, name: value} for point in found for value in values]
    return [point for point in found if point["m"] * point["n"] <= 4096 and not (point["a"] and point["b"])]


SPACE = Space(CHOICES, points())


def score(point) -> float:
    """Each field has a best value, and one of two best tiles needs a third field."""
    best = {"a": True, "b": False, "c": True, "d": False, "k": 2}
    cost = sum(0.05 for name, value in best.items() if point[name] != value)
    return 1 + cost + 0.04 * abs(point["m"] - 64) / 16 + 0.03 * abs(point["n"] - 32 * point["k"]) / 16


SCORES = {point_key(point): score(point) for point in SPACE.points}


@pytest.mark.parametrize("sampler", ["evolutionary", "random", "exhaustive"])
def test_every_point_that_fits_is_proposed_once_and_no_other(sampler: str) -> None:
    few = Space(CHOICES, SPACE.points[::4])
    study, proposed = Study(few, sampler, 0), []
    while found := study.propose(40):
        for proposal in found:
            study.tell(proposal, SCORES[point_key(proposal.values)])
        proposed += found
    assert [proposal.number for proposal in proposed] == list(range(len(few.points)))
    assert {point_key(proposal.values) for proposal in proposed} == {point_key(values) for values in few.points}
    if sampler == "exhaustive":
        assert [proposal.values for proposal in proposed] == few.points


def test_evolution_finds_the_optimum_earlier_than_chance() -> None:
    best = min(SCORES.values())

    def evaluations(sampler: str, seed: int) -> int:
        found = replay(SPACE, SCORES, sampler, seed, len(SPACE.points) // 3)
        return next((number for number, one in enumerate(found) if one <= best / 0.99), len(SPACE.points))

    evolved, drawn = ([evaluations(sampler, seed) for seed in range(5)] for sampler in ("evolutionary", "random"))
    assert median(evolved) < len(SPACE.points) / 5 and median(evolved) < 0.6 * median(drawn)


def test_evolution_goes_on_from_what_has_a_time() -> None:
    """Where most points have none, the next generation is not made of them."""
    study, told = Study(SPACE, "evolutionary", 1), []
    for _ in range(4):
        for proposal in study.propose(sampling.POPULATION):
            study.tell(proposal, SCORES[point_key(proposal.values)] if proposal.values["c"] else NO_TIME)
            told.append(proposal.values["c"])
    assert sum(told[32:64]) > 20 and sum(told[:16]) < 14


def test_a_journal_gives_back_what_was_open_told_and_kept(tmp_path: Path) -> None:
    first = Study(SPACE, "evolutionary", 0, tmp_path / "journal")
    proposals = first.propose(20)
    for proposal in proposals[:12]:
        first.tell(proposal, SCORES[point_key(proposal.values)])
    first.keep("name", {"of": [1, 2.5]})
    second = Study(SPACE, "evolutionary", 0, tmp_path / "journal")
    assert second.open == proposals[12:] and second.count == 20 and second.kept == {"name": {"of": [1, 2.5]}}
    for proposal in second.open:
        second.tell(proposal, NO_TIME)
    assert not second.open and not Study(SPACE, "evolutionary", 0, tmp_path / "journal").open
    again = [point_key(proposal.values) for proposal in second.propose(60)]
    assert not set(again) & {point_key(proposal.values) for proposal in proposals} and len(set(again)) == 60


def test_a_journal_whose_last_line_was_cut_off_is_read(tmp_path: Path) -> None:
    study = Study(SPACE, "random", 0, tmp_path / "journal")
    study.propose(5)
    with (tmp_path / "journal").open("r+b") as journal:
        journal.truncate((tmp_path / "journal").stat().st_size - 10)
    again = Study(SPACE, "random", 0, tmp_path / "journal")
    assert again.count == 4 and len(again.propose(3)) == 3
    assert Study(SPACE, "random", 0, tmp_path / "journal").count == 7


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        Study(SPACE, "random", 0)
