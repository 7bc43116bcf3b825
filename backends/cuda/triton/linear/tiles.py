"""Where the programs of a GEMM compute, and how they store what they computed."""

import triton
import triton.language as tl


@triton.jit
def place_tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The first row and the first column of a program's tile of out `[M, N]`.

    GROUP_M tiles of rows run together and share the weights in the L2 cache. The last tile of
    columns overlaps its neighbour rather than reach past the end; both store the same.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid, width = tl.program_id(0), GROUP_M * tiles_n
    first = pid // width * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    first_m = (first + pid % width % height) * BLOCK_M
    return first_m, min(pid % width // height * BLOCK_N, N - BLOCK_N)


@triton.jit
def store_tile(
    acc, residual, out, first_m, first_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Stores acc `[BLOCK_N, BLOCK_M]`, fp32, plus residual `[M, N]`, if there is one, into out."""
    m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    acc = tl.trans(acc)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = m[:, None] < M
    if residual is not None:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
