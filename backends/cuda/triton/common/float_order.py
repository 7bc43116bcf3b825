"""Integers that have the order of floats: a warp finds the largest of them in one instruction."""

import triton
import triton.language as tl


@triton.jit
def to_order_key(value):
    """int32 that is ordered like the float32; the key of -0.0 is that of 0.0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_order_key(key):
    """The float32 that has the key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
