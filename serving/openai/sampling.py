"""Sampling parameters of requests, as the engine takes them."""

import random
from collections.abc import Mapping
from typing import Any

from et_moe.serving.interface import SamplingParams
from et_moe.serving.openai.errors import bad_request
from et_moe.serving.openai.protocol import SamplingRequest
from et_moe.serving.served_model import ServedModel

_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def sampling_params(
    request: SamplingRequest,
    defaults: Mapping[str, Any],
    vocab_size: int,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
) -> list[SamplingParams]:
    """Those of each of the request's `n` choices, which differ in their seeds.

    What a request leaves out is the program's default, and OpenAI's where it has none; a seed that
    is left out is drawn at random.
    """
    given = {key: value for key in _FIELDS if (value := getattr(request, key)) is not None}
    values = {**defaults, **given}
    values["top_k"] = max(int(values.get("top_k", 0)), 0)  # -1 is vLLM's name for all
    seed = random.getrandbits(63) if request.seed is None else request.seed
    return [
        SamplingParams(
            **values,
            max_tokens=max_tokens,
            seed=_wrapped(seed + choice),
            logit_bias=_logit_bias(request, vocab_size),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for choice in range(request.n)
    ]


def check_places(request: SamplingRequest, prompts: int, model: ServedModel) -> None:
    """Refuses a request that the engine could not take however long it waited."""
    places = model.engine.engine.max_requests
    if request.n * prompts > places:
        what = f"{request.n} for each of {prompts} prompts" if prompts > 1 else f"{request.n}"
        message = f"n: {what} are more choices than this server can have at once, which is {places}"
        raise bad_request(message, "n")


def _wrapped(seed: int) -> int:
    """As a signed integer of 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _logit_bias(request: SamplingRequest, vocab_size: int) -> dict[int, float]:
    biases = {}
    for key, value in (request.logit_bias or {}).items():
        digits = key.isascii() and key.isdigit() and len(key) < 20
        if not digits or int(key) >= vocab_size:
            expected = f"expected a token id below {vocab_size}"
            raise bad_request(f"logit_bias: {key[:20]!r}: {expected}", "logit_bias")
        biases[int(key)] = value
    return biases
