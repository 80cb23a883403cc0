"""Where binaries come from, and what happens when a disk, a file or a compiler is not what it should be."""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashcore.build import pool
from flashcore.errors import BinaryError, CompileError, UnsupportedError
from flashcore.kernels.registry import EMPTY
from flashcore.runtime import store
from flashcore.runtime.binary import Binary
from flashcore.target import Target

AMPERE = Target(name="A100", arch="sm_80", capability=(8, 0), sm_count=108, interpreted=False)


@pytest.fixture
def compiled(binaries, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that answers at once with a real binary; returns the archs that it was asked for."""
    asked: list[str] = []

    def stand_in(specialisation, arch: str) -> Binary:
        assert specialisation == EMPTY
        asked.append(arch)
        return getattr(binaries, f"empty_{arch}")

    monkeypatch.setattr(pool, "compile_one", stand_in)
    return asked


@pytest.fixture
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _obtain() -> Binary:
    """As a new process would."""
    store.obtain.cache_clear()
    store.read_manifest.cache_clear()
    return store.obtain(EMPTY, AMPERE)


def _entry(cache_dir: Path) -> tuple[Path, Path]:
    (cubin,) = cache_dir.rglob("*.cubin")
    return cubin, cubin.with_suffix(".json")


def _only_the_entry(cache_dir: Path) -> bool:
    return sorted(path.suffix for path in cache_dir.rglob("*") if path.is_file()) == [".cubin", ".json"]


@pytest.mark.usefixtures("_no_warnings")
def test_compiled_on_demand_then_cached(compiled, binaries, cache_dir: Path) -> None:
    assert store.locate(EMPTY, "sm_80").origin == "compile"
    first = _obtain()
    assert first == binaries.empty_sm_80 and compiled == ["sm_80"]
    assert _only_the_entry(cache_dir) and _entry(cache_dir)[0].read_bytes() == first.cubin
    located = store.locate(EMPTY, "sm_80")
    assert located.origin == "cached" and located.info == first.info
    assert _obtain() == first and compiled == ["sm_80"]
    assert store.obtain(EMPTY, AMPERE) is store.obtain(EMPTY, AMPERE)


@pytest.mark.usefixtures("_no_warnings")
def test_each_arch_source_triton_and_schema_has_an_entry_of_its_own(compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    _obtain()
    hopper = Target(name="H200", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)
    assert store.obtain(EMPTY, hopper).info.arch == "sm_90a"
    monkeypatch.setattr(store, "triton_version", lambda: "99.0")
    _obtain()
    monkeypatch.setattr(store, "kernel_hash", lambda kernel: "another source")
    _obtain()
    monkeypatch.setattr(store, "MANIFEST_SCHEMA", 99)
    _obtain()
    assert compiled == ["sm_80", "sm_90a", "sm_80", "sm_80", "sm_80"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda cubin, record: cubin.write_bytes(cubin.read_bytes()[: cubin.stat().st_size // 2]),
        lambda cubin, record: cubin.write_bytes(b""),
        lambda cubin, record: cubin.write_bytes(b"x" * cubin.stat().st_size),
        lambda cubin, record: cubin.unlink(),
        lambda cubin, record: record.write_text(""),
        lambda cubin, record: record.write_text(record.read_text()[:-20]),
        lambda cubin, record: record.write_text("[]"),
        lambda cubin, record: record.write_text(record.read_text().replace('"sha256":"', '"sha256":"0')),
        lambda cubin, record: record.write_bytes(b"\xff\xfe\x00" * 40),
    ],
    ids=["truncated", "empty", "other-bytes", "no-cubin", "empty-record", "cut-record", "not-a-record", "wrong-hash", "noise"],
)
def test_a_damaged_cache_entry_is_compiled_again(damage, compiled, binaries, cache_dir: Path) -> None:
    _obtain()
    damage(*_entry(cache_dir))
    with pytest.warns(RuntimeWarning, match="compiling the kernel again"):
        assert _obtain() == binaries.empty_sm_80
    assert compiled == ["sm_80"] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _obtain() == binaries.empty_sm_80
    assert compiled == ["sm_80"] * 2 and _only_the_entry(cache_dir)


@pytest.mark.filterwarnings("ignore:flashcore")
def test_a_record_that_cannot_be_read_is_as_good_as_none(compiled, binaries, cache_dir: Path) -> None:
    _obtain()
    _, record = _entry(cache_dir)
    record.unlink()
    record.mkdir()  # reading it raises an OSError, as a file without permission or a failing disk would
    assert _obtain() == binaries.empty_sm_80


@pytest.mark.usefixtures("_no_warnings")
def test_a_cubin_without_its_record_is_not_trusted(compiled, binaries, cache_dir: Path) -> None:
    _obtain()
    _entry(cache_dir)[1].unlink()
    assert _obtain() == binaries.empty_sm_80 and compiled == ["sm_80"] * 2


@pytest.mark.parametrize("call", ["os.replace", "os.fdopen", "tempfile.mkstemp", "pathlib.Path.mkdir"])
def test_a_full_disk_costs_a_warning(call: str, compiled, binaries, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(call, full)
        with pytest.warns(RuntimeWarning, match="cannot cache a compiled kernel: .*No space left on device"):
            assert _obtain() == binaries.empty_sm_80
    assert [path for path in cache_dir.rglob("*") if path.is_file()] == []
    assert _obtain() == binaries.empty_sm_80 and _only_the_entry(cache_dir)


def test_a_cache_folder_that_cannot_be_made_costs_a_warning(compiled, binaries, cache_dir: Path) -> None:
    cache_dir.write_text("a file is in its place")
    with pytest.warns(RuntimeWarning, match="cannot cache a compiled kernel"):
        assert _obtain() == binaries.empty_sm_80


def test_what_the_compiler_refuses_is_not_cached(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(specialisation, arch):
        raise CompileError("ptxas: no")

    monkeypatch.setattr(pool, "compile_one", refuse)
    with pytest.raises(CompileError, match="ptxas: no"):
        _obtain()
    assert not cache_dir.exists()


@pytest.fixture
def shipped(binaries, cache_dir: Path) -> Path:
    """A package that ships the empty kernel for sm_80; returns the folder."""
    from flashcore.build.sets import write_set

    folder = store.SHIPPED / "sm_80"
    write_set(folder, "sm_80", (binaries.empty_sm_80,))
    return folder


@pytest.mark.usefixtures("_no_warnings")
def test_a_shipped_binary_needs_no_compiler_and_no_cache(shipped, compiled, binaries, cache_dir, monkeypatch) -> None:
    monkeypatch.setattr(store, "triton_version", lambda: None)
    assert store.locate(EMPTY, "sm_80").origin == "shipped"
    assert _obtain() == binaries.empty_sm_80 and compiled == [] and not cache_dir.exists()


@pytest.mark.usefixtures("_no_warnings")
def test_a_shipped_binary_of_another_source_is_not_used(shipped, compiled, binaries, monkeypatch) -> None:
    monkeypatch.setattr(store, "kernel_hash", lambda kernel: "another source")
    assert store.locate(EMPTY, "sm_80").origin == "compile"
    _obtain()
    assert compiled == ["sm_80"]


@pytest.mark.parametrize("content", [b"", b"half a cubin", None])
def test_a_damaged_shipped_binary_is_an_error_that_names_it(content: bytes | None, shipped: Path, compiled) -> None:
    file = shipped / "empty.cubin"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(BinaryError, match="reinstall flashcore") as raised:
        _obtain()
    assert str(file) in str(raised.value) and compiled == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"schema_version": %d}' % store.MANIFEST_SCHEMA, b"\xff\xfe\x00\x01"], ids=repr
)
def test_a_damaged_manifest_is_an_error_that_names_it(content: bytes, shipped: Path, compiled) -> None:
    (shipped / "manifest.json").write_bytes(content)
    with pytest.raises(BinaryError, match=r"manifest\.json: not a manifest") as raised:
        _obtain()
    assert str(shipped) in str(raised.value) and compiled == []


def test_a_manifest_of_another_schema_is_an_error(shipped: Path) -> None:
    manifest = json.loads((shipped / "manifest.json").read_text())
    (shipped / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))
    with pytest.raises(BinaryError, match=f"schema 1; this FlashCore reads {store.MANIFEST_SCHEMA}"):
        _obtain()


def test_a_manifest_of_before_clusters_is_told_by_its_schema(shipped: Path) -> None:
    """Its records have fewer fields, and what is wrong is not these."""
    manifest = json.loads((shipped / "manifest.json").read_text())
    for record in manifest["binaries"]:
        del record["cluster"], record["programmatic"]
    (shipped / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2}))
    with pytest.raises(BinaryError, match="schema 2; this FlashCore reads 3"):
        _obtain()
    (shipped / "manifest.json").write_text(json.dumps(manifest))
    store.read_manifest.cache_clear()
    with pytest.raises(BinaryError, match=r"manifest\.json: not a manifest"):
        _obtain()


@pytest.mark.parametrize("cluster", [0, -1, 9, "two", None])
def test_a_record_of_a_cluster_that_no_gpu_has_is_no_record(cluster: object, shipped: Path) -> None:
    manifest = json.loads((shipped / "manifest.json").read_text())
    manifest["binaries"][0]["cluster"] = cluster
    (shipped / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BinaryError, match=r"(?s)manifest\.json: not a manifest.*cluster"):
        _obtain()


def test_no_binary_and_no_triton(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "triton_version", lambda: None)
    assert store.locate(EMPTY, "sm_80") is None
    with pytest.raises(UnsupportedError, match=r"empty .*sm_80.*pip install flashcore\[compile\]"):
        _obtain()


def test_a_gpu_of_no_known_arch() -> None:
    with pytest.raises(UnsupportedError, match="no kernel can be built for V100"):
        store.obtain(EMPTY, Target(name="V100", arch=None, capability=(7, 0), sm_count=80, interpreted=False))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", "/somewhere")
    assert store.cache_folder() == Path("/somewhere")
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert store.cache_folder() == Path("/xdg/flashcore")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache" / "flashcore"


TOGETHER = """
import sys, time
from pathlib import Path
from flashcore.kernels.registry import EMPTY
from flashcore.runtime import store
from flashcore.target import Target
store.SHIPPED = Path("nothing here")
me, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"ready-{me}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.01)
binary = store.obtain(EMPTY, Target("A100", "sm_80", (8, 0), 108, False))
binary.check("mine")
print(store.locate(EMPTY, "sm_80").origin, binary.info.sha256)
"""


def test_two_processes_that_compile_the_same_at_once_both_succeed(binaries, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {**os.environ, "FLASHCORE_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "error", "-c", TOGETHER]
    running = [
        subprocess.Popen(
            [*command, me, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for me in ("a", "b")
    ]
    for process in running:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.split() == ["cached", binaries.empty_sm_80.info.sha256]
    assert _only_the_entry(cache)
