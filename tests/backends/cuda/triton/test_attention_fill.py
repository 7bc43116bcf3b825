"""Attention whose first token no row reaches: k and v are cached, in one launch."""

import pytest
import torch
from test_attention import GROUP_3, make_inputs

from et_moe.backends import ops
from et_moe.backends.cuda.triton.attention.op import attention
from et_moe.backends.cuda.triton.cases.launches import record_launches


@pytest.mark.parametrize("tokens", [1, 9])
def test_only_the_caches_are_filled(tokens: int, device: torch.device) -> None:
    given = make_inputs(GROUP_3, tokens, 60, torch.float32, device)
    given["first_token"] = ops.PAGE_SIZE * given["pages"].shape[1]
    copies = [
        {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        for _ in range(2)
    ]
    found, expected = (
        function(**c) for function, c in zip((attention, ops.attention), copies, strict=True)
    )
    assert torch.equal(found, expected) and not found.any()
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(copies[0][name], copies[1][name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(copies[0][name], given[name])


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_only_launch(tokens: int) -> None:
    given = make_inputs(GROUP_3, tokens, 60, torch.float32, torch.device("meta"))
    given["first_token"] = ops.PAGE_SIZE * given["pages"].shape[1]
    with record_launches() as launches:
        attention(**given)
    assert len(launches) == 1
