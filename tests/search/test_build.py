"""Building candidates: with a compiler that is none, but for the last tests, which compile."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from flashcore.build.machine_code import MachineCode
from flashcore.build.pool import Outcome as Compiled
from flashcore.build.pool import Request
from flashcore.errors import ArgumentValueError, BinaryError, CompileError
from flashcore.kernels.small.config import SmallConfig
from flashcore.runtime import store
from flashcore.runtime.binary import Binary
from flashcore.search import build
from flashcore.search.batch import read_batch, read_binary
from flashcore.search.build import Outcome, build_candidates, build_incumbent, make_batch
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.retest import fastest, make_retests, unseen
from flashcore.search.schema import Judged, Problem, SearchResult, Trial

GOOD = MachineCode(96, 0, 9000, 0, 0, 0, {"HGMMA": 8}, 6, 0, 0, 0)


class Compiler:
    """Makes a text of each candidate, by its form's name: which text, or that it fails; and what its machine code takes."""

    def __init__(self, stub: ModuleType) -> None:
        self._stub = stub
        self.texts: dict[str, str] = {}
        self.codes: dict[str, MachineCode] = {}
        self.crashes: set[str] = set()
        self.launched: dict[str, dict[str, object]] = {}
        self.asked: list[str] = []

    def compile_all(self, requests: Sequence[Request], *, jobs: int | None, done: Callable[[Compiled], None]) -> None:
        # in any order, as several compilers end
        for request in reversed(requests):
            name = request.specialisation.name.rpartition("-")[2]
            self.asked.append(name)
            if name in self.crashes:
                done(Compiled(request, None, f"{name}: the compiler died with status -11"))
                continue
            binary = self._stub.binary_of(self._stub.PROBLEM, config_of(name), self.texts.get(name, name))[0]
            cubin = self.texts.get(name, name).encode()
            info = {"sha256": self._stub.hashlib.sha256(cubin).hexdigest(), "size": len(cubin), **self.launched.get(name, {})}
            done(Compiled(request, Binary(cubin, binary.info.model_copy(update=info)), None))

    def read(self, binary: Binary) -> MachineCode:
        name = binary.info.name.rpartition("-")[2]
        clusters = binary.info.cluster > 1
        return replace(self.codes.get(name, GOOD), cluster_barriers=int(clusters))


def config_of(name: str) -> SmallConfig:
    cluster, keys, block_n = name.replace("c", "").replace("k", " ").replace("n", " ").split()
    return SmallConfig(int(cluster), int(keys), int(block_n))


@pytest.fixture
def compiler(stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """In the compiler's place; nothing is shipped, and the cache is empty."""
    found = Compiler(stub)
    monkeypatch.setattr(build.pool, "compile_all", found.compile_all)
    monkeypatch.setattr(build, "read_machine_code", found.read)
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    return found


NAMES = ("c1k64n64", "c1k128n128", "c2k64n64", "c2k128n64", "c2k128n128")


def built(problem: Problem, *names: str, **options: object) -> list[Outcome]:
    return build_candidates(problem, [config_of(name) for name in names], "sm_90a", **options)


def test_each_outcome_is_its_candidates_whatever_order_they_end_in(compiler: Compiler, stub: ModuleType) -> None:
    heard: list[str] = []
    found = built(stub.PROBLEM, *NAMES, numbers=[7, 8, 9, 10, 11], done=lambda outcome: heard.append(outcome.name))
    assert [outcome.name.rpartition("-")[2] for outcome in found] == list(NAMES)
    assert [(outcome.number, outcome.verdict, outcome.words) for outcome in found] == [(n, "built", None) for n in range(7, 12)]
    assert found[0].config == {"cluster": 1, "keys": 64, "block_n": 64}
    assert found[0].resources is not None and found[0].resources.registers == 96
    assert sorted(heard) == sorted(outcome.name for outcome in found)
    assert found[2].built.number == 9 and found[2].built.sha256 == found[2].sha256


def test_a_crash_of_the_compiler_and_a_broken_limit_fail_one_candidate_each(compiler: Compiler, stub: ModuleType) -> None:
    compiler.crashes = {NAMES[1]}
    compiler.codes = {NAMES[2]: replace(GOOD, spill_loads=2, spill_stores=2), NAMES[3]: replace(GOOD, matrix={})}
    found = built(stub.PROBLEM, *NAMES)
    assert [one.verdict for one in found] == ["built", "compiler failed", "breaks a limit", "breaks a limit", "built"]
    assert "died with status -11" in (found[1].words or "") and found[1].sha256 is None and found[1].resources is None
    assert "spills: 2 loads and 2 stores" in (found[2].words or "") and found[2].resources is not None
    assert "meant HGMMA" in (found[3].words or "")


def test_machine_code_that_cannot_be_read_passes_no_gate(
    compiler: Compiler, stub: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(binary: Binary) -> MachineCode:
        raise CompileError("cannot read the disassemblers' output")

    monkeypatch.setattr(build, "read_machine_code", read)
    (found,) = built(stub.PROBLEM, NAMES[0])
    assert (found.verdict, found.words) == ("compiler failed", "cannot read the disassemblers' output")


def test_the_lowest_number_of_one_machine_code_is_judged_and_the_others_name_it(compiler: Compiler, stub: ModuleType) -> None:
    compiler.texts = dict.fromkeys((NAMES[0], NAMES[1]), "the same")
    found = built(stub.PROBLEM, *NAMES[:3], numbers=[5, 4, 6])
    assert [(one.verdict, one.same_as) for one in found] == [("same binary", 4), ("built", None), ("built", None)]
    seen = {found[2].sha256: 1}
    again = built(stub.PROBLEM, *NAMES[:3], seen=seen)
    assert [(one.verdict, one.same_as) for one in again] == [("built", None), ("same binary", 0), ("same binary", 1)]


def test_one_machine_code_that_is_launched_in_two_ways_is_not_taken_for_one_binary(
    compiler: Compiler, stub: ModuleType
) -> None:
    compiler.texts = dict.fromkeys((NAMES[0], NAMES[1]), "the same")
    compiler.launched = {NAMES[1]: {"shared": 4096}}
    found = built(stub.PROBLEM, *NAMES[:2])
    assert found[0].verdict == "built" and found[1].verdict == "compiler failed"
    assert "is launched in another way" in (found[1].words or "")


def test_one_that_fails_is_nobodys_twin(compiler: Compiler, stub: ModuleType) -> None:
    compiler.texts = dict.fromkeys((NAMES[0], NAMES[1]), "the same")
    compiler.codes = {NAMES[0]: replace(GOOD, spill_loads=1)}
    assert [one.verdict for one in built(stub.PROBLEM, *NAMES[:2])] == ["breaks a limit", "built"]


def test_what_was_compiled_once_is_not_compiled_again(compiler: Compiler, stub: ModuleType) -> None:
    first = built(stub.PROBLEM, *NAMES)
    assert sorted(compiler.asked) == sorted(NAMES)
    assert built(stub.PROBLEM, *NAMES) == first and len(compiler.asked) == len(NAMES)


def test_a_form_that_does_not_fit_is_the_callers_mistake(compiler: Compiler, stub: ModuleType) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        built(stub.PROBLEM, "c1k512n64")
    with pytest.raises(ArgumentValueError, match="takes at most"):
        built(stub.PROBLEM.model_copy(update={"seqlen_k": 5000}), NAMES[0])
    assert compiler.asked == []


def test_a_batch_holds_what_was_built_and_the_incumbent(compiler: Compiler, stub: ModuleType, tmp_path: Path) -> None:
    compiler.crashes = {NAMES[2]}
    outcomes = built(stub.PROBLEM, *NAMES)
    incumbent = build_incumbent(stub.PROBLEM, "sm_90a", 132)
    folder = tmp_path / "batch"
    batch = make_batch(folder, stub.PROBLEM, "sm_90a", incumbent, outcomes, rounds=12)
    assert read_batch(folder) == batch and batch.rounds == 12
    assert [one.number for one in batch.candidates] == [0, 1, 3, 4] and batch.incumbent.number == -1
    for one, outcome in zip(batch.candidates, [outcomes[number] for number in (0, 1, 3, 4)], strict=True):
        assert read_binary(folder, one, "sm_90a") == outcome.binary
    # the hand-chosen form is in the space: it is judged against itself, which shows the noise
    assert batch.incumbent.sha256 in {one.sha256 for one in batch.candidates}
    (folder / f"{batch.candidates[0].sha256}.cubin").unlink()
    with pytest.raises(BinaryError, match="cannot be read"):
        read_batch(folder)


def test_an_incumbent_that_breaks_a_limit_is_none(compiler: Compiler, stub: ModuleType) -> None:
    compiler.crashes = set(NAMES)
    with pytest.raises(CompileError, match=r"is no incumbent: compiler failed: .* died"):
        build_incumbent(stub.PROBLEM, "sm_90a", 132)


def searched(problem: Problem, *trials: tuple[str, float, float], compiled: Sequence[Outcome]) -> SearchResult:
    """A search that measured these: form, ratio and its lower bound."""
    sha256 = {outcome.name.rpartition("-")[2]: outcome.sha256 or "" for outcome in compiled}
    return SearchResult.model_construct(
        problem=problem,
        arch="sm_90a",
        triton="3.9.0",
        incumbent=SEARCHABLE[problem.impl].values(SEARCHABLE[problem.impl].incumbent(problem, 132)),
        trials=[
            Trial(
                number=number,
                config={"cluster": form.cluster, "keys": form.keys, "block_n": form.block_n},
                name=name,
                sampler="random",
                seed=0,
                verdict="measured",
                sha256=sha256[name],
                judged=Judged(
                    number=number, sha256=sha256[name], verdict="measured", ratio=ratio, ratio_low=low, ratio_high=2.0
                ),
            )
            for number, (name, ratio, low) in enumerate(trials)
            for form in [config_of(name)]
        ],
    )


def test_the_fastest_are_retested_at_shapes_that_the_search_did_not_see(
    compiler: Compiler, stub: ModuleType, tmp_path: Path
) -> None:
    compiled = built(stub.PROBLEM, *NAMES)
    # the second is within noise, the first is the hand-chosen form itself
    trials = [(NAMES[0], 1.2, 1.1), (NAMES[1], 1.3, 0.99), (NAMES[2], 1.02, 1.01), (NAMES[3], 1.04, 1.03), (NAMES[4], 1.3, 1.2)]
    result = searched(stub.PROBLEM, *trials, compiled=compiled)
    assert [trial.name for trial in fastest(result, top=2)] == [NAMES[4], NAMES[3]]
    folders = make_retests(result, tmp_path / "retests", top=2, rounds=40)
    batches = [read_batch(folder) for folder in folders]
    assert [batch.problem for batch in batches] == [stub.PROBLEM, *unseen(stub.PROBLEM)]
    assert len({folder.name for folder in folders}) == len(folders) == 5
    for batch in batches:
        assert batch.rounds == 40 and {one.number for one in batch.candidates} <= {3, 4}
        assert {one.sha256 for one in batch.candidates} <= {compiled[3].sha256, compiled[4].sha256}
        assert batch.incumbent.config == SEARCHABLE["small"].values(SEARCHABLE["small"].incumbent(batch.problem, 132))
    assert any(batch.problem.seqlen_k % 2 for batch in batches)


def test_nothing_faster_is_nothing_to_retest_and_another_binary_is_no_retest(
    compiler: Compiler, stub: ModuleType, tmp_path: Path
) -> None:
    compiled = built(stub.PROBLEM, *NAMES)
    said: list[str] = []
    result = searched(stub.PROBLEM, (NAMES[1], 1.3, 0.99), compiled=compiled)
    assert make_retests(result, tmp_path, say=said.append) == [] and "nothing was faster" in said[0]
    result = searched(stub.PROBLEM, (NAMES[1], 1.3, 1.1), compiled=compiled)
    other = result.trials[0].model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ArgumentValueError, match="allowed: the same binary"):
        make_retests(result.model_copy(update={"trials": [other]}), tmp_path)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("impl", "sizes"), [("hopper", (4, 16, 4096, 128)), ("portable", (1, 8, 512, 64)), ("small", (1, 8, 512, 64))]
)
def test_unseen_shapes_are_near_and_of_the_same_binaries(impl: str, sizes: tuple[int, ...], causal: bool) -> None:
    from flashcore.nearness import MAX_DISTANCE, Sizes, distance

    batch, heads, seqlen, dim = sizes
    problem = Problem(
        impl=impl, batch=batch, heads=heads, heads_k=heads, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=dim, head_dim_v=dim,
        causal=causal,
    )  # fmt: skip
    searchable = SEARCHABLE[impl]
    config = searchable.incumbent(problem, 132)
    found = unseen(problem)
    assert len(found) >= 3 and problem not in found and len(set(found)) == len(found)
    for one in found:
        near = distance(Sizes.of(searchable.spec(one)), Sizes.of(searchable.spec(problem)))
        assert 0 < near <= MAX_DISTANCE / 2, one.name
        if searchable.fits(one, config):
            assert searchable.specialise(one, config) == searchable.specialise(problem, config)


def test_real_compilers_build_and_real_gates_read(stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path / "cache"))
    (found,) = built(stub.PROBLEM, "c1k64n32", jobs=1)
    assert found.verdict == "built" and found.resources is not None and 0 < found.resources.registers <= 255
    folder = tmp_path / "batch"
    make_batch(folder, stub.PROBLEM, "sm_90a", found, [found])
    assert read_binary(folder, read_batch(folder).candidates[0], "sm_90a").cubin.startswith(b"\x7fELF")
