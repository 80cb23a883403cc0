"""TMA tensor maps: the 128 bytes, opaque and made by the driver, through which a kernel copies tiles of a tensor."""

from __future__ import annotations

from collections.abc import Callable

from flashcore.errors import BinaryError
from flashcore.kernels.arguments import TensorMap
from flashcore.runtime.binary import ELEMENT_SIZES, TensorMapLayout
from flashcore.runtime.driver import encode_tensor_map

ADDRESS_SIZE = 8
# Two addresses that differ in every bit that an address may have set.
_PROBES = (0x5555_5555_5550, 0xAAAA_AAAA_AAA0)


def encoder(argument: TensorMap, layout: TensorMapLayout) -> Callable[[int], bytes]:
    """A function from a tensor's address to its map. Call it where a context is current.

    Raises:
        BinaryError: the map is not one that the binary takes, or its last dimension is not contiguous.
    """
    shape, strides = argument.shape, argument.strides
    if not len(shape) == len(strides) == len(layout.box) or strides[-1] != 1:
        raise BinaryError(
            f"{argument.tensor}: the binary takes a tensor map of {len(layout.box)} dimensions, the last with stride 1; "
            f"got shape {shape} with strides {strides}"
        )
    size = ELEMENT_SIZES[layout.element]
    # Where there is one element, PyTorch lets the stride be anything, and the driver refuses most of it.
    byte_strides = [16 if extent == 1 else stride * size for extent, stride in zip(shape[:-1], strides[:-1], strict=True)]

    def encode(address: int) -> bytes:
        return encode_tensor_map(
            argument.tensor, address, shape, byte_strides, element=layout.element, box=layout.box, swizzle=layout.swizzle
        )

    return encode


def try_out(encode: Callable[[int], bytes]) -> tuple[bytes, bool]:
    """A map of some address, and whether writing another address over its first 8 bytes gives the map of that.

    It does on Hopper, but no document promises it (PTX's tensormap.replace only shows that the address is a field).
    """
    maps = [encode(address) for address in _PROBES]
    leads = all(
        encoded[:ADDRESS_SIZE] == address.to_bytes(ADDRESS_SIZE, "little")
        for encoded, address in zip(maps, _PROBES, strict=True)
    )
    return maps[0], leads and len({encoded[ADDRESS_SIZE:] for encoded in maps}) == 1
