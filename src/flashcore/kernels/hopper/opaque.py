"""Constants that Triton's compiler cannot see through."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.jit
def opaque(NUMBER: gl.constexpr):
    """The number, such that what depends on it is computed where it is used.

    Of a plain slot number Triton's compiler would compute the matrix descriptors of all slices of a tile before the loop,
    which has no registers to keep them; ptxas, which sees the constant again, puts them together from uniform registers.
    """
    return gl.inline_asm("mov.u32 $0, $1;", "=r,n", [NUMBER], gl.int32, False)
