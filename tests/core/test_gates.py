"""What machine code is read as, and the limits it is held to: a gate fails closed."""

import re
import subprocess
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashcore.build import control_flow, gates, machine_code
from flashcore.build.gates import expected_matrix_instruction, violations
from flashcore.build.machine_code import MachineCode, read_machine_code
from flashcore.errors import CompileError
from flashcore.kernels.registry import EMPTY, shipped_set
from flashcore.kernels.specialisation import Specialisation

GOOD = MachineCode(
    registers=128, stack=0, shared=1024, spill_loads=0, spill_stores=0, spills_in_loops=0, matrix={"HMMA": 64}, async_copies=8,
    cluster_barriers=0, before_wait=0, lanes_apart=0,
)  # fmt: skip


def _named(arch: str, part: str) -> Specialisation:
    return next(s for s in shipped_set(arch) if part in s.name)


HALF, FULL = _named("sm_80", "fp16-d64-none-m64"), _named("sm_80", "fp32-d64")


def test_a_real_binary_is_read(binaries) -> None:
    half, full, empty = (read_machine_code(b) for b in (binaries.half, binaries.full, binaries.empty_sm_80))
    assert half.matrix.keys() == {"HMMA"} and half.matrix["HMMA"] >= 32 and half.async_copies > 0
    assert half.shared >= binaries.half.info.shared > 0 and 32 <= half.registers <= 255
    assert full.matrix == {} and full.registers > 16
    assert (empty.matrix, empty.shared, empty.spills, empty.async_copies) == ({}, 0, 0, 0)
    assert violations(HALF, "sm_80", half) == violations(FULL, "sm_80", full) == violations(EMPTY, "sm_80", empty) == []


def test_the_limits() -> None:
    assert violations(HALF, "sm_80", GOOD) == []
    (loads,) = violations(HALF, "sm_80", replace(GOOD, spill_loads=3))
    assert loads == "spills: 3 loads and 0 stores, allowed 0"
    (stores,) = violations(HALF, "sm_80", replace(GOOD, spill_stores=2))
    assert "2 stores" in stores
    assert violations(HALF, "sm_80", replace(GOOD, shared=99 * 1024)) == []
    (shared,) = violations(HALF, "sm_80", replace(GOOD, shared=99 * 1024 + 1))
    assert shared == f"shared memory: {99 * 1024 + 1} bytes, allowed {99 * 1024}"
    hopper = replace(GOOD, shared=227 * 1024, matrix={"HGMMA": 4})
    assert violations(_named("sm_90a", "fp16-d64-none"), "sm_90a", hopper) == []
    assert len(violations(HALF, "sm_89", replace(GOOD, shared=10**6, spill_loads=1, matrix={}))) == 3


def test_matrix_instructions_must_be_those_meant() -> None:
    (missing,) = violations(HALF, "sm_80", replace(GOOD, matrix={}))
    assert "none" in missing and "meant HMMA" in missing
    hopper = _named("sm_90a", "fp16-d64-none")
    (older,) = violations(hopper, "sm_90a", GOOD)
    assert "meant HGMMA" in older
    (unexpected,) = violations(FULL, "sm_80", GOOD)
    assert "meant none" in unexpected
    (unexpected,) = violations(EMPTY, "sm_80", GOOD)
    assert "meant none" in unexpected


def test_which_matrix_instruction_is_meant() -> None:
    assert [expected_matrix_instruction(HALF, arch) for arch in ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")] == [
        "HMMA",
        "HMMA",
        "HGMMA",
        "UTCHMMA",
        "HMMA",
    ]
    small = replace(HALF, constants=tuple((n, 32 if n == "BLOCK_M" else v) for n, v in HALF.constants))
    assert expected_matrix_instruction(small, "sm_90a") == "HMMA"
    assert expected_matrix_instruction(FULL, "sm_90a") is None and expected_matrix_instruction(EMPTY, "sm_90a") is None
    tf32 = replace(FULL, constants=tuple((n, "tf32" if n == "PRECISION" else v) for n, v in FULL.constants))
    assert expected_matrix_instruction(tf32, "sm_80") == "HMMA"


def test_a_spill_is_excused_by_name_and_arch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "SPILL_EXCEPTIONS", {("sm_80", HALF.name): "5 % faster: out/bench.json"})
    spilling = replace(GOOD, spill_loads=3)
    assert violations(HALF, "sm_80", spilling) == []
    assert len(violations(HALF, "sm_89", spilling)) == 1
    assert len(violations(HALF, "sm_80", replace(spilling, shared=10**6))) == 1


def test_a_spill_in_an_innermost_loop_is_never_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = replace(GOOD, spill_loads=3, spills_in_loops=2)
    for excuses in ({}, {("sm_80", HALF.name): "5 % faster: out/bench.json"}):
        monkeypatch.setattr(gates, "SPILL_EXCEPTIONS", excuses)
        assert violations(HALF, "sm_80", spilling) == ["spills in innermost loops: 2, allowed 0"]


def _sass(*lines: str) -> str:
    """The disassembler's text of instructions, each with the label in front of it, if any: "L_x_0: @P0 LDL R0, [R1]"."""
    found = []
    for number, line in enumerate(lines):
        *label, instruction = line.rsplit(": ", 1)
        found += [f".{name}:" for name in label]
        found.append(f"        /*{16 * number:04x}*/  {instruction} ;")
    return "\n".join([".text.kernel:", *found])


LOOP = ("L_x_0: MOV R1, R2", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", "LDL R2, [R1]", "@P0 BRA `(.L_x_0)")


@pytest.mark.parametrize(
    ("lines", "spills"),
    [
        (LOOP, 1),
        (("LDL R0, [R1]", *LOOP, "STL [R1], R0", "EXIT"), 1),
        # of the loop around it, only that is counted which is in the inner one
        (("L_x_1: LDL R0, [R1]", *LOOP, "STL [R1], R0", "@P1 BRA `(.L_x_1)", "EXIT"), 1),
        # ... which counts itself where the inner one has no matrix instruction
        (("L_x_1: LDL R0, [R1]", "HMMA R0, R1", "L_x_2: LDL R3, [R1]", "@P0 BRA `(.L_x_2)", "@P1 BRA `(.L_x_1)", "EXIT"), 2),
        # no loop, and none with a matrix instruction
        (("HGMMA R24, R24", "LDL R0, [R1]", "EXIT"), 0),
        (("L_x_1: LDL R0, [R1]", "@P0 BRA `(.L_x_1)", "HGMMA R24, R24", "EXIT"), 0),
        # a wait in the loop, which spins behind the code and jumps back from there, over a spill that is in no loop
        (
            ("L_x_0: @!P0 BRA `(.L_x_3)", "L_x_4: HGMMA R24, R24", "@P1 BRA `(.L_x_0)", "LDL R2, [R1]", "EXIT",
             "L_x_3: SYNCS P0", "@!P0 BRA `(.L_x_3)", "BRA `(.L_x_4)"),
            0,
        ),
        # ... and what is spilled there is paid in the loop
        (
            ("L_x_0: @!P0 BRA `(.L_x_3)", "L_x_4: HGMMA R24, R24", "@P1 BRA `(.L_x_0)", "EXIT",
             "L_x_3: SYNCS P0", "@!P0 BRA `(.L_x_3)", "LDL R2, [R1]", "BRA `(.L_x_4)"),
            1,
        ),
        # two ways back to the start
        (
            ("L_x_0: @P2 BRA `(.L_x_5)", "HMMA R0, R1", "@P0 BRA `(.L_x_0)", "LDL R2, [R1]", "@P1 BRA `(.L_x_0)",
             "L_x_5: EXIT"),
            1,
        ),
        # the workers of warp specialisation are sent to their code by an indirect branch
        (("BRX R2 -0xe660 (*\"BRANCH_TARGETS .L_x_6,.L_x_0\"*)", "L_x_6: LDL R0, [R1]", "EXIT", *LOOP, "EXIT"), 1),
        # one side of a divergent branch leaves it by BSYNC, which goes to where BSSY said
        (
            ("L_x_0: BSSY B0, `(.L_x_7)", "HMMA R0, R1", "@P0 BRA `(.L_x_8)", "LDL R2, [R1]", "BSYNC B0", "L_x_8: LDL R3, [R1]",
             "BSYNC B0", "L_x_7: @P1 BRA `(.L_x_0)", "LDL R2, [R1]", "EXIT"),
            2,
        ),
    ],
)  # fmt: skip
def test_spills_in_innermost_loops_with_matrix_instructions_are_counted(
    lines: tuple[str, ...], spills: int, binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = "REG:40 STACK:16 SHARED:32 LOCAL:0"
    monkeypatch.setattr(machine_code, "_run", lambda tool, *a: usage if tool == "cuobjdump" else _sass(*lines))
    code = read_machine_code(binaries.half)
    assert code.spills_in_loops == spills
    assert code.spills == sum("LDL" in line or "STL" in line for line in lines)


@pytest.mark.parametrize("line", ["@P0 BRA `(.L_x_9)", "BRX R2 -0xe660", "BSYNC B0"])
def test_code_that_cannot_be_followed_is_an_error(line: str) -> None:
    with pytest.raises(CompileError, match="cannot follow the code"):
        control_flow.opcodes_of_innermost_loops(_sass("HMMA R0, R1", line, "EXIT"), ["HMMA"])


def test_loops_of_a_real_binary_are_found(binaries) -> None:
    inside = control_flow.opcodes_of_innermost_loops(machine_code.disassemble(binaries.half), ["HMMA"])
    all_of_it = read_machine_code(binaries.half).matrix["HMMA"]
    assert 32 <= inside["HMMA"] <= all_of_it and inside["MUFU"] > 0 and inside["EXIT"] == 0


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        (("ACQBULK", "LDG.E R0, [R2]", "STG.E [R2], R0", "EXIT"), 0),
        (("LDG.E R0, [R2]", "ACQBULK", "STG.E [R2], R0", "EXIT"), 1),
        # neither the parameters nor shared memory
        (("LDC R1, c[0x0][0x28]", "LDS R0, [R2]", "STS [R2], R0", "UTMACCTL.PF [UR4]", "ACQBULK", "EXIT"), 0),
        # what has no wait, and what may not carry it out
        (("UTMALDG.4D [UR8], [UR4]", "ST.E [R2], R0", "ATOMG.E.ADD PT, RZ, [R2], R5", "EXIT"), 4),
        (("@P0 ACQBULK", "LDG.E R0, [R2]", "EXIT"), 2),
        # a way around it
        (("@P0 BRA `(.L_x_0)", "ACQBULK", "L_x_0: LDG.E R0, [R2]", "EXIT"), 2),
        # one way waits first, whichever that is, and the other does not
        (("@P0 BRA `(.L_x_0)", "LDG.E R0, [R2]", "ACQBULK", "EXIT", "L_x_0: ACQBULK", "EXIT"), 1),
        (("@P0 BRA `(.L_x_0)", "ACQBULK", "EXIT", "L_x_0: LDG.E R0, [R2]", "ACQBULK", "EXIT"), 1),
        # ... that does not come back, and one that waits for itself
        (("@P0 EXIT", "ACQBULK", "LDG.E R0, [R2]", "EXIT"), 1),
        (("@P0 BRA `(.L_x_0)", "ACQBULK", "LDG.E R0, [R2]", "EXIT", "L_x_0: ACQBULK", "STG.E [R2], R0", "EXIT"), 0),
        # code that is behind what is met first, and before it on the way
        (("BRA `(.L_x_1)", "L_x_0: ACQBULK", "EXIT", "L_x_1: UBLKCP.S.G [UR8], [UR4], UR6", "BRA `(.L_x_0)"), 1),
        # a loop before the wait, counted once
        (("L_x_0: LDG.E R0, [R2]", "@P0 BRA `(.L_x_0)", "ACQBULK", "EXIT"), 1),
        # a subroutine
        (("CALL.REL.NOINC `(.L_x_0)", "ACQBULK", "EXIT", "L_x_0: RED.E.ADD [R2], R0", "RET.REL.NODEC R2 `(kernel)"), 1),
    ],
)
def test_accesses_and_exits_that_do_not_wait_for_earlier_launches_are_counted(
    lines: tuple[str, ...], early: int, binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = "REG:40 STACK:16 SHARED:32 LOCAL:0"
    monkeypatch.setattr(machine_code, "_run", lambda tool, *a: usage if tool == "cuobjdump" else _sass(*lines))
    programmatic = replace(binaries.half, info=binaries.half.info.model_copy(update={"programmatic": True}))
    assert read_machine_code(programmatic).before_wait == early
    # launched in the stream's order, a binary need not wait
    assert read_machine_code(binaries.half).before_wait == 0


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        # the last warps of the last group have nothing to do
        (("@P0 EXIT", "USETMAXREG.DEALLOC.CTAPOOL 0x18", "ACQBULK", "LDG.E R0, [R2]", "EXIT"), 0),
        (("@P0 BRA `(.L_x_0)", "ACQBULK", "EXIT", "L_x_0: USETMAXREG.DEALLOC.CTAPOOL 0x18", "EXIT"), 0),
        # ... and even they touch no memory
        (("@P0 BRA `(.L_x_0)", "ACQBULK", "EXIT", "L_x_0: USETMAXREG.DEALLOC.CTAPOOL 0x18", "STG.E [R2], R0", "EXIT"), 1),
        (("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", "UTMALDG.4D [UR8], [UR4]", "ACQBULK", "EXIT"), 1),
        # where all warps have the same task, none ends before it waits
        (("@P0 EXIT", "ACQBULK", "LDG.E R0, [R2]", "EXIT"), 1),
        (("EXIT",), 1),
    ],
)
def test_only_warps_with_tasks_of_their_own_may_end_before_they_wait(
    lines: tuple[str, ...], early: int, binaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = "REG:40 STACK:16 SHARED:32 LOCAL:0"
    monkeypatch.setattr(machine_code, "_run", lambda tool, *a: usage if tool == "cuobjdump" else _sass(*lines))
    programmatic = replace(binaries.half, info=binaries.half.info.model_copy(update={"programmatic": True}))
    assert read_machine_code(programmatic).before_wait == early


def test_a_programmatic_binary_may_access_nothing_and_not_end_before_it_waits() -> None:
    (found,) = violations(HALF, "sm_80", replace(GOOD, before_wait=2))
    assert found == "accesses to memory and exits before griddepcontrol.wait: 2, allowed 0"


_DRAW = ("BSSY B1, `(.L_x_1)", "@!P0 BRA `(.L_x_0)", "ATOMG.E.ADD.STRONG.GPU PT, R12, desc[UR6][R2.64], R5")


@pytest.mark.parametrize(
    ("lines", "apart"),
    [
        ((*_DRAW, "L_x_0: BSYNC B1", "L_x_1: REDUX.SUM UR8, R12", "EXIT"), 0),
        # the barrier where they meet is at the loop's end
        ((*_DRAW, "L_x_0: UIADD3 UR57, UR57, 0x2, URZ", "@P1 BRA `(.L_x_0)", "BSYNC B1", "L_x_1: EXIT"), 1),
        # of all lanes
        (("ATOMG.E.ADD.STRONG.GPU PT, R12, desc[UR6][R2.64], R5", "L_x_1: EXIT"), 0),
        # nothing comes back
        ((*_DRAW[:2], "REDG.E.ADD.STRONG.GPU desc[UR6][R2.64], R5", "L_x_0: BSYNC B1", "L_x_1: EXIT"), 0),
    ],
    ids=["at once", "later", "no branch", "no result"],
)
def test_lanes_that_draw_a_number_meet_the_others_at_once(lines: tuple[str, ...], apart: int) -> None:
    assert control_flow.atomics_that_part_lanes(_sass(*lines)) == apart
    found = violations(HALF, "sm_80", replace(GOOD, lanes_apart=apart))
    assert found == (["atomics after which a warp's lanes stay apart: 1, allowed 0"] if apart else [])


def test_a_cluster_has_barriers_and_nothing_else_has() -> None:
    pair, barriers = replace(HALF, cluster=2), replace(GOOD, cluster_barriers=2)
    assert violations(pair, "sm_80", barriers) == []
    (none,) = violations(pair, "sm_80", GOOD)
    assert none == "cluster barriers: none, and a cluster of 2 blocks cannot do without"
    (unexpected,) = violations(HALF, "sm_80", barriers)
    assert unexpected == "cluster barriers: 2, meant none"


def test_every_excuse_names_a_binary_that_there_is_and_a_figure_of_its_file() -> None:
    names = {arch: {s.name for s in shipped_set(arch)} for arch, _ in gates.SPILL_EXCEPTIONS}
    for (arch, name), words in gates.SPILL_EXCEPTIONS.items():
        assert name in names[arch]
        ratio, path = words.split("x ")[0], words.split(": ")[1]
        lines = (Path(gates.__file__).parents[3] / path).read_text().splitlines()
        form = name.split("-", 2)[2]
        # of the backward kernel's forms by name, of the forward kernel's by head dim
        of_form = re.compile(rf"{form} .*ratio {ratio} " if "backward" in name else rf"D {_dims(form)} .*\({ratio}x\)")
        assert any(of_form.match(line) for line in lines), name


def _dims(form: str) -> str:
    found = re.match(r"d(\d+)(?:v(\d+))?-", form)
    assert found is not None
    return f"{found[1]},{found[2] or found[1]}"


@pytest.fixture
def _fresh_tools():
    machine_code._tool.cache_clear()
    yield
    machine_code._tool.cache_clear()


@pytest.mark.usefixtures("_fresh_tools")
def test_a_missing_tool_is_an_error(binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = SimpleNamespace(origin=str(tmp_path / "triton" / "__init__.py"))
    monkeypatch.setattr(machine_code, "find_spec", lambda name: elsewhere)
    with pytest.raises(CompileError, match="cuobjdump: not found"):
        read_machine_code(binaries.half)
    machine_code._tool.cache_clear()
    monkeypatch.setattr(machine_code, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"pip install flashcore\[build\]"):
        read_machine_code(binaries.half)


def test_a_tool_that_fails_is_an_error(binaries) -> None:
    with pytest.raises(CompileError, match=r"cuobjdump .* failed with"):
        read_machine_code(replace(binaries.half, cubin=b"not a cubin"))


@pytest.mark.parametrize(
    ("usage", "text"),
    [
        ("", "        /*0000*/                   MOV R1, c[0x0][0x28] ;"),
        ("REG:8 STACK:0 SHARED:0 LOCAL:0", ""),
        ("REG: 8, STACK: 0", "a new format"),
    ],
)
def test_output_that_is_not_understood_is_an_error(usage: str, text: str, binaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "_run", lambda tool, *arguments: usage if tool == "cuobjdump" else text)
    with pytest.raises(CompileError, match="cannot read the disassemblers' output"):
        read_machine_code(binaries.half)


def test_instructions_are_counted_whatever_their_predicate(binaries, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "        /*0000*/                   MOV R1, c[0x0][0x28] ;",
        "        /*0010*/              @!P0 HMMA.16816.F32 R24, R4, R8, R24 ;",
        "        /*0020*/              @UP1 HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24 ;",
        "        /*0030*/               @P3 LDL.64 R2, [R1+0x8] ;",
        "        /*0040*/                   STL [R1], R2 ;",
        "        /*0050*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64] ;",
        "        /*0060*/                   UTMALDG.4D [UR8], [UR4] ;",
        "        /*0070*/                   UCGABAR_ARV ;",
        "        /*0080*/               @P0 UCGABAR_WAIT ;",
        "        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;",
        "        // HMMA in a comment",
    ]
    usage = " Function x:\n  REG:40 STACK:16 SHARED:32 LOCAL:0 CONSTANT[0]:400"
    monkeypatch.setattr(machine_code, "_run", lambda tool, *a: usage if tool == "cuobjdump" else "\n".join(lines))
    code = read_machine_code(binaries.half)
    assert (code.registers, code.stack, code.shared) == (40, 16, 32 + binaries.half.info.shared)
    assert (code.spill_loads, code.spill_stores, code.spills) == (1, 1, 2)
    assert code.matrix == {"HMMA": 1, "HGMMA": 1} and code.async_copies == code.cluster_barriers == 2


def test_the_disassemblers_come_with_this_triton() -> None:
    assert util.find_spec("triton") is not None
    for name in ("cuobjdump", "nvdisasm"):
        assert subprocess.run([machine_code._tool(name), "--version"], capture_output=True).returncode == 0
