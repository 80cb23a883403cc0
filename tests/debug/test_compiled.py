"""What a compile shows of the views, with no GPU: that every kernel can record, and that none is changed by being able to."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashcore.bench.shapes import parse_shape
from flashcore.build.machine_code import read_machine_code
from flashcore.build.pool import Request, compile_all
from flashcore.debug.subjects import SUBJECTS, recording, specialisations
from flashcore.kernels.arguments import Pointer
from flashcore.kernels.registry import SHIPPED_ARCHS, shipped_set
from flashcore.kernels.specialisation import VIEW
from flashcore.sources import PACKAGE
from flashcore.target import SM_COUNTS, Target

MISSION = parse_shape("mission")
CAUSAL = replace(MISSION, causal=True)
# small in a cluster of one, and the Hopper kernel with a tail of its head dim
OTHERS = (("small", parse_shape("1,2,64,64")), ("hopper", parse_shape("1,8,512,96")))

EMPTY_VIEWS = ("kernels/view.py", "kernels/hopper/view.py")


def test_every_kernel_can_record() -> None:
    chosen = [(name, MISSION) for name in SUBJECTS] + [("hopper", CAUSAL), ("small", CAUSAL), *OTHERS]
    target = Target(name="an H200", arch="sm_90a", capability=None, sm_count=SM_COUNTS["sm_90a"], interpreted=False)
    launches = [one for name, shape in chosen for one in recording(name, shape, target).program.launches]
    outcomes = compile_all([Request(one.specialisation, "sm_90a") for one in launches])
    assert [outcome.error for outcome in outcomes] == [None] * len(launches)
    for one, outcome in zip(launches, outcomes, strict=True):
        assert outcome.binary is not None
        parameters = [p for p in outcome.binary.info.parameters if not p.name.startswith("scratch_")]
        assert (parameters[-1].name, parameters[-1].type) == (VIEW.name, VIEW.type)
        assert one.arguments[-1] == Pointer("view") and len(one.arguments) == len(one.specialisation.parameters)
        code, kernel = read_machine_code(outcome.binary), one.specialisation.kernel
        # nothing is recorded before the launch ahead has ended
        assert code.before_wait == 0 and outcome.binary.info.programmatic is (kernel in ("hopper_forward", "small_forward"))
        assert bool(code.matrix) is (kernel not in ("ladder_scalar", "ladder_unfused_softmax"))


@pytest.mark.parametrize("arch", SHIPPED_ARCHS)
def test_no_binary_of_a_wheel_records(arch: str) -> None:
    assert not any(specialisation.recorded for specialisation in shipped_set(arch))
    recorded = [one.recording() for one in shipped_set(arch)]
    assert all(one.recorded and one.from_key(one.key).recorded for one in recorded)
    assert not {one.key for one in recorded} & {one.key for one in shipped_set(arch)}


def test_a_product_binary_is_the_same_to_the_byte_without_the_views(tmp_path: Path) -> None:
    """The package once as it is, and once with views that do nothing at all."""
    package = tmp_path / "without" / "flashcore"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("binaries", "evidence", "__pycache__"))
    for name in EMPTY_VIEWS:
        source = (package / name).read_text()
        emptied = re.sub(r'(    """.*?"""\n)    if view_ptr is not None:\n(?:        .*\n)+', r"\1    pass\n", source)
        assert emptied.count("    pass\n") == 4 and "is not None" not in emptied
        (package / name).write_text(emptied)
    wanted = [
        one for name in ("portable", "small", "hopper", "tensor_core_pv") for one in specialisations(name, MISSION, "sm_90a")
    ]
    keys = [replace(one, name=one.name.removesuffix("-view"), parameters=one.parameters[:-1]).key for one in wanted]
    here, without = (_hashes(keys, root, tmp_path) for root in (PACKAGE.parent, package.parent))
    assert here == without and len(set(here)) == len(keys)


def _hashes(keys: list[str], root: Path, folder: Path) -> list[str]:
    """SHA-256 of each binary as the package under a root compiles it."""
    asked = "".join(json.dumps({"key": key, "arch": "sm_90a", "out": str(folder / "cubin")}) + "\n" for key in keys)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "flashcore.build.worker"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=250, env=environment, cwd=folder)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer.get("error") for answer in answers] == [None] * len(keys), done.stderr
    return [answer["info"]["sha256"] for answer in answers]
