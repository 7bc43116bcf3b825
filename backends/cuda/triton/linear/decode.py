"""A linear layer with INT4 or INT8 weights on one row, in one launch, perhaps with a convolution.

What counts is the time from the row's arrival to the result. The weights are on their way earlier,
into the registers in which they are used. The matrix unit would need them in shared memory, behind
barriers. Instead, each thread computes dot products of four bytes, and the row, which is small, is
brought to the threads that have the weights.
"""

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.causal_conv1d.decode import (
    count_conv_versions,
    find_conv_state,
    find_conv_version,
    load_conv_window,
    store_convolved,
)
from et_moe.backends.cuda.triton.common.dependent_launch import prefetch, wait_for_previous
from et_moe.backends.cuda.triton.common.int4 import NIBBLE_SCALE, pack_bytes
from et_moe.backends.cuda.triton.common.launch import cdiv, launch
from et_moe.backends.cuda.triton.common.rms_norm import apply_rms_norm
from et_moe.backends.cuda.triton.common.store_once import store_once
from et_moe.backends.cuda.triton.linear.layout import point_to_scale_pairs, split_scale_pair
from et_moe.backends.cuda.triton.linear.row_quantization import quantize_tiles, take_plane
from et_moe.backends.cuda.triton.linear.words import (
    multiply_apart,
    multiply_parts,
    unpack_words,
)
from et_moe.backends.cuda.triton.tuning import find_config


@triton.jit
def _split_every_fourth(words):
    """Splits words `[A, B, 4 C]` into four `[A, B, C]`; word 4 c + i of a row goes to the i-th."""
    shape: tl.constexpr = (words.shape[0], words.shape[1], words.shape[2] // 4, 2, 2)
    even, odd = tl.reshape(words, shape).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@triton.jit
def _split_row(
    r,
    PLANE: tl.constexpr,
    PLANES: tl.constexpr,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
    BITS: tl.constexpr,
):
    """Brings a plane of the row into the order of the weights that it is multiplied with.

    Args:
        r: the row as from `quantize_tiles`, `[8 / BITS RUNS SPAN, 128]`.

    Returns:
        The bytes for each part of the weights (`unpack_words`), four to an int32, each as from
        `_split_every_fourth`: four `[RUNS, 1, 8 SPAN]`.
    """
    shape: tl.constexpr = (8 // BITS, RUNS * SPAN, 128)
    bytes4 = _split_every_fourth(tl.reshape(take_plane(r, PLANE, PLANES), shape))
    words = pack_bytes(bytes4[0], bytes4[1], bytes4[2], bytes4[3])
    if BITS == 8:
        return (_split_every_fourth(tl.reshape(words, (RUNS, 1, 32 * SPAN))),)
    else:
        words = tl.reshape(words, (RUNS, SPAN, 2, 32)).permute(0, 1, 3, 2)
        low, high = tl.reshape(words, (RUNS, 1, 32 * SPAN, 2)).split()
        return _split_every_fourth(low), _split_every_fourth(high)


@triton.jit
def _split_scales(scale, RUNS: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr):
    """The scales of the row's tiles for the pieces of each part of the weights.

    Args:
        scale: as from `quantize_tiles`, `[8 / BITS RUNS SPAN]`.

    Returns:
        fp32 `[RUNS, 1, 8 SPAN]` of each part.
    """
    if BITS == 8:
        # Neighbours lie in different threads, and bringing them together takes the tensor into
        # another layout. In its own, the compiler would bring the products of all weights to the
        # few threads that have the scales.
        even, odd = tl.reshape(scale, (RUNS * SPAN // 2, 2)).split()
        scale = tl.reshape(tl.join(even, odd), (RUNS, SPAN, 1))
        scale = tl.broadcast_to(scale, (RUNS, SPAN, 8))
        return (tl.reshape(scale, (RUNS, 1, 8 * SPAN)),)
    else:
        scale = tl.reshape(scale * NIBBLE_SCALE, (RUNS, SPAN, 1, 2))
        scale = tl.broadcast_to(scale, (RUNS, SPAN, 8, 2))
        return tl.reshape(scale, (RUNS, 1, 8 * SPAN, 2)).split()


@triton.jit
def order_row(
    value, PLANES: tl.constexpr, RUNS: tl.constexpr, SPAN: tl.constexpr, BITS: tl.constexpr
):
    """A row, fp32 `[TILES, 128]`, quantized, in the order of the weights: its planes, of which the
    second is the first again if PLANES is 1, and its scales."""
    r, x_scale = quantize_tiles(value, PLANES)
    x_scales = _split_scales(x_scale, RUNS, SPAN, BITS)
    q = _split_row(r, 0, PLANES, RUNS, SPAN, BITS)
    q0 = _split_row(r, 1, PLANES, RUNS, SPAN, BITS) if PLANES == 2 else q
    return q, q0, x_scales


@triton.jit
def multiply_row(
    w, scales, q, q0, x_scales, PLANES: tl.constexpr, BITS: tl.constexpr, SCALE_TYPE: tl.constexpr
):
    """fp32 `[BLOCK_N]`, the products of weights `[RUNS, BLOCK_N, 4 PIECES]` with a row."""
    zero = tl.zeros((w.shape[0], w.shape[1], w.shape[2] // 4), tl.int32)
    words = ()
    for part in tl.static_range(8 // BITS):
        words += (_split_every_fourth(unpack_words(w, part, BITS)),)
    sums = multiply_parts(words, q, q0, zero, PLANES)
    if BITS == 4:
        low_group, high_group = split_scale_pair(scales, SCALE_TYPE)
        y = sums[1].to(tl.float32) * (high_group * x_scales[1])
        # Without words the compiler would choose which product it fuses with the sum.
        y = tl.fma(sums[0].to(tl.float32), low_group * x_scales[0], y)
    else:
        y = multiply_apart(sums[0].to(tl.float32), scales.to(tl.float32) * x_scales[0])
    return tl.sum(tl.sum(y, axis=0), axis=1)


@triton.jit
def point_to_weights(
    weight,
    weight_scale,
    N,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Where a program finds its weights; see `_gemv_kernel`. Of several blocks it has the second
    one brought into the L2 cache.

    Returns:
        The first column of out that is this program's own; the first one that it computes, since
        the last program overlaps its neighbour; and for the first of its blocks pointers to the
        words of the weight, `[RUNS, BLOCK_N, 4 PIECES]`, and to the scales of its pieces.
    """
    RUNS: tl.constexpr = BLOCKS // SPAN
    PIECES: tl.constexpr = SPAN * 8
    WORDS: tl.constexpr = BLOCK_N * BLOCKS * 32
    rows_n, run = tl.arange(0, BLOCK_N), tl.arange(0, RUNS)[:, None, None]
    row, piece = rows_n[None, :, None], tl.arange(0, PIECES)[None, None, :]
    word = tl.arange(0, 4 * PIECES)[None, None, :]
    own_n = tl.program_id(0) * (BLOCK_N * REPEAT)
    first_n = min(own_n, N - BLOCK_N * REPEAT)
    weight = weight.to(tl.pointer_type(tl.int32)) + first_n.to(tl.int64) * (BLOCKS * 32)
    if REPEAT > 1:
        prefetch(weight + WORDS, 4 * WORDS)
    weight += (row * RUNS + run) * (4 * PIECES) + word
    # The scales are contiguous along N; without the hint they would be loaded in another layout
    # than the weights.
    if BITS == 4:
        group = (run * PIECES + piece) * 16 // GROUP
        weight_scale = point_to_scale_pairs(weight_scale)
        scales = tl.max_contiguous(weight_scale + (group * N + (first_n + row)), (1, 1, 1))
    else:
        copies = tl.broadcast_to(row, (1, BLOCK_N, PIECES))
        scales = tl.max_contiguous(weight_scale + (first_n + copies), (1, 1, 1))
    return own_n, first_n, weight, scales


@triton.jit
def _gemv_kernel(
    x,
    norm_weight,
    weight,
    weight_scale,
    residual,
    conv_weight,
    conv_state,
    conv_slots,
    conv_versions,
    out,
    eps,
    N,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    VERSIONS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """RMSNorm, quantization, product and residual of one row, and perhaps a convolution.

    A row of the weight is BLOCKS blocks of 128 bytes, and RUNS runs of SPAN blocks. A thread has
    pieces of 16 bytes. Of INT8 weights these are 16 columns; of INT4 weights, 16 columns of the
    first half of a block's 256 in the low nibbles, and 16 of the second half in the high ones.
    Threads lie along a run first, then along N, then along the runs. If BLOCK_N runs have at least
    as many pieces as there are threads, no result needs more than one warp, and a thread uses 16 or
    32 columns of x per run. So a small SPAN takes few shuffles and many registers. A program
    computes REPEAT times BLOCK_N results.

    With conv_weight the row is one token, whose first CHANNELS results are convolved over time.
    """
    HALF: tl.constexpr = 128
    TILES: tl.constexpr = BLOCKS * 8 // BITS
    RUNS: tl.constexpr = BLOCKS // SPAN
    PIECES: tl.constexpr = SPAN * (HALF // 16)
    WORDS: tl.constexpr = BLOCK_N * BLOCKS * (HALF // 4)
    SCALE_TYPE: tl.constexpr = weight_scale.dtype.element_ty
    # Only the neighbour convolves what both compute.
    own_n, first_n, weight, weight_scale = point_to_weights(
        weight, weight_scale, N, BLOCKS, SPAN, GROUP, BITS, BLOCK_N, REPEAT
    )
    at = tl.arange(0, TILES)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    # All loads are on their way before the first value is needed, and those of the weights before x
    # exists. The weights are read once; the L2 cache shall keep what kernels hand on instead.
    w, scales = tl.load(weight, eviction_policy="evict_first"), tl.load(weight_scale)
    if norm_weight is not None:
        gain = tl.load(norm_weight + at)
    n = first_n + tl.arange(0, BLOCK_N)
    if conv_weight is not None:
        conv_state = find_conv_state(conv_state, conv_slots, CHANNELS, TAPS, VERSIONS)
        old_state = find_conv_version(conv_state, conv_versions, CHANNELS, VERSIONS)
        window = load_conv_window(conv_weight, old_state, n, n >= own_n, CHANNELS, TAPS)
    wait_for_previous()
    value = tl.load(x + at).to(tl.float32)
    if residual is not None:
        addend = tl.load(residual + n)
    if norm_weight is not None:
        squares = tl.sum(tl.reshape(value * value, (TILES * HALF,)), axis=0)
        value = apply_rms_norm(value, gain, squares / (TILES * HALF), eps, x.dtype.element_ty)
    q, q0, x_scales = order_row(value, PLANES, RUNS, SPAN, BITS)

    for i in tl.static_range(REPEAT):
        if i + 1 < REPEAT:
            next_w = tl.load(weight + (i + 1) * WORDS, eviction_policy="evict_first")
            next_scales = tl.load(weight_scale + (i + 1) * BLOCK_N)
        y = multiply_row(w, scales, q, q0, x_scales, PLANES, BITS, SCALE_TYPE)
        if residual is not None:
            y += addend.to(tl.float32)
        y = y.to(out.dtype.element_ty)
        if conv_weight is None:
            store_once(out + n, y, n >= 0, PIECES)
        else:
            store_convolved(y, window, conv_state, out, n, n >= own_n, CHANNELS, TAPS, PIECES)
        if i + 1 < REPEAT:
            w, scales, n = next_w, next_scales, n + BLOCK_N
            if residual is not None:
                addend = tl.load(residual + n)
            if conv_weight is not None:
                window = load_conv_window(conv_weight, old_state, n, n >= own_n, CHANNELS, TAPS)


def floor_power_of_two(limit: int) -> int:
    """The largest power of two that is not above `limit`."""
    return 1 << (limit.bit_length() - 1)


def supports_k(k: int) -> bool:
    """Whether `linear_decode` takes rows of k columns: 256 times a power of two, up to 8192."""
    return k in (256, 512, 1024, 2048, 4096, 8192)


def linear_decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    planes: int,
    conv: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """A linear layer (`op.py`) on x `[1, K]`, K as in `supports_k`.

    Args:
        group_size: None for INT8 weights; planes: INT8 planes of the activations.
        conv: weight `[C, W]`, state, updated in place, slots `int32 [1]` and versions of a
            `causal_conv1d` whose result takes the place of the first C columns; or None.

    Returns:
        `[1, N]` in x's dtype.
    """
    n, blocks = weight.shape[0], weight.shape[1] // 128
    bits = 8 if group_size is None else 4
    config = find_config(f"linear_w{bits}_gemv", out_features=n)
    block_n = min(config.pop("BLOCK_ROWS") // blocks, floor_power_of_two(n))
    repeat = min(config.pop("REPEAT"), floor_power_of_two(n // block_n))
    conv_weight, conv_state, conv_slots, conv_versions = conv or (None, None, None, None)
    channels, taps = (0, 1) if conv_weight is None else conv_weight.shape
    out = x.new_empty((1, n))
    launch(
        _gemv_kernel,
        (cdiv(n, block_n * repeat),),
        x,
        norm_weight,
        weight,
        scale,
        residual,
        conv_weight,
        conv_state,
        conv_slots,
        conv_versions,
        out,
        eps,
        n,
        CHANNELS=channels,
        TAPS=taps,
        VERSIONS=1 if conv is None else count_conv_versions(conv_state, taps),
        BLOCKS=blocks,
        SPAN=min(config.pop("SPAN"), blocks),
        GROUP=group_size,
        BITS=bits,
        PLANES=planes,
        BLOCK_N=block_n,
        REPEAT=repeat,
        **config,
    )
    return out
