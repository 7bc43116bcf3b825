"""What the chunked gated delta rule needs of each chunk before the state is known.

All chunks are prepared in parallel. `chunk.py` has the formulas.
"""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import dot
from et_moe.backends.cuda.triton.common.interpreter import is_interpreted
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens
from et_moe.backends.cuda.triton.gated_delta_net.gates import compute_gates

SQUARES = tl.constexpr(3)
"""Number of matrices `[CHUNK, CHUNK]` of a chunk: T beta, -T beta exp(G) / |k|, and P."""

FACTORS = tl.constexpr(3)
"""Number of vectors `[CHUNK]` of a chunk: factors of q S, of v' in the new state, and of S."""


@triton.jit
def _keep_and_add(beta_1, g_1, beta_2, g_2):
    """Sums g and keeps beta, as a step of a scan.

    beta takes part because the results of a scan are computed once. Other vectors are computed anew
    for every layout in which they meet a matrix.
    """
    return beta_2, g_1 + g_2


@triton.jit
def _exp2(x):
    """2^x of fp32, to within a few units in the last place; denormals become zero."""
    if is_interpreted():
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _double_blocks(x, a, level, DTYPE: tl.constexpr):
    """From the inverses of I + a's diagonal blocks of 2^level rows to those of twice as many rows.

    inv([[P, 0], [B, Q]]) = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]]. For all blocks at once, with X the
    inverse of the block diagonal and B the blocks below it: X <- X - X B X. No entry of a is larger
    than 1, nor one of X, since the delta rule is a contraction. So operands in fp16 are as good as
    tf32, and twice as fast.

    Args:
        x, a: fp32 `[..., SIZE, SIZE]`; x is block diagonal.
        DTYPE: of the operands of products.
    """
    # B has the entries whose row and column lie in neighbouring blocks: their indices, divided by
    # the size of a block, differ in the lowest bit alone.
    index = tl.arange(0, x.shape[-1]) >> level
    between = tl.where(index[:, None] ^ index[None, :] == 1, a, 0.0).to(DTYPE)
    xb = tl.dot(x.to(DTYPE), between, input_precision="tf32x3")
    return x - tl.dot(xb.to(DTYPE), x.to(DTYPE), input_precision="tf32x3")


@triton.jit
def _invert_unit_lower(a, LOG_SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular `a [2^LOG_SIZE, 2^LOG_SIZE]`, fp32.

    The size of inverted blocks doubles from step to step. Up to 16 rows, each block is computed by
    warps of its own, which need not wait for others.
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
def _compute_inverse_norm(x):
    """1 / |x| of each row of x `[CHUNK, DK]`, as the contract defines it: fp32 `[CHUNK]`."""
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
    """Prepares one chunk of one value head.

    It fills squares `[Hv, chunks, SQUARES, CHUNK, CHUNK]` and factors
    `float32 [Hv, chunks, FACTORS, CHUNK]`. With RAW_GATES, b and a are yet to become beta and g;
    without, they are beta and g.
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
        beta, g = compute_gates(beta, g, a_log, tl.load(dt_bias_ptr + head).to(tl.float32))
    gate = (tl.where(is_valid, beta, 0.0), tl.where(is_valid, g, 0.0))
    beta, decay = tl.associative_scan(gate, 0, _keep_and_add)
    last = tl.sum(tl.where(token == CHUNK - 1, decay, 0.0))
    k_scale, q_scale = _compute_inverse_norm(k), _compute_inverse_norm(q) * DK**-0.5
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
    t = _invert_unit_lower(a, LOG_CHUNK, tl.float32 if element == tl.float32 else tl.float16)
    t *= beta[None, :]
    tl.store(square, t.to(element))
    tl.store(square + CHUNK * CHUNK, (t * (-tl.exp(decay) * k_scale)[None, :]).to(element))
