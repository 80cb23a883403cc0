"""Nsight Compute as a child: what it is asked, and what becomes of each of its failures."""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from flashcore.bench.artifact import Artifact
from flashcore.bench.shapes import parse_shape
from flashcore.errors import ProfilerError
from flashcore.profile import metrics, ncu
from flashcore.profile.records import ProfileRecord

MISSION = parse_shape("mission")
NO_KERNELS = "==WARNING== No kernels were profiled.\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, artifact: Artifact) -> None:
    monkeypatch.setattr("flashcore.environment.collect", lambda: artifact.environment)


def _profile() -> ProfileRecord:
    tool = ncu.find()
    assert tool is not None
    return ncu.profile(tool, "hopper", MISSION, 3)


def test_the_call_is_profiled_and_recorded(page, fake_ncu: Callable[..., Path], tmp_path: Path) -> None:
    folder = fake_ncu(page(({"Kernel Name": "fill"}, {})))
    record = _profile()
    assert [kernel.name for kernel in record.kernels] == ["fill", "hopper_forward"] and record.us == pytest.approx(10.24)
    assert (record.impl, record.shape) == ("hopper", MISSION) and record.ncu.startswith("Version 2025.3")
    asked = (folder / "asked").read_text().splitlines()
    pairs = set(pairwise(asked))
    for pair in (("--page", "raw"), ("--print-units", "base"), ("--clock-control", "none"), ("--profile-from-start", "off")):
        assert pair in pairs
    start = asked.index(sys.executable)
    assert asked[start:] == ncu.target_command("hopper", MISSION, 3)
    assert asked[start + 1 : start + 4] == ["-m", "flashcore.profile.target", "hopper"] and "--causal" not in asked
    # what is kept has no path of this machine, and comes back as it was
    record.save(tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text()
    assert ProfileRecord.model_validate_json(text) == record and sys.executable not in text and str(folder) not in text


def test_what_the_chip_lacks_is_not_asked_for(page, fake_ncu: Callable[..., Path]) -> None:
    folder = fake_ncu(page())
    record = _profile()
    # the stand-in lists what its page has
    assert "stall tex_throttle" in record.absent and "tensor pipe" not in record.absent
    asked = (folder / "asked").read_text()
    assert metrics.STALL_NAME.format("tex_throttle") not in asked and metrics.STALL_NAME.format("gmma") in asked
    assert "launch__registers_per_thread" in asked


@pytest.mark.parametrize("listed", ["", "==ERROR== unknown option --query-metrics", "foo__bar Counter"])
def test_where_ncu_lists_nothing_everything_is_asked_for(page, fake_ncu: Callable[..., Path], listed: str) -> None:
    folder = fake_ncu(page(), listed=listed)
    assert _profile().absent == []
    assert all(metric.names[0] in (folder / "asked").read_text() for metric in metrics.METRICS)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on the "
            f"target device 0.\n{NO_KERNELS}",
            1,
            ("ERR_NVGPUCTRPERM", "NVreg_RestrictProfilingToAdminUsers=0", "--cap-add=SYS_ADMIN", "--no-ncu"),
        ),
        (
            "==ERROR== Failed to find metric regex:^sm__no_such.(sum|avg)$\n",
            1,
            ("metric sm__no_such on this GPU", "Update Nsight Compute"),
        ),
        ("==ERROR== Profiling failed because a driver resource was unavailable.\n", 9, ("dcgmi profile --pause",)),
        (NO_KERNELS, 0, ("no kernel was launched between the profiler's start and its stop",)),
        (
            f"error: flashcore-hopper: only sm_90a\n==ERROR== The application returned an error code (2).\n{NO_KERNELS}",
            2,
            ("the call that was to be profiled failed: flashcore-hopper: only sm_90a",),
        ),
        ("==ERROR== Unknown Error on device 0.\n", 1, ("exit code 1", "Unknown Error on device 0")),
        ("Segmentation fault\n", 139, ("exit code 139", "Segmentation fault")),
        ("", 1, ("exit code 1", "nothing was printed")),
        ("", 0, ("no table of metrics",)),
    ],
)
def test_every_failure_says_what_it_is_and_what_to_do(
    fake_ncu: Callable[..., Path], text: str, code: int, said: tuple[str, ...]
) -> None:
    fake_ncu(text, code=code)
    with pytest.raises(ProfilerError) as raised:
        _profile()
    assert all(part in str(raised.value) for part in said)


def test_what_a_program_says_of_errors_is_no_failure_of_a_run_that_had_none(page, fake_ncu: Callable[..., Path]) -> None:
    fake_ncu(f"error: only the program's own words\n{page()}")
    assert len(_profile().kernels) == 1


def test_a_page_of_a_run_that_failed_is_not_believed(page, fake_ncu: Callable[..., Path]) -> None:
    fake_ncu(page() + "==ERROR== The application returned an error code (11).\n", code=11)
    with pytest.raises(ProfilerError, match="exit code 11"):
        _profile()


def test_the_shape_arrives_as_it_was_asked_for() -> None:
    shape = parse_shape("2,32/8,1/8192,128/64")
    command = ncu.target_command("auto", shape, 0)
    assert command[command.index("--shape") + 1] == "2,32/8,1/8192,128/64" and command[command.index("--dtype") + 1] == "fp16"


def test_a_hang_is_ended_with_its_child(fake_ncu: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_ncu("")
    (folder / "ncu").write_text('#!/bin/sh\n[ -z "${1##--q*}" ] && exit 1\nsleep 60\n')
    monkeypatch.setattr(ncu, "PROFILE_SECONDS", 0.5)
    with pytest.raises(ProfilerError, match="did not finish"):
        _profile()
