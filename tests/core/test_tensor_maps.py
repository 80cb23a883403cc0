"""Tensor maps in a launch: how they are asked for, where they lie, how later addresses get into them."""

import sys
import threading
from dataclasses import replace
from hashlib import sha256

import pytest

from flashcore.errors import BinaryError, DriverError
from flashcore.kernels.arguments import TENSORS, Pointer, TensorMap

# the tensor map parameter of conftest.py's binaries; its shape and strides follow it
MAP = "tensormap<fp16[1,64,32]>"


def _addresses(**tensors: int) -> tuple[int, ...]:
    return tuple(tensors.get(name, 0) for name in TENSORS)


def address_first(address: int, others: bytes) -> bytes:
    """A tensor map as Hopper's are: the address, then what does not depend on it."""
    return address.to_bytes(8, "little") + others


def address_later(address: int, others: bytes) -> bytes:
    return others[:16] + address.to_bytes(8, "little")


def address_everywhere(address: int, others: bytes) -> bytes:
    return address.to_bytes(8, "little") + sha256(others + bytes([address % 251])).digest()


def address_scaled(address: int, others: bytes) -> bytes:
    return (address >> 4).to_bytes(8, "little") + others


def _map(tensor: str = "k", shape=(4, 100, 40), strides=(8000, 80, 1)) -> TensorMap:
    return TensorMap(tensor, shape, strides)


def _map_values(fake, address: int, tensor_map: TensorMap) -> list[object]:
    """What a kernel must get for a tensor map over an address: the driver's encoding, the shape, the strides."""
    *_, (_, element, rank, _, *others) = (call for call in fake.calls if call[0] == "cuTensorMapEncodeTiled")
    encoded = fake.map_of(address, sha256(repr((element, rank, tuple(others))).encode()).digest())
    return [encoded.ljust(128, b"\0"), *tensor_map.shape, *tensor_map.strides]


def _encodings(fake) -> list[int]:
    """The addresses that tensor maps were encoded for."""
    return [call[3] for call in fake.calls if call[0] == "cuTensorMapEncodeTiled"]


@pytest.mark.parametrize("map_of", [address_first, address_later])
def test_threads_do_not_mix_their_arguments(map_of, fake) -> None:
    fake.map_of = map_of
    names = ("q", "k", "v", "o", "lse", "counter")
    pointers = [Pointer(name) for name in names]
    launcher = fake.launcher(fake.binary(*["*fp16"] * 6, MAP, "i64", scratch=0), *pointers, _map("mask"), 9)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(address: int) -> None:
        for _ in range(300):
            launcher.launch(_addresses(**dict.fromkeys((*names, "mask"), address)))

    try:
        threads = [threading.Thread(target=work, args=(address,)) for address in (16, 32, 48)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(fake.launches) == 900
    launched = {tuple(one.values) for one in fake.launches}
    assert launched == {(*[address] * 6, *_map_values(fake, address, _map("mask")), 9) for address in (16, 32, 48)}


@pytest.mark.parametrize(
    ("map_of", "patched"),
    [(address_first, True), (address_later, False), (address_everywhere, False), (address_scaled, False)],
)
def test_a_tensor_map_holds_each_launchs_address(map_of, patched: bool, fake) -> None:
    """One parameter in front of it moves it to a multiple of 64, and the arguments after it lie where they should."""
    fake.map_of = map_of
    launcher = fake.launcher(fake.binary("i32", MAP, "*fp16", "i32"), 7, _map("k"), Pointer("o"), 8)
    before = _encodings(fake)
    addresses = [2**47 - 16, 4096, 0x7F12_3456_7890, 4096]
    for address in addresses:
        launcher.launch(_addresses(k=address, o=48))
    assert _encodings(fake) == before + ([] if patched else addresses)
    expected = [[7, *_map_values(fake, address, _map("k")), 48, 8, 0, 0] for address in addresses]
    assert [one.values for one in fake.launches] == expected


@pytest.mark.parametrize(("map_of", "patched"), [(address_first, True), (address_later, False)])
def test_a_tensor_map_may_begin_after_its_tensors_address(map_of, patched: bool, fake) -> None:
    """Elements of two bytes; what it leaves out is not the pointer's concern, nor another map's of the same tensor."""
    fake.map_of = map_of
    later, whole = _map("k", shape=(4, 60, 40)), _map("k")
    later = replace(later, offset=40 * 80)
    launcher = fake.launcher(fake.binary(MAP, "*fp16", MAP, scratch=0), later, Pointer("k"), whole)
    before = _encodings(fake)
    for address in (4096, 2**47 - 16):
        launcher.launch(_addresses(k=address))
    started = [6400 + 4096, 4096, 6400 + 2**47 - 16, 2**47 - 16]
    assert _encodings(fake) == before + ([] if patched else started)
    for launch, address in zip(fake.launches, (4096, 2**47 - 16), strict=True):
        first, pointer, second = launch.values[0], launch.values[7], launch.values[8]
        where = slice(0, 8) if patched else slice(16, 24)
        assert [int.from_bytes(one[where], "little") for one in (first, second)] == [address + 6400, address]
        assert pointer == address and launch.values[1:7] == [*later.shape, *later.strides]


def test_a_tensor_map_lies_where_the_binarys_record_says(fake) -> None:
    """A multiple of 64 in the constant memory of sm_90, whose parameters begin at 0x210, is not one in the buffer."""
    binary = fake.binary(MAP, "i32", MAP, scratch=1)
    maps = [p.offset for p in binary.info.parameters if p.tensor_map]
    assert maps == [0x30, 0xF0]
    fake.launcher(binary, _map("k"), 7, _map("v")).launch(_addresses(k=64, v=128))
    values = fake.launches[0].values
    assert [int.from_bytes(values[i][:8], "little") for i in (0, 8)] == [64, 128] and values[7] == 7


def test_how_a_tensor_map_is_asked_for(fake) -> None:
    """The driver takes the innermost dimension first, and strides in bytes of all the others."""
    fake.launcher(fake.binary(MAP), _map(shape=(4, 100, 40), strides=(8000, 80, 1)))
    _, element, rank, _, shape, strides, box, steps, interleave, swizzle, promotion, fill = fake.calls[-1]
    assert (element, rank) == ("CU_TENSOR_MAP_DATA_TYPE_FLOAT16", 3)
    assert (shape, strides, box, steps) == ([40, 100, 4], [160, 16000], [32, 64, 1], [1, 1, 1])
    assert interleave == "CU_TENSOR_MAP_INTERLEAVE_NONE" and swizzle == "CU_TENSOR_MAP_SWIZZLE_64B"
    # L2_128B and zeros beyond the edges
    assert promotion == "CU_TENSOR_MAP_L2_PROMOTION_L2_128B" and fill == "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE"


@pytest.mark.parametrize(
    ("shape", "strides", "asked"),
    [
        ((4, 100, 40), (0, 80, 1), [160, 0]),  # expanded: every batch is the same memory
        ((1, 100, 40), (2**60 + 3, 80, 1), [160, 16]),
        ((4, 1, 40), (80, 7, 1), [16, 160]),
        ((1, 1, 40), (0, 1, 1), [16, 16]),
    ],
)
def test_strides_that_mean_nothing_are_not_the_drivers_concern(shape, strides, asked, fake) -> None:
    launcher = fake.launcher(fake.binary(MAP, scratch=0), _map(shape=shape, strides=strides))
    assert fake.calls[-1][5] == asked
    launcher.launch(_addresses(k=16))
    assert fake.launches[0].values[1:] == [*shape, *strides]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 100), (80, 1)), ((4, 100, 40), (80, 1)), ((4, 100, 40), (8000, 80, 2)), ((2, 2, 2, 2), (8, 4, 2, 1))],
)
def test_a_tensor_map_of_another_form_is_refused(shape, strides, fake) -> None:
    types = ["i32"] * len(shape) + ["i64"] * len(strides)
    tensor_map = fake.binary(MAP).info.parameters[:1]
    binary = fake.binary(*types, parameters=tensor_map + fake.binary(*types, scratch=0).info.parameters)
    with pytest.raises(BinaryError, match=r"p0 is tensormap.*k: the binary takes a tensor map of 3 dimensions"):
        fake.launcher(binary, _map(shape=shape, strides=strides))


def test_a_tensor_map_that_the_driver_refuses(fake) -> None:
    fake.answers["cuTensorMapEncodeTiled"] = fake.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        DriverError, match=r"k: .*INVALID_VALUE.*shape \(4, 100, 40\), strides of \(24, 160\) bytes, box \(1, 64"
    ):
        fake.launcher(fake.binary(MAP), _map(strides=(12, 80, 1)))


def test_tensor_maps_are_encoded_where_a_context_is_current(fake) -> None:
    fake.map_of = address_later
    binary = fake.binary(MAP)
    for _ in range(2):  # the second time, nothing is loaded any more
        fake.context = 0
        launcher = fake.launcher(binary, _map())
        fake.context = 0  # as in a thread that was started later
        launcher.launch(_addresses(k=64))
    assert [one.values[:7] for one in fake.launches] == [_map_values(fake, 64, _map())] * 2


def test_a_tensor_map_for_another_parameter_is_refused(fake) -> None:
    with pytest.raises(BinaryError, match=r"p0 is i64 and cannot take TensorMap.*: it is not a tensor map"):
        fake.launcher(fake.binary("i64", *["i64"] * 6), _map())


@pytest.mark.parametrize(("value", "words"), [(64, "it is not a number"), (Pointer("k"), "it is not a pointer")])
def test_a_parameter_that_is_a_tensor_map_takes_nothing_else(value: object, words: str, fake) -> None:
    with pytest.raises(BinaryError, match=f"the-kernel: p0 is tensormap.*{words}"):
        fake.launcher(fake.binary(MAP), value, 1, 1, 1, 1, 1, 1)


def test_the_shape_and_strides_of_a_tensor_map_count_as_arguments(fake) -> None:
    with pytest.raises(BinaryError, match="takes 8 arguments, 9 were packed"):
        fake.launcher(fake.binary(MAP, scratch=1), _map(), 1)
