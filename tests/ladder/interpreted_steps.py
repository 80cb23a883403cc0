"""The steps in Triton's interpreter, by `verify`'s own judgement; test_interpreted.py runs this with TRITON_INTERPRET=1."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore import cli, reference
from flashcore.kernels.registry import LADDER
from flashcore.ladder import artifact, checks
from flashcore.ladder.checks import MUTATED_CASE, MUTATIONS, cases, verify_step
from flashcore.ladder.run import attend, implementation
from flashcore.ladder.steps import STEPS, find_step
from flashcore.verify.suite import run_case

CPU = torch.device("cpu")
OWN = [step.name for step in STEPS if step.impl is None and not step.gluon]
TINY, SMALL = (next(case for case in cases() if case.name == name) for name in ("tiny-seed0", "small-seed42"))
# more keys than queries, in no way a multiple of a tile
ODD = replace(TINY, name="odd", seqlen_q=19, seqlen_k=45, scale=None)
# In the interpreter all is the same for them but the kernel, whose thousands of keys one by one take most of the time.
KEY_BY_KEY = ("scalar", "vectorised")


@pytest.mark.parametrize("name", OWN)
def test_a_step_passes(name: str) -> None:
    for case in (TINY, SMALL, ODD):
        (result,) = run_case(case, [implementation(find_step(name))], CPU)
        assert result.verdict == "passed", (case.name, result.reason)


@pytest.mark.parametrize("name", [name for name in OWN if name not in KEY_BY_KEY])
def test_every_mutation_around_a_step_fails(name: str) -> None:
    found = verify_step(find_step(name), CPU, [TINY], interpreted=True)
    assert found.sound and found.missed == [] and found.mutations == [mutation.value for mutation in MUTATIONS]
    assert len(found.mutations) == 5 and MUTATED_CASE in {case.name for case in cases()}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_other_head_dims_and_a_single_key(name: str, head_dim: int) -> None:
    q, k, v = (torch.randn(1, 2, length, head_dim).half() for length in (3, 1, 1))
    torch.testing.assert_close(attend(find_step(name), q, k, v), v.expand(q.shape))


def test_scores_far_from_zero_stay_finite() -> None:
    q, k, v = (torch.randn(1, 1, 33, 16).half() for _ in range(3))
    for name in ("unfused", "tensor_core_pv"):
        o = attend(find_step(name), q * 40, k * 40, v, scale=4.0)
        expected, _ = reference.attention(q * 40, k * 40, v, scale=4.0, layout="bhsd")
        torch.testing.assert_close(o.double(), expected, atol=2e-3, rtol=2e-3)


def test_the_command_verifies_and_says_that_nothing_was_timed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(checks, "cases", lambda: [TINY, next(case for case in cases() if case.name == MUTATED_CASE)])
    out = tmp_path / "ladder.json"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "flashcore",
            "ladder",
            "--run",
            "--step",
            "tuned_tiles",
            "--step",
            "warp_specialised",
            "--step",
            "small",
            "--out",
            str(out),
        ],
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().out
    assert stopped.value.code in (0, None), said
    assert "tuned_tiles (interpreted): 2 of 2 cases passed; 5 of 5 mutations caught" in said
    assert "warp_specialised: not run: needs a GPU of sm_80 or later; got the interpreter" in said
    assert "small: not run: " in said and "nothing was timed" in said
    found = artifact.load(out)
    assert found.shapes == [] and found.steps == ["tuned_tiles", "warp_specialised", "small"] and found.failures == []
    assert found.environment.gpu is None and set(found.sources) == set(LADDER)
