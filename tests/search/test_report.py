"""The report: its figures from a record that is known, and that it refuses records which contradict themselves."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from flashcore.errors import ArgumentValueError
from flashcore.search import report as reporting
from flashcore.search.plot import plot
from flashcore.search.report import Curves, damages, make_report
from flashcore.search.report_view import to_markdown, views
from flashcore.search.run import Order, Search
from flashcore.search.schema import Problem, SearchResult

SMALL = Problem(impl="small", batch=4, heads=8, heads_k=8, seqlen_q=128, seqlen_k=128, head_dim=64, head_dim_v=64)
INCUMBENT = {"cluster": 1, "keys": 128, "block_n": 128}


def us(config) -> float | str:
    if config["block_n"] == 32:
        return "compiler failed"
    if config["cluster"] == 4:
        return "wrong"
    return 100.0 if config == INCUMBENT else 80.0 + config["keys"] / 8 + 10 * config["cluster"]


@pytest.fixture(scope="module")
def found(fakes: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """An exhaustive search of a small space, of which block_n 64 and 128 have one machine code with two keys and clusters."""
    folder = tmp_path_factory.mktemp("found")
    builder = fakes.FakeBuilder(SMALL, us=us, same=lambda c: (c["cluster"], c["keys"], c["block_n"] == 32, c == INCUMBENT))
    return Search(Order.of(SMALL, "exhaustive", 0, None), folder, 132).run(builder, fakes.FakeMeasurer(us=us))


@pytest.fixture
def save(found: SearchResult, tmp_path: Path) -> Callable[..., Path]:
    """The search in a file, changed, or with one of its candidates changed; judged {}: without a judgement."""

    def save(name: str = "r.json", trial: int | None = None, judged: dict | None = None, **changes: object) -> Path:
        result = found
        if trial is not None:
            trials, one = list(found.trials), found.trials[trial]
            if judged is not None:
                changes["judged"] = one.judged.model_copy(update=judged) if judged else None
            trials[trial] = one.model_copy(update=changes)
            changes = {"trials": trials}
        result = result.model_copy(update=changes)
        result.save(tmp_path / name)
        return tmp_path / name

    return save


def test_the_best_and_the_verdicts_are_those_of_the_record(save, found: SearchResult) -> None:
    (one,) = make_report([save()], seeds=2).searches
    assert one.exhaustive and one.evaluations == one.fitting == 40 and sum(one.verdicts.values()) == 40
    assert one.verdicts["same binary"] > 0 and one.verdicts["wrong"] > 0 and one.verdicts["compiler failed"] > 0
    fastest = min((us(t.config), t.number) for t in found.trials if t.verdict == "measured")
    assert one.best is not None and one.best.us == fastest[0] and one.best.ratio == 100 / fastest[0]
    assert one.best.ratio_low == one.best.ratio == one.best.ratio_high and one.best.sdpa_us == 120.0
    assert one.incumbent == INCUMBENT and one.speeds[-1] == one.best.ratio == max(one.speeds)
    assert one.speeds == sorted(one.speeds) and one.gpus == ["NVIDIA Fake"]


def test_samplers_are_compared_on_the_record_where_it_is_large_enough(save, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_report([save()], seeds=2).searches[0].compared is None  # 40 points: evolution would not begin
    monkeypatch.setattr(reporting, "POPULATION", 4)
    (one,) = make_report([save()], seeds=3).searches
    compared = one.compared
    assert compared is not None and one.best is not None
    assert compared.budget == 13 and compared.optimum == pytest.approx(one.best.ratio)
    assert [curves.sampler for curves in compared.curves] == ["evolutionary", "random"]
    for curves in compared.curves:
        assert len(curves.low) == len(curves.middle) == len(curves.high) == 13 and len(curves.reached) == 3
        assert curves.middle == sorted(curves.middle) and max(curves.high) <= compared.optimum + 1e-12
        for low, middle, high in zip(curves.low, curves.middle, curves.high, strict=True):
            assert low <= middle <= high


def test_evaluations_to_the_optimum_are_the_median_over_the_seeds() -> None:
    line = {"low": [1.0], "middle": [1.0], "high": [1.0]}
    one = Curves(sampler="random", reached=[3, None, 9, 5, 30], **line)
    assert one.share == 0.8 and one.typical == 9
    assert Curves(sampler="random", reached=[3, None, None], **line).typical is None


@pytest.mark.parametrize(
    ("trial", "changes", "words"),
    [
        ("measured", {"number": 99}, "candidates are missing"),
        ("measured", {"config": INCUMBENT}, "1 configurations more than once"),
        ("measured", {"config": {"cluster": 8, "keys": 128, "block_n": 64}}, "is not in the space"),
        ("measured", {"judged": {"ratio": 1.5}}, "ratio 1.5, which is not its samples'"),
        ("measured", {"judged": {"us": [50.0] * 3}}, "which is not its samples'"),
        ("measured", {"judged": {"us": [90.0]}}, "no samples beside the hand-chosen form's"),
        ("measured", {"judged": {"us": []}}, "no samples"),
        ("measured", {"judged": {"sha256": "f" * 64}}, "another's judgement"),
        ("measured", {"judged": {}}, "measured, without a GPU's judgement"),
        ("wrong", {"verdict": "measured"}, "another's judgement"),
        ("wrong", {"verdict": "compiler failed"}, "compiler failed, and a GPU's judgement"),
        ("same binary", {"same_as": None}, "same binary, and the same as None"),
        ("same binary", {"same_as": 39}, "which is none such"),
        ("same binary", {"sha256": "f" * 64}, "which is none such"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(save, found: SearchResult, trial: str, changes: dict, words: str) -> None:
    number = next(t.number for t in found.trials if t.verdict == trial and t.config != INCUMBENT)
    with pytest.raises(ArgumentValueError, match=words):
        make_report([save(trial=number, **changes)], seeds=1)


def test_a_record_without_its_visits_or_of_a_part_is_refused(save, found: SearchResult) -> None:
    with pytest.raises(ArgumentValueError, match="times and no visit to a GPU"):
        make_report([save(visits=[])], seeds=1)
    with pytest.raises(ArgumentValueError, match="exhaustive, and has 39 of 40"):
        make_report([save(trials=found.trials[:-1])], seeds=1)
    assert not damages(found)


def test_files_that_are_no_results_are_refused(tmp_path: Path, save) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArgumentValueError, match="is not a flashcore-search artifact"):
        make_report([tmp_path / "x.json"])
    with pytest.raises(ArgumentValueError, match="cannot be read"):
        make_report([tmp_path / "y.json"])
    with pytest.raises(ArgumentValueError, match="got none"):
        make_report([])
    with pytest.raises(ArgumentValueError, match="got 2 of small-fp16-b4h8s128d64, exhaustive, seed 0"):
        make_report([save("a.json"), save("b.json")], seeds=1)


def test_an_unfinished_search_is_shown_as_such_and_not_compared(save, found: SearchResult, monkeypatch) -> None:
    monkeypatch.setattr(reporting, "POPULATION", 4)
    number = next(t.number for t in found.trials if t.verdict == "wrong")
    report = make_report([save(trial=number, verdict="built", judged={})], seeds=1)
    assert report.searches[0].compared is None and not report.searches[0].exhaustive
    assert "not judged yet" in to_markdown(report, "x/search.json")


def test_tables_and_plot_are_made(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "POPULATION", 4)
    report = make_report([save()], seeds=2)
    best, verdicts, samplers = views(report)
    assert best.rows[0][:4] == ("small-fp16-b4h8s128d64", "exhaustive 40 of 40", "c1k128n128", best.rows[0][3])
    assert "NVIDIA Fake" in best.title and "same binary" in verdicts.columns and "13" in samplers.rows[0]
    text = to_markdown(report, "x/search.json")
    assert "`r.json`" in text and "`x/search.json`" in text and "NVIDIA Fake, driver 1, CUDA 13, torch 2" in text
    assert "before the present source" not in text
    plot(report, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    stale = report.model_copy(update={"searches": [report.searches[0].model_copy(update={"source_sha256": "f" * 64})]})
    assert "before the present source of small" in to_markdown(stale, "x")
