"""The spaces: every choice can be reached, nothing that does not fit is proposed, and each point is a binary of its own."""

import itertools

import pytest

from flashcore.errors import ArgumentValueError
from flashcore.kernels.hopper.config import HopperConfig
from flashcore.kernels.portable.config import PortableConfig
from flashcore.kernels.registry import KERNELS
from flashcore.search.kernels import SEARCHABLE
from flashcore.search.schema import Problem


def problem(impl: str, seqlen: int, head_dim: int, **more: object) -> Problem:
    sizes = {"batch": 1, "heads": 8, "heads_k": 8, "seqlen_q": seqlen, "seqlen_k": seqlen, "head_dim": head_dim}
    return Problem(**{"impl": impl, **sizes, "head_dim_v": head_dim, **more})


PROBLEMS = {
    "hopper": [problem("hopper", 4096, head_dim) for head_dim in (64, 96, 128, 192, 256)],
    "small": [problem("small", seqlen, head_dim) for head_dim in (32, 64, 128) for seqlen in (32, 197, 512)],
    "portable": [problem("portable", 512, head_dim) for head_dim in (64, 128, 256)],
}


@pytest.mark.parametrize("impl", SEARCHABLE)
def test_every_choice_fits_some_problem(impl: str) -> None:
    searchable = SEARCHABLE[impl]
    reached = {
        (name, value)
        for one in PROBLEMS[impl]
        for config in searchable.space(one)
        for name, value in searchable.values(config).items()
    }
    assert reached == {(name, value) for name, values in searchable.choices.items() for value in values}


@pytest.mark.parametrize("one", [one for problems in PROBLEMS.values() for one in problems], ids=lambda one: one.name)
def test_the_space_is_what_fits_and_each_point_is_another_binary(one: Problem) -> None:
    searchable = SEARCHABLE[one.impl]
    configs = list(searchable.space(one))
    assert configs and len(set(configs)) == len(configs)
    for config in configs[:: max(1, len(configs) // 20)]:
        assert searchable.fits(one, config) and searchable.configure(searchable.values(config)) == config
    keys = {searchable.form.specialise(searchable.spec(one), config).key for config in configs[:50]}
    assert len(keys) == len(configs[:50])
    points = [searchable.configure(dict(zip(searchable.choices, values, strict=True))) for values in _every_tenth(searchable)]
    for config in set(points) - set(configs):
        assert not searchable.fits(one, config)


def _every_tenth(searchable) -> list[tuple[object, ...]]:
    return list(itertools.product(*searchable.choices.values()))[::10]


@pytest.mark.parametrize("impl", SEARCHABLE)
def test_every_shipped_form_fits_and_the_incumbent_is_the_hand_chosen_one(impl: str) -> None:
    searchable = SEARCHABLE[impl]
    for one in PROBLEMS[impl]:
        incumbent = searchable.incumbent(one, 132)
        assert searchable.fits(one, incumbent)
        assert incumbent == searchable.binding.hand_chosen(searchable.spec(one), "sm_90a", 132)
        assert searchable.specialise(one, incumbent).kernel in KERNELS


def test_small_refuses_what_holds_too_few_keys_or_takes_too_many_blocks() -> None:
    small = SEARCHABLE["small"]
    few, many = problem("small", 512, 64), problem("small", 512, 64, batch=4)
    narrow = small.configure({"cluster": 2, "keys": 128, "block_n": 64})
    assert small.fits(problem("small", 256, 64), narrow) and not small.fits(few, narrow)
    wide = small.configure({"cluster": 4, "keys": 256, "block_n": 64})
    assert small.fits(few, wide) and not small.fits(many, wide)
    assert small.fits(many, small.configure({"cluster": 2, "keys": 256, "block_n": 64}))


@pytest.mark.parametrize(
    ("config", "head_dim", "fits"),
    [
        # ptxas serialises the products of those that do not fit (C7512)
        (HopperConfig(3, 128, 1, 2), 64, True),
        (HopperConfig(3, 128, 1, 2, q_registers=True), 64, False),
        (HopperConfig(2, 256, 1, 2), 64, False),
        (HopperConfig(2, 128, 1, 2, q_registers=True), 128, True),
        (HopperConfig(3, 64, 1, 2), 128, True),
        (HopperConfig(3, 64, 1, 2, q_registers=True), 128, False),
    ],
)
def test_hopper_refuses_what_the_registers_do_not_hold(config: HopperConfig, head_dim: int, fits: bool) -> None:
    assert config.fits(head_dim, head_dim) == fits


def test_portable_refuses_sums_that_no_thread_has_registers_for() -> None:
    assert PortableConfig(128, 128, 4, 1, 1).fits("sm_90a", 64, 2)
    assert not PortableConfig(128, 256, 4, 1, 1).fits("sm_90a", 64, 2)
    assert PortableConfig(256, 128, 8, 1, 1).fits("sm_90a", 64, 2)


@pytest.mark.parametrize(
    ("impl", "change", "words"),
    [
        ("small", {"seqlen_q": 4096, "seqlen_k": 4096}, "takes at most"),
        ("hopper", {"dtype": "fp32"}, "takes float16 and bfloat16"),
        ("small", {"softcap": 5.0}, "no softcap"),
        ("hopper", {"mask": "bool"}, "takes no mask"),
        ("portable", {"heads_k": 3}, "allowed: a divisor"),
    ],
)
def test_a_problem_that_the_kernel_does_not_take_is_refused(impl: str, change: dict, words: str) -> None:
    with pytest.raises(ArgumentValueError, match=words):
        SEARCHABLE[impl].spec(problem(impl, 512, 64).model_copy(update=change))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cluster": 3, "keys": 128, "block_n": 64}, "cluster: got 3; allowed: 1, 2, 4"),
        ({"cluster": 2, "keys": 128}, "config: got cluster, keys; allowed: exactly cluster, keys, block_n"),
    ],
)
def test_values_that_are_no_point_of_the_space_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ArgumentValueError, match=words):
        SEARCHABLE["small"].configure(values)
