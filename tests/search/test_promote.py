"""From a search and its retests to an entry: only what holds on shapes that the search did not see is taken."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashcore import evidence, tuned
from flashcore.errors import ArgumentValueError
from flashcore.search import promote
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import BatchResult, Environment, Judged, Problem, SearchResult, Trial
from flashcore.sources import kernel_hash
from flashcore.tuned import Ratio

SIZES = {"batch": 1, "heads": 8, "heads_k": 8, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64, "head_dim_v": 64}
PROBLEM = Problem(impl="small", **SIZES)
UNSEEN = PROBLEM.model_copy(update={"heads": 12, "heads_k": 12})
SMALL = SEARCHABLE["small"]
INCUMBENT = SMALL.values(SMALL.incumbent(PROBLEM, 132))
FAST, GOOD, EVEN = ({"cluster": 4, "keys": keys, "block_n": 64} for keys in (128, 192, 256))
NAMES = {128: "fast", 192: "good", 256: "even"}
MACHINE = Environment(
    gpu="NVIDIA H200",
    sm_count=132,
    driver="1",
    torch="2.11",
    cuda="13",
    git_sha="0" * 40,
    git_dirty=False,
    time="2026-11-21",
    command=["flashcore"],
)
Times = tuple[float, float, float]
SURE, NOISE, SLOWER = (1.2, 1.1, 1.3), (1.001, 0.99, 1.01), (0.9, 0.85, 0.95)


def _sha256(config: dict, dtype: str = "fp16") -> str:
    return f"{config['keys']:03d}{dtype}".ljust(64, "0")


def _judged(config: dict, times: Times | None, number: int = 0) -> Judged:
    if times is None:
        return Judged(number=number, sha256=_sha256(config), verdict="wrong", words="off by 3")
    ratio, low, high = times
    fields = {"us": [1.0], "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return Judged(number=number, sha256=_sha256(config), verdict="measured", **fields)


def _trial(number: int, config: dict, times: Times | None) -> Trial:
    judged = _judged(config, times, number)
    name = NAMES[config["keys"]]
    common = {"number": number, "config": config, "name": name, "sampler": "random", "seed": 0}
    return Trial(**common, verdict=judged.verdict, sha256=judged.sha256, judged=judged)


def _search(*found: tuple[dict, Times | None], **changes: Any) -> SearchResult:
    fields = {
        "problem": PROBLEM,
        "arch": "sm_90a",
        "sampler": "random",
        "seed": 0,
        "budget": 9,
        "space": {},
        "fitting": 9,
        "triton": "3.9.0",
        "git_sha": "0" * 40,
        "git_dirty": False,
        "time": "2026-11-21",
        "command": ["flashcore"],
        "source_sha256": kernel_hash("small_forward"),
        "incumbent": INCUMBENT,
        "visits": [MACHINE],
        "trials": [_trial(number, *one) for number, one in enumerate(found)],
    }
    return SearchResult(**{**fields, **changes})


def _retest(*found: tuple[dict, Times | None], problem: Problem = UNSEEN, **changes: Any) -> BatchResult:
    fields = {
        "problem": problem,
        "environment": MACHINE,
        "source_sha256": kernel_hash("small_forward"),
        "sdpa_backend": None,
        "judged": [_judged(*one) for one in found],
    }
    return BatchResult(**{**fields, **changes})


@pytest.fixture(autouse=True)
def builds(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Builds nothing; a dtype in what is returned does not keep the limits, for the words given."""
    broken: dict[str, str] = {}

    def build(problem: Problem, configs: Sequence[Any], arch: str, *, jobs: int) -> list[SimpleNamespace]:
        (config,) = configs
        values, words = SMALL.values(config), broken.get(problem.dtype)
        verdict = "built" if words is None else "breaks a limit"
        sha256 = _sha256(values, problem.dtype)
        return [SimpleNamespace(name=f"{problem.dtype}-{NAMES[values['keys']]}", verdict=verdict, words=words, sha256=sha256)]

    monkeypatch.setattr(promote, "build_candidates", build)
    return broken


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Promotes records from files, with evidence and tables in folders of the test's own."""
    for name, module in (("evidence", evidence), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(module, "FOLDER", tmp_path / name)
    tuned.forget()

    def run(result: SearchResult, *retests: BatchResult) -> tuned.Entry:
        paths = [tmp_path / f"{number}.json" for number in range(1 + len(retests))]
        for path, record in zip(paths, (result, *retests), strict=True):
            path.write_text(record.model_dump_json())
        return promote.promote(paths[0], paths[1:])

    return run


@pytest.fixture(autouse=True)
def _read_anew(files: Any) -> Any:
    yield
    tuned.forget()


def test_the_fastest_that_holds_is_taken_with_its_retests_ratio(files: Callable, tmp_path: Path) -> None:
    search = _search((EVEN, NOISE), (GOOD, (1.1, 1.05, 1.15)), (FAST, SURE))
    entry = files(search, _retest((FAST, (1.08, 1.02, 1.1)), (GOOD, SURE)), _retest((FAST, (1.15, 1.1, 1.2)), problem=PROBLEM))
    assert entry.config == FAST and entry.features == "d64-none" and entry.problem == PROBLEM
    assert entry.ratio == Ratio(value=1.15, low=1.1, high=1.2)
    assert entry.unseen == {"small-fp16-b1h12s512d64": Ratio(value=1.08, low=1.02, high=1.1)}
    assert entry.sha256 == {"fp16": _sha256(FAST), "bf16": _sha256(FAST, "bf16")}
    (table,) = tuned.tables().values()
    assert table.entries == [entry] and (table.gpu, table.arch, table.sm_count) == ("NVIDIA H200", "sm_90a", 132)
    kept = {path.name for path in (tmp_path / "evidence" / "nvidia-h200").iterdir()}
    assert kept == {entry.search, *entry.retests} and len(kept) == 3
    spec = SMALL.spec(PROBLEM.model_copy(update={"heads": 9, "heads_k": 9}))
    assert SMALL.values(tuned.config("small", spec, "sm_90a", 132)) == FAST
    assert promote.unfounded(entry, tmp_path / "evidence" / "nvidia-h200") is None


@pytest.mark.parametrize(
    ("unseen", "words"),
    [
        (SLOWER, "fast is slower at every shape that the search did not see, such as small-fp16-b1h12s512d64"),
        (None, "fast is not measured at small-fp16-b1h12s512d64: wrong, off by 3"),
    ],
)
def test_a_winner_that_fails_on_an_unseen_shape_is_not_taken(unseen: Any, words: str, files: Callable) -> None:
    entry = files(_search((FAST, SURE)), _retest((FAST, SURE), problem=UNSEEN.model_copy(update={"heads": 4, "heads_k": 4})))
    assert entry.config == FAST
    entry = files(_search((FAST, SURE)), _retest((FAST, unseen)))
    assert entry.config is None and entry.sha256 == {} and entry.ratio is None
    (table,) = tuned.tables().values()
    # in the place of the entry that was there: the hand-chosen form stands
    assert table.entries == [entry]
    assert re.search(words, entry.words)
    # and the next that was faster, and holds, is taken instead
    entry = files(_search((FAST, SURE), (GOOD, (1.05, 1.01, 1.1))), _retest((FAST, unseen), (GOOD, NOISE)))
    assert entry.config == GOOD and entry.ratio.value == 1.05


@pytest.mark.parametrize("times", [(1.05, 1.0, 1.1), NOISE, SLOWER])
def test_an_interval_that_touches_1_is_no_winner(times: Times, files: Callable) -> None:
    entry = files(_search((EVEN, times), (GOOD, None)), _retest((EVEN, SURE)))
    assert entry.config is None and entry.words == "none of 1 measured forms is faster beyond noise"
    # nor one of the retest at the searched shape
    entry = files(_search((EVEN, SURE)), _retest((EVEN, SURE)), _retest((EVEN, times), problem=PROBLEM))
    assert entry.config is None and "even is not faster in the retest beyond noise" in entry.words


WIDER = UNSEEN.model_copy(update={"heads": 4, "heads_k": 4})


def test_where_a_winner_is_slower_the_hand_chosen_form_gets_an_entry(files: Callable, tmp_path: Path) -> None:
    entry = files(_search((FAST, SURE)), _retest((FAST, SLOWER)), _retest((FAST, SURE), problem=WIDER))
    assert entry.config == FAST and entry.unseen[UNSEEN.name].high < 1 < entry.unseen[WIDER.name].low
    (table,) = tuned.tables().values()
    (kept,) = (one for one in table.entries if one.problem == UNSEEN)
    assert kept.config is None and kept.words.startswith("fast, promoted for small-fp16-b1h8s512d64, is slower here: 0.900")
    assert tuned.config("small", SMALL.spec(UNSEEN), "sm_90a", 132) is None
    assert SMALL.values(tuned.config("small", SMALL.spec(WIDER), "sm_90a", 132)) == FAST
    folder = tmp_path / "evidence" / "nvidia-h200"
    assert promote.unfounded(kept, folder) is None and promote.unfounded(entry, folder) is None
    # without the second entry calls there would take the slower form, and the check says so
    path = tuned.FOLDER / "nvidia-h200.json"
    table.model_copy(update={"entries": [entry]}).save(path)
    tuned.forget()
    assert "is taken at small-fp16-b1h12s512d64, where it is slower" in promote.unfounded(entry, folder)


def test_a_form_that_is_slower_nowhere_comes_first(files: Callable) -> None:
    search = _search((FAST, SURE), (GOOD, (1.1, 1.05, 1.15)))
    entry = files(search, _retest((FAST, SLOWER), (GOOD, SURE)), _retest((FAST, SURE), (GOOD, SURE), problem=WIDER))
    assert entry.config == GOOD


def test_an_entry_that_is_there_is_not_replaced_by_one_that_only_keeps_the_hand_chosen(files: Callable) -> None:
    unseen = _search((GOOD, SURE)).model_copy(update={"problem": UNSEEN})
    other = UNSEEN.model_copy(update={"heads": 16, "heads_k": 16})
    assert files(unseen, _retest((GOOD, SURE), problem=other)).config == GOOD
    files(_search((FAST, SURE)), _retest((FAST, SLOWER)), _retest((FAST, SURE), problem=WIDER))
    assert SMALL.values(tuned.config("small", SMALL.spec(UNSEEN), "sm_90a", 132)) == GOOD


def test_the_hand_chosen_form_is_no_winner_over_itself(files: Callable) -> None:
    entry = files(_search((EVEN, SURE), incumbent=EVEN), _retest((EVEN, SURE)))
    assert entry.config is None and entry.words == "none of 0 measured forms is faster beyond noise"


def test_where_a_form_is_the_hand_chosen_one_slower_is_noise(files: Callable) -> None:
    long = PROBLEM.model_copy(update={"seqlen_q": 700, "seqlen_k": 700})
    chosen = SMALL.values(SMALL.incumbent(long, 132))
    assert chosen["keys"] == 256
    search = _search((chosen, SURE))
    assert files(search, _retest((chosen, SLOWER), problem=long), _retest((chosen, NOISE))).config == chosen
    assert files(search, _retest((chosen, SLOWER))).config is None


def test_a_form_that_no_other_dtype_can_be_built_in_is_not_taken(files: Callable, builds: dict) -> None:
    builds["bf16"] = "spills: 3 loads"
    entry = files(_search((FAST, SURE)), _retest((FAST, SURE)))
    assert entry.config is None and entry.words == "bf16-fast cannot be shipped: breaks a limit: spills: 3 loads"


BAD: list[tuple[SearchResult, tuple[BatchResult, ...], str]] = [
    (_search((FAST, SURE)), (), "none of the 1 forms that were faster .* was retested"),
    (_search((FAST, SURE)), (_retest((GOOD, SURE)),), "none of the 1 forms that were faster"),
    (_search((FAST, SURE)), (_retest((FAST, SURE), problem=PROBLEM),), "none of the 1 forms that were faster"),
    (_search((FAST, SURE), source_sha256="0" * 64), (_retest((FAST, SURE)),), "is of another source of small_forward"),
    (_search((FAST, SURE)), (_retest((FAST, SURE), source_sha256="0" * 64),), "is of another source of small_forward"),
    (_search((FAST, SURE), visits=[]), (), "was on no GPU"),
    (
        _search((FAST, SURE)),
        (_retest((FAST, SURE), environment=MACHINE.model_copy(update={"gpu": "NVIDIA L4"})),),
        r"records of .*H200.*L4.*allowed: all of one GPU",
    ),
    (
        _search((FAST, SURE)),
        (_retest((FAST, SURE), problem=UNSEEN.model_copy(update={"causal": True})),),
        "got small-fp16-b1h12s512d64-causal; allowed: other sizes of small-fp16-b1h8s512d64",
    ),
    (
        _search((FAST, SURE)),
        (_retest((FAST, SURE), problem=UNSEEN.model_copy(update={"dtype": "bf16"})),),
        "allowed: other sizes of",
    ),
]


@pytest.mark.parametrize(("search", "retests", "words"), BAD)
def test_records_that_do_not_belong_together_are_refused(
    search: SearchResult, retests: tuple[BatchResult, ...], words: str, files: Callable
) -> None:
    with pytest.raises(ArgumentValueError, match=words):
        files(search, *retests)
    assert tuned.tables() == {}


def test_a_binary_that_is_not_the_searched_one_is_refused(files: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(name="n", verdict="built", words=None, sha256="9" * 64)
    monkeypatch.setattr(promote, "build_candidates", lambda *given, **named: [other])
    with pytest.raises(ArgumentValueError, match=rf"fast was {_sha256(FAST)} in the search, by Triton 3\.9\.0, .*{'9' * 64}"):
        files(_search((FAST, SURE)), _retest((FAST, SURE)))


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        with pytest.raises(ArgumentValueError, match=rf"{path.name} is no SearchResult"):
            promote.promote(path, [])


def test_the_grids_shapes_that_take_an_entry_unmeasured_are_named(files: Callable) -> None:
    search = _search((FAST, SURE), problem=PROBLEM.model_copy(update={"seqlen_q": 300, "seqlen_k": 300}))
    entry = files(search, _retest((FAST, SURE)))
    near = promote.unmeasured(entry)
    assert "small-fp16-b1h12s197d64" in near and "small-fp16-b4h8s128d64" not in near and entry.problem.name not in near
    vit = PROBLEM.model_copy(update={"heads": 12, "heads_k": 12, "seqlen_q": 197, "seqlen_k": 197})
    assert "small-fp16-b1h12s197d64" not in promote.unmeasured(files(search, _retest((FAST, SURE), problem=vit)))
    files(_search((FAST, NOISE), problem=vit))
    entry = files(search, _retest((FAST, SURE)))
    assert "small-fp16-b1h12s197d64" not in promote.unmeasured(entry)
    assert promote.unmeasured(files(_search((FAST, NOISE)))) == []


def test_only_records_of_the_gpu_that_is_named_pass(tmp_path: Path, files: Callable) -> None:
    files(_search((FAST, SURE)), _retest((FAST, SURE)))
    paths = (tmp_path / "0.json", [tmp_path / "1.json"])
    assert promote.promote(*paths, "nvidia-h200").config == FAST
    with pytest.raises(ArgumentValueError, match="gpu: got nvidia-l4; allowed: the records', nvidia-h200"):
        promote.promote(*paths, "nvidia-l4")


def test_the_tables_gpu_is_the_records(files: Callable, tmp_path: Path) -> None:
    files(_search((FAST, SURE)), _retest((FAST, SURE)))
    fewer = MACHINE.model_copy(update={"sm_count": 114})
    with pytest.raises(ArgumentValueError, match="with 114 multiprocessors"):
        files(_search((FAST, SURE), visits=[fewer]), _retest((FAST, SURE), environment=fewer))
    # entries of other problems stay
    other = UNSEEN.model_copy(update={"seqlen_q": 400})
    files(_search((GOOD, SURE), problem=other), _retest((GOOD, SURE), problem=PROBLEM))
    (table,) = tuned.tables().values()
    assert [entry.config for entry in table.entries] == [FAST, GOOD]


def test_every_visit_to_a_gpu_counts(files: Callable, tmp_path: Path) -> None:
    entry = files(_search((FAST, SURE), (GOOD, SURE)), _retest((GOOD, SURE)), _retest((FAST, SLOWER)), _retest(problem=PROBLEM))
    assert entry.config == GOOD and len(set(entry.retests)) == 3
    folder = tmp_path / "evidence" / "nvidia-h200"
    assert promote.unfounded(entry, folder) is None
    # from what was kept, in another order, the same comes out
    again = promote.promote(folder / entry.search, [folder / name for name in reversed(entry.retests)])
    assert again.config == GOOD and set(again.retests) == set(entry.retests) and promote.unfounded(again, folder) is None


def test_an_entry_must_be_what_its_records_say(files: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "evidence" / "nvidia-h200"
    entry = files(_search((FAST, SURE)), _retest((FAST, SURE)))

    def words(**changes: Any) -> str | None:
        return promote.unfounded(entry.model_copy(update=changes), folder)

    assert words() is None
    assert "search-none.json is no SearchResult" in words(search="search-none.json")
    assert "was retested on no shape" in words(retests=[])
    assert "ratios are not its records'" in words(ratio=Ratio(value=1.5, low=1.1, high=1.6))
    assert "has no such form" in words(config=GOOD) and "has no such form" in words(sha256={"fp16": "0" * 64, "bf16": "0" * 64})
    assert "is of small-fp16-b1h8s512d64" in words(problem=UNSEEN)
    # a record that was changed since
    record = json.loads((folder / entry.retests[0]).read_text())
    record["judged"][0] |= {"ratio": 0.9, "ratio_low": 0.8, "ratio_high": 0.95}
    (folder / entry.retests[0]).write_text(json.dumps(record))
    assert "is slower at every shape" in words()
