"""The one compile path: reproducible bytes, the right arch, no traces of this machine, and failures that stay single."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashcore.build import compile as compiling
from flashcore.build import machine_code, pool, sets
from flashcore.build.machine_code import disassemble, read_parameter_places
from flashcore.build.pool import Outcome, Request, compile_all, compile_one
from flashcore.errors import CompileError
from flashcore.kernels.registry import EMPTY, shipped_set
from flashcore.kernels.specialisation import Parameter, Specialisation
from flashcore.runtime import store
from flashcore.sources import PACKAGE, kernel_hash

ELSEWHERE = """
import json, sys
from hashlib import sha256
import flashcore.build.pool as pool
from flashcore.kernels.specialisation import Specialisation
requests = [pool.Request(Specialisation.from_key(key), arch) for key, arch in json.loads(sys.stdin.read())]
print(pool.__file__)
for outcome in pool.compile_all(requests, jobs=1):
    print(outcome.error or sha256(outcome.binary.cubin).hexdigest())
"""


def test_bytes_depend_on_nothing_of_the_machine(binaries, tmp_path: Path) -> None:
    """Another checkout, working directory, temporary folder, cache folder, home, time zone and hash seed: the same bytes."""
    copy = tmp_path / "a checkout elsewhere" / "flashcore"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("binaries", "__pycache__"))
    temporary, folder = tmp_path / "temporary", tmp_path / "working directory"
    temporary.mkdir()
    folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy.parent),
        "TMPDIR": str(temporary),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "HOME": str(tmp_path),
        "TZ": "Asia/Kathmandu",
        "PYTHONHASHSEED": "7",
    }
    chosen = [binaries.half, binaries.empty_sm_80]
    asked = json.dumps([(binary.info.key, binary.info.arch) for binary in chosen])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], input=asked, capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    where, *hashes = done.stdout.splitlines()
    assert where.startswith(str(copy))
    assert hashes == [binary.info.sha256 for binary in chosen]
    assert list(temporary.iterdir()) == list(folder.iterdir()) == []


def test_a_record_says_what_the_binary_is(binaries) -> None:
    for binary in vars(binaries).values():
        info = binary.info
        assert (info.sha256, info.size) == (sha256(binary.cubin).hexdigest(), len(binary.cubin))
        assert info.triton == compiling.triton_version() and info.source_sha256 == kernel_hash(info.kernel)
        specialisation = Specialisation.from_key(info.key)
        assert info.name == specialisation.name and info.threads == 32 * specialisation.num_warps
        assert info.cluster == 1 and not info.programmatic
        own = [(p.name, p.type) for p in info.parameters if not p.name.startswith("scratch_")]
        assert own == [(p.name, p.type) for p in specialisation.parameters]
        sizes = {"i64": 8, "i32": 4, "fp32": 4}
        assert all(p.size == sizes.get(p.type, 8) for p in info.parameters)
        ends = [0, *(p.offset + p.size for p in info.parameters)]
        starts = [end + -end % p.size for p, end in zip(info.parameters, ends, strict=False)]
        assert [p.offset for p in info.parameters] == starts
        assert info.symbol.encode() in binary.cubin


def test_each_arch_gets_its_own_machine_code(binaries) -> None:
    for binary, arch in ((binaries.empty_sm_80, "sm_80"), (binaries.half, "sm_80"), (binaries.empty_sm_90a, "sm_90a")):
        assert binary.info.arch == arch
        # the ELF of newer GPUs names its target, that of older ones holds it in its flags
        target = re.search(r"\.target\s+sm_(\w+)|EF_CUDA_SM(\w+)", disassemble(binary))
        assert target is not None and f"sm_{target[1] or target[2]}" == arch


def test_no_path_of_this_machine_is_in_a_binary(binaries) -> None:
    for binary in vars(binaries).values():
        for trace in (str(PACKAGE), "flashcore/kernels", ".py", tempfile.gettempdir(), str(Path.home())):
            assert trace.encode() not in binary.cubin, (binary.info.name, trace)
        assert b".debug_line" not in binary.cubin


def test_a_compiler_whose_log_is_not_to_be_had_builds_no_gluon_kernel() -> None:
    with pytest.raises(CompileError, match="it for sm_90a: ptxas's log is not to be had"):
        compiling._refuse_lost_performance("", "it for sm_90a")


@pytest.mark.parametrize(
    ("parameters", "places", "words"),
    [
        (".param .u64 x", [(0, 8)], "1 parameters in the PTX for 2"),
        (".param .u64 .ptr .global .align 16 x, .param .u32 y", [(0, 8), (8, 4)], "y is i64, and in the cubin 4 bytes"),
        (".param .align 64 .b8 x[128], .param .u64 y", [(0, 128), (128, 8)], "x is .fp16, and in the cubin 128 bytes"),
        (".param .u64 x, .param .u64 y", [(0, 8), (4, 8)], "y is i64, .* at offset 4, with 8 taken"),
        (".param .u64 x, .param .u64 y", [(0, 8), (12, 8)], "y is i64, .* at offset 12"),
        (
            ".param .u64 x, .param .u64 y",
            [(0, 8), (8, 4)],
            r"\[8, 8\] bytes in the PTX, and in the cubin \[\(0, 8\), \(8, 4\)\]",
        ),
        (".param .u64 x, .param .u64 y", [(0, 8)], "bytes in the PTX, and in the cubin"),
    ],
)
def test_an_entry_point_that_is_not_as_specified_is_refused(parameters: str, places: list[tuple[int, int]], words: str) -> None:
    specialisation = replace(EMPTY, parameters=(Parameter("x", "*fp16"), Parameter("y", "i64")))
    with pytest.raises(CompileError, match=words):
        compiling._entry_parameters(f".visible .entry it(\n{parameters}\n)", places, specialisation, ())


def test_where_parameters_lie_is_read_from_the_cubin(binaries) -> None:
    info = binaries.half.info
    assert read_parameter_places(binaries.half.cubin, info.symbol) == [(p.offset, p.size) for p in info.parameters]
    with pytest.raises(CompileError, match="another: the cubin says nothing of it"):
        read_parameter_places(binaries.half.cubin, "another")
    with pytest.raises(CompileError, match=r"cuobjdump .* failed with"):
        read_parameter_places(b"not a cubin", info.symbol)


_ENTRY = "Attribute:\tEIATTR_KPARAM_INFO\n\tValue:\tIndex : 0x0\tOrdinal : 0x{}\tOffset  : 0x{:x}\tSize    : 0x8\n"


@pytest.mark.parametrize(
    "table",
    [
        _ENTRY.format(1, 8),  # the first is not there
        _ENTRY.format(0, 0) * 2,
        _ENTRY.format(0, 0) + "Attribute:\tEIATTR_KPARAM_INFO\n\tValue:\tin a new format\n",
    ],
)
def test_a_table_of_parameters_that_is_not_understood_is_an_error(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f".nv.info.other\n{_ENTRY.format(0, 0)}\n\n"

    def read(own: str) -> list[tuple[int, int]]:
        monkeypatch.setattr(machine_code, "_run", lambda tool, *arguments: f"{other}.nv.info.it\n{own}\n\n{other}")
        return read_parameter_places(b"", "it")

    assert read(_ENTRY.format(1, 16) + _ENTRY.format(0, 0)) == [(0, 8), (16, 8)]
    with pytest.raises(CompileError, match="it: cannot read the cubin's table of parameters"):
        read(table)


def _impossible() -> Specialisation:
    good = next(s for s in shipped_set("sm_80") if "fp16-d64-none-m64" in s.name)
    constants = tuple((name, 48 if name == "BLOCK_M" else value) for name, value in good.constants)
    return replace(good, name="impossible", constants=constants)


def test_what_the_compiler_refuses_fails_alone_and_in_its_own_words() -> None:
    heard: list[Outcome] = []
    outcomes = compile_all([Request(_impossible(), "sm_80"), Request(EMPTY, "sm_80")], jobs=1, done=heard.append)
    assert outcomes == heard
    refused, built = outcomes
    assert refused.binary is None and "impossible" in refused.error and "power of 2" in refused.error
    assert built.error is None and built.binary.info.name == "empty"


def test_compile_one_raises_the_compilers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, 'print(json.dumps({"error": "ptxas: no such instruction"}), flush=True)')
    with pytest.raises(CompileError, match="ptxas: no such instruction"):
        compile_one(EMPTY, "sm_80")


def test_compiling_outside_the_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_DISABLE_LINE_INFO", raising=False)
    with pytest.raises(CompileError, match="TRITON_DISABLE_LINE_INFO=1"):
        compiling.compile_specialisation(EMPTY, "sm_80")


def _stand_in(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Put another program in the worker's place; `answer` is what it does with each `request`."""
    folder = Path(tempfile.mkdtemp())
    script = folder / "worker"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nfor line in sys.stdin:\n    request = json.loads(line)\n    {answer}\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(pool, "sys", SimpleNamespace(executable=str(script)))


def test_a_worker_that_dies_is_one_failure_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(
        monkeypatch,
        "print('LLVM ERROR: out of registers', file=sys.stderr, flush=True) or os._exit(9) if 'die' in request['key'] else "
        "print(json.dumps({'error': 'alive'}), flush=True)",
    )
    requests = [Request(replace(EMPTY, name=name), "sm_80") for name in ("a", "die-1", "b", "die-2", "c")]
    for jobs in (1, 2):
        errors = [outcome.error for outcome in compile_all(requests, jobs=jobs)]
        assert [errors[i] for i in (0, 2, 4)] == ["alive"] * 3
        for i in (1, 3):
            assert f"{requests[i].specialisation.name}: the compiler died with status 9: LLVM ERROR" in errors[i]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("already", [False, True], ids=["dies", "is dead"])
def test_a_worker_that_never_starts_is_a_failure(already: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Process(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if already:  # so that the request is written into a pipe that nobody reads
                self.wait()

    monkeypatch.setattr(pool, "sys", SimpleNamespace(executable="/bin/false"))
    monkeypatch.setattr(pool, "subprocess", SimpleNamespace(Popen=Process, PIPE=subprocess.PIPE))
    errors = [o.error for o in compile_all([Request(EMPTY, "sm_80")] * 3, jobs=1)]
    assert all("the compiler died with status 1" in error for error in errors)


def test_a_caller_that_gives_up_gets_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _stand_in(monkeypatch, "print(json.dumps({'error': 'alive'}), flush=True)")

    def interrupt(outcome: Outcome) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all([Request(EMPTY, "sm_80")] * 4, jobs=2, done=interrupt)
    assert compile_all([]) == []


@pytest.fixture
def small_set(binaries, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """A shipped set of one kernel, and a compiler that answers with the binary that is there; returns what it was asked."""
    asked: list[Request] = []

    def stand_in(requests, *, jobs=None, done=lambda outcome: None):
        asked.extend(requests)
        outcomes = [Outcome(request, binaries.empty_sm_80, None) for request in requests]
        for outcome in outcomes:
            done(outcome)
        return outcomes

    monkeypatch.setattr(sets, "shipped_set", lambda arch: (EMPTY,))
    monkeypatch.setattr(sets, "compile_all", stand_in)
    monkeypatch.setattr(sets, "SHIPPED", cache_dir.parent / "shipped")
    return asked


def test_a_set_is_compiled_once_and_again_only_what_is_damaged(small_set, binaries, cache_dir: Path) -> None:
    names: list[str] = []
    built = sets.build_set("sm_80", done=names.append)
    assert built.binaries == (binaries.empty_sm_80,) and not built.failures and names == ["empty"] and len(small_set) == 1
    assert sets.build_set("sm_80", done=names.append) == built and len(small_set) == 1 and names == ["empty"] * 2
    (cubin,) = cache_dir.rglob("empty.cubin")
    cubin.write_bytes(cubin.read_bytes()[:-1])
    assert sets.build_set("sm_80") == built and len(small_set) == 2
    assert cubin.read_bytes() == binaries.empty_sm_80.cubin


def test_of_a_set_only_what_is_asked_for_is_compiled_and_the_rest_of_it_is_kept(small_set, binaries, cache_dir: Path) -> None:
    names: list[str] = []
    assert sets.build_set("sm_80", only="full*", done=names.append).binaries == () and not small_set and not names
    assert sets.build_set("sm_80", only="emp*", done=names.append).binaries == (binaries.empty_sm_80,) and names == ["empty"]
    sets.build_set("sm_80", only="full*")
    assert len(sets.build_set("sm_80").binaries) == len(small_set) == 1, "what was not asked for is gone"


def test_a_set_is_compiled_again_when_its_source_changed(small_set, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.build_set("sm_80")
    monkeypatch.setattr(sets, "kernel_hash", lambda kernel: "another source")
    sets.build_set("sm_80")
    assert len(small_set) == 2


def test_a_set_of_another_schema_is_left_alone(small_set, monkeypatch: pytest.MonkeyPatch) -> None:
    sets.build_set("sm_80")
    for module in (sets, store):
        monkeypatch.setattr(module, "MANIFEST_SCHEMA", sets.MANIFEST_SCHEMA + 1)
    assert not sets.build_set("sm_80").failures and len(small_set) == 2


def test_a_complete_set_is_shipped_and_an_incomplete_one_is_not(small_set, binaries) -> None:
    folder = sets.ship(sets.build_set("sm_80"))
    (folder / "of an older set.cubin").write_bytes(b"")
    assert sets.ship(sets.build_set("sm_80")) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["empty.cubin", "manifest.json"]
    (info,) = sets.read_manifest(folder).values()
    assert info == binaries.empty_sm_80.info
    with pytest.raises(CompileError, match="1 kernels failed to build for sm_80; first it: no registers"):
        sets.ship(sets.BuiltSet("sm_80", (), {"it": "no registers"}))
    assert (folder / "empty.cubin").exists()


def test_building_without_triton_says_what_to_install(small_set, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "triton_version", lambda: None)
    with pytest.raises(CompileError, match=r"pip install flashcore\[build\]"):
        sets.build_set("sm_80")
