"""The artifact: a round trip loses nothing, and a file that is not one is refused with its name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore.bench.artifact import Artifact, SeriesRecord, load
from flashcore.bench.stats import summarise
from flashcore.bench.timing import Series
from flashcore.errors import ArgumentValueError

Make = Callable[..., Artifact]


def test_round_trip(make_artifact: Make, tmp_path: Path) -> None:
    artifact = make_artifact()
    artifact.save(tmp_path / "run.json")
    assert load(tmp_path / "run.json") == artifact
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_statistics_are_those_of_the_samples_written() -> None:
    record = SeriesRecord.of(Series("device_warm", 100, tuple(9 + n / 3e4 for n in range(100))))
    assert record.stats == summarise(record.samples)
    assert record.samples[1] == 9.0 and record.samples[-1] == 9.0033


def test_what_the_mission_asks_for_is_in_the_file(make_artifact: Make, tmp_path: Path) -> None:
    make_artifact().save(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["schema_version"] == 2
    found = data["environment"]
    assert {"time_utc", "command", "git", "torch", "triton", "cuda", "cudnn", "kernel_sources"} <= found.keys()
    assert {"name", "sm_count", "l2_bytes", "driver", "clocks"} <= found["gpu"].keys()
    ours = data["shapes"][0]["contenders"][0]
    assert ours["correctness"]["passed"] and len(ours["series"][0]["samples"]) == 100
    assert {"p50", "p90", "p99", "mean", "std", "min"} <= ours["series"][0]["stats"].keys()
    assert {"baseline", "value", "low", "high"} <= ours["series"][0]["ratio"].keys()


def test_a_wrong_result_with_nan_can_be_written_and_read(make_artifact: Make, tmp_path: Path) -> None:
    artifact = make_artifact()
    record = artifact.shapes[0]
    assert record.contenders[0].correctness is not None
    correctness = record.contenders[0].correctness.model_copy(update={"max_abs": float("nan"), "passed": False})
    wrong = record.contenders[0].model_copy(update={"status": "wrong", "series": [], "correctness": correctness})
    changed = artifact.model_copy(update={"shapes": [record.model_copy(update={"contenders": [wrong]})]})
    changed.save(tmp_path / "run.json")
    loaded = load(tmp_path / "run.json")
    assert loaded.own_failures and str(loaded.shapes[0].contenders[0].correctness.max_abs) == "nan"


@pytest.mark.parametrize("change", [{"schema_version": 3}, {"kind": "other"}, {"shapes": None}, {"extra": 1}])
def test_other_files_are_refused(make_artifact: Make, tmp_path: Path, change: dict[str, object]) -> None:
    data = json.loads(make_artifact().model_dump_json()) | change
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(ArgumentValueError, match=next(iter(change))):
        load(tmp_path / "run.json")


@pytest.mark.parametrize("content", [None, "", "not JSON", "[]"])
def test_unreadable_files_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArgumentValueError, match=r"run\.json"):
        load(tmp_path / "run.json")
