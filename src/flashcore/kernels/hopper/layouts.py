"""Layouts: which thread of a warpgroup holds what of a wgmma's operands in registers."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.constexpr_function
def accumulator(columns):
    """The layout of a [64, columns] fp32 tile in the registers of a warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def left_operand(columns):
    """The layout of a left operand in registers, of a product with `columns` columns."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(columns), k_width=2)
