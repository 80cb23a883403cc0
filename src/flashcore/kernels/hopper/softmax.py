"""The online softmax of a warpgroup's rows: running maximum and sum, all in fp32 (FlashAttention-2, Dao 2023, section 3.1)."""

from flashcore.kernels.hopper.gluon_api import gl, gluon

LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def exp2_partly_emulated(outputs, inputs):
    """PTX: 2^x of every number that a thread holds, x <= 0, each eighth of them by fused multiply-adds.

    The exp2 unit gives 16 results a clock; at head dim 64 it has as much to do as the matrix unit, and the multiply-add units
    are free (FlashAttention-4 does so on Blackwell). x = i + f with i an integer and |f| <= 1/2: 2^f is the polynomial of
    degree 3 with the least relative error (7.5e-5, a sixth of fp16's rounding).
    """
    (results,), (numbers,) = outputs, inputs
    lines = ["{ .reg .f32 x, t, r, f, p, e; .reg .b32 i;"]
    for index, (result, number) in enumerate(zip(results, numbers, strict=True)):
        if index % 8 < 7:
            lines.append(f"ex2.approx.ftz.f32 {result}, {number};")
            continue
        lines.append(f"max.NaN.f32 x, {number}, 0fC2FC0000;")  # -126: the least exponent of a normal number
        # 1.5 * 2^23 + 127: adding it rounds to an integer, which is then in the low bits with an exponent's bias on it
        lines.append("add.rn.f32 t, x, 0f4B40007F; sub.rn.f32 r, t, 0f4B40007F; sub.rn.f32 f, x, r;")
        lines.append("fma.rn.f32 p, f, 0f3D61FBAE, 0f3E786F0D; fma.rn.f32 p, p, f, 0f3F31798D; fma.rn.f32 p, p, f, 0f3F7FFB49;")
        # 2^i by its bits, and a product rather than a sum of exponents, so that NaN stays NaN
        lines.append(f"mov.b32 i, t; shl.b32 i, i, 23; mov.b32 e, i; mul.rn.f32 {result}, p, e;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def hold_until_summed(outputs, inputs):
    """PTX: something that never happens, and that ptxas cannot place before the sums of a row's exponentials are there.

    It moves a wait for products that stands behind the softmax in front of it, where nothing tells it not to.
    """
    ((first, *others),) = inputs
    lines = ["{ .reg .pred p; .reg .f32 sum;", f"mov.f32 sum, {first};"]
    lines += [f"add.f32 sum, sum, {other};" for other in others]
    return "\n".join([*lines, "setp.lt.f32 p, sum, 0f00000000;", "@p nanosleep.u32 0; }"])


@gluon.jit
def cap_scores(s, cap_scale):
    """tanh(s * scale / softcap), with cap_scale = 2 * log2(e) * scale / softcap; the softcap joins the softmax's scale."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(s * cap_scale))


@gluon.jit
def thread_sums(p):
    """[rows, 8]: sums over every eighth column: each thread adds what it holds, and nothing crosses threads inside the loop."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def finite_pivot(m_i):
    """A row that has attended nothing yet has m_i = -inf; any finite pivot gives it p = 0."""
    return gl.where(m_i == float("-inf"), 0.0, m_i)


@gluon.jit
def first_block(s, scale):
    """(p, m_i, l_i) of a row's first block of scores; l_i has 8 partial sums a row until `finish`."""
    m_i = gl.max(s, 1)
    p = gl.exp2(s * scale - (finite_pivot(m_i) * scale)[:, None])
    return p, m_i, thread_sums(p)


@gluon.jit
def next_block(s, m_i, l_i, scale, EMULATE_EXP2: gl.constexpr):
    """(p, alpha, m_i, l_i) after one more block; what was accumulated so far must be multiplied by alpha."""
    m_new = gl.maximum(m_i, gl.max(s, 1))
    pivot = finite_pivot(m_new)
    alpha = gl.exp2((m_i - pivot) * scale)
    x = s * scale - (pivot * scale)[:, None]
    if EMULATE_EXP2:
        p = gl.inline_asm(exp2_partly_emulated, ("=f", "f"), [x], x.type, True)
    else:
        p = gl.exp2(x)
    l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + thread_sums(p)
    return p, alpha, m_new, l_i


@gluon.jit
def inverse_and_lse(m_i, l_row, scale):
    """(1 / l_row, natural log-sum-exp) by row; a row that attended nothing gives 0 and -inf."""
    attended = l_row != 0.0  # true of NaN, which must reach the results
    inverse = gl.where(attended, 1.0 / l_row, 0.0)
    lse = gl.where(attended, (m_i * scale + gl.log2(l_row)) * LN_2, float("-inf"))
    return inverse, lse


@gluon.jit
def finish(m_i, l_i, scale):
    """`inverse_and_lse` of partial sums."""
    return inverse_and_lse(m_i, gl.convert_layout(gl.sum(l_i, 1), m_i.type.layout), scale)
