"""Where drawn tokens go."""

import pytest
import torch

from et_moe.backends.cuda.triton.hand_over.op import hand_over, hand_over_drafts


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("sequences", [1, 5, 129])
def test_hand_over(sequences: int, room: int, device: torch.device) -> None:
    """Positions are even and odd, and larger than 32 bits; rows of `drawn` may have more room."""
    positions = torch.tensor([0, 1, 6, 2**33 + 1, 7], device=device).repeat(26)[-sequences:]
    drawn = torch.full((2, sequences + room), -1, device=device)
    token = torch.randint(0, 248320, (sequences, 1), device=device)
    tokens, at = torch.full_like(token, 3), positions.clone()
    hand_over(token, at, drawn[:, :sequences], tokens)
    expected = torch.full_like(drawn, -1)
    expected[positions % 2, torch.arange(sequences, device=device)] = token.flatten()
    assert torch.equal(drawn, expected)
    assert torch.equal(at, positions + 1) and torch.equal(tokens, token)


@pytest.mark.parametrize("position", [0, 1, 6, 2**33 + 1])
def test_one_sequence(position: int, device: torch.device) -> None:
    drawn = torch.tensor([[-1], [-1]], device=device)
    at, tokens = torch.tensor([position], device=device), torch.tensor([[3]], device=device)
    hand_over(torch.tensor([[248319]], device=device), at, drawn, tokens)
    assert drawn.flatten().tolist() == ([-1, 248319] if position % 2 else [248319, -1])
    assert at.item() == position + 1 and tokens.item() == 248319


@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("sequences", [1, 5])
def test_hand_over_of_drafts(sequences: int, drafts: int, device: torch.device) -> None:
    """Each sequence has its own count of calls, and goes its own way."""
    rows = torch.arange(sequences, device=device)
    accepted, calls = rows % (1 + drafts), rows + 6
    tokens = torch.randint(0, 248320, (sequences, 1 + drafts), device=device)
    step = torch.cat((accepted[:, None], tokens), 1)
    drawn = torch.full((2, sequences + 3, 2 + drafts), -1, device=device)
    positions = 2**33 + rows
    found = [positions.clone(), torch.full_like(tokens, 3), rows + 9, calls.clone()]
    hand_over_drafts(step, found[0], drawn[:, :sequences], *found[1:])
    expected = torch.full_like(drawn, -1)
    expected[calls % 2, rows] = step
    assert torch.equal(drawn, expected)
    for tensor, wanted in zip(
        found, (positions + accepted + 1, tokens, accepted, calls + 1), strict=True
    ):
        assert torch.equal(tensor, wanted)
