"""What the requests of one conversation have in common, for whoever spreads them over replicas."""

import hashlib
import json

_HEAD = 256
"""Characters, or token ids, of a prompt without messages: they stay as it grows."""


def conversation_key(body: bytes) -> str:
    """A hash of `prompt_cache_key` where a request gives it, else of how its conversation begins:
    its tools, and its messages up to the user's first. Empty for a body that is no request."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(request, dict):
        return ""
    head = request.get("prompt_cache_key")
    if not head:
        start = request.get("messages") or request.get("input")
        if isinstance(start, str):
            start = [{"role": "user", "content": start}]
        said = _until_user(start) if start else _first(request.get("prompt"))
        head = [request.get("instructions"), request.get("tools"), said]
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def _first(prompt: object) -> object:
    """The beginning of a prompt, or of the first of several."""
    while isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    return prompt[:_HEAD] if isinstance(prompt, (str, list)) else prompt


def _until_user(messages: object) -> list:
    """Messages up to the first of the user, by role and content."""
    start = []
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            break
        start.append([message.get("role"), message.get("content")])
        if message.get("role") == "user":
            break
    return start
