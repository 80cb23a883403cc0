"""The portable backward kernels: what binds a pass to them, and in a process of its own what they compute, interpreted."""

import ast
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore.backward_spec import BackwardSpec
from flashcore.kernels.arguments import Pointer
from flashcore.kernels.portable import backward_binding as binding
from flashcore.kernels.portable.backward_config import BackwardConfig, choose_config
from flashcore.kernels.program import Program
from flashcore.kernels.registry import BACKWARDS, KERNELS, SHIPPED_ARCHS
from flashcore.sources import PACKAGE
from flashcore.spec import AttentionSpec
from flashcore.target import SHARED_MEMORY_LIMIT


def test_the_kernels_in_the_interpreter() -> None:
    checks = Path(__file__).with_name("portable_backward.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", str(checks)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture
def make_pass(make_spec):
    """A function that makes a BackwardSpec from what make_spec takes; every gradient is wanted."""

    def make(mask: torch.Tensor | None = None, *, dq: bool = True, dkv: bool = True, dlse: bool = False, **options: object):
        call: AttentionSpec = make_spec(mask=mask, **options)
        return BackwardSpec.of(
            call,
            torch.empty(call.output_shape, dtype=call.dtype),
            dq=dq,
            dkv=dkv,
            mask=mask if mask is not None and mask.dtype != torch.bool else None,
            dlse=dlse,
            deterministic=False,
        )

    return make


def _kernels(program: Program) -> list[str]:
    return [launch.specialisation.kernel.removeprefix(binding.PREFIX) for launch in program.launches]


def _program(spec: BackwardSpec, arch: str = "sm_90a") -> Program:
    return binding.program(spec, arch, 132)


def test_only_what_is_asked_for_is_launched(make_pass) -> None:
    assert _kernels(_program(make_pass())) == ["delta", "dkdv", "dq"]
    assert _kernels(_program(make_pass(dq=False))) == ["delta", "dkdv"]
    assert _kernels(_program(make_pass(dkv=False))) == ["delta", "dq"]
    assert _kernels(_program(make_pass(torch.ones(128, 128, dtype=torch.bool)))) == ["delta", "dkdv", "dq"]
    mask = torch.ones(128, 128).half()
    assert _kernels(_program(make_pass(mask))) == ["delta", "rest", "dkdv", "dq", "dmask"]
    assert _kernels(_program(make_pass(mask[:, :1]))) == ["delta", "rest", "dkdv", "dq", "dmask_rows"]
    assert _kernels(_program(make_pass(mask, dq=False, dkv=False))) == ["delta", "rest", "dmask"]
    assert BACKWARDS["portable"] is binding and all(binding.reproducible(spec) for spec in (make_pass(), make_pass(mask)))


def test_memory_between_the_launches(make_pass) -> None:
    plain, biased = _program(make_pass()), _program(make_pass(torch.ones(128, 128).half()))
    assert [(w.tensor, w.shape, w.dtype) for w in plain.workspaces] == [("delta", (2, 4, 128), torch.float32)]
    assert plain.workspace_bytes == 2 * 4 * 128 * 4 and biased.workspace_bytes == 2 * plain.workspace_bytes


def test_what_it_refuses(make_pass) -> None:
    spec = make_pass()
    assert binding.reject(spec, "sm_90a", False) is None and binding.reject(spec, None, True) is None
    assert "needs an NVIDIA GPU" in str(binding.reject(spec, None, False))
    turned = replace(spec, call=replace(spec.call, contiguous_last=False))
    assert "stride 1 in the last dimension" in str(binding.reject(turned, "sm_90a", False))


def _signature(file: str, function: str) -> tuple[list[str], list[str]]:
    """(run-time parameters, constants) of a kernel, in its order, read from its source: no compiler is needed."""
    tree = ast.parse((PACKAGE / file).read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    constants = [a.arg for a in found.args.args if a.annotation is not None]
    return [a.arg for a in found.args.args if a.annotation is None], constants


@pytest.mark.parametrize("kernel", binding.KERNELS)
def test_parameters_are_the_kernels_in_its_order(kernel: str) -> None:
    parameters, constants = _signature(KERNELS[kernel].sources[0], KERNELS[kernel].function)
    assert list(binding.PARAMETERS[kernel]) == parameters and sorted(binding.CONSTANTS[kernel]) == sorted(constants)


def test_what_fills_the_parameters(make_pass) -> None:
    mask = torch.ones(2, 1, 30, 50)
    spec = make_pass(
        mask, batch=2, heads_q=6, heads_k=3, seqlen_q=30, seqlen_k=50, head_dim=72, head_dim_v=40,
        causal=True, window=(40, 3), softcap=2.0, scale=0.3, dlse=True,
    )  # fmt: skip
    values = {}
    for launch in _program(spec).launches:
        names = [parameter.name for parameter in launch.specialisation.parameters]
        filled = dict(zip(names, launch.arguments, strict=True))
        assert all(values.get(name, value) == value for name, value in filled.items())
        values |= filled
    assert values == {
        **{f"{name}_ptr": Pointer(name) for name in ("q", "k", "v", "mask", "o", "do", "lse", "dlse", "delta")},
        **{f"{name}_ptr": Pointer(name) for name in ("dq", "dk", "dv", "dmask")}, "rest_ptr": Pointer("row_lse"),
        "stride_qb": 30 * 6 * 72, "stride_qh": 72, "stride_qs": 6 * 72,
        "stride_kb": 50 * 3 * 72, "stride_kh": 72, "stride_ks": 3 * 72,
        "stride_vb": 50 * 3 * 40, "stride_vh": 40, "stride_vs": 3 * 40,
        "stride_mb": 30 * 50, "stride_mh": 0, "stride_mq": 50, "stride_mk": 1,
        "stride_ob": 30 * 6 * 40, "stride_oh": 40, "stride_os": 6 * 40,
        "stride_dob": 30 * 6 * 40, "stride_doh": 40, "stride_dos": 6 * 40,
        "stride_dqb": 30 * 6 * 72, "stride_dqh": 72, "stride_dqs": 6 * 72,
        "stride_dkb": 50 * 3 * 72, "stride_dkh": 72, "stride_dks": 3 * 72,
        "stride_dvb": 50 * 3 * 40, "stride_dvh": 40, "stride_dvs": 3 * 40,
        "batch": 2, "heads_q": 6, "heads_per_kv": 2, "seqlen_q": 30, "seqlen_k": 50, "head_dim": 72, "head_dim_v": 40,
        "mask_batch": 2, "mask_heads": 1, "mask_rows": 30, "band_lo": 20 - 40, "band_hi": 20, "scale": 0.3, "softcap": 2.0,
        "has_dlse": 1,
    }  # fmt: skip


def test_divisors_promised_to_the_compiler_hold(make_pass) -> None:
    mask = torch.ones(128, 128)
    for options in ({}, {"head_dim": 72}, {"mask": mask}, {"dtype": torch.float32}, {"offset": 1}, {"head_dim": 63}):
        spec = make_pass(**options)
        for launch in _program(spec).launches:
            for parameter, value in zip(launch.specialisation.parameters, launch.arguments, strict=True):
                if isinstance(value, int):
                    assert value % parameter.divisor == 0, (options, parameter)
                if parameter.name == "do_ptr":
                    assert (parameter.divisor == 16) == spec.aligned


def test_an_unaligned_gradient_of_the_output_is_read_so(make_pass) -> None:
    call = make_pass().call
    do = torch.empty(1 + math.prod(call.output_shape), dtype=call.dtype)[1:].view(call.output_shape)
    spec = BackwardSpec.of(call, do, dq=True, dkv=True, mask=None, dlse=False, deterministic=False)
    assert call.aligned and not spec.aligned
    for launch in _program(spec).launches:
        assert "unaligned" in launch.specialisation.name
        assert all(parameter.divisor == 1 for parameter in launch.specialisation.parameters)


def test_grids_cover_everything_once(make_pass) -> None:
    for seqlen_q, seqlen_k in ((1, 1), (64, 128), (65, 1000), (0, 5), (5, 0)):
        spec = make_pass(
            torch.ones(1, 2, seqlen_q, seqlen_k).half(), seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=2, heads_k=1
        )
        for launch in _program(spec).launches:
            constants = dict(launch.specialisation.constants)
            rows = math.ceil(seqlen_q / constants["BLOCK_M"])
            keys = math.ceil(seqlen_k / constants.get("BLOCK_N", 1))
            # 2 batch entries, 2 query heads, 1 key head; the mask has 1 and 2
            expected = {"dkdv": keys * 2, "dmask": rows * keys * 2}
            kernel = launch.specialisation.kernel.removeprefix(binding.PREFIX)
            assert launch.grid == expected.get(kernel, rows * 4), (kernel, seqlen_q, seqlen_k)


def test_different_code_has_a_different_name(make_pass) -> None:
    mask = torch.ones(2, 4, 128, 128)
    calls = [
        {},
        {"causal": True},
        {"dtype": torch.bfloat16},
        {"head_dim": 128},
        {"head_dim": 96},
        {"offset": 1},
        {"scale": -1.0},
        {"softcap": 1.0},
        {"mask": mask},
        {"mask": mask[:, :, :1]},
        {"mask": mask[..., :1]},
        {"mask": mask.bool()},
        {"mask": mask.half()},
        {"mask": mask, "softcap": 1.0},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "mask": mask},
    ]
    found = {launch.specialisation for options in calls for launch in _program(make_pass(**options)).launches}
    assert len({s.key for s in found}) == len(found) == len({s.name for s in found})


@pytest.mark.parametrize("arch", SHIPPED_ARCHS)
def test_common_passes_are_shipped(arch: str, make_pass) -> None:
    shipped = binding.shipped(arch)
    assert len(shipped) <= 20 and max(Counter(s.name for s in shipped).values()) == 1
    for dtype in (torch.float16, torch.bfloat16):
        for options in ({}, {"causal": True}, {"window": (64, 0)}, {"heads_k": 1}, {"layout": "bhsd", "dlse": True}):
            for head_dim in (64, 128):
                program = _program(make_pass(dtype=dtype, head_dim=head_dim, **options), arch)
                assert all(launch.specialisation in shipped for launch in program.launches), (options, head_dim)
    assert not any(launch.specialisation in shipped for launch in _program(make_pass(head_dim=80), arch).launches)


@pytest.mark.parametrize("arch", SHARED_MEMORY_LIMIT)
def test_every_tuned_configuration_fits_its_arch(arch: str) -> None:
    for kernel in ("rest", "dkdv", "dq", "dmask"):
        for kind in ("plain", "general", "mask", "fp32"):
            for block_d in (64, 128, 256):
                config = choose_config(kernel, kind, block_d, arch)
                walked = config.block_m if kernel == "dkdv" else config.block_n
                assert walked % config.edge == 0, (kernel, kind, block_d)
                # float32 reads its operands a chunk at a time
                assert kind == "fp32" or config.fits(arch, kernel, block_d, 2), (kernel, kind, block_d)


def test_a_configuration_that_does_not_fit_is_found_out() -> None:
    config = BackwardConfig(64, 128, 8, 2, 16)
    # K and V of 128 keys, and 2 stages of 64 rows of Q and dO: 2 * 256 * 128 * 2 bytes = 128 KiB
    assert config.fits("sm_90a", "dkdv", 128, 2) and not config.fits("sm_89", "dkdv", 128, 2)
    assert config.name == "m64n128w8s2e16" and BackwardConfig(64, 64, 4, 2, 64).name == "m64n64w4s2"


def test_matrix_instructions(make_pass) -> None:
    def meant(arch: str, **options: object) -> dict[str, str | None]:
        launches = _program(make_pass(**options), arch).launches
        return {
            launch.specialisation.kernel.removeprefix(binding.PREFIX): binding.matrix_instruction(launch.specialisation, arch)
            for launch in launches
        }

    assert meant("sm_90a") == {"delta": None, "dkdv": "HGMMA", "dq": "HGMMA"}
    assert meant("sm_89") == {"delta": None, "dkdv": "HMMA", "dq": "HMMA"}
    assert meant("sm_90a", dtype=torch.float32) == {"delta": None, "dkdv": None, "dq": None}
