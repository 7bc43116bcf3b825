"""What differs under Triton's interpreter, on which kernels are tested without a GPU."""

import triton


@triton.constexpr_function
def is_interpreted() -> bool:
    """Whether the kernel runs under TRITON_INTERPRET=1, where inline assembly does not exist."""
    return triton.knobs.runtime.interpret
