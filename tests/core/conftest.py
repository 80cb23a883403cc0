"""What the core's tests share: one torch thread, caches that do not leak between tests, specs, targets and real binaries."""

import fcntl
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashcore import evidence
from flashcore.build.pool import Request, compile_all
from flashcore.kernels.registry import EMPTY, shipped_set
from flashcore.runtime import engine, store
from flashcore.runtime.binary import Binary
from flashcore.spec import AttentionSpec, Options
from flashcore.target import Target

# taken here, because a test may put something else in their place
_CACHED = (store.obtain, store.read_manifest, evidence.indexes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan, binary, manifest or evidence of one test reaches another; what the environment says of them is not heard."""
    for name in ("TRITON_INTERPRET", "FLASHCORE_STRICT"):
        monkeypatch.delenv(name, raising=False)

    def clear() -> None:
        engine._prepared.clear()
        for cached in _CACHED:
            cached.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def h200() -> Target:
    return Target(name="NVIDIA H200", arch="sm_90a", capability=(9, 0), sm_count=132, interpreted=False)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache, and a package that ships nothing."""
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def make_spec() -> Callable[..., AttentionSpec]:
    """A function that makes the spec of a call from its sizes; the tensors are not written, only described."""

    def make(
        batch: int = 2,
        heads_q: int = 4,
        heads_k: int = 4,
        seqlen_q: int = 128,
        seqlen_k: int = 128,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float16,
        mask: torch.Tensor | None = None,
        layout: str = "bshd",
        return_lse: bool = False,
        needs_grad: bool = False,
        offset: int = 0,
        **options: object,
    ) -> AttentionSpec:
        def empty(heads: int, length: int, dim: int) -> torch.Tensor:
            size = (batch, length, heads, dim) if layout == "bshd" else (batch, heads, length, dim)
            storage = torch.empty(offset + batch * length * heads * dim, dtype=dtype)
            return storage[offset:].view(size)

        given = {"causal": False, "scale": None, "window": None, "softcap": 0.0, "layout": layout, **options}
        return AttentionSpec.from_tensors(
            empty(heads_q, seqlen_q, head_dim).requires_grad_(needs_grad),
            empty(heads_k, seqlen_k, head_dim),
            empty(heads_k, seqlen_k, head_dim_v or head_dim),
            mask,
            Options.check(**given),
            return_lse=return_lse,
        )

    return make


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Real binaries, compiled once: the empty kernel for two archs, a half and a float32 portable kernel for sm_80."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers share what the first of them compiles
    kept = folder / "binaries.pickle"
    with (folder / "binaries.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_bytes(pickle.dumps(_compile()))
    return SimpleNamespace(**pickle.loads(kept.read_bytes()))


def _compile() -> dict[str, Binary | None]:
    half, full = (next(s for s in shipped_set("sm_80") if name in s.name) for name in ("fp16-d64-none-m64", "fp32-d64partial"))
    requests = {
        "empty_sm_80": Request(EMPTY, "sm_80"),
        "empty_sm_90a": Request(EMPTY, "sm_90a"),
        "half": Request(half, "sm_80"),
        "full": Request(full, "sm_80"),
    }
    outcomes = compile_all(list(requests.values()), jobs=2)
    assert [outcome.error for outcome in outcomes] == [None] * len(requests)
    return {name: outcome.binary for name, outcome in zip(requests, outcomes, strict=True)}
