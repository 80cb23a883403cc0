"""What machine code is read as, and the limits it is held to: a gate fails closed."""

import subprocess
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashcore.build import gates, machine_code
from flashcore.build.gates import expected_matrix_instruction, violations
from flashcore.build.machine_code import MachineCode, read_machine_code
from flashcore.errors import CompileError
from flashcore.kernels.registry import EMPTY, shipped_set
from flashcore.kernels.specialisation import Specialisation

GOOD = MachineCode(registers=128, stack=0, shared=1024, spill_loads=0, spill_stores=0, matrix={"HMMA": 64}, async_copies=8)


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


def test_every_excuse_names_a_binary_that_there_is() -> None:
    for arch, name in gates.SPILL_EXCEPTIONS:
        assert name in {s.name for s in shipped_set(arch)}


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
        "        // HMMA in a comment",
    ]
    usage = " Function x:\n  REG:40 STACK:16 SHARED:32 LOCAL:0 CONSTANT[0]:400"
    monkeypatch.setattr(machine_code, "_run", lambda tool, *a: usage if tool == "cuobjdump" else "\n".join(lines))
    code = read_machine_code(binaries.half)
    assert (code.registers, code.stack, code.shared) == (40, 16, 32 + binaries.half.info.shared)
    assert (code.spill_loads, code.spill_stores, code.spills) == (1, 1, 2)
    assert code.matrix == {"HMMA": 1, "HGMMA": 1} and code.async_copies == 2


def test_the_disassemblers_come_with_this_triton() -> None:
    assert util.find_spec("triton") is not None
    for name in ("cuobjdump", "nvdisasm"):
        assert subprocess.run([machine_code._tool(name), "--version"], capture_output=True).returncode == 0
