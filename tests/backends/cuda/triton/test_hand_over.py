"""Where a drawn token goes."""

import pytest
import torch

from et_moe.backends.cuda.triton.hand_over.op import hand_over


@pytest.mark.parametrize("position", [0, 1, 6, 2**33 + 1])
def test_hand_over(position: int, device: torch.device) -> None:
    drawn = torch.tensor([-1, -1], device=device)
    at = torch.tensor([position], device=device)
    tokens = torch.tensor([[3]], device=device)
    hand_over(torch.tensor([[248319]], device=device), at, drawn, tokens)
    other = -1
    assert drawn.tolist() == ([other, 248319] if position % 2 else [248319, other])
    assert at.item() == position + 1
    assert tokens.item() == 248319
