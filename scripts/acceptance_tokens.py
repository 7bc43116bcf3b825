"""Tokens that must not depend on what a sequence shares a call with, on drafts, nor on a prefix
cache, bit by bit.

What a program gives one request at a time says what is right: here it is compared with itself, so
no near tie is an excuse. Up to four rows of a call have the bits that they have alone (the section
on a row's bits in docs/performance.md), and no more are fed with drafts. Of more sequences it is
only counted how many have the same tokens. With drafts several at once are compared as well: two,
which draft together where a step has one draft, and more, of which the last ones draft.

Prompts that begin alike are answered with a prefix cache and without. They share what a long prompt
is fed up to at first, and differ within the page behind it: so what is reused was made by a call of
the same tokens that is made without a cache, too.
"""

from collections.abc import Callable, Iterator, Sequence

from acceptance_models import Program, compare_tokens

SAME = 4
"""So many sequences at once have the bits that they have alone."""
MORE = 16

NEW_TOKENS = 40

PAGE = 64
"""Tokens of a page, of which a prefix cache keeps full ones."""
SHARED = 1024
"""Tokens that prompts share: of a prompt as long the last full page ends a call."""
OWN = PAGE - 4
"""Tokens of a prompt behind these."""


def requests_of(prompts: Sequence[list[int]]) -> list[dict]:
    """Requests of different lengths, every other one sampled, which tells of smaller differences
    than greedy ones do."""
    requests = []
    for i, ids in enumerate(prompts):
        request = {"prompt_ids": ids, "max_new_tokens": NEW_TOKENS + i}
        requests.append(request | ({"temperature": 0.8, "seed": i} if i % 2 else {}))
    return requests


def check_same_tokens(
    program: Program,
    drafting: Program,
    prompts: Sequence[list[int]],
    accepts: bool,
    shared: list[int],
) -> Iterator[dict]:
    """Yields what each check found, with an `error` or None.

    Args:
        program, drafting: of the same weights, the second one with drafts.
        prompts: shorter than a page.
        accepts: whether some of its drafts must be accepted.
        shared: what prompts begin with for the prefix cache, one page at least.
    """
    requests = requests_of(prompts)

    def answer(of: Program, sequences: int) -> tuple[list[list[int]], dict]:
        return of.answer(requests, f"--max_sequences={sequences}")

    alone, _ = answer(program, 1)

    def together() -> dict:
        return {"error": first_difference(answer(program, SAME)[0], alone)}

    def many() -> dict:
        tokens, _ = answer(program, MORE)
        same = sum(a == b for a, b in zip(tokens, alone, strict=True))
        return {"same": same, "of": len(alone), "error": None}

    def with_drafts(sequences: int) -> dict:
        tokens, stats = answer(drafting, sequences)
        names = ("draft_tokens", "accepted_draft_tokens")
        found = {name: stats.get(name, 0) for name in names}
        wanted = names if accepts else names[:1]
        # Of several sequences perhaps only those that are left at the end draft.
        if sequences == 1 and not all(found[name] for name in wanted):
            return {**found, "error": f"no drafts were fed or accepted: {found}"}
        return {**found, "error": first_difference(tokens, alone)}

    checks: dict[str, Callable[[], dict]] = {
        f"{SAME} at once": together,
        f"{MORE} at once": many,
        "drafts": lambda: with_drafts(1),
    }
    for n in (2, SAME):
        checks[f"drafts, {n} at once"] = lambda n=n: with_drafts(n)
    for name, of in (("prefix cache", program), ("drafts, prefix cache", drafting)):
        checks[name] = lambda of=of: check_cache(program, of, prompts, shared)
    for name, check in checks.items():
        yield {"check": name, **check()}


def check_cache(
    program: Program, of: Program, prompts: Sequence[list[int]], shared: list[int]
) -> dict:
    """Compares the tokens of a program with a prefix cache with those of `program` without."""
    alike = requests_of([shared + ids for ids in prompts])
    expected, _ = program.answer(alike, "--max_sequences=1")
    tokens, stats = of.answer(alike, "--max_sequences=1", "--prefix_cache")
    found = {"cached_prompt_tokens": stats.get("cached_prompt_tokens", 0)}
    # The second of short prompts shows what is shared, later ones take it.
    least = (len(alike) - 2) * (len(shared) // PAGE * PAGE)
    if found["cached_prompt_tokens"] < least:
        return {**found, "error": f"expected at least {least} cached tokens: {found}"}
    return {**found, "error": first_difference(tokens, expected)}


def first_difference(actual: list[list[int]], expected: list[list[int]]) -> str | None:
    """Which request has other tokens, and where, or None."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if error := compare_tokens(a, e):
            return f"request {i}: {error}"
    return None
