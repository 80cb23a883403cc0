"""The launcher, with a driver that only writes down what it was told (conftest.py)."""

from types import SimpleNamespace

import pytest
import torch

import flashcore
from flashcore import evidence
from flashcore.errors import BinaryError, DriverError
from flashcore.kernels.arguments import TENSORS, Pointer
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime import store
from flashcore.runtime.binary import Binary
from flashcore.target import Target


def _addresses(**tensors: int) -> tuple[int, ...]:
    return tuple(tensors.get(name, 0) for name in TENSORS)


def test_a_binary_is_loaded_once_and_launched(fake) -> None:
    binary = fake.binary("*fp16", "i64")
    for _ in range(2):
        fake.launcher(binary, Pointer("q"), 7).launch(_addresses(q=4096))
    names = [call[0] for call in fake.calls]
    assert names.count("cuModuleLoadData") == 1 and names.count("cuLaunchKernelEx") == 2
    assert ("cuModuleLoadData", binary.cubin) in fake.calls and ("cuModuleGetFunction", "module", b"entry") in fake.calls
    assert ("cuFuncSetAttribute", "function", "shared", 5000) in fake.calls
    # a load may happen under a stream capture; the mode is put back
    assert [call[1] for call in fake.calls if call[0] == "cuThreadExchangeStreamCaptureMode"] == ["relaxed", "mode before"]
    first = fake.launches[0]
    assert (first.function, first.grid, first.block) == ("function", (3, 1, 1), (128, 1, 1))
    assert (first.shared, first.stream, first.values) == (5000, 77, [4096, 7, 0, 0])


@pytest.mark.parametrize("scratch", [0, 1, 2])
def test_arguments_are_packed_by_their_types(scratch: int, fake) -> None:
    types = ("*fp16", "*fp32", "i64", "i32", "i64", "i32", "i32", "fp32", "fp32", "i32")
    scalars = (2**40 + 3, -5, -(2**33), 2**31 - 1, -(2**31), 0.125, -3.5, 1)
    launcher = fake.launcher(fake.binary(*types, scratch=scratch), Pointer("q"), Pointer("lse"), *scalars)
    launcher.launch(_addresses(q=2**47 + 16, k=64))
    assert fake.launches[0].values == [2**47 + 16, 0, *scalars] + [0] * scratch
    launcher.launch(_addresses(q=32, lse=2**63 + 48))
    assert fake.launches[1].values == [32, 2**63 + 48, *scalars] + [0] * scratch


def test_pointers_may_stand_anywhere_in_any_order(fake) -> None:
    arguments = (5, Pointer("counter"), 2.5, Pointer("o"), Pointer("q"), 6, Pointer("mask"))
    launcher = fake.launcher(fake.binary("i32", "*i32", "fp32", "*fp16", "*fp16", "i64", "*u8", scratch=0), *arguments)
    launcher.launch(range(16, 16 + len(TENSORS)))
    where = {name: 16 + i for i, name in enumerate(TENSORS)}
    assert fake.launches[0].values == [5, where["counter"], 2.5, where["o"], where["q"], 6, where["mask"]]


def test_a_kernel_without_arguments(fake) -> None:
    fake.launcher(fake.binary(scratch=0)).launch(())
    assert fake.launches[0].values == []


def test_a_launch_of_no_programs_is_none(fake) -> None:
    fake.launcher(fake.binary("*fp16"), Pointer("q"), grid=0).launch(_addresses(q=16))
    assert fake.launches == []


@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("programmatic", [False, True])
def test_a_launch_states_the_cluster_and_whether_the_kernel_waits_itself(cluster: int, programmatic: bool, fake) -> None:
    binary = fake.binary("*fp16", cluster=cluster, programmatic=programmatic)
    fake.launcher(binary, Pointer("q"), grid=24).launch(_addresses(q=16))
    (launch,) = fake.launches
    attributes = dict(launch.attributes)
    stated = attributes.pop("CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION", None)
    # the grid counts blocks and not clusters
    assert launch.grid == (24, 1, 1) and (None if stated is None else vars(stated.clusterDim)) == (
        None if cluster == 1 else {"x": cluster, "y": 1, "z": 1}
    )
    serialised = attributes.pop("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", None)
    assert (serialised is not None and serialised.programmaticStreamSerializationAllowed == 1) == programmatic
    assert attributes == {}


def test_a_grid_without_whole_clusters_is_refused_before_anything_is_loaded(fake) -> None:
    binary = fake.binary("*fp16", cluster=4)
    with pytest.raises(BinaryError, match="the-kernel: a grid of 10 blocks; allowed are multiples of its cluster of 4"):
        fake.launcher(binary, Pointer("q"), grid=10)
    assert fake.calls == []
    fake.launcher(binary, Pointer("q"), grid=0).launch(_addresses(q=16))
    assert fake.launches == []


def test_too_few_or_too_many_arguments_are_refused(fake) -> None:
    q = Pointer("q")
    for arguments in ((q, 1), (q, q, 1, 2), ()):
        with pytest.raises(BinaryError, match=f"the-kernel: takes 5 arguments, {len(arguments) + 2} were packed"):
            fake.launcher(fake.binary("*fp16", "*fp16", "i32"), *arguments)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("*fp16", 64, "it is not a number"),
        ("i64", Pointer("q"), "it is not a pointer"),
        ("i32", 1.5, "integer"),
        ("i32", 2**31, "number <= 2147483647"),
        ("fp32", "1", "real number|float"),
    ],
)
def test_an_argument_of_another_kind_is_refused(kind: str, value: object, words: str, fake) -> None:
    with pytest.raises(BinaryError, match=f"the-kernel: p0 is .*({words})"):
        fake.launcher(fake.binary(kind), value)


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (
            "cuModuleLoadData",
            "CUDA_ERROR_NO_BINARY_FOR_GPU",
            "for sm_90a: the driver refused the binary: .*NO_BINARY_FOR_GPU",
        ),
        ("cuModuleGetFunction", "CUDA_ERROR_NOT_FOUND", "holds no kernel 'entry': CUDA_ERROR_NOT_FOUND"),
    ],
)
def test_a_binary_that_the_driver_refuses(call: str, status: str, words: str, fake) -> None:
    fake.answers[call] = fake.CUresult[status]
    binary = fake.binary()
    with pytest.raises(BinaryError, match=words):
        fake.launcher(binary).launch(())
    # the capture mode is put back all the same, and the failure is not remembered as a success
    assert fake.calls[-1] == ("cuThreadExchangeStreamCaptureMode", "mode before")
    fake.answers.clear()
    fake.launcher(binary).launch(())
    assert len(fake.launches) == 1


def test_a_damaged_binary_never_reaches_the_driver(fake) -> None:
    with pytest.raises(BinaryError, match="the-kernel is damaged"):
        fake.launcher(fake.binary(sha256="0" * 64))
    assert "cuModuleLoadData" not in [call[0] for call in fake.calls]


def test_other_calls_that_fail_name_themselves(fake) -> None:
    fake.answers["cuFuncSetAttribute"] = fake.CUresult.CUDA_ERROR_NOT_FOUND
    with pytest.raises(DriverError, match="cuFuncSetAttribute failed: CUDA_ERROR_NOT_FOUND"):
        fake.launcher(fake.binary())


def test_a_launch_that_fails(fake) -> None:
    launcher = fake.launcher(fake.binary())
    fake.answers["cuLaunchKernelEx"] = fake.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DriverError, match="the-kernel: cuLaunchKernelEx failed: CUDA_ERROR_LAUNCH_FAILED"):
        launcher.launch(())
    fake.answers.clear()
    launcher.launch(())
    assert len(fake.launches) == 2


def test_a_thread_without_a_context_gets_the_devices_own(fake) -> None:
    fake.context = 0
    launcher = fake.launcher(fake.binary("*fp16"), Pointer("q"))
    assert fake.context == 1000
    fake.context = 0  # as in a thread that was started after the load
    launcher.launch(_addresses(q=64))
    assert fake.context == 1000 and [one.values for one in fake.launches] == [[64, 0, 0]]


def test_a_context_that_the_driver_refuses_is_not_tried_for_ever(fake) -> None:
    launcher = fake.launcher(fake.binary())
    fake.answers["cuLaunchKernelEx"] = fake.CUresult.CUDA_ERROR_INVALID_CONTEXT
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
        launcher.launch(())
    fake.context = 0
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
        launcher.launch(())


def test_a_launch_on_a_device_that_is_not_the_current_one(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    launched_on: list[int] = []
    original = fake.cuLaunchKernelEx
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(fake, "cuLaunchKernelEx", lambda *a: (launched_on.append(current[0]), original(*a))[1])
    fake.launcher(fake.binary()).launch(())
    assert launched_on == [0] and current == [1]


@pytest.fixture
def on_the_gpu(fake, h200: Target, monkeypatch: pytest.MonkeyPatch):
    """CPU tensors that every part of FlashCore takes for tensors on an H200."""

    def obtain(specialisation: Specialisation, target: Target) -> Binary:
        binary = fake.binary(*(p.type for p in specialisation.parameters), name=specialisation.name)
        fake.parameters = binary.info.parameters
        return binary

    location = store.Location("shipped", SimpleNamespace(sha256="5" * 64), None)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: h200))
    monkeypatch.setattr(store, "locate", lambda specialisation, arch: location)
    monkeypatch.setattr(store, "obtain", obtain)
    monkeypatch.setattr(evidence, "state", lambda *arguments: "verified")
    return fake


def test_a_call_from_end_to_end(on_the_gpu) -> None:
    q, k, v = (torch.zeros(2, length, 4, 64, dtype=torch.float16) for length in (70, 90, 90))
    mask = torch.ones(70, 90, dtype=torch.bool)
    o, lse = flashcore.attention(q, k, v, attn_mask=mask, return_lse=True, impl="portable")
    again = flashcore.attention(q, k, v, impl="portable")
    with_mask, plain = on_the_gpu.launches
    pointers = [t.data_ptr() for t in (q, k, v, mask, o, lse)]
    assert with_mask.values[:6] == pointers
    assert plain.values[:6] == [*pointers[:3], 0, again.data_ptr(), 0]
    assert (o.shape, lse.shape, lse.dtype) == ((2, 70, 4, 64), (2, 4, 70), torch.float32)
    strides = [q.stride(0), q.stride(2), q.stride(1), k.stride(0), k.stride(2), k.stride(1)]
    assert with_mask.values[6:12] == strides


def test_a_second_call_uses_what_the_first_prepared(on_the_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(1, 70, 4, 64, dtype=torch.float16) for _ in range(4)]
    first = flashcore.attention(*tensors[:3], impl="portable")
    monkeypatch.setattr(store, "obtain", lambda *arguments: pytest.fail("prepared again"))
    second = flashcore.attention(*tensors[1:], impl="portable")
    assert second.data_ptr() != first.data_ptr()
    assert on_the_gpu.launches[1].values[:3] == [t.data_ptr() for t in tensors[1:]]


@pytest.mark.parametrize("sizes", [(0, 70, 70), (2, 0, 70)])
def test_nothing_to_compute_launches_nothing(sizes: tuple[int, int, int], on_the_gpu) -> None:
    batch, seqlen_q, seqlen_k = sizes
    q, k = (torch.zeros(batch, length, 4, 64, dtype=torch.float16) for length in (seqlen_q, seqlen_k))
    assert flashcore.attention(q, k, k, impl="portable").shape == q.shape and on_the_gpu.launches == []
