"""What binds a backward pass to a binary of the Hopper kernel of wide heads' dk and dv. Needs no compiler."""

from __future__ import annotations

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Pointer, TensorName
from flashcore.kernels.hopper.backward_config import WIDE_CONFIGS, WideConfig
from flashcore.kernels.hopper.backward_factors import factor_arguments
from flashcore.kernels.hopper.backward_features import BackwardFeatures
from flashcore.kernels.hopper.backward_form import specialise_form, tail_maps
from flashcore.kernels.hopper.backward_main import INTEGERS, REGISTERS, WARPGROUP_KEYS, integers, tensor_maps
from flashcore.kernels.program import Launch
from flashcore.kernels.specialisation import Specialisation

KERNEL = "hopper_backward_wide"
# The files that a binary is made of.
SOURCES = tuple(
    f"kernels/hopper/{name}.py"
    for name in (
        "backward_shared",
        "backward_softcap",
        "backward_wide",
        "exchange",
        "gluon_api",
        "launches",
        "layouts",
        "mask",
        "operand",
        "ring",
        "tiles",
    )
)
# In the order of the kernel's parameters.
_MAPS: tuple[TensorName, ...] = ("q", "do", "k", "v", "dk", "dv")


def specialise(features: BackwardFeatures, config: WideConfig | None = None) -> Specialisation:
    """The binary for these features, in the table's form for them unless another is given.

    Raises:
        ValueError: the form does not fit the GPU.
    """
    config = config or WIDE_CONFIGS[features.head_dims]
    return specialise_form(
        KERNEL,
        features,
        config,
        rows={tensor: config.block_m if tensor in ("q", "do") else WARPGROUP_KEYS for tensor in _MAPS},
        integers=INTEGERS,
        registers=REGISTERS,
        constants={"SLOTS": config.slots, "EXCHANGED": config.exchanged},
    )


def launch(spec: BackwardSpec) -> Launch:
    """The launch of a pass: all of dk and dv."""
    call = spec.call
    features = BackwardFeatures.of(spec)
    config = WIDE_CONFIGS[features.head_dims]
    specialisation = specialise(features, config)
    maps = tensor_maps(spec)
    return Launch(
        specialisation,
        -(-call.seqlen_k // WARPGROUP_KEYS) * call.batch * call.heads_k,
        (
            *(maps[tensor] for tensor in _MAPS),
            Pointer("row_lse"),
            Pointer("delta"),
            *integers(spec, config.block_m),
            *factor_arguments(call),
            *tail_maps(specialisation, maps),
        ),
    )
