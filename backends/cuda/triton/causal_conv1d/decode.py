"""The convolution of one token, as the end of the kernel that makes the token's channels."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.store_once import store_once


@triton.jit
def load_conv_window(weight_ptr, state_ptr, n, own_n, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """Loads what `store_convolved` needs besides the token itself: taps and earlier inputs.

    Args:
        weight_ptr: `[CHANNELS, TAPS]`. state_ptr: `[TAPS - 1, CHANNELS]`, the earlier inputs.
        n, own_n: `[N]`, columns of the token, and which of them are this program's. Of others, and
            of columns from CHANNELS on, the result is 0.

    Returns:
        A tuple of TAPS vectors `[N]` of taps, and one of TAPS - 1 vectors of earlier inputs.
    """
    inside = own_n & (n < CHANNELS)
    taps, earlier = (), ()
    for tap in tl.static_range(TAPS):
        taps += (tl.load(weight_ptr + n * TAPS + tap, mask=inside, other=0.0),)
    for tap in tl.static_range(TAPS - 1):
        earlier += (tl.load(state_ptr + tap * CHANNELS + n, mask=inside, other=0.0),)
    return taps, earlier


@triton.jit
def store_convolved(
    x,
    window,
    state_ptr,
    out_ptr,
    n,
    own_n,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    COPIES: tl.constexpr,
):
    """`causal_conv1d` of one token; it stores the result and updates the state in place.

    Taps and inputs are single vectors, not matrices, since those are loaded in the layout of x.

    Args:
        x: `[N]` in the dtype of out, the token's columns n. From CHANNELS on they are stored as
            they are.
        window: as from `load_conv_window`.
        COPIES: how many threads hold a copy of x, as for `store_once`.
    """
    taps, earlier = window
    inside = own_n & (n < CHANNELS)
    y = x.to(tl.float32) * taps[TAPS - 1].to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        y += earlier[tap].to(tl.float32) * taps[tap].to(tl.float32)
    y = tl.where(n < CHANNELS, silu(y).to(x.dtype), x)
    store_once(out_ptr + n, y, own_n, COPIES)
    tl.debug_barrier()  # until every warp of this program has read the old state
    for tap in tl.static_range(TAPS - 1):
        value = earlier[tap + 1] if tap + 1 < TAPS - 1 else x
        value = value.to(state_ptr.dtype.element_ty)
        store_once(state_ptr + tap * CHANNELS + n, value, inside, COPIES)
