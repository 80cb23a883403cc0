"""Softcap in the backward kernels. With raw scores s = q k^T:

    t = tanh(s * scale / softcap),   p = exp(softcap * t - lse),   ds = p * (1 - t^2) * (dp - delta)

ds is computed a step later than p, when t is gone. What is kept of the slope 1 - t^2 is its product with p, in the 16 bits in
which p is kept: that is rounded once, where p and a slope of 16 bits would be rounded one by one.
"""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.constexpr_function
def _reciprocals(outputs, inputs):
    """PTX: 1 / x of every number that a thread holds, to a unit in the last place; a division takes five instructions."""
    (results,), (numbers,) = outputs, inputs
    return "\n".join(f"rcp.approx.ftz.f32 {result}, {number};" for result, number in zip(results, numbers, strict=True))


@gluon.jit
def cap_scores(s, cap_scale, one):
    """tanh(s * scale / softcap), with cap_scale = 2 * log2(e) * scale / softcap; -inf where `one` is -inf, else it is 1."""
    x = 1.0 + gl.exp2(s * cap_scale)
    return one - 2.0 * gl.inline_asm(_reciprocals, ("=f", "f"), [x], x.type, True)


@gluon.jit
def weights_and_slopes(t, exponent_scale, row_lse):
    """(p, p * (1 - t^2)) of capped scores t, with exponent_scale = softcap * log2(e) and row_lse = -lse * log2(e).

    t = -inf, of a pair that is not attended, gives 0 and 0.
    """
    p = gl.exp2(t * exponent_scale + row_lse)
    return p, p * gl.maximum(1.0 - t * t, 0.0)
