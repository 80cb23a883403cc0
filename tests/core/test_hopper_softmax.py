"""The exponentials that the Hopper kernel computes by multiply-adds: its PTX, carried out here in float32."""

import numpy as np
import pytest

pytest.importorskip("triton")

from flashcore.kernels.hopper.softmax import exp2_partly_emulated

NUMBERS = 16
# what softmax.py and docs/notes/hopper-forward.md say of the polynomial; float32's own rounding comes on top
RELATIVE_ERROR = 7.5e-5


def _run(ptx: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The registers after the PTX, with x as every input. fma rounds twice here, which is less exact than the GPU."""
    registers: dict[str, np.ndarray] = {f"${NUMBERS + i}": x for i in range(NUMBERS)}

    def value(text: str) -> np.ndarray | np.float32:
        if text in registers:
            return registers[text].view(np.float32)
        assert text.startswith("0f"), text
        return np.array(int(text[2:], 16), np.uint32).view(np.float32)[()]

    float_operations = {
        "ex2.approx.ftz.f32": np.exp2,
        "max.NaN.f32": np.maximum,  # which keeps NaN too
        "add.rn.f32": np.add,
        "sub.rn.f32": np.subtract,
        "mul.rn.f32": np.multiply,
        "fma.rn.f32": lambda a, b, c: a * b + c,
    }
    for statement in ptx.strip("{}\n ").replace("\n", " ").split(";"):
        if not statement.strip() or ".reg" in statement:
            continue
        name, operands = statement.split(maxsplit=1)
        target, *sources = (operand.strip() for operand in operands.split(","))
        if name in float_operations:
            registers[target] = float_operations[name](*map(value, sources)).astype(np.float32)
        elif name == "mov.b32":
            registers[target] = registers[sources[0]]
        else:
            assert name == "shl.b32", name
            registers[target] = registers[sources[0]].view(np.uint32) << np.uint32(int(sources[1], 0))
    return registers


@pytest.fixture(scope="module")
def ptx() -> str:
    names = [f"${i}" for i in range(2 * NUMBERS)]
    return exp2_partly_emulated((names[:NUMBERS],), (names[NUMBERS:],))


def test_an_eighth_is_emulated_and_as_exact_as_it_is_said_to_be(ptx: str) -> None:
    assert ptx.count("ex2.approx") == NUMBERS * 7 // 8
    x = -np.concatenate([np.linspace(0, 20, 100_001), np.linspace(20, 125.9, 100_001)]).astype(np.float32)
    results = _run(ptx, x)
    exact = np.exp2(x.astype(np.float64))
    errors = [np.max(np.abs(results[f"${i}"] / exact - 1)) for i in range(NUMBERS)]
    emulated = [error for i, error in enumerate(errors) if i % 8 == 7]
    assert max(emulated) < RELATIVE_ERROR + 5e-7
    assert min(emulated) > 1e-5  # else it was not the polynomial that ran


def test_what_is_far_below_counts_as_nothing_and_nan_as_nan(ptx: str) -> None:
    low = _run(ptx, np.array([-126.0, -1e4, -np.inf], np.float32))["$7"]
    assert np.all((low > 0) & (low < 2.0**-125))
    assert np.isnan(_run(ptx, np.array([np.nan], np.float32))["$7"]).all()
