"""A batch of shipped forms, judged on a real GPU: the one place where candidates are launched."""

from pathlib import Path

import pytest
import torch

from flashcore.runtime import store
from flashcore.search.build import Outcome, make_batch
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.measure import measure
from flashcore.search.schema import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("impl", "sizes"), [("small", (1, 8, 512, 64)), ("hopper", (4, 16, 1024, 128)), ("portable", (2, 4, 300, 64))]
)
def test_the_hand_chosen_form_is_right_and_as_fast_as_itself(
    impl: str, sizes: tuple[int, ...], causal: bool, tmp_path: Path
) -> None:
    batch, heads, seqlen, dim = sizes
    problem = Problem(
        impl=impl, batch=batch, heads=heads, heads_k=heads // 2, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=dim, head_dim_v=dim,
        causal=causal,
    )  # fmt: skip
    config = SEARCHABLE[impl].incumbent(problem, 132)
    specialisation = SEARCHABLE[impl].specialise(problem, config)
    location = store.locate(specialisation, "sm_90a")
    if location is None or location.origin == "compile":
        pytest.skip("its binary is not here, and this Triton may not compile it")
    outcome = Outcome(0, SEARCHABLE[impl].values(config), specialisation, "built", binary=store.read(location))
    folder = tmp_path / "batch"
    make_batch(folder, problem, "sm_90a", outcome, [outcome])
    visit = measure([folder], tmp_path / "out")
    assert not visit.failures and not visit.left
    (judged,) = visit.results[folder].judged
    assert judged.verdict == "measured", judged.words
    assert judged.ratio == pytest.approx(1.0, abs=0.05) and len(judged.us) == len(judged.sdpa_us) == 30
    assert visit.results[folder].sdpa_backend in ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
