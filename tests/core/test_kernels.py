"""What binds calls to binaries: features, configurations, the shipped set, and arguments in the kernel's own order."""

import ast
import math
from collections import Counter
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import torch

import flashcore
from flashcore.kernels.arguments import Argument, Pointer
from flashcore.kernels.binding import Binding
from flashcore.kernels.portable import binding, tuning
from flashcore.kernels.portable.binding import Features
from flashcore.kernels.portable.config import PortableConfig
from flashcore.kernels.registry import BINDINGS, EMPTY, KERNELS, SHIPPED_ARCHS, Kernel, shipped_set
from flashcore.kernels.specialisation import Specialisation
from flashcore.runtime.binary import MAX_CLUSTER
from flashcore.sources import PACKAGE, kernel_hash, kernel_hashes
from flashcore.spec import AttentionSpec
from flashcore.target import ARCH_OF_CAPABILITY, SHARED_MEMORY_LIMIT

ARCHS = tuple(SHARED_MEMORY_LIMIT)
KINDS = ("plain", "causal", "window", "general", "mask", "fp32")


def test_every_arch_has_a_limit() -> None:
    assert set(ARCHS) == set(ARCH_OF_CAPABILITY.values()) and set(SHIPPED_ARCHS) <= set(ARCHS)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tuned_configuration_fits_its_arch(arch: str) -> None:
    for kind in KINDS:
        for block_d in (64, 128, 256):
            for config in tuning.configurations(kind, block_d, arch):
                assert config.fits(arch, block_d, 4 if kind == "fp32" else 2), (kind, block_d, config.name)


def test_a_configuration_that_does_not_fit_is_found_out() -> None:
    config = PortableConfig(128, 64, 4, 3, 3)
    # (3 stages * K and V * 64 keys + 128 rows) * 128 * 2 bytes = 128 KiB
    assert config.fits("sm_90a", 128, 2) and not config.fits("sm_89", 128, 2)
    assert not PortableConfig(128, 64, 4, 1, 3).fits("sm_89", 128, 2)


def test_names_of_configurations_tell_them_apart() -> None:
    assert PortableConfig(64, 32, 4, 2, 2).name == "m64n32w4s2" and PortableConfig(64, 32, 4, 2, 1).name == "m64n32w4s2e1"


def test_more_rows_choose_the_larger_tiles() -> None:
    few, many = tuning.configurations("plain", 64, "sm_90a")
    assert few != many
    enough = 2 * many.block_m * 132
    assert tuning.choose_config("plain", 64, "sm_90a", enough - 1, 132) == few
    assert tuning.choose_config("plain", 64, "sm_90a", enough, 132) == many


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_names_and_keys_are_unique(arch: str) -> None:
    shipped = shipped_set(arch)
    assert EMPTY in shipped and len(shipped) > 20
    assert max(Counter(s.name for s in shipped).values()) == 1
    assert len({s.key for s in shipped}) == len(shipped)
    assert all(set(s.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for s in shipped)  # they name files


def test_a_key_gives_the_specialisation_back() -> None:
    for specialisation in shipped_set("sm_90a"):
        again = Specialisation.from_key(specialisation.key)
        assert again == specialisation and again.key == specialisation.key
        types = {name: type(value) for name, value in specialisation.constants}
        assert {name: type(value) for name, value in again.constants} == types


HALF = (torch.float16, torch.bfloat16)


_shipped = cache(shipped_set)


def _is_shipped(spec: AttentionSpec, arch: str) -> bool:
    return binding.specialise_call(spec, arch, 132) in _shipped(arch)


@pytest.mark.parametrize("arch", SHIPPED_ARCHS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_common_calls_are_shipped(arch: str, dtype: torch.dtype, make_spec) -> None:
    mask = torch.ones(128, 128, dtype=torch.bool)
    for length in (1, 128, 16384):
        for head_dim in (64, 80, 96, 128, 192, 256):
            for options in (
                {},
                {"causal": True},
                {"window": (64, 0)},
                {"causal": True, "window": (64, 0)},
                {"heads_q": 8, "heads_k": 2},
                {"layout": "bhsd", "return_lse": True},
                {"softcap": 30.0},
                {"scale": 0.1},
                {"batch": 1, "heads_q": 1, "heads_k": 1},
            ):
                spec = make_spec(seqlen_q=length, seqlen_k=length, head_dim=head_dim, dtype=dtype, **options)
                assert _is_shipped(spec, arch), (length, head_dim, options)
    for masks in (mask, mask.to(dtype), mask[0]):
        assert _is_shipped(make_spec(dtype=dtype, mask=masks, causal=True), arch)
    assert _is_shipped(make_spec(dtype=dtype, head_dim=128, head_dim_v=64), arch)


@pytest.mark.parametrize("arch", SHIPPED_ARCHS)
def test_float32_is_shipped(arch: str, make_spec) -> None:
    for head_dim in (16, 64, 100, 128, 256):
        for options in ({}, {"causal": True}, {"window": (3, 3)}):
            assert _is_shipped(make_spec(dtype=torch.float32, head_dim=head_dim, **options), arch)


def test_odd_calls_are_compiled_on_demand(make_spec) -> None:
    mask = torch.ones(128, 128, dtype=torch.bool)
    for options in (
        {"head_dim": 63},
        {"offset": 1},
        {"scale": -0.1},
        {"scale": 0.0},
        {"mask": mask, "softcap": 3.0},
        {"mask": mask.float()},
        {"mask": mask, "dtype": torch.float32},
        {"softcap": 3.0, "dtype": torch.float32},
    ):
        assert not _is_shipped(make_spec(**options), "sm_90a"), options


def test_features_of_calls(make_spec) -> None:
    plain = Features.of(make_spec())
    assert (plain.band, plain.partial_d, plain.fold_scale, plain.kind, plain.aligned) == ("none", False, True, "plain", True)
    assert Features.of(make_spec(causal=True)).band == "causal" and Features.of(make_spec(window=(5, 0))).band == "window"
    assert [Features.of(make_spec(head_dim=d)).block_d for d in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]
    assert Features.of(make_spec(head_dim=64, head_dim_v=160)).block_d == 256
    assert Features.of(make_spec(head_dim=96)).partial_d and Features.of(make_spec(head_dim=128, head_dim_v=64)).partial_d
    assert not Features.of(make_spec(offset=1)).aligned
    assert Features.of(make_spec(dtype=torch.float32)).kind == "fp32"
    assert Features.of(make_spec(softcap=1.0)).kind == "general" and not Features.of(make_spec(softcap=1.0)).fold_scale
    mask = torch.zeros(128, 128)
    assert Features.of(make_spec(mask=mask)).kind == "mask" and Features.of(make_spec(mask=mask)).mask_dtype == torch.float32


def test_different_code_has_a_different_name(make_spec) -> None:
    mask = torch.ones(128, 128)
    calls = [
        {},
        {"causal": True},
        {"window": (9, 9)},
        {"dtype": torch.bfloat16},
        {"head_dim": 128},
        {"head_dim": 96},
        {"offset": 1},
        {"scale": -1.0},
        {"softcap": 1.0},
        {"softcap": 1.0, "offset": 1},
        {"mask": mask},
        {"mask": mask.bool()},
        {"mask": mask.half()},
        {"mask": mask, "softcap": 1.0},
        {"dtype": torch.float32},
        {"dtype": torch.float32, "softcap": 1.0},
        {"dtype": torch.float32, "mask": mask},
        {"dtype": torch.float32, "offset": 1},
    ]
    found = [binding.specialise_call(make_spec(**options), "sm_90a", 132) for options in calls]
    assert len({s.key for s in found}) == len(found) == len({s.name for s in found})


def _kernel_arguments() -> tuple[list[str], list[str]]:
    """(run-time parameters, constants) of the kernel, in its order, read from its source: no compiler is needed."""
    tree = ast.parse((PACKAGE / "kernels/portable/forward.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "portable_forward")
    constants = [a.arg for a in function.args.args if a.annotation is not None]
    return [a.arg for a in function.args.args if a.annotation is None], constants


def test_arguments_are_the_kernels_in_its_order(make_spec) -> None:
    parameters, constants = _kernel_arguments()
    options = {"causal": True, "window": (40, 3), "softcap": 2.0, "scale": 0.3, "return_lse": True}
    mask = torch.ones(2, 1, 30, 50)
    spec = make_spec(2, 6, 3, 30, 50, 72, 40, mask=mask, **options)
    specialisation = binding.specialise_call(spec, "sm_90a", 132)
    assert [p.name for p in specialisation.recording().parameters] == parameters
    assert sorted(name for name, _ in specialisation.constants) == sorted(constants)
    values = dict(zip(parameters[:-1], binding.arguments(spec, specialisation), strict=True))
    assert values == {
        "q_ptr": Pointer("q"), "k_ptr": Pointer("k"), "v_ptr": Pointer("v"),
        "mask_ptr": Pointer("mask"), "o_ptr": Pointer("o"), "lse_ptr": Pointer("lse"),
        "stride_qb": 30 * 6 * 72, "stride_qh": 72, "stride_qs": 6 * 72,
        "stride_kb": 50 * 3 * 72, "stride_kh": 72, "stride_ks": 3 * 72,
        "stride_vb": 50 * 3 * 40, "stride_vh": 40, "stride_vs": 3 * 40,
        "stride_mb": 30 * 50, "stride_mh": 0, "stride_mq": 50, "stride_mk": 1,
        "stride_ob": 30 * 6 * 40, "stride_oh": 40, "stride_os": 6 * 40,
        "heads_q": 6, "heads_per_kv": 2, "seqlen_q": 30, "seqlen_k": 50, "head_dim": 72, "head_dim_v": 40,
        "band_lo": 20 - 40, "band_hi": 20, "scale": 0.3, "softcap": 2.0, "store_lse": 1,
    }  # fmt: skip


def _values(spec: AttentionSpec) -> dict[str, Argument]:
    """The arguments of a call by the names of the parameters."""
    specialisation = binding.specialise_call(spec, "sm_90a", 132)
    names = [parameter.name for parameter in specialisation.parameters]
    return dict(zip(names, binding.arguments(spec, specialisation), strict=True))


def test_scalars_of_a_plain_call(make_spec) -> None:
    values = _values(make_spec(2, 4, 4, 30, 50, 64, layout="bhsd"))
    assert (values["stride_ob"], values["stride_oh"], values["stride_os"]) == (4 * 30 * 64, 30 * 64, 64)
    assert values["band_lo"] <= -50 and values["band_hi"] >= 50 and values["store_lse"] == 0
    assert values["stride_mq"] == values["stride_mk"] == 0
    # the exponent is base 2, and the factor is folded into the scale where nothing comes between
    assert values["scale"] == pytest.approx(0.125 * math.log2(math.e))


def test_a_window_wider_than_32_bits_is_unlimited_and_fits(make_spec) -> None:
    spec = make_spec(seqlen_q=4, seqlen_k=4, window=(2**40, 2**40))
    assert spec.band.lo is None and spec.band.hi is None
    values = _values(make_spec(1, 1, 1, 4, 2000, window=(2, 2**40)))
    assert all(-(2**31) <= values[name] < 2**31 for name in (*binding.INTEGERS, "store_lse"))


def test_divisors_promised_to_the_compiler_hold(make_spec) -> None:
    mask = torch.ones(128, 128)
    for options in ({}, {"head_dim": 72}, {"mask": mask}, {"dtype": torch.float32}, {"offset": 1}, {"head_dim": 63}):
        spec = make_spec(**options)
        specialisation = binding.specialise_call(spec, "sm_90a", 132)
        for parameter, value in zip(specialisation.parameters, binding.arguments(spec, specialisation), strict=True):
            if isinstance(value, int):
                assert value % parameter.divisor == 0, (options, parameter)
        divisors = {p.name: p.divisor for p in specialisation.parameters}
        assert divisors["mask_ptr"] == 1 and (divisors["q_ptr"] == 16) == spec.aligned


def test_the_grid_covers_every_row_once(make_spec) -> None:
    for length in (0, 1, 63, 64, 65, 1000):
        spec = make_spec(2, 6, 3, length, 50)
        specialisation = binding.specialise_call(spec, "sm_90a", 132)
        block_m = dict(specialisation.constants)["BLOCK_M"]
        assert binding.grid(spec, specialisation, 132) == math.ceil(length / block_m) * 12
    assert binding.grid(make_spec(0), specialisation, 132) == 0


def test_hashes_are_of_the_sources_and_change_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = kernel_hashes()
    assert set(hashes) == set(KERNELS)
    # those of a backward pass that live in one file share one
    assert len(set(hashes.values())) == len({kernel.sources for kernel in KERNELS.values()})
    from flashcore import sources

    source = KERNELS["empty"].sources[0]
    (tmp_path / source).parent.mkdir(parents=True)
    (tmp_path / source).write_bytes((PACKAGE / source).read_bytes())
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    kernel_hash.cache_clear()
    try:
        assert kernel_hash("empty") == hashes["empty"]
        kernel_hash.cache_clear()
        (tmp_path / source).write_text("changed")
        assert kernel_hash("empty") != hashes["empty"]
    finally:
        kernel_hash.cache_clear()


def _imports(module: str) -> set[str]:
    """The files of FlashCore that a module is made of, itself included, as `Kernel.sources` names them."""
    source = f"{module.removeprefix('flashcore.').replace('.', '/')}.py"
    found = {source}
    for node in ast.walk(ast.parse((PACKAGE / source).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashcore"):
            found |= _imports(node.module)
    return found


# What a module imports only for the type of a field that its kernel has not. Among its sources they would make the record of
# its binaries stale, which are the same: they go there with the next verification.
NO_PART_OF_IT = {"hopper_backward_wide": {"kernels/hopper/backward_turns.py", "kernels/hopper/progress.py"}}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_sources_of_a_kernel_are_all_that_its_module_imports(kernel: Kernel) -> None:
    imported = _imports(kernel.module) - NO_PART_OF_IT.get(kernel.id, set())
    assert set(kernel.sources) == imported and len(set(kernel.sources)) == len(kernel.sources)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_for_one_triton_is_for_the_one_that_builds_wheels(kernel: Kernel) -> None:
    assert kernel.triton is None or any(wanted.startswith(f"triton=={kernel.triton}") for wanted in requires("flashcore"))


def test_what_is_made_for_fewer_calls_is_preferred() -> None:
    assert list(BINDINGS) == ["small", "hopper", "portable"]


@pytest.mark.parametrize(("impl", "binding"), BINDINGS.items(), ids=BINDINGS)
def test_a_binding_and_its_kernel_name_each_other(impl: str, binding: Binding) -> None:
    assert impl == binding.IMPL and KERNELS[binding.KERNEL].binding is binding
    for arch in KERNELS[binding.KERNEL].archs:
        for specialisation in binding.shipped(arch):
            assert specialisation.kernel == binding.KERNEL and 1 <= specialisation.cluster <= MAX_CLUSTER
            assert binding.matrix_instruction(specialisation, arch) in (None, "HMMA", "HGMMA", "UTCHMMA")


def test_the_version_is_the_packages() -> None:
    assert flashcore.__version__ == version("flashcore")
