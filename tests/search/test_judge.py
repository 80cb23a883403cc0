"""Judging candidates, on a machine whose binaries behave as their bytes say (stub.py)."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashcore.errors import BinaryError, UnsupportedError
from flashcore.kernels.specialisation import Specialisation
from flashcore.search import checks
from flashcore.search.checks import Check, checks_of, odd_problems, serves
from flashcore.search.judge import Judge, Request, serve
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.machine import CudaMachine
from flashcore.search.measure import measure
from flashcore.search.schema import Built, Judged, Problem
from flashcore.target import Target

HERE = Path(__file__).parent
H200 = Target("NVIDIA H200", "sm_90a", (9, 0), 132, False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def judged(stub: ModuleType, tmp_path: Path) -> Callable[..., dict[str, Judged]]:
    def judged(*behaviours: str, **options: object) -> dict[str, Judged]:
        batch = stub.write_stub_batch(tmp_path / "batch", list(behaviours), **options)
        judge = Judge(tmp_path / "batch", stub.StubMachine())
        return {name: judge.judge(built) for name, built in zip(behaviours, batch.candidates, strict=True)}

    return judged


def test_what_is_right_is_timed_beside_the_incumbent_and_what_is_wrong_is_not(judged: Callable[..., dict[str, Judged]]) -> None:
    wrong = {
        "wrong": "output: max error",
        "wrong_lse": "lse: LSE error 0.01",
        "unwritten": "not finite everywhere (or never written)",
        "flaky": "two runs on the same input are not bitwise equal",
        "wrong_when_odd": "h2s1d64 bhsd: output",
        "rare": "1 of 20 runs after it was timed differ from the first",
    }
    found = judged("us=8", *wrong, "us=9")
    for name, words in wrong.items():
        assert found[name].verdict == "wrong" and words in (found[name].words or ""), name
        assert found[name].us == [] and found[name].ratio is None
    fast = found["us=8"]
    assert fast.verdict == "measured" and fast.words is None
    assert (fast.us, fast.incumbent_us, fast.sdpa_us) == ([8.0] * 8, [10.0] * 8, [20.0] * 8)
    assert (fast.ratio, fast.ratio_low, fast.ratio_high) == pytest.approx((1.25, 1.25, 1.25))


def test_a_slow_one_is_not_timed_for_long(judged: Callable[..., dict[str, Judged]]) -> None:
    found = judged("us=16", "us=14")
    assert len(found["us=14"].us) == 8 and 0 < len(found["us=16"].us) < 8
    assert found["us=16"].ratio == pytest.approx(0.625)


def test_a_problem_that_sdpa_has_no_kernel_for_is_timed_without_it(judged: Callable[..., dict[str, Judged]]) -> None:
    problem = Problem(
        impl="portable",
        batch=1,
        heads=2,
        heads_k=1,
        seqlen_q=40,
        seqlen_k=70,
        head_dim=64,
        head_dim_v=64,
        window=(9, 9),
        softcap=5.0,
    )
    found = judged("us=8", "wrong", problem=problem)
    assert found["us=8"].verdict == "measured" and found["us=8"].sdpa_us == []
    assert found["wrong"].verdict == "wrong"


def test_a_binary_that_is_not_its_configurations_is_not_launched(stub: ModuleType, tmp_path: Path) -> None:
    batch = stub.write_stub_batch(tmp_path, ["us=8", "us=9"])
    first, second = batch.candidates
    judge = Judge(tmp_path, stub.StubMachine())
    with pytest.raises(BinaryError, match="is not a binary of small-fp16"):
        judge.judge(first.model_copy(update={"key": second.key}))


def test_an_incumbent_that_is_wrong_or_not_the_hand_chosen_one_is_refused(stub: ModuleType, tmp_path: Path) -> None:
    machine = stub.StubMachine()
    stub.INCUMBENT_US, right = "wrong", stub.INCUMBENT_US
    try:
        batch = stub.write_stub_batch(tmp_path / "wrong", ["us=8"])
    finally:
        stub.INCUMBENT_US = right
    binary, key = stub.binary_of(stub.PROBLEM, SEARCHABLE["small"].incumbent(stub.PROBLEM, 132), "wrong")
    bad = batch.incumbent.model_copy(update={"sha256": binary.info.sha256, "key": key})
    stub.write_batch(tmp_path / "wrong", batch.model_copy(update={"incumbent": bad}), [binary])
    with pytest.raises(BinaryError, match=r"the incumbent small_forward\S+ is wrong: .* max error"):
        Judge(tmp_path / "wrong", machine)
    batch = stub.write_stub_batch(tmp_path / "other", ["us=8"])
    other = batch.model_copy(update={"incumbent": batch.candidates[0]})
    (tmp_path / "other" / "batch.json").write_text(other.model_dump_json())
    with pytest.raises(BinaryError, match=r"the incumbent is .* and hand-chosen for stub is .*: build it again"):
        Judge(tmp_path / "other", machine)
    machine.target = Target("another", "sm_80", (8, 0), 108, False)
    with pytest.raises(BinaryError, match="is for sm_90a, and another is sm_80"):
        Judge(tmp_path / "wrong", machine)


def test_requests_are_served_in_turn_and_end_at_their_deadline(stub: ModuleType, tmp_path: Path) -> None:
    stub.write_stub_batch(tmp_path / "batch", ["us=8", "refused", "us=9"])
    machine, said = stub.StubMachine(), []
    requests = [
        Request(folder=tmp_path / "batch", numbers=[0, 1], sdpa=""),
        Request(folder=tmp_path / "nothing", numbers=[0]),
        Request(folder=tmp_path / "batch", numbers=[0, 2], deadline=0.0, sdpa="sdpa-flash"),
    ]
    serve(iter(requests), said.append, machine)
    assert [next(iter(message)) for message in said] == [
        *("ready", "started", "judged", "started", "judged", "done"),
        "refused",
        *("ready", "done"),
    ]
    first, second = said[2]["judged"], said[4]["judged"]
    assert (first["verdict"], first["sdpa_us"]) == ("measured", [])
    # the process goes on: the device says that it can
    assert (second["verdict"], second["words"]) == ("crash", "RuntimeError: the driver refused the binary")
    assert said[0]["ready"]["sdpa"] == "" and said[7]["ready"]["sdpa"] == "sdpa-flash" and machine.tidied == 2


def test_a_lost_context_and_spoilt_references_cost_a_process_and_no_verdict(
    stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    stub.write_stub_batch(tmp_path / "batch", ["us=8", "crash", "spoils", "us=9"])
    visit = measure([tmp_path / "batch"], tmp_path / "out", child=[sys.executable, str(HERE / "stub.py")])
    (result,) = visit.results.values()
    assert [one.verdict for one in result.judged] == ["measured", "crash", "wrong", "measured"]
    assert "illegal memory access" in (result.judged[1].words or "") and result.judged[3].ratio == pytest.approx(10 / 9)
    assert result.sdpa_backend == "sdpa-flash" and result.environment.sm_count == 132


def test_there_is_no_machine_without_a_gpu_and_none_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
            CudaMachine()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET=1"):
        CudaMachine()


PROBLEMS = [
    Problem(
        impl="hopper", batch=4, heads=16, heads_k=16, seqlen_q=1024, seqlen_k=1024, head_dim=128, head_dim_v=128, causal=causal
    )
    for causal in (False, True)
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_odd_calls_are_of_every_kind_and_some_candidate_takes_each(problem: Problem) -> None:
    searchable = SEARCHABLE[problem.impl]
    odd = odd_problems(problem)
    assert {(one.seqlen_q > one.seqlen_k, one.seqlen_q == one.seqlen_k, one.heads > one.heads_k) for one in odd} >= {
        (False, True, True),
        (False, True, False),
        (True, False, False),
        (False, False, True),
    }
    config = searchable.incumbent(problem, H200.sm_count)
    specialisation = searchable.specialise(problem, config)
    same = [one for one in odd if searchable.specialise(one, config) == specialisation]
    # causal: a single row attends every key, and that is another binary
    assert len(same) == len(odd) - 2 * problem.causal
    specs = [searchable.spec(one) for one in same]
    grids = [searchable.binding.grid(spec, specialisation, H200.sm_count) for spec in specs]
    counted = [searchable.binding.needs_counter(spec, specialisation, grid) for spec, grid in zip(specs, grids, strict=True)]
    assert any(counted) and not all(counted), "tiles in a fixed order, and drawn from the counter"


def test_a_window_is_narrowed_to_the_odd_calls() -> None:
    problem = PROBLEMS[1].model_copy(update={"window": (512, -1), "softcap": 20.0})
    assert {one.window for one in odd_problems(problem)} == {(checks.ODD_WINDOW[0], -1)}
    searchable = SEARCHABLE["hopper"]
    config = searchable.incumbent(problem, H200.sm_count)
    same = [
        one for one in odd_problems(problem) if searchable.specialise(one, config) == searchable.specialise(problem, config)
    ]
    assert len(same) >= 5


def test_a_form_is_checked_only_by_calls_that_fit_it(stub: ModuleType) -> None:
    searchable = SEARCHABLE["small"]
    found = checks_of(stub.PROBLEM, CPU, H200)
    lengths = {}
    for config in searchable.space(stub.PROBLEM):
        key = searchable.specialise(stub.PROBLEM, config).key
        built = Built(number=0, config=searchable.values(config), name=config.name, key=key, sha256="0")
        served = [check for check in found if serves(built, check)]
        assert served[0] is found[0] and len(served) > 2, config.name
        assert all(check.spec.seqlen_k <= config.capacity for check in served)
        lengths[config.capacity] = max(check.spec.seqlen_k for check in served)
    assert lengths[64] == 64 and lengths[256] == 197 and len({check.spec.layout for check in found}) == 2


def test_a_check_sees_its_inputs_change(stub: ModuleType) -> None:
    check = Check.of(stub.PROBLEM, CPU)
    assert check.intact() and check.wrong(check.ref.half(), check.lse.float()) is None
    check.v[0, 0, 3, 3] += 1
    assert not check.intact()
    assert Specialisation.from_key(
        SEARCHABLE["small"].specialise(stub.PROBLEM, SEARCHABLE["small"].incumbent(stub.PROBLEM, 132)).key
    )
