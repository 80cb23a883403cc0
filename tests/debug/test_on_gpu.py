"""Every view of every kernel on a GPU. FLASHCORE_VIEW_BINARIES is the folder that `flashcore debug --build` made elsewhere,
where the Triton here is not the one that compiles the Gluon kernels."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore.bench.shapes import Shape, parse_shape
from flashcore.debug.run import Request, run
from flashcore.debug.subjects import STEPS, SUBJECTS
from flashcore.debug.views import VIEWS
from flashcore.errors import UnsupportedError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

FOLDER = os.environ.get("FLASHCORE_VIEW_BINARIES")
MISSION = parse_shape("mission")
# takes the binaries of the mission shape, in no way a multiple of a tile
ODD = parse_shape("2,3,200/411,64")


@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("shape", [MISSION, ODD], ids=["mission", "odd"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_view_is_right(subject: str, shape: Shape, causal: bool) -> None:
    if causal and subject in STEPS:
        pytest.skip("the steps are not causal")
    request = Request(subject, replace(shape, causal=causal), VIEWS, seed=1, binaries=None if FOLDER is None else Path(FOLDER))
    try:
        found = run(request, torch.device("cuda", 0))
    except UnsupportedError as error:
        pytest.skip(str(error))
    assert found.right, [(part.name, part.error, part.bound, str(part.first)) for view in found.views for part in view.parts]
    assert len(found.binaries) == len(found.kernels) and not found.interpreted
