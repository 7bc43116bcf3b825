"""RMSNorm of heads and partial rotary position embedding (Su et al., "RoFormer", 2021)."""

import triton
import triton.language as tl


@triton.jit
def sincos(x):
    """sin and cos of fp32 angles up to 2^18, to within 1e-7; their shape is that of x.

    The method is that of the Cephes library: reduction after Cody and Waite, then polynomials.
    The functions of libdevice reduce large angles through local memory.
    """
    # The nearest multiple of pi / 2, which is subtracted in three parts.
    n = tl.floor(x * 0.6366197723675814 + 0.5)
    r = tl.fma(n, -1.5703125, x)
    r = tl.fma(n, -4.837512969970703125e-4, r)
    r = tl.fma(n, -7.54978995489188216e-8, r)
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z
    cos += z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = n.to(tl.int32)
    odd = (quadrant & 1) == 1
    sin, cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return (
        tl.where((quadrant & 2) == 2, -sin, sin),
        tl.where(((quadrant + 1) & 2) == 2, -cos, cos),
    )


@triton.jit
def load_heads(row_ptr, mask, HALF: tl.constexpr, DIM: tl.constexpr):
    """Loads M heads for `norm_and_rotate`.

    Args:
        row_ptr, mask: `[M]`, a pointer to the first column of each head, and whether to load it.
        HALF: half the number of columns that are rotated.

    Returns:
        `[M, DIM]` twice: the heads, and for each column the one that it is rotated with, or itself
        where it is not rotated.
    """
    column = tl.arange(0, DIM)
    partner = tl.where(column < HALF, column + HALF, column)
    partner = tl.where((column >= HALF) & (column < 2 * HALF), column - HALF, partner)
    rows = mask[:, None]
    x = tl.load(row_ptr[:, None] + column[None, :], mask=rows, other=0.0)
    return x, tl.load(row_ptr[:, None] + partner[None, :], mask=rows, other=0.0)


@triton.jit
def load_frequencies(inv_freq_ptr, HALF: tl.constexpr, DIM: tl.constexpr):
    """The frequency by which each column of a head is rotated, fp32 `[DIM]`; 0 for none.

    inv_freq_ptr: fp32 `[HALF]`.
    """
    column = tl.arange(0, DIM)
    pair = tl.where(column < HALF, column, column - HALF)
    return tl.load(inv_freq_ptr + pair, mask=column < 2 * HALF, other=0.0)


@triton.jit
def norm_and_rotate(
    heads, weights, sin, cos, HALF: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr
):
    """RMSNorm of heads with a zero-centred weight, then rotation of their first 2 * HALF columns.

    Args:
        heads: M heads, as from `load_heads`.
        weights: the norm's weight, loaded as if it were a single head.
        sin, cos: fp32 `[DIM]`, of position * frequency.

    Returns:
        fp32 `[M, DIM]`.
    """
    x, partner = heads[0].to(tl.float32), heads[1].to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + EPS)[:, None]
    x = x * scale * (1.0 + weights[0].to(tl.float32))
    partner = partner * scale * (1.0 + weights[1].to(tl.float32))
    sin = tl.where(tl.arange(0, DIM) < HALF, -sin, sin)
    return x * cos[None, :] + partner * sin[None, :]
