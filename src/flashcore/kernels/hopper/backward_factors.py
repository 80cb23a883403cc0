"""What a Hopper backward pass multiplies scores and log-sum-exps by. Needs no compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashcore.kernels.specialisation import Parameter
from flashcore.spec import MAX_FACTOR, AttentionSpec


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of a pass, in double precision.

    With row_lse = lse * `lse` of each row, p = 2^((q k^T + row_lse) * `exponent`); with a softcap, `cap` is there and
    p = 2^(t * `exponent` + row_lse), t = 1 - 2 / (1 + 2^(q k^T * `cap`)), which is tanh(q k^T * scale / softcap).
    """

    lse: float
    exponent: float
    cap: float | None

    @classmethod
    def of(cls, call: AttentionSpec) -> Factors:
        log2_e = math.log2(math.e)
        if call.softcap == 0:
            return cls(lse=-1 / call.scale, exponent=call.scale * log2_e, cap=None)
        # beyond float32 the cap is reached by any score but 0, as by this
        cap = min(2 * log2_e * call.scale / call.softcap, MAX_FACTOR)
        return cls(lse=-log2_e, exponent=call.softcap * log2_e, cap=cap)


def factor_parameters(*, softcap: bool) -> tuple[list[Parameter], dict[str, int | bool | str | None]]:
    """A kernel's parameters for the factors of scores and results, and the constants in place of those that it has not."""
    parameters = [Parameter("exponent_scale", "fp32"), Parameter("scale", "fp32")]
    if not softcap:
        return parameters, {"cap_scale": None}
    return [*parameters, Parameter("cap_scale", "fp32")], {}


def factor_arguments(call: AttentionSpec) -> tuple[float, ...]:
    """What fills factor_parameters."""
    factors = Factors.of(call)
    return (factors.exponent, call.scale, *(() if factors.cap is None else (factors.cap,)))
