"""The Gluon kernels of the Hopper backward pass, run on the CPU (gluon_on_cpu.py), against torch in fp64."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.hopper import backward_binding as binding
from flashcore.kernels.hopper import backward_main as main
from flashcore.kernels.hopper.backward_factors import Factors
from flashcore.kernels.program import Launch, Program, Workspace
from flashcore.spec import AttentionSpec, Options

_FOUND = importlib.util.spec_from_file_location("gluon_on_cpu", Path(__file__).with_name("gluon_on_cpu.py"))
assert _FOUND is not None and _FOUND.loader is not None
gluon_on_cpu = importlib.util.module_from_spec(_FOUND)
_FOUND.loader.exec_module(gluon_on_cpu)

CASES: dict[str, dict[str, Any]] = {
    "whole blocks": {"lengths": (128, 128)},
    "odd": {"lengths": (197, 131)},
    "one row and one key": {"lengths": (1, 1)},
    "causal, more keys": {"lengths": (100, 197), "causal": True},
    "causal, rows that attend nothing": {"lengths": (197, 100), "causal": True, "poison": True},
    "window, keys that nobody attends": {"lengths": (100, 260), "window": (20, 10), "poison": True},
    "shared heads": {"lengths": (70, 130), "heads": (6, 2), "causal": True},
    "bf16": {"lengths": (130, 70), "dtype": torch.bfloat16},
}
SOFTCAP: dict[str, dict[str, Any]] = {
    "softcap": {"lengths": (130, 197), "heads": (4, 2), "softcap": 1.5},
    "softcap, rows that attend nothing": {"lengths": (197, 100), "causal": True, "poison": True, "softcap": 1.5},
}


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("case", (CASES | SOFTCAP).values(), ids=CASES | SOFTCAP)
@pytest.mark.parametrize("head_dims", [(192, 128), (256, 256)], ids=str)
def test_gradients_of_wide_heads(head_dims: tuple[int, int], case: dict[str, Any], early: bool) -> None:
    assert _worst_error(head_dims, early, **case) < 4


@pytest.mark.parametrize("deterministic", [True, False], ids=["in order", "atomics"])
@pytest.mark.parametrize("case", (CASES | SOFTCAP).values(), ids=CASES | SOFTCAP)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients(head_dim: int, case: dict[str, Any], deterministic: bool) -> None:
    assert _worst_error((head_dim, head_dim), early=False, deterministic=deterministic, **case) < 4


MANY_TILES: dict[str, dict[str, Any]] = {
    "heads": {"lengths": (130, 100), "heads": (13, 13)},
    "causal heads": {"lengths": (130, 100), "heads": (26, 13), "causal": True},
    "a window": {"lengths": (100, 130), "heads": (13, 13), "window": (50, 20)},
    "shared keys": {"lengths": (2100, 100), "heads": (4, 4)},
}


@pytest.mark.parametrize("case", MANY_TILES.values(), ids=MANY_TILES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_that_take_many_tiles(head_dim: int, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks: they draw tiles, round what earlier ones have summed, and share the keys of the last."""
    left = _observe(monkeypatch)
    # one head after the other, so that some are done long before the last
    monkeypatch.setattr(main, "GROUP_BYTES", 1)
    assert _worst_error((head_dim, head_dim), early=False, deterministic=False, **case) < 4
    rounded = left[0]["progress"][1 + case["heads"][1] :]
    assert (rounded.count_nonzero() > 0) == (case["heads"][1] == 13)
    shared = "dkv_sum" in left[0]
    assert shared == (case is MANY_TILES["shared keys"] and head_dim == 128)
    assert not shared or left[0]["dkv_sum"].count_nonzero() > 0


IN_ORDER: dict[str, dict[str, Any]] = {
    "whole heads": {"lengths": (130, 500), "heads": (6, 3)},
    "one block of rows": {"lengths": (60, 900)},
    "causal": {"lengths": (400, 500), "heads": (4, 2), "causal": True},
    "a window": {"lengths": (500, 400), "heads": (3, 3), "window": (150, 60)},
    "a softcap": {"lengths": (200, 300), "heads": (2, 1), "softcap": 1.5},
}


@pytest.mark.parametrize("case", IN_ORDER.values(), ids=IN_ORDER)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_in_order_the_sums_do_not_depend_on_the_blocks(
    head_dim: int, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block adds the tiles of a head one after the other; five at work at once add them in the same order."""
    left = _observe(monkeypatch)
    for sm_count in (1, 5, 5):
        assert _worst_error((head_dim, head_dim), early=False, sm_count=sm_count, **case) < 4
    assert all(torch.equal(of["dq_sum"], left[0]["dq_sum"]) for of in left[1:])
    # how many tiles have added to each block of rows: all that visit it
    rows, heads = left[0]["dq_sum"].shape[1] * 64, case.get("heads", (2, 2))
    turns = [of["progress"][1 + heads[1] + heads[0] * rows // 64 :] for of in left]
    assert turns[0].numel() == heads[0] * rows // main.BLOCK_ROWS[head_dim] and turns[0].count_nonzero() > 0
    assert all(torch.equal(turns[0], one) for one in turns[1:])


def test_out_of_turn_the_sums_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above compares differs where tiles add in another order: here the second of a head's four is the last."""
    left = _observe(monkeypatch)
    poll = gluon_on_cpu._Machine.poll

    def poll_for_others(self: Any, reported: Any, count: int) -> Any:
        return poll(self, reported, 4 - count if count else 0)

    case = IN_ORDER["whole heads"]
    _worst_error((64, 64), early=False, sm_count=12, **case)
    monkeypatch.setattr(gluon_on_cpu._Machine, "poll", poll_for_others)
    _worst_error((64, 64), early=False, sm_count=12, **case)
    assert not torch.equal(left[0]["dq_sum"], left[1]["dq_sum"])


def _observe(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The tensors of each launch that runs from now on, as it leaves them."""
    run, left = gluon_on_cpu.run_on_cpu, []

    def observe(launch: Launch, tensors: dict[str, torch.Tensor], *, early: bool) -> None:
        run(launch, tensors, early=early)
        left.append({name: t.clone() for name, t in tensors.items()})

    monkeypatch.setattr(gluon_on_cpu, "run_on_cpu", observe)
    return left


@pytest.mark.parametrize("head_dims", [(40, 72), (160, 104), (200, 136)], ids=str)
def test_head_dims_that_are_padded(head_dims: tuple[int, int]) -> None:
    assert _worst_error(head_dims, early=True, **CASES["odd"]) < 4


@pytest.mark.parametrize("head_dims", [(128, 128), (192, 128)], ids=str)
def test_barriers_and_waits_are_needed(head_dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU would not notice, no case above would show."""
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 0.5)
    wait = gluon_on_cpu._Machine.wait
    with monkeypatch.context() as patched, pytest.raises(AssertionError, match="under way"):
        patched.setattr(gluon_on_cpu._Machine, "wait", lambda self, pending, *, deps: wait(self, pending + 1, deps=deps))
        _worst_error(head_dims, early=False, **CASES["odd"])
    monkeypatch.setattr(gluon_on_cpu._Barrier, "wait", lambda self, parity: None)
    # more arrivals than a phase has, or else wrong gradients; or a turn that never comes
    with pytest.raises((AssertionError, TimeoutError)):
        assert _worst_error(head_dims, early=True, **CASES["odd"]) < 4


def test_a_barrier_that_never_completes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 0.5)
    change = gluon_on_cpu._Barrier.change
    # one warp of each arrival is lost
    monkeypatch.setattr(gluon_on_cpu._Barrier, "change", lambda self, n, num_bytes: change(self, min(n, 3), num_bytes))
    with pytest.raises(TimeoutError, match="hangs"):
        _worst_error((256, 256), early=True, **CASES["shared heads"])


@pytest.mark.parametrize("kernel", ["hopper_backward_wide", "hopper_backward_dq"])
def test_a_gradient_that_nothing_writes_is_found(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gluon_on_cpu.run_on_cpu

    def run_others(launch: Launch, tensors: dict[str, torch.Tensor], *, early: bool) -> None:
        if launch.specialisation.kernel != kernel:
            run(launch, tensors, early=early)

    monkeypatch.setattr(gluon_on_cpu, "run_on_cpu", run_others)
    assert math.isnan(_worst_error((192, 128), early=True, **CASES["one row and one key"]))


def _worst_error(
    head_dims: tuple[int, int],
    early: bool,
    lengths: tuple[int, int],
    heads: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float16,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    poison: bool = False,
    deterministic: bool = True,
    sm_count: int = 3,
) -> float:
    """The greatest error of a gradient, as a multiple of what the inputs' dtype rounds its largest element by."""
    torch.manual_seed(0)
    (seqlen_q, seqlen_k), (heads_q, heads_k), (dim, dim_v) = lengths, heads, head_dims
    q = torch.randn(1, heads_q, seqlen_q, dim).to(dtype)
    k, v = (torch.randn(1, heads_k, seqlen_k, d).to(dtype) for d in (dim, dim_v))
    do = torch.randn(1, heads_q, seqlen_q, dim_v).to(dtype)
    options = Options.check(causal=causal, scale=None, window=window, softcap=softcap, layout="bhsd")
    call = AttentionSpec.from_tensors(q, k, v, None, options, return_lse=True)
    spec = BackwardSpec.of(call, do, dq=True, dkv=True, mask=None, dlse=False, deterministic=deterministic)
    attended = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    difference = torch.arange(seqlen_k)[None, :] - torch.arange(seqlen_q)[:, None]
    if call.band.lo is not None:
        attended &= difference >= call.band.lo
    if call.band.hi is not None:
        attended &= difference <= call.band.hi
    o, lse, expected = _reference(q, k, v, do, attended, call)
    tensors = {"q": q, "k": k, "v": v, "do": do}
    for name, like in (("dq", q), ("dk", k), ("dv", v)):
        tensors[name] = torch.full_like(like, math.nan)
    if poison:
        rows, keys = attended.any(1), attended.any(0)
        assert not (rows.all() and keys.all())
        for name, alive in (("q", rows), ("do", rows), ("k", keys), ("v", keys)):
            tensors[name][:, :, ~alive] = math.nan
    program = binding.program(spec, "sm_90a", sm_count)
    tensors |= _row_numbers(o, do, lse, Factors.of(call).lse, program.workspaces)
    assert len(program.launches) == 3
    for launch in program.launches[1:]:
        if launch.specialisation.kernel != binding.FINISH:
            gluon_on_cpu.run_on_cpu(launch, tensors, early=early)
    if "dq_sum" in tensors:
        _finish(spec, tensors, program)
    rounding = torch.finfo(dtype).eps / 2
    errors = [
        (tensors[name].double() - gradient).abs().max() / (rounding * gradient.abs().max().clamp(min=1))
        for name, gradient in zip(("dq", "dk", "dv"), expected, strict=True)
    ]
    # Python's max would lose a NaN
    return float(torch.stack(errors).max())


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, attended: torch.Tensor, call: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, log-sum-exp and gradients in fp64."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * call.scale
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~attended, -math.inf)
    p = torch.softmax(scores.masked_fill(~attended.any(1)[:, None], 0), -1).masked_fill(~attended, 0)
    o = p @ v.repeat_interleave(group, 1)
    return o.detach(), scores.logsumexp(-1).detach(), torch.autograd.grad(o, (q, k, v), do.double())


def _row_numbers(
    o: torch.Tensor, do: torch.Tensor, lse: torch.Tensor, lse_factor: float, workspaces: tuple[Workspace, ...]
) -> dict[str, torch.Tensor]:
    """What the first launch of a pass leaves (interpreted_hopper_backward.py tests it)."""
    shapes = {workspace.tensor: workspace.shape for workspace in workspaces}
    row_lse, delta = torch.full(shapes["row_lse"], -math.inf), torch.zeros(shapes["delta"])
    seqlen, dead = lse.shape[-1], lse.flatten(0, 1) == -math.inf
    row_lse[:, :seqlen] = torch.where(dead, -math.inf, lse.flatten(0, 1) * lse_factor)
    delta[:, :seqlen] = torch.where(dead, 0, -(o * do.double()).sum(-1).flatten(0, 1))
    found = {"row_lse": row_lse, "delta": delta}
    zeroed = {"progress": torch.int32, "dq_sum": torch.float32, "dkv_sum": torch.float32}
    return found | {name: torch.zeros(shapes[name], dtype=dtype) for name, dtype in zeroed.items() if name in shapes}


def _finish(spec: BackwardSpec, tensors: dict[str, torch.Tensor], program: Program) -> None:
    """What the last launch of a pass does (interpreted_hopper_backward.py tests it): round the sums that nobody has."""
    call = spec.call
    kv_heads = call.batch * call.heads_k
    dq = _from_fragments(tensors["dq_sum"])[:, : call.seqlen_q, : call.head_dim].unflatten(0, (1, call.heads_q)) * call.scale
    rows = tensors["dq_sum"].shape[:2]
    flags = tensors["progress"][1 + kv_heads :][: rows.numel()].view(rows)
    rounded = flags.repeat_interleave(64, 1)[:, : call.seqlen_q] != 0
    tensors["dq"].copy_(torch.where(rounded[None, :, :, None], tensors["dq"], dq))
    shared = tensors.get("dkv_sum", torch.empty(0))
    tiles = -(-call.seqlen_k // 128)
    for slot in range(len(shared)):
        head, block = divmod(kv_heads * tiles - len(shared) + slot, tiles)
        for warpgroup in range(2):
            n0 = 128 * block + 64 * warpgroup
            count = min(64, call.seqlen_k - n0)
            for name, sums, factor in zip(("dk", "dv"), shared[slot, 2 * warpgroup :], (call.scale, 1.0), strict=False):
                if count > 0:
                    rows = _from_fragments(sums[None, None])[0, :count, : tensors[name].shape[-1]] * factor
                    tensors[name][0, head, n0 : n0 + count] = rows.to(tensors[name].dtype)


def _from_fragments(sums: torch.Tensor) -> torch.Tensor:
    """dq's sums (B * H, rows / 64, columns / 64, 4096) as (B * H, rows, columns), which the last launch of a pass does."""
    heads, row_tiles, column_tiles, _ = sums.shape
    # [group of 8 columns, warp, row of 8, pair of columns, half of 16 rows, column of the pair]
    tiles = sums.view(heads, row_tiles, column_tiles, 8, 4, 8, 4, 2, 2).permute(0, 1, 4, 7, 5, 2, 3, 6, 8)
    return tiles.reshape(heads, 64 * row_tiles, 64 * column_tiles)
