"""Gluon kernels under the compile path: tensor maps, clusters, programmatic launches, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashcore.build import gates
from flashcore.build.gates import violations
from flashcore.build.machine_code import read_machine_code
from flashcore.kernels.specialisation import Parameter, Specialisation
from flashcore.runtime.binary import Binary, BinaryInfo, TensorMapLayout
from flashcore.sources import PACKAGE

# The compile worker with the kernels of gluon_kernels.py, which is in the working directory, in the registry.
GLUON_WORKER = """
import sys
from types import SimpleNamespace
from flashcore.build import worker
from flashcore.kernels.registry import KERNELS, Kernel
sys.path.insert(0, "")
NAMES = ("copy", "product", "meet", "absent")
one_of_each = tuple(SimpleNamespace(kernel=name) for name in NAMES)
binding = SimpleNamespace(shipped=lambda arch: one_of_each if arch == "sm_90a" else ())
for name in NAMES:
    module = "no_such_module" if name == "absent" else "gluon_kernels"
    KERNELS[name] = Kernel(name, module, name, ("kernels/empty.py",), binding)
worker.main()
"""


def _gluon(kernel: str, tile: str, *rest: Parameter, **constants: object) -> Specialisation:
    parameters = (Parameter("x_desc", f"tensormap<{tile}>"), Parameter("o_desc", f"tensormap<{tile}>"), *rest)
    return Specialisation(kernel, f"{kernel}-{tile}", parameters, tuple(constants.items()), num_warps=4, num_stages=1)


COUNT, ROWS = Parameter("count_ptr", "*i32", 16), Parameter("rows", "i32")
COPY = _gluon("copy", "fp16[64,128]", COUNT, ROWS, UNUSED=None)
SMALL_COPY = _gluon("copy", "bf16[16,32]", COUNT, ROWS, UNUSED=None)
PRODUCT, SERIALISED = (_gluon("product", "fp16[64,64]", PENDING=pending) for pending in (0, 1))


def _compile_gluon(folder: Path, *requests: tuple[Specialisation, str]) -> list[Binary | str]:
    """The binaries, or the errors, of these requests to one worker, whose kernels lie in a folder."""
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("gluon_kernels.py"), folder)
    outs = [folder / f"{i}.cubin" for i in range(len(requests))]
    asked = [{"key": s.key, "arch": arch, "out": str(out)} for (s, arch), out in zip(requests, outs, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", GLUON_WORKER],
        input="".join(json.dumps(request) + "\n" for request in asked),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(requests), done.stderr
    return [
        answer.get("error") or Binary(out.read_bytes(), BinaryInfo.model_validate(answer["info"]))
        for answer, out in zip(answers, outs, strict=True)
    ]


def test_gluon_kernels_with_tensor_maps_are_compiled_reproducibly(tmp_path: Path) -> None:
    requests = [(COPY, "sm_90a"), (SMALL_COPY, "sm_90a"), (PRODUCT, "sm_90a")]
    here = _compile_gluon(tmp_path / "here", *requests)
    elsewhere = _compile_gluon(tmp_path / "a folder elsewhere", *reversed(requests))
    assert here == elsewhere[::-1]
    copy, small, product = here
    own = ["x_desc", "x_desc_shape_0", "x_desc_shape_1", "x_desc_stride_0", "x_desc_stride_1"]
    own += [name.replace("x", "o") for name in own] + ["count_ptr", "rows", "scratch_0", "scratch_1"]
    for binary, layout in (
        # 128 fp16 are more than a swizzled row of 128 bytes: two copies make a tile
        (copy, TensorMapLayout(element="fp16", box=(64, 64), swizzle=128)),
        (small, TensorMapLayout(element="bf16", box=(16, 32), swizzle=64)),
    ):
        parameters = {p.name: p for p in binary.info.parameters}
        assert list(parameters) == own
        assert parameters["x_desc"].tensor_map == parameters["o_desc"].tensor_map == layout
        sizes = [(p.size, p.tensor_map is None) for p in parameters.values()]
        described = [(128, False), (4, True), (4, True), (8, True), (8, True)]
        assert sizes == [*described * 2, (8, True), (4, True), (8, True), (8, True)]
        # 64-byte aligned where the parameters of sm_90 begin, at 0x210 of the constant memory
        offsets = [0x30, 0xB0, 0xB4, 0xB8, 0xC0, 0xF0, 0x170, 0x174, 0x178, 0x180, 0x188, 0x190, 0x198, 0x1A0]
        assert [p.offset for p in parameters.values()] == offsets
        # the four warps of the kernel and those of its partition
        assert binary.info.threads > 128
    assert product.info.threads == 128
    code = read_machine_code(copy)
    assert (code.async_copies, code.matrix) == (2, {})
    assert read_machine_code(product).matrix == {"HGMMA": 4}


def test_a_gluon_kernel_that_must_not_be_built_is_refused_and_the_worker_lives(tmp_path: Path) -> None:
    swapped = replace(COPY, parameters=COPY.parameters[::-1])
    wide = _gluon("copy", "fp32[16,32]", COUNT, ROWS, UNUSED=None)
    serialised, again, ampere, blackwell, order, element, absent, none, many, product = _compile_gluon(
        tmp_path / "here",
        (SERIALISED, "sm_90a"),
        (SERIALISED, "sm_90a"),  # Triton now has the binary in its cache
        (COPY, "sm_80"),
        (COPY, "sm_100a"),
        (swapped, "sm_90a"),
        (wide, "sm_90a"),
        (replace(COPY, kernel="absent"), "sm_90a"),
        (replace(COPY, cluster=0), "sm_90a"),
        (replace(COPY, cluster=9), "sm_90a"),
        (PRODUCT, "sm_90a"),
    )
    assert re.search(r"product-fp16.* for sm_90a: ptxas lost performance in 1 places.*C7514.*serialized", serialised)
    assert again == serialised
    assert ampere.endswith("for sm_80: copy can be built for sm_90a") and "for sm_100a: copy can be" in blackwell
    assert "are not in the order of the kernel's arguments" in order
    assert "a tensor map of fp32 that the compiler describes as" in element
    assert re.search(r"Triton .* cannot import no_such_module: ModuleNotFoundError", absent)
    assert none.endswith("for sm_90a: a cluster of 0 blocks; allowed 1 to 8") and "a cluster of 9 blocks" in many
    assert product.info.name == PRODUCT.name


def _meet(cluster: int, **constants: bool) -> Specialisation:
    given = {"MEET": False, "WAIT": False, "EARLY": False, **constants}
    parameters = (Parameter("x_ptr", "*i32", 16), Parameter("o_ptr", "*i32", 16))
    return Specialisation("meet", "meet", parameters, tuple(given.items()), num_warps=4, num_stages=1, cluster=cluster)


def test_clusters_and_programmatic_launches_are_recorded_and_held_to_what_the_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, cluster, programmatic, early, neither = (
        _meet(2, MEET=True, WAIT=True),
        _meet(8, MEET=True),
        _meet(1, WAIT=True),
        _meet(1, WAIT=True, EARLY=True),
        _meet(1),
    )
    asked = (both, cluster, programmatic, early, neither)
    built = dict(zip(asked, _compile_gluon(tmp_path / "here", *((one, "sm_90a") for one in asked)), strict=True))
    taken = [(b.info.cluster, b.info.programmatic) for b in built.values()]
    assert taken == [(2, True), (8, False), (1, True), (1, True), (1, False)]
    for one, binary in built.items():
        assert binary.info.key == one.key != replace(one, cluster=4).key
        assert Specialisation.from_key(one.key).cluster == one.cluster and binary.info.threads == 128
    monkeypatch.setitem(gates.KERNELS, "meet", SimpleNamespace(binding=None))

    def found(code_of: Specialisation, said: Specialisation | None = None) -> list[str]:
        """What the code of one breaks, said to be that of another."""
        said = said or code_of
        return violations(said, "sm_90a", read_machine_code(Binary(built[code_of].cubin, built[said].info)))

    assert [found(one) for one in (both, cluster, programmatic, neither)] == [[]] * 4
    # a load that the code comes to before it waits; and code that is said to wait and does not
    assert found(early) == ["accesses to memory and exits before griddepcontrol.wait: 1, allowed 0"]
    # the load, the store and the end
    assert found(neither, programmatic) == ["accesses to memory and exits before griddepcontrol.wait: 3, allowed 0"]
    # code for one block in a cluster, and code for a cluster in no cluster
    (absent,) = found(neither, cluster)
    assert absent.startswith("cluster barriers: none")
    (present,) = found(both, programmatic)
    assert re.fullmatch(r"cluster barriers: \d+, meant none", present)
