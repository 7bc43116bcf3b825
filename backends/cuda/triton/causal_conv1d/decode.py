"""The convolution of one token, for the kernel that makes the token's channels."""

import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.silu import silu
from et_moe.backends.cuda.triton.common.store_once import store_once


@triton.jit
def load_conv_window(weight_ptr, state_ptr, n, own_n, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """TAPS taps and TAPS - 1 earlier inputs, vectors `[N]`, of one token's columns n `[N]`.

    For `store_convolved`, once the token's own inputs are known. Only where own_n is set; columns
    from CHANNELS on get 0.
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
    """`causal_conv1d` of one token, with what `load_conv_window` gave: out, and the state in place.

    x `[N]` is of out's dtype; its columns from CHANNELS on are stored as they are. All are vectors,
    since those are loaded in the layout that x has. COPIES as `store_once` takes it.
    """
    taps, earlier = window
    inside = own_n & (n < CHANNELS)
    y = x.to(tl.float32) * taps[TAPS - 1].to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        y += earlier[tap].to(tl.float32) * taps[tap].to(tl.float32)
    y = tl.where(n < CHANNELS, silu(y).to(x.dtype), x)
    store_once(out_ptr + n, y, own_n, COPIES)
    tl.debug_barrier()  # every warp of this program has read the old state
    for tap in tl.static_range(TAPS - 1):
        value = earlier[tap + 1] if tap + 1 < TAPS - 1 else x
        value = value.to(state_ptr.dtype.element_ty)
        store_once(state_ptr + tap * CHANNELS + n, value, inside, COPIES)
