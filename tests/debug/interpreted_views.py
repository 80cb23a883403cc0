"""The views of kernels in Triton's interpreter, right ones and wrong; test_interpreted.py runs this with TRITON_INTERPRET=1."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore import cli
from flashcore.bench.shapes import Shape, parse_shape
from flashcore.debug import artifact
from flashcore.debug.artifact import DebugArtifact
from flashcore.debug.compare import PartVerdict
from flashcore.debug.run import Request, run
from flashcore.debug.subjects import STEPS
from flashcore.debug.views import VIEWS
from flashcore.kernels.registry import KERNELS, LADDER, find_kernel
from flashcore.ladder.steps import find_step
from flashcore.sources import PACKAGE

CPU = torch.device("cpu")
# in no way a multiple of a tile; in several tiles of keys for all but the unfused softmax
ODD = parse_shape("2,2,19/45,16")
SMALL = parse_shape("1,2,40/56,16")
LONG = parse_shape("1,2,70/180,16")

# (kernel id, what stands in its file, what to put there)
Mutate = Callable[[str, str, str], None]


@pytest.fixture
def mutate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mutate:
    """Put a wrong kernel, made from the right one's file, in its place."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(kernel_id: str, right: str, wrong: str) -> None:
        kernel = find_kernel(kernel_id)
        source = (PACKAGE / kernel.sources[0]).read_text()
        assert source.count(right) == 1, (right, source.count(right))
        name = f"mutant_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(source.replace(right, wrong))
        found = LADDER if kernel_id in LADDER else KERNELS
        monkeypatch.setitem(found, kernel_id, replace(kernel, module=name))

    return put


def _run(subject: str, shape: Shape) -> DebugArtifact:
    return run(Request(subject, shape, VIEWS), CPU)


def _wrong(found: DebugArtifact) -> dict[str, PartVerdict]:
    return {part.name: part for view in found.views for part in view.parts if part.wrong}


@pytest.mark.parametrize("step", [step for step in STEPS if not find_step(step).gluon])
@pytest.mark.parametrize("shape", [ODD, parse_shape("1,1,1,32"), parse_shape("1,1,3/70,64")], ids=lambda s: s.label)
def test_every_view_of_a_step_is_right(step: str, shape: Shape) -> None:
    found = _run(step, shape)
    assert found.right and found.interpreted and found.binaries == []
    assert [view.view for view in found.views] == list(VIEWS)
    assert all(part.tiles > 0 and part.error is not None for view in found.views for part in view.parts)


@pytest.mark.parametrize(
    "shape",
    [
        parse_shape("1,4/2,70/180,64/32"),
        replace(parse_shape("1,4/2,70/180,64"), causal=True),
        # rows that attend nothing
        replace(parse_shape("1,2,80/20,64"), causal=True),
    ],
    ids=lambda s: s.label,
)
def test_every_view_of_the_portable_kernel_is_right(shape: Shape) -> None:
    found = _run("portable", shape)
    assert found.right, _wrong(found)


def test_the_tiles_of_the_unfused_step_are_those_of_its_three_kernels() -> None:
    scores, softmax, pv = _run("unfused", SMALL).views
    assert scores.parts[0].tile == (64, 32) and scores.parts[0].tiles == 4
    assert [part.tile for part in softmax.parts] == [(1, 1024), (1, 0)] * 2 and softmax.parts[2].tiles == 80
    assert pv.parts[0].tile == (64, 0) and pv.parts[0].tiles == 2


# Each is judged by its own input, so a mistake shows in the stage that made it and in no other.
@pytest.mark.parametrize(
    ("right", "wrong", "part", "count", "where"),
    [
        (
            "tl.dot(q, tl.trans(k)) * scale,",
            "tl.dot(q, tl.trans(k)) * scale * tl.where((m0 == 16) & (n0 == 32) & (head == 1), 1.001, 1.0),",
            "scores",
            1,
            "batch 0, head 1, rows 16 to 31, keys 32 to 47",
        ),
        (
            "k = load_rows(k_ptr + head * seqlen_k * HEAD_DIM, keys,",
            "k = load_rows(k_ptr + head * seqlen_k * HEAD_DIM, tl.where(n0 == 16, keys ^ 1, keys),",
            "scores",
            6,
            "batch 0, head 0, rows 0 to 15, keys 16 to 31",
        ),
        (
            "range(0, seqlen_k, BLOCK_N)",
            "range(0, seqlen_k - tl.where(head == 1, BLOCK_N, 0), BLOCK_N)",
            "scores",
            3,
            "batch 0, head 1, rows 0 to 15, keys 48 to 55",
        ),
        (
            "(keys < seqlen_k)[None, :], tl.dot",
            "(keys < seqlen_k - 1)[None, :], tl.dot",
            "scores",
            6,
            "batch 0, head 0, rows 0 to 15, keys 48 to 55",
        ),
        (
            "acc * alpha[:, None]",
            "acc * tl.where((m0 == 16) & (head == 1), 1.0, alpha)[:, None]",
            "output",
            1,
            "batch 0, head 1, rows 16 to 31",
        ),
        (
            "v = load_rows(v_ptr + head * seqlen_k * HEAD_DIM, keys,",
            "v = load_rows(v_ptr + head * seqlen_k * HEAD_DIM, tl.where((n0 == 16) & (m0 == 32), keys ^ 1, keys),",
            "output",
            2,
            "batch 0, head 0, rows 32 to 39",
        ),
    ],
    ids=["a wrong scale", "swapped keys", "a skipped tile", "a key too few", "a dropped rescale", "swapped values"],
)
def test_a_mistake_in_a_step_is_caught_and_located(
    mutate: Mutate, right: str, wrong: str, part: str, count: int, where: str
) -> None:
    mutate("ladder_tensor_core_pv", right, wrong)
    found = _run("tensor_core_pv", SMALL)
    assert not found.right and list(_wrong(found)) == [part]
    verdict = _wrong(found)[part]
    assert (verdict.wrong, str(verdict.first)) == (count, where)
    assert sum(line.count("#") for line in verdict.map) == (count if "head 1" in where else count // 2)
    assert verdict.error is None or verdict.error > verdict.bound


@pytest.mark.parametrize(
    ("right", "wrong", "parts", "where"),
    [
        ("l_i = l_i * alpha + tl.sum(p, 1)", "l_i = l_i + tl.sum(p, 1)", ["row sums"], "batch 0, head 0, rows 0 to 63"),
        (
            "m_new = tl.maximum(m_i, tl.max(s, 1) * scale)",
            "m_new = tl.max(s, 1) * scale",
            ["tile maxima", "row maxima"],
            "batch 0, head 0, rows 0 to 63, keys 64 to 127",
        ),
        (
            "p = tl.exp2(s * scale - pivot[:, None])",
            "p = tl.exp2(s * scale - pivot[:, None]) * tl.where(m0 == 64, 1.0001, 1.0)",
            ["weights"],
            "batch 0, head 0, rows 64 to 69, keys 0 to 63",
        ),
        ("p.to(v.dtype), v, acc * alpha[:, None]", "p.to(v.dtype), v, acc", ["output"], "batch 0, head 0, rows 0 to 63"),
    ],
    ids=["a sum not rescaled", "a maximum that does not run", "weights a little too large", "an output not rescaled"],
)
def test_a_mistake_in_the_portable_kernel_is_caught_and_located(
    mutate: Mutate, right: str, wrong: str, parts: list[str], where: str
) -> None:
    source = (PACKAGE / "kernels/portable/forward.py").read_text()
    if right.startswith("p = "):  # m0 is not at hand there, and its first row is
        wrong = wrong.replace("m0", "tl.min(offs_m, 0)")
    assert right in source
    mutate("portable_forward", right, wrong)
    found = _wrong(_run("portable", LONG))
    assert list(found) == parts and str(found[parts[0]].first) == where


def test_a_band_that_is_one_key_too_wide_is_caught(mutate: Mutate) -> None:
    right = "attended = attended & (n[None, :] <= offs_m[:, None] + band_hi)"
    mutate("portable_forward", right, right.replace("+ band_hi", "+ band_hi + 1"))
    # a score where there should be none is no number that could be compared
    verdict = _wrong(_run("portable", replace(LONG, causal=True)))["scores"]
    assert verdict.error is None and str(verdict.first) == "batch 0, head 0, rows 0 to 63, keys 64 to 127"


def test_a_mistake_in_the_unfused_softmax_is_seen_there(mutate: Mutate) -> None:
    mutate("ladder_unfused_softmax", "p = tl.exp2(s - m_i) / l_i", "p = tl.exp2(s - m_i) / (l_i + 1.0)")
    found = _wrong(_run("unfused", SMALL))
    assert list(found) == ["weights"] and found["weights"].wrong == 80
    assert str(found["weights"].first) == "batch 0, head 0, rows 0 to 0, keys 0 to 55"


def _command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["flashcore", "debug", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said, errors = capsys.readouterr()
    return int(stopped.value.code or 0), said + errors


def test_the_command_shows_and_records_what_is_right(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "debug.json"
    status, said = _command(["tensor_core_qk", "--shape", "1,1,20,16", "--out", str(out)], monkeypatch, capsys)
    assert status == 0 and "tensor_core_qk: every tile is right" in said and "interpreter" in said
    assert all(f"view {view}" in said for view in VIEWS) and "16x16" in said and "#" not in said
    found = artifact.load(out)
    assert found.right and found.subject == "tensor_core_qk" and found.environment.gpu is None
    assert found.kernels == ["ladder_tensor_core_qk-d16-m16n16w4s1-view"] and set(found.sources) == {"ladder_tensor_core_qk"}


def test_the_command_shows_where_the_first_wrong_tile_lies(mutate: Mutate, monkeypatch, capsys) -> None:
    mutate("ladder_tensor_core_pv", "tl.trans(k)) * scale", "tl.trans(k)) * tl.where(n0 == 16, 0.0, scale)")
    arguments = ["tensor_core_pv", "--view", "scores", "--shape", "1,1,20,16", "--seed", "3"]
    status, said = _command(arguments, monkeypatch, capsys)
    assert status == 1 and "tensor_core_pv: wrong" in said and "view softmax" not in said
    assert "scores: 2 of 4 tiles of 16x16 are wrong; the first: batch 0, head 0, rows 0 to 15, keys 16 to 19" in said
    assert said.count(".#") == 2


def test_a_gluon_kernel_is_refused(monkeypatch, capsys) -> None:
    for subject, needed in (
        ("hopper", "Hopper GPU (sm_90a)"),
        ("small", "Hopper GPU (sm_90a)"),
        ("warp_specialised", "GPU of sm_80"),
    ):
        status, said = _command([subject], monkeypatch, capsys)
        assert status == 2 and f"{subject}: needs a {needed}" in said and "got the interpreter" in said
