"""Nsight Compute's page, read: what is in it, what is not, and what is no page at all."""

import pytest

from flashcore.errors import ProfilerError
from flashcore.profile import metrics
from flashcore.profile.ncu_page import number, parse

ASKED, _ = metrics.choose(None)
TENSOR = metrics.TENSOR.names[0]
DURATION = metrics.DURATION.names[0]


def test_a_page_between_other_lines_is_read(page) -> None:
    (kernel,) = parse(page(), ASKED)
    assert (kernel.name, kernel.grid, kernel.block) == ("hopper_forward", "(132, 1, 1)", "(384, 1, 1)")
    assert kernel.us == pytest.approx(5.12) and kernel.readings[DURATION].unit == "us"
    assert kernel.value(metrics.TENSOR) == 41.5 and kernel.value(metrics.REGISTERS) == 168
    assert kernel.value(metrics.SHARED) == 200704 and kernel.dram_bytes == 3 * 2**20
    assert [reason for reason, _, _ in kernel.stalls[:3]] == ["gmma", "long_scoreboard", "math_pipe_throttle"]
    assert kernel.stalls[0][1:] == (4.0, pytest.approx(0.4))
    assert sum(share for _, _, share in kernel.stalls) == pytest.approx(1)


def test_kernels_keep_their_order_and_names_with_commas_and_quotes(page) -> None:
    name = 'void fill<float, "x">(Array<char*, 1>, int)'
    first, second = parse(page(({"Kernel Name": name, DURATION: "1,000"}, {"Grid Size": "(8, 4, 1)"})), ASKED)
    assert (first.name, first.us) == (name, 1.0) and (second.name, second.grid) == ("hopper_forward", "(8, 4, 1)")


def test_what_ncu_has_no_value_for_is_none_and_not_zero(page) -> None:
    gone = metrics.STALL_NAME.format("barrier")
    text = page(({TENSOR: "n/a", metrics.DRAM_READ.names[0]: "(!) n/a", metrics.L2.names[0]: "nan"},), without=(gone,))
    (kernel,) = parse(text, ASKED)
    assert kernel.value(metrics.TENSOR) is None and kernel.readings[TENSOR].value is None
    assert kernel.dram_bytes is None and kernel.value(metrics.L2) is None
    assert gone not in kernel.readings and "barrier" not in [reason for reason, _, _ in kernel.stalls]


def test_a_metric_by_its_other_name_is_found(page) -> None:
    other = metrics.TENSOR.names[1]
    (kernel,) = parse(page(readings={other: ("%", "7.5")}, without=(TENSOR,)), [*ASKED, other])
    assert kernel.value(metrics.TENSOR) == 7.5


@pytest.mark.parametrize(("unit", "us"), [("ns", 5.12), ("usecond", 5120), ("ms", 5.12e6), ("s", 5.12e9)])
def test_every_unit_of_time_comes_to_microseconds(page, unit: str, us: float) -> None:
    (kernel,) = parse(page(readings={DURATION: (unit, "5,120")}), ASKED)
    assert kernel.us == pytest.approx(us)


def test_sizes_come_to_bytes_whatever_they_are_told_in(page) -> None:
    told = {metrics.L2_BYTES.names[0]: ("Mbyte", "1.5"), metrics.SHARED.names[0]: ("Kbyte/block", "2.048")}
    (kernel,) = parse(page(readings=told), ASKED)
    assert kernel.value(metrics.L2_BYTES) == 1.5e6 and kernel.value(metrics.SHARED) == 2048
    assert kernel.readings[metrics.SHARED.names[0]].unit == "byte/block"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("41.50", 41.5),
        ("1,048,576", 1048576),
        ("5,120", 5120),
        ("1,234.5", 1234.5),
        ("1.234,5", 1234.5),
        ("1.048.576", 1048576),
        ("0,125", 0.125),
        ("12,5", 12.5),
        ("1.234", 1.234),
        ("1 048 576", 1048576),
        ("1\u202f048,5", 1048.5),
        ("1'048'576.25", 1048576.25),
        ("6.5 (3; 3.5)", 6.5),
        ("-2", -2),
        ("1e3", 1000),
        ("n/a", None),
        ("", None),
        ("inf", None),
    ],
)
def test_numbers_of_every_locale(text: str, value: float | None) -> None:
    assert number(text) == value


def _cut(text: str) -> str:
    """The page with the last two cells of its kernel's row gone."""
    row = next(line for line in text.splitlines() if line.startswith('"0"'))
    return text.replace(row, row.rsplit(",", 2)[0])


def _without_units(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith('""'))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: "", "no table of metrics; its first lines were: none at all"),
        (lambda text: "==PROF== Connected to process 1\n", "no table of metrics; its first lines were: ==PROF=="),
        (lambda text: "\n".join(line for line in text.splitlines() if not line.startswith('"0"')), "no kernel in it"),
        (_without_units, "no row of units"),
        (_cut, "it was cut off"),
        (lambda text: text.replace('"Kernel Name"', '"Kernel Name","Metric Name"'), "details page"),
        (lambda text: text.replace("41.50", "many"), f"{TENSOR} cannot be read: 'many'"),
        (lambda text: text.replace('"5,120"', '"n/a"'), "no duration of hopper_forward"),
        (lambda text: text.replace('"5,120"', '"0"'), "no duration of hopper_forward"),
        (lambda text: text.replace("nsecond", "fortnight"), "in 'fortnight'; allowed: ns"),
    ],
)
def test_what_is_no_page_is_an_error_and_never_an_empty_table(page, spoil, said: str) -> None:
    with pytest.raises(ProfilerError) as raised:
        parse(spoil(page()), ASKED)
    assert said in str(raised.value)


def test_what_was_not_asked_for_is_not_read(page) -> None:
    (kernel,) = parse(page().replace("41.50", "many"), [name for name in ASKED if name != TENSOR])
    assert TENSOR not in kernel.readings


def test_a_chip_is_asked_only_for_what_it_has() -> None:
    have = {name.partition(".")[0] for metric in metrics.METRICS for name in metric.names}
    asked, absent = metrics.choose(have)
    assert absent == [] and asked == ASKED
    asked, absent = metrics.choose(have - {TENSOR.partition(".")[0], metrics.STALL_NAME.format("gmma").partition(".")[0]})
    assert absent == ["stall gmma"] and metrics.TENSOR.names[1] in asked and TENSOR not in asked
    assert set(metrics.choose(set())[0]) == {metrics.REGISTERS.names[0], metrics.SHARED.names[0]}
