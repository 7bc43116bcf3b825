"""What the chunked gated delta rule needs of each chunk before the state comes, in parallel.

See `gated_delta_chunk` for the formulas.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.interpreter import is_interpreted
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens
from et_moe.backends.cuda.triton.gated_delta_net.gates import delta_gates

SQUARES = tl.constexpr(3)
"""Matrices `[CHUNK, CHUNK]` of a chunk: T beta, -T beta exp(G) / |k|, P."""

FACTORS = tl.constexpr(3)
"""Vectors `[CHUNK]` of a chunk: what multiplies q S, v' on its way into the state, and S."""


@triton.jit
def _keep_and_add(beta_1, g_1, beta_2, g_2):
    """Sums g and leaves beta alone: a scan's results are computed once, whereas other vectors are
    computed anew for every layout in which they meet a matrix."""
    return beta_2, g_1 + g_2


@triton.jit
def _exp2(x):
    """2^x of float32, within a few units in the last place, without care for denormals."""
    if is_interpreted():
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _double_blocks(x, a, level, DTYPE: tl.constexpr):
    """With x the inverses of the diagonal blocks of 2^level rows of I + a: those of twice as many.

    inv([[P, 0], [B, Q]]) = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]], for all blocks at once: with X the
    inverse of the block diagonal and B what lies between, X <- X - X B X. Entries of a and, the
    delta rule being a contraction, of X are at most 1, so fp16 operands are as good as tf32 and
    twice as fast. x and a may be batches.
    """
    # The level at which two indices part is that of the highest bit in which they differ.
    index = tl.arange(0, x.shape[-1]) >> level
    between = tl.where(index[:, None] ^ index[None, :] == 1, a, 0.0).to(DTYPE)
    xb = tl.dot(x.to(DTYPE), between, input_precision="tf32x3")
    return x - tl.dot(xb.to(DTYPE), x.to(DTYPE), input_precision="tf32x3")


@triton.jit
def _unit_lower_inverse(a, LOG_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular `a`, doubling the size of inverted blocks.

    Blocks of 16 first, each on warps of its own, which need not wait for others.
    """
    SIZE: tl.constexpr = 1 << LOG_SIZE
    BLOCKS: tl.constexpr = SIZE // 16
    i, block = tl.arange(0, 16), tl.arange(0, BLOCKS)
    on_diagonal = (block[:, None] == block[None, :])[:, None, :, None]
    small = tl.sum(tl.where(on_diagonal, a.reshape(BLOCKS, 16, BLOCKS, 16), 0.0), 2)
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    x = x - tl.where(i[:, None] ^ i[None, :] == 1, small, 0.0)
    for level in tl.static_range(1, 4):
        x = _double_blocks(x, small, level, DTYPE)
    x = tl.where(on_diagonal, x[:, :, None, :], 0.0).reshape(SIZE, SIZE)
    for level in tl.static_range(4, LOG_SIZE):
        x = _double_blocks(x, a, level, DTYPE)
    return x


@triton.jit
def _inverse_norm(x):
    """1 / |x| of each row."""
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit
def prepare_kernel(
    q_ptr,
    k_ptr,
    b_ptr,
    a_ptr,
    a_log_ptr,
    dt_bias_ptr,
    num_tokens_ptr,
    squares_ptr,
    factors_ptr,
    tokens,
    K_ROW: tl.constexpr,
    K_COLUMN: tl.constexpr,
    GATE_ROW: tl.constexpr,
    B_COLUMN: tl.constexpr,
    A_COLUMN: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    RAW_GATES: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
):
    """squares `[Hv, chunks, SQUARES, CHUNK, CHUNK]` and factors `fp32 [Hv, chunks, FACTORS, CHUNK]`
    of one chunk and value head.

    RAW_GATES: `b` and `a` are yet to become beta and g.
    """
    wait_for_previous()
    CHUNK: tl.constexpr = 1 << LOG_CHUNK
    head = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * CHUNK
    valid = count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS) - start
    if valid <= 0:
        return
    token = tl.arange(0, CHUNK)
    dk = tl.arange(0, DK)
    is_valid = token < valid
    inside = is_valid[:, None]
    qk_tile = start * K_ROW + head // GROUP * DK + token[:, None] * K_ROW + dk[None, :]
    k = tl.load(k_ptr + K_COLUMN + qk_tile, mask=inside, other=0.0)
    q = tl.load(q_ptr + qk_tile, mask=inside, other=0.0)
    gate = start * GATE_ROW + token * GATE_ROW + head
    beta = tl.load(b_ptr + gate + B_COLUMN, mask=is_valid, other=0.0).to(tl.float32)
    g = tl.load(a_ptr + gate + A_COLUMN, mask=is_valid, other=0.0).to(tl.float32)
    if RAW_GATES:
        a_log = tl.load(a_log_ptr + head).to(tl.float32)
        beta, g = delta_gates(beta, g, a_log, tl.load(dt_bias_ptr + head).to(tl.float32))
    gate = (tl.where(is_valid, beta, 0.0), tl.where(is_valid, g, 0.0))
    beta, decay = tl.associative_scan(gate, 0, _keep_and_add)
    last = tl.sum(tl.where(token == CHUNK - 1, decay, 0.0))
    k_scale, q_scale = _inverse_norm(k), _inverse_norm(q) * DK**-0.5
    chunk = head * tl.cdiv(tokens, CHUNK).to(tl.int64) + tl.program_id(0)
    factors = factors_ptr + chunk * (FACTORS * CHUNK) + token
    tl.store(factors, tl.exp(decay) * q_scale)
    tl.store(factors + CHUNK, tl.exp(last - decay) * k_scale)
    tl.store(factors + 2 * CHUNK, tl.exp(decay))

    squares_ptr += chunk * (SQUARES * CHUNK * CHUNK)
    square = squares_ptr + token[:, None] * CHUNK + token[None, :]
    element: tl.constexpr = squares_ptr.dtype.element_ty
    past, seen = token[:, None] > token[None, :], token[:, None] >= token[None, :]
    between = (decay[:, None] - decay[None, :]) * 1.4426950408889634  # log2(e)
    between = _exp2(tl.where(seen, between, float("-inf"))) * k_scale[None, :]
    p = dot(q, tl.trans(k), q_ptr) * q_scale[:, None] * between
    tl.store(square + 2 * CHUNK * CHUNK, p.to(element))
    a = dot(k, tl.trans(k), k_ptr) * (beta * k_scale)[:, None] * between
    a = tl.where(past, a, 0.0)
    t = _unit_lower_inverse(a, LOG_CHUNK, tl.float32 if element == tl.float32 else tl.float16)
    t *= beta[None, :]
    tl.store(square, t.to(element))
    tl.store(square + CHUNK * CHUNK, (t * (-tl.exp(decay) * k_scale)[None, :]).to(element))
