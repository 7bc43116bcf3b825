"""The gated delta rule over a whole prompt, in chunks (Yang et al., "Gated Delta Networks", 2024).

Let S be the state before a chunk, G_i the sum of g over the chunk's tokens up to i, and
A_ij = beta_i exp(G_i - G_j) k_i . k_j for j < i, else 0. The corrections
v'_i = beta_i (v_i - k_i^T S_i) of all tokens of the chunk solve a unit lower triangular system:

    T = (I + A)^-1,  P_ij = exp(G_i - G_j) q_i . k_j for j <= i
    v' = T beta (v - exp(G) k S)
    o = exp(G) q S + P v'
    S <- exp(G_last) S + (exp(G_last - G) k)^T v'

`prepare_kernel` makes, for all chunks at once, the matrices by which v, k S and v' are multiplied.
`_scan_kernel` carries the state from chunk to chunk and computes o on its way. o is rounded to the
dtype of q; `_norm_kernel` then applies the layer's gated norm. q and k are never normalised in
memory; their norms are factors of rows and columns. Only differences G_i - G_j <= 0 are
exponentiated. Tokens from `num_tokens` on count as k = v = beta = g = 0, which leaves S as it is.
S is fp32 within a call; a state of bf16 is rounded where it is left, and behind every page of rows.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.dependent_launch import wait_for_previous
from et_moe.backends.cuda.triton.common.dot import add_dot, dot
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.tokens import count_valid_tokens
from et_moe.backends.cuda.triton.gated_delta_net.gates import Gating, find_gates
from et_moe.backends.cuda.triton.gated_delta_net.places import StatePlaces, find_state
from et_moe.backends.cuda.triton.gated_delta_net.prepare import FACTORS, SQUARES, prepare_kernel
from et_moe.backends.cuda.triton.tuning import find_config, find_largest
from et_moe.backends.ops.sequences import PAGE_SIZE

LOG_CHUNK = {2: 6, 4: 4}
"""log2 of the tokens in a chunk, by the bytes of an element; fp32 takes more registers. Chunks fill
pages."""
LEAST_LOG_CHUNK = 4
"""That of prompts which are no longer."""
_PAGE = tl.constexpr(PAGE_SIZE)


@triton.jit
def _round_page(state, state_ptr, end, CHUNK: tl.constexpr):
    """The state behind a chunk that ends with row `end`, rounded to what it is kept in if a page
    ends there. Where each chunk is a page it stays bf16, which takes half the registers."""
    kept: tl.constexpr = state_ptr.dtype.element_ty
    if kept != tl.float32:
        if CHUNK == _PAGE:
            state = state.to(kept)
        else:
            is_end = end // _PAGE * _PAGE == end  # the interpreter knows no remainder of it
            state = tl.where(is_end, state.to(kept).to(tl.float32), state)
    return state


@triton.jit
def _advance_chunk(state, k, q, v, squares, factors, token, like, CHUNK: tl.constexpr):
    """Carries the state over a chunk.

    The product with v comes first, since it is the only one that need not wait for the last product
    of the chunk before.

    Args:
        state: fp32 or bf16 `[BLOCK_V, DK]`, transposed.
        k, q, v: `[CHUNK, DK]` twice, and `[CHUNK, BLOCK_V]`.
        squares, factors: pointers to what `prepare_kernel` made of the chunk, squares as a tile of
            pointers to the first matrix.
        like: a pointer to the dtype that products round their operands to.

    Returns:
        The state after the chunk, fp32, and o, fp32 `[CHUNK, BLOCK_V]`.
    """
    change = dot(tl.trans(v), tl.trans(tl.load(squares)), like)
    known = dot(state, tl.trans(k), like)
    change = add_dot(known, tl.trans(tl.load(squares + CHUNK * CHUNK)), change, like)
    o = dot(state, tl.trans(q), like) * tl.load(factors + token)[None, :]
    o = add_dot(change, tl.trans(tl.load(squares + 2 * CHUNK * CHUNK)), o, like)
    change *= tl.load(factors + CHUNK + token)[None, :]
    decayed = state.to(tl.float32) * tl.load(factors + 3 * CHUNK - 1)
    state = add_dot(change, k, decayed, like)
    return state, tl.trans(o)


@triton.jit
def _scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    squares_ptr,
    factors_ptr,
    state_ptr,
    slots_ptr,
    versions_ptr,
    num_tokens_ptr,
    out_ptr,
    tokens,
    K_ROW: tl.constexpr,
    K_COLUMN: tl.constexpr,
    V_ROW: tl.constexpr,
    V_COLUMN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    VERSIONS: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Carries BLOCK_V columns of one head's state through all chunks; o goes to `[T, HEADS * DV]`.
    What it leaves is version 0.

    Everything is transposed: value columns by tokens, or by keys. The result of a product is then
    where the next product, whose left operand it is, needs it in registers. So no warp waits for
    another, and only what other kernels made goes through shared memory.
    """
    wait_for_previous()
    CHUNK: tl.constexpr = 1 << LOG_CHUNK
    head = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    valid = count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS).to(tl.int32)
    if valid <= 0:
        return
    token = tl.arange(0, CHUNK)
    dk = tl.arange(0, DK)
    chunk = head * tl.cdiv(tokens, CHUNK).to(tl.int64)
    in_qk = token[:, None] * K_ROW + dk[None, :]
    in_v = token[:, None] * V_ROW + column[None, :]
    in_out = token[:, None] * (HEADS * DV) + column[None, :]
    in_square = token[:, None] * CHUNK + token[None, :]
    q_ptr += head // GROUP * DK
    k_ptr += K_COLUMN + head // GROUP * DK
    v_ptr += V_COLUMN + head * DV
    out_ptr += head * DV
    squares_ptr += chunk * (SQUARES * CHUNK * CHUNK)
    factors_ptr += chunk * (FACTORS * CHUNK)
    STATE: tl.constexpr = HEADS * DK * DV
    pool_ptr = state_ptr
    state_ptr = find_state(pool_ptr, slots_ptr, versions_ptr, STATE, VERSIONS)
    in_state = head * (DK * DV) + dk[:, None] * DV + column[None, :]
    state = tl.trans(tl.load(state_ptr + in_state))
    if CHUNK != _PAGE:
        state = state.to(tl.float32)
    whole = valid // CHUNK * CHUNK
    for begin in tl.range(0, whole, CHUNK, num_stages=STAGES):
        k, q, v = tl.load(k_ptr + in_qk), tl.load(q_ptr + in_qk), tl.load(v_ptr + in_v)
        squares = squares_ptr + in_square
        state, o = _advance_chunk(state, k, q, v, squares, factors_ptr, token, v_ptr, CHUNK)
        state = _round_page(state, pool_ptr, begin + CHUNK, CHUNK)
        tl.store(out_ptr + in_out, o.to(out_ptr.dtype.element_ty))
        k_ptr += CHUNK * K_ROW
        q_ptr += CHUNK * K_ROW
        v_ptr += CHUNK * V_ROW
        squares_ptr += SQUARES * CHUNK * CHUNK
        out_ptr += CHUNK * HEADS * DV
        factors_ptr += FACTORS * CHUNK
    if whole < valid:
        inside = (whole + token < valid)[:, None]
        k = tl.load(k_ptr + in_qk, mask=inside, other=0.0)
        q = tl.load(q_ptr + in_qk, mask=inside, other=0.0)
        v = tl.load(v_ptr + in_v, mask=inside, other=0.0)
        squares = squares_ptr + in_square
        state, o = _advance_chunk(state, k, q, v, squares, factors_ptr, token, v_ptr, CHUNK)
        state = _round_page(state, pool_ptr, valid, CHUNK)
        tl.store(out_ptr + in_out, o.to(out_ptr.dtype.element_ty), mask=inside)
    if versions_ptr is not None:  # found anew, since registers are scarce until here
        state_ptr = find_state(pool_ptr, slots_ptr, None, STATE, VERSIONS)
    tl.store(state_ptr + in_state, tl.trans(state.to(state_ptr.dtype.element_ty)))


@triton.jit
def _norm_kernel(
    z_ptr,
    norm_weight_ptr,
    num_tokens_ptr,
    out_ptr,
    tokens,
    Z_ROW: tl.constexpr,
    Z_COLUMN: tl.constexpr,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    EPS: tl.constexpr,
    HAS_NUM_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Replaces out `[T, HEADS, DV]` by its RMSNorm per head times SiLU(z). Padding becomes 0."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    dv = tl.arange(0, DV)[None, :]
    in_out = (token < tokens)[:, None]
    z_tile = z_ptr + (token * Z_ROW + Z_COLUMN + head * DV)[:, None] + dv
    z = tl.load(z_tile, mask=in_out, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + dv).to(tl.float32)
    wait_for_previous()
    inside = (token < count_valid_tokens(num_tokens_ptr, tokens, HAS_NUM_TOKENS))[:, None]
    out_tile = out_ptr + row[:, None] * DV + dv
    o = tl.load(out_tile, mask=inside, other=0.0).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, 1) / DV + EPS)[:, None] * norm_weight
    o = tl.where(inside, o * silu(z), 0.0)
    tl.store(out_tile, o.to(out_ptr.dtype.element_ty), mask=in_out)


def scan_table(dtype: torch.dtype, state_dtype: torch.dtype) -> str:
    """The table of `_scan_kernel` for a model and a state of these dtypes."""
    if dtype == torch.float32:
        return "gated_delta_scan_fp32"
    return "gated_delta_scan" + ("" if state_dtype == torch.float32 else "_bf16_state")


def chunk_gated_delta(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    columns: tuple[int, int],
    gates: tuple[torch.Tensor, torch.Tensor] | Gating,
    places: StatePlaces,
    key_heads: int,
) -> torch.Tensor:
    """The gated delta rule of a prompt; with a `Gating` also the gates and the layer's gated norm.

    Args:
        qkv: q, k and v, each with one row per token; it may be the same tensor three times.
        columns: the columns of their rows at which k and v begin; q begins at 0.
        gates: g and beta, `float32 [T, Hv]`, or what they are made of.
        places: where the state lies of the sequence, of which there is one.
        key_heads: Hk.

    Returns:
        `[T, Hv * Dv]` in the dtype of q.
    """
    (q, k, v), (heads, key_dim, value_dim) = qkv, places.shape
    tokens, values = q.shape[0], heads * value_dim
    is_short = find_largest(tokens) <= 1 << LEAST_LOG_CHUNK
    log_chunk = LEAST_LOG_CHUNK if is_short else LOG_CHUNK[q.element_size()]
    chunk = 1 << log_chunk
    chunks = cdiv(tokens, chunk)
    out = q.new_empty((tokens, values))
    squares = q.new_empty((heads, chunks, SQUARES.value, chunk, chunk))
    factors = q.new_empty((heads, chunks, FACTORS.value, chunk), dtype=torch.float32)
    state, slots, num_tokens, versions = places
    counted = {"HAS_NUM_TOKENS": num_tokens is not None}
    shape = counted | {
        "K_ROW": k.stride(0),
        "K_COLUMN": columns[0],
        "GROUP": heads // key_heads,
        "DK": key_dim,
        "LOG_CHUNK": log_chunk,
    }
    num_tokens = slots if num_tokens is None else num_tokens
    found = find_gates(gates, columns[1] + values, values, heads)
    rows = {"GATE_ROW": found.b.stride(0), "B_COLUMN": found.b_column, "A_COLUMN": found.a_column}
    rows |= {"RAW_GATES": found.gated}
    arguments = (q, k, found.b, found.a, found.a_log, found.dt_bias, num_tokens)
    arguments += (squares, factors)
    config = find_config("gated_delta_prepare", tokens=tokens)
    launch(prepare_kernel, (chunks, heads), *arguments, tokens, **shape, **rows, **config)

    config = find_config(scan_table(q.dtype, state.dtype), tokens=tokens)
    config["BLOCK_V"] = min(config["BLOCK_V"], max(value_dim // 2, 16))
    grid = (value_dim // config["BLOCK_V"], heads)
    rows = {"V_ROW": v.stride(0), "V_COLUMN": columns[1], "HEADS": heads, "DV": value_dim}
    rows |= {"VERSIONS": places.count}
    arguments = (q, k, v, squares, factors, state, slots, versions, num_tokens, out)
    launch(_scan_kernel, grid, *arguments, tokens, **shape, **rows, **config)
    if found.gated:
        arguments = (found.z, found.norm_weight, num_tokens, out)
        rows = {"Z_ROW": found.z.stride(0), "Z_COLUMN": found.z_column, "HEADS": heads}
        rows |= {"DV": value_dim, "EPS": found.eps}
        config = find_config("gated_delta_norm", tokens=tokens)
        grid = (cdiv(tokens * heads, config["ROWS"]),)
        launch(_norm_kernel, grid, *arguments, tokens, **counted, **rows, **config)
    return out
