"""What a compile shows of the steps, with no GPU: the limits of mission.md, and each idea where it is meant and not before."""

import ast
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest

from flashcore.build import pool
from flashcore.build.compile import triton_version
from flashcore.build.pool import Request, compile_all
from flashcore.kernels.arguments import TENSORS, Pointer
from flashcore.kernels.registry import EMPTY, KERNELS, LADDER, SHIPPED_ARCHS, shipped_set
from flashcore.ladder import measure
from flashcore.ladder.code import KernelCode, arch_for, compile_steps, read_code, violations
from flashcore.ladder.problem import HEAD_DIMS, Problem
from flashcore.ladder.steps import STEPS, Step, find_step
from flashcore.runtime.launch import _Arguments
from flashcore.runtime.store import locate, obtain
from flashcore.sources import PACKAGE, kernel_hashes
from flashcore.target import SHARED_MEMORY_LIMIT

MISSION = measure.problem_of(measure.SHAPES[0])
OWN = [step for step in STEPS if step.impl is None]


def test_every_step_keeps_the_limits_at_the_mission_shape_and_takes_its_arguments() -> None:
    launches = [
        (arch, step.name, launch)
        for arch in SHIPPED_ARCHS
        for step in OWN
        for launch in step.program(MISSION, arch, 58).launches
    ]
    # by one worker process, because that takes longer to start than to compile any of them
    outcomes = compile_all([Request(launch.specialisation, arch) for arch, _, launch in launches], jobs=1)
    assert [outcome.error for outcome in outcomes] == [None] * len(launches)
    codes: dict[str, dict[str, list[KernelCode]]] = {arch: {step.name: [] for step in OWN} for arch in SHIPPED_ARCHS}
    for (arch, name, launch), outcome in zip(launches, outcomes, strict=True):
        assert outcome.binary is not None and outcome.binary.info.arch == arch
        codes[arch][name].append(read_code(outcome.binary))
        packed = _Arguments(outcome.binary, launch.arguments)
        pointers = [argument.tensor for argument in launch.arguments if isinstance(argument, Pointer)]
        assert [TENSORS[index] for _, index, _ in packed.places] == pointers
        assert [p.name for p in launch.specialisation.parameters][: len(pointers)] == [f"{one}_ptr" for one in pointers]
    for arch, found in codes.items():
        assert [violations(step, found[step.name]) for step in OWN] == [[]] * len(OWN), arch
        # the gate sees one step in the next one's place, where the idea shows in what it looks at
        for step, after in pairwise(OWN):
            if after.meant != step.meant:
                assert violations(after, found[step.name]), (arch, step.name, after.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 2}, "spills: 2, allowed 0"),
        ({"registers": 129}, "registers: 129, allowed 128"),
        ({"shared": SHARED_MEMORY_LIMIT["sm_89"] + 1}, "shared memory: 101377 bytes, allowed 101376"),
        ({"matrix": {}}, "matrix instructions: none, meant some"),
        ({"async_copies": 4}, "async copies: 4, meant none"),
        ({"arriving_copies": 1}, "copies that arrive at a barrier: 1, meant none"),
        ({"narrow_loads": 1}, "128-bit loads: some of them, meant all"),
        ({"wide_loads": 0, "narrow_loads": 4}, "128-bit loads: none of them, meant all"),
    ],
)
def test_each_limit_is_found_broken(change: dict[str, object], words: str) -> None:
    right = KernelCode(
        specialisation="it", arch="sm_89", sha256="", triton="", registers=128, spills=0, shared=1024, matrix={"HMMA": 8},
        async_copies=0, arriving_copies=0, wide_loads=3, narrow_loads=0,
    )  # fmt: skip
    step = find_step("tensor_core_pv")
    assert violations(step, [right]) == []
    assert violations(step, [right.model_copy(update=change)]) == [f"it for sm_89: {words}"]
    assert violations(step, []) == ["tensor_core_pv: 0 binaries, meant 1"]


def test_the_warp_specialised_step_spills_nothing_at_any_head_dim_and_takes_the_matrix_unit_of_the_arch() -> None:
    step = find_step("warp_specialised")
    units = {"sm_80": {"HMMA"}, "sm_90a": {"HGMMA"}}
    # the tiles for few queries and for many
    wanted = [
        Request(specialisation, arch)
        for arch in units
        for head_dim in HEAD_DIMS
        for seqlen_q in (512, 65536)
        for specialisation in step.specialisations(Problem(1, 8, seqlen_q, 512, head_dim, 0.125), arch, 108)
    ]
    for outcome in compile_all(list(dict.fromkeys(wanted)), jobs=1):
        assert outcome.binary is not None, outcome.error
        code = read_code(outcome.binary)
        assert (code.spills, set(code.matrix)) == (0, units[code.arch]) and code.arriving_copies, code
        # the consumers' warps, the producer's, and those that make up its four
        assert outcome.binary.info.threads == 32 * (outcome.request.specialisation.num_warps + 4)
        assert code.shared <= SHARED_MEMORY_LIMIT["sm_89"]


def test_no_matrix_instructions_may_hide_in_the_scalar_steps() -> None:
    dots = {file: _dots(file) for file in ("unfused", "scalar", "tensor_core_qk", "tensor_core_pv")}
    assert dots == {"unfused": 2, "scalar": 0, "tensor_core_qk": 1, "tensor_core_pv": 2}


def _dots(file: str) -> int:
    tree = ast.parse((PACKAGE / "ladder" / f"{file}.py").read_text())
    return sum(isinstance(node, ast.Attribute) and node.attr == "dot" for node in ast.walk(tree))


def _grids(step: Step, problem: Problem) -> Sequence[int]:
    return [launch.grid for launch in step.program(problem, "sm_89", 58).launches]


def test_grids_cover_every_query_of_every_head() -> None:
    odd = Problem(2, 3, 65, 33, 64, 0.125)
    assert _grids(find_step("unfused"), odd) == [12, 2 * 3 * 65, 12]
    assert _grids(find_step("scalar"), odd) == [30]
    assert _grids(find_step("tuned_tiles"), odd) == _grids(find_step("warp_specialised"), odd) == [12]
    assert [step.program(odd, "sm_89", 58).workspace_bytes for step in OWN] == [4 * 2 * 3 * 65 * 33] + [0] * (len(OWN) - 1)


def test_more_queries_choose_the_larger_tile_and_every_head_dim_has_both() -> None:
    from flashcore.ladder.tuned_tiles import TILES, choose

    assert tuple(TILES) == HEAD_DIMS
    for head_dim, (few, many) in TILES.items():
        enough = 2 * many.block_m * 132
        assert choose(Problem(1, 1, enough, 64, head_dim, 1.0), 132) == many
        assert choose(Problem(1, 1, enough - 1, 64, head_dim, 1.0), 132) == few


def test_a_step_in_gluon_is_not_interpreted() -> None:
    step = find_step("warp_specialised")
    assert step.refusal(MISSION, "sm_80", False) is None and "does not run Gluon" in str(step.refusal(MISSION, None, True))
    assert step.refusal(MISSION, None, False) == "needs a GPU of sm_80 or later"
    assert [one.name for one in OWN if one.refusal(MISSION, None, True)] == ["warp_specialised"]


def test_the_ladder_is_neither_shipped_nor_evidence() -> None:
    assert not set(LADDER) & set(KERNELS) and not set(LADDER) & set(kernel_hashes())
    for arch in SHARED_MEMORY_LIMIT:
        shipped = shipped_set(arch)
        assert EMPTY in shipped and not {s.kernel for s in shipped} & set(LADDER)
        assert all(kernel.shipped(arch) == () and arch in kernel.archs for kernel in LADDER.values())
    assert not any(kernel.computes for kernel in LADDER.values())


def test_every_kernel_of_the_ladder_is_some_steps_and_its_sources_are_all_that_it_imports_of_kernels() -> None:
    used = {s.kernel for step in OWN for s in step.specialisations(MISSION, "sm_89", 58)}
    assert used == set(LADDER)
    for kernel in LADDER.values():
        source = PACKAGE / kernel.sources[0]
        assert f"def {kernel.function}(" in source.read_text()
        imported = {
            f"{(node.module or '').removeprefix('flashcore.').replace('.', '/')}.py"
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashcore")
        }
        jitted = {name for name in imported if re.search(r"^@(triton|gluon)\.jit$", (PACKAGE / name).read_text(), re.MULTILINE)}
        # of another step only a tile may be taken, which is no part of a binary's source
        assert "ladder/harness.py" in jitted and jitted - {"ladder/tensor_core_qk.py"} <= set(kernel.sources)


def test_a_step_is_compiled_once_and_then_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(tmp_path))
    obtain.cache_clear()
    step = find_step("scalar")
    (specialisation,) = step.specialisations(MISSION, "sm_80", 108)
    before = locate(specialisation, "sm_80")
    assert before is not None and before.origin == "compile"
    (code,) = compile_steps([step], MISSION, "sm_80")["scalar"]
    after = locate(specialisation, "sm_80")
    assert after is not None and after.origin == "cached" and after.info is not None
    assert (after.info.sha256, after.info.name, after.info.triton) == (code.sha256, code.specialisation, triton_version())
    monkeypatch.setattr(pool, "compile_one", None)  # which would be called again
    obtain.cache_clear()
    assert compile_steps([step], MISSION, "sm_80") == {"scalar": [code]}
    obtain.cache_clear()


def test_a_step_that_does_not_run_on_an_arch_is_compiled_for_its_own() -> None:
    assert arch_for(find_step("hopper"), "sm_89") == "sm_90a" and arch_for(find_step("scalar"), "sm_89") == "sm_89"
    (specialisation,) = find_step("small").specialisations(MISSION, "sm_90a", 132)
    assert specialisation.kernel == "small_forward" and specialisation in shipped_set("sm_90a")
