"""Where recurrent states lie: in slots of a pool, perhaps in versions."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from et_moe.backends.cuda.triton.common.tokens import load_version


@triton.jit
def find_state(state_ptr, slots_ptr, versions_ptr, STATE: tl.constexpr, VERSIONS: tl.constexpr):
    """Where a version of a sequence's state lies.

    Args:
        state_ptr: `[S, VERSIONS, STATE]`. slots_ptr: that of the sequence.
        versions_ptr: the same, or None for version 0.
    """
    state_ptr += tl.load(slots_ptr).to(tl.int64) * (VERSIONS * STATE)
    if versions_ptr is not None:
        state_ptr += load_version(versions_ptr, VERSIONS) * STATE
    return state_ptr


class StatePlaces(NamedTuple):
    """The states of a call's sequences.

    Attributes:
        state: fp32 or bf16 `[S, Hv, Dk, Dv]` or, with versions, `[S, V, Hv, Dk, Dv]`; updated in
            place.
        slots: `int32 [B]`.
        num_tokens: `int64 [B]`, or None if all rows are valid.
        versions: `int64 [B]`, or None if there is one.
    """

    state: torch.Tensor
    slots: torch.Tensor
    num_tokens: torch.Tensor | None
    versions: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Hv, Dk and Dv."""
        return tuple(self.state.shape[-3:])

    @property
    def count(self) -> int:
        """V."""
        return 1 if self.versions is None else self.state.shape[1]
