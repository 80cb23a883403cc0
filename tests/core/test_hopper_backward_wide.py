"""The Hopper backward of wide heads: which launches, what is padded to what, and what the binary of dk and dv holds."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.build.gates import violations
from flashcore.build.machine_code import read_machine_code
from flashcore.build.pool import Request, compile_all
from flashcore.kernels.arguments import Argument, TensorMap
from flashcore.kernels.hopper import backward_binding as binding
from flashcore.kernels.hopper import backward_dq_launch as dq
from flashcore.kernels.hopper import backward_wide_launch as wide
from flashcore.kernels.hopper.backward_config import HEAD_DIMS, WIDE_CONFIGS, WideConfig
from flashcore.kernels.hopper.backward_features import BackwardFeatures
from flashcore.kernels.hopper.head_dims import padded_head_dims, tile_columns
from flashcore.kernels.program import Launch
from flashcore.spec import MAX_HEAD_DIM, AttentionSpec
from flashcore.target import SHARED_MEMORY_LIMIT

MakeSpec = Callable[..., AttentionSpec]


def _backward(call: AttentionSpec, **changes: object) -> BackwardSpec:
    plain = BackwardSpec(call, call.o_strides, True, dq=True, dkv=True, dmask_shape=None, dlse=False, deterministic=False)
    return replace(plain, **changes)


def _values(launch: Launch) -> dict[str, Argument]:
    return dict(zip((p.name for p in launch.specialisation.parameters), launch.arguments, strict=True))


@pytest.mark.parametrize(
    ("given", "padded"),
    [
        ((8, 64), (64, 64)),
        ((64, 72), (128, 128)),
        ((96, 96), (128, 128)),
        ((136, 64), (192, 128)),
        ((192, 128), (192, 128)),
        ((192, 136), (256, 256)),
        ((64, 256), (256, 256)),
    ],
    ids=str,
)
def test_head_dims_are_padded_together(given: tuple[int, int], padded: tuple[int, int], make_spec: MakeSpec) -> None:
    assert padded_head_dims(HEAD_DIMS, *given) == padded
    spec = _backward(make_spec(head_dim=given[0], head_dim_v=given[1]))
    assert binding.reject(spec, "sm_90a", False) is None
    program = binding.program(spec, "sm_90a", 132)
    kernels = [launch.specialisation.kernel for launch in program.launches]
    is_wide = padded in WIDE_CONFIGS
    assert kernels[1:] == ([wide.KERNEL, dq.KERNEL] if is_wide else ["hopper_backward", binding.FINISH])
    # nothing is summed by atomics, so that bitwise equal results cost nothing
    assert binding.reproducible(spec) == is_wide
    assert ("dq_sum" in {workspace.tensor for workspace in program.workspaces}) != is_wide
    assert dict(program.launches[0].specialisation.constants)["BLOCK_DV"] == padded[1]


def test_every_call_has_head_dims_that_are_built() -> None:
    assert HEAD_DIMS[-1] == (MAX_HEAD_DIM, MAX_HEAD_DIM)
    assert [tile_columns(d) for d in (64, 128, 192, 256)] == [(64, 0), (128, 0), (128, 64), (256, 0)]
    assert set(WIDE_CONFIGS) < set(HEAD_DIMS)


def test_gradients_that_are_wanted_alone(make_spec: MakeSpec) -> None:
    spec = _backward(make_spec(head_dim=256))
    for wanted, kernels in (({"dq": False}, [wide.KERNEL]), ({"dkv": False}, [dq.KERNEL])):
        program = binding.program(replace(spec, **wanted), "sm_90a", 132)
        assert [launch.specialisation.kernel for launch in program.launches] == [binding.PREPARE, *kernels]


def test_numbers_of_a_launch(make_spec: MakeSpec) -> None:
    call = make_spec(2, 6, 2, 100, 300, 160, 104, window=(20, 10))
    values = _values(wide.launch(_backward(call)))
    assert wide.launch(_backward(call)).grid == 5 * 2 * 2
    # the first row attends keys from 180 on; every row attends some
    assert (values["first_query"], values["first_key"], values["heads_per_kv"], values["kv_heads"]) == (0, 180, 3, 4)
    assert values["blocks_per_head"] == 128 // WIDE_CONFIGS[192, 128].block_m
    assert (values["band_lo"], values["band_hi"]) == (-210, -180)
    for tensor, shape in (("q", (2, 6, 100, 160)), ("k", (2, 2, 120, 160)), ("dk", (2, 2, 300, 160))):
        tensor_map = values[f"{tensor}_map"]
        assert isinstance(tensor_map, TensorMap) and tensor_map.shape == shape
        # columns from 128 on, by the same map
        assert values[f"{tensor}_tail_map"] == tensor_map
    for tensor, shape in (("do", (2, 6, 100, 104)), ("v", (2, 2, 120, 104)), ("dv", (2, 2, 300, 104))):
        tensor_map = values[f"{tensor}_map"]
        assert isinstance(tensor_map, TensorMap) and tensor_map.shape == shape
        assert f"{tensor}_tail_map" not in values


def test_forms() -> None:
    for head_dims, config in WIDE_CONFIGS.items():
        assert config.fits(head_dims)
    assert not WideConfig(32, 2).fits((256, 256))  # no room for the queries after the next
    assert not WideConfig(64, 3).fits((256, 256))  # 256 KiB of 227
    features = BackwardFeatures(torch.float16, (256, 256), False)
    with pytest.raises(ValueError, match=r"m64k3x2 does not fit head dims \(256, 256\)"):
        wide.specialise(features, WideConfig(64, 3))


def test_the_binary_holds_what_is_meant() -> None:
    # with a softcap it has everything that it can have
    specialisation = wide.specialise(BackwardFeatures(torch.float16, (256, 256), True, softcap=True))
    (outcome,) = compile_all([Request(specialisation, "sm_90a")], jobs=1)
    assert outcome.binary is not None, outcome.error
    code, info = read_machine_code(outcome.binary), outcome.binary.info
    assert violations(specialisation, "sm_90a", code) == [] and code.spills == 0
    # of each warpgroup: the first products, 16; and a step, which starts the next ones and adds 2 of 16 rows
    assert code.matrix == {"HGMMA": 2 * (16 + 16 + 2)}
    estimate = WIDE_CONFIGS[256, 256].shared_memory((256, 256))
    assert estimate <= info.shared <= estimate + 1024 <= SHARED_MEMORY_LIMIT["sm_90a"]
    # two consumer warpgroups, and the producer's warp rounded up to a third
    assert info.threads == 384 and info.programmatic
