"""Measuring a batch by way of a process that judges: what becomes of it when that process hangs, dies, or is not to be had."""

import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from flashcore.errors import ArgumentValueError, BinaryError
from flashcore.search.child import Limits
from flashcore.search.measure import Reporter, Visit, measure, results_of
from flashcore.search.schema import BatchResult

HERE = Path(__file__).parent
PATIENT = Limits(setup=60.0, candidate=60.0)


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """Where the fake child writes down what it judged: number, behaviour, process."""
    return tmp_path / "seen"


@pytest.fixture
def judge(tmp_path: Path, seen: Path) -> Callable[..., Visit]:
    def judge(*folders: Path, start: str = "well", at_most: int = 1000, limits: Limits = PATIENT, **options: object) -> Visit:
        child = [sys.executable, str(HERE / "fake_child.py"), start, str(seen), str(at_most)]
        return measure(folders, tmp_path / "out", child=child, limits=limits, **options)

    return judge


def verdicts(result: BatchResult) -> list[str]:
    return [one.verdict for one in result.judged]


def test_each_has_its_verdict_and_the_rest_goes_on_in_a_new_process(
    stub: ModuleType, judge: Callable[..., Visit], seen: Path, tmp_path: Path
) -> None:
    behaviours = ["us=8", "hang", "wrong", "dies", "us=9", "damages", "us=20"]
    folder = tmp_path / "batch"
    stub.write_stub_batch(folder, behaviours)
    visit = judge(folder)
    result = visit.results[folder]
    assert verdicts(result) == ["measured", "hang", "wrong", "crash", "measured", "wrong", "measured"]
    hang, crash = result.judged[1], result.judged[3]
    assert "ended with status 3" in (hang.words or "") and "the GPU hangs" in (hang.words or "")
    assert "ended with status -6" in (crash.words or "") and "context is lost" in (crash.words or "")
    assert result.judged[0].ratio == pytest.approx(1.25) and result.sdpa_backend == "sdpa-cudnn"
    assert not visit.left and not visit.failures
    told = [line.split() for line in seen.read_text().splitlines()]
    assert [name for _, name, _ in told] == behaviours, "each is judged once"
    # one for each that took it down, and one for the rest
    assert len({process for *_, process in told}) == 4
    assert results_of(tmp_path / "out", "batch") == [result]
    assert result.environment.gpu == "NVIDIA Fake" and result.environment.command != ["the child's own"]


def test_a_child_that_says_nothing_is_ended_and_the_candidate_hangs(
    stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    stub.write_stub_batch(folder, ["silent", "us=9"])
    started = time.monotonic()
    visit = judge(folder, limits=Limits(setup=30.0, candidate=1.0))
    assert verdicts(visit.results[folder]) == ["hang", "measured"] and time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("start", "words"),
    [("breaks", "before any candidate.*no torch here"), ("refuses", "needs an NVIDIA GPU"), ("stuck", "hung")],
)
def test_a_machine_that_judges_nothing_is_a_failure_and_no_endless_loop(
    start: str, words: str, stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        stub.write_stub_batch(folder, ["us=9"])
    visit = judge(*folders, start=start, limits=Limits(setup=1.0 if start == "stuck" else 30.0, candidate=30.0))
    assert not visit.results and visit.left == dict.fromkeys(folders, 1)
    assert all(re.search(words, visit.failures[folder], re.DOTALL) for folder in folders)


def test_what_the_time_was_too_short_for_is_judged_at_the_next_visit(
    stub: ModuleType, judge: Callable[..., Visit], seen: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    stub.write_stub_batch(folder, ["us=8", "wrong", "us=9", "us=7"])
    assert judge(folder, at_most=2).left == {folder: 2}
    assert judge(folder, seconds=0.0).left == {folder: 2}, "no candidate is begun when there is no time"
    last = judge(folder)
    assert not last.left and [one.number for one in last.results[folder].judged] == [2, 3]
    results = results_of(tmp_path / "out", "batch")
    assert [[one.number for one in result.judged] for result in results] == [[0, 1], [2, 3]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["batch.0.json", "batch.1.json"]
    assert [line.split()[0] for line in seen.read_text().splitlines()] == ["0", "1", "2", "3"]
    assert judge(folder).results == {}, "and then there is nothing left to judge"


def test_an_interrupted_visit_keeps_what_was_judged(stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path) -> None:
    folder = tmp_path / "batch"
    stub.write_stub_batch(folder, ["us=8", "us=9", "us=7"])

    class Stops(Reporter):
        def judged(self, built, judged) -> None:
            if judged.number == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(folder, watcher=Stops(Console(quiet=True)))
    (result,) = results_of(tmp_path / "out", "batch")
    assert [one.number for one in result.judged] == [0, 1]
    assert [one.number for one in judge(folder).results[folder].judged] == [2]


def test_a_cubin_that_is_not_the_one_is_refused_before_anything_is_launched(
    stub: ModuleType, judge: Callable[..., Visit], seen: Path, tmp_path: Path
) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    batch = stub.write_stub_batch(bad, ["us=8", "us=9"])
    stub.write_stub_batch(good, ["us=7"])
    cubin = bad / f"{batch.candidates[1].sha256}.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"!")
    visit = judge(bad, good)
    assert list(visit.results) == [good] and "is damaged" in visit.failures[bad]
    assert [line.split()[1] for line in seen.read_text().splitlines()] == ["us=7"]


def test_batches_that_cannot_be_trusted_are_refused(stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path) -> None:
    names = ("missing", "empty", "stale", "other_arch", "swapped")
    folders = {name: tmp_path / name for name in names}
    for name in names[2:]:
        stub.write_stub_batch(folders[name], ["us=8"])
    folders["empty"].mkdir()
    stale = next(path for path in folders["stale"].glob("*.json") if path.name != "batch.json")
    stale.write_text(re.sub(r'"source_sha256":"\w+"', f'"source_sha256":"{"0" * 64}"', stale.read_text()))
    described = folders["other_arch"] / "batch.json"
    described.write_text(described.read_text().replace('"arch": "sm_90a"', '"arch": "sm_80"'))
    records = [path for path in folders["swapped"].glob("*.json") if path.name != "batch.json"]
    first, second = (path.with_suffix(".cubin") for path in records)
    first.write_bytes(second.read_bytes())
    visit = judge(*folders.values())
    assert not visit.results
    for name, words in zip(names, ("no batch", "no batch", "another source", "for sm_80", "damaged"), strict=True):
        assert words in visit.failures[folders[name]], name


def test_earlier_results_of_something_else_are_not_taken_for_this_batchs(
    stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path
) -> None:
    folder, other, again = tmp_path / "batch", tmp_path / "other" / "batch", tmp_path / "again" / "batch"
    stub.write_stub_batch(folder, ["us=8", "us=9"])
    judge(folder)
    stub.write_stub_batch(other, ["us=8"], stub.PROBLEM.model_copy(update={"heads": 4, "heads_k": 4}))
    assert "holds results of" in judge(other).failures[other]
    stub.write_stub_batch(again, ["us=8", "us=7"])
    assert "candidate 1 of" in judge(again).failures[again]
    damaged = tmp_path / "out" / "batch.0.json"
    damaged.write_text(damaged.read_text()[:-30])
    assert "no result that can be read" in judge(folder).failures[folder]
    with pytest.raises(BinaryError, match="no result that can be read"):
        results_of(tmp_path / "out", "batch")


@pytest.mark.parametrize(("behaviour", "words"), [("swapped", "0000 was"), ("nonsense", "means nothing")])
def test_a_child_that_talks_nonsense_is_not_believed(
    behaviour: str, words: str, stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path
) -> None:
    stub.write_stub_batch(tmp_path / "batch", [behaviour])
    with pytest.raises(BinaryError, match=words):
        judge(tmp_path / "batch")
    assert results_of(tmp_path / "out", "batch") == []


def test_two_batches_of_one_name_are_refused_but_for_searches_own_folders(
    stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path
) -> None:
    one, other = (tmp_path / search / "batches" / "b" for search in ("one", "other"))
    for folder in (one, other):
        stub.write_stub_batch(folder, ["us=8"])
    with pytest.raises(ArgumentValueError, match="allowed: folders whose names differ"):
        judge(one, other)
    child = [sys.executable, str(HERE / "fake_child.py"), "well", str(tmp_path / "seen"), "9"]
    measure([one, other], child=child)
    assert all(results_of(tmp_path / search / "judged", "b") for search in ("one", "other"))


def test_people_hear_of_the_best_so_far_and_of_what_went_wrong(
    stub: ModuleType, judge: Callable[..., Visit], tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    stub.write_stub_batch(folder, ["us=8", "wrong", "us=9", "us=5"])
    console = Console(record=True, width=200, file=io.StringIO())
    judge(folder, watcher=Reporter(console))
    told = console.export_text()
    assert told.count("best so far") == 2 and "best so far 1.250" in told and "best so far 2.000" in told
    assert re.search(r"wrong: small_forward\S+: output: off", told)


def test_without_a_gpu_the_command_says_so(stub: ModuleType, run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    stub.write_stub_batch(tmp_path / "batch", ["us=8"])
    code, _, errors = run("search", "measure", str(tmp_path / "batch"), "--out", str(tmp_path / "out"))
    assert code == 2 and "needs an NVIDIA GPU" in errors
