"""The acceptance's comparison of tokens alone, in batches and with drafts fails where it must."""

from dataclasses import dataclass, field

import acceptance_tokens
import gpu_acceptance as acceptance
import pytest
from acceptance_session import StepFailed

ACCEPTED = {"draft_tokens": 9, "accepted_draft_tokens": 5}


@dataclass
class Fake:
    """A program that counts up from a prompt's last token, but for what is in `other`."""

    stats: dict = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)

    def answer(self, requests: list[dict], flag: str) -> tuple[list[list[int]], dict]:
        tokens = [
            [request["prompt_ids"][-1] + i for i in range(request["max_new_tokens"])]
            for request in requests
        ]
        if flag in self.other:
            tokens[self.other[flag]][7] += 1
        return tokens, self.stats


def errors(program: Fake, drafting: Fake, accepts: bool = True) -> dict[str, str | None]:
    checks = acceptance_tokens.check_same_tokens(program, drafting, [[3, 4], [5], [6]], accepts)
    return {check["check"]: check["error"] for check in checks}


def test_all_agree() -> None:
    names = ("4 at once", "16 at once", "drafts", "drafts, 2 at once", "drafts, 4 at once")
    assert errors(Fake(), Fake(ACCEPTED)) == dict.fromkeys(names)


@pytest.mark.parametrize("drafting", [False, True])
def test_a_token_that_differs(drafting: bool) -> None:
    other = Fake(ACCEPTED, {"--max_sequences=4": 1})
    found = errors(Fake(), other) if drafting else errors(other, Fake(ACCEPTED))
    name = "drafts, 4 at once" if drafting else "4 at once"
    assert found.pop(name) == "request 1: token 7 of 41 is 13, expected 12"
    assert not any(found.values())


def test_many_at_once_are_counted() -> None:
    other = Fake(ACCEPTED, {"--max_sequences=16": 2})
    prompts = [[3], [5], [6]]
    checks = list(acceptance_tokens.check_same_tokens(other, Fake(ACCEPTED), prompts, True))
    assert checks[1] == {"check": "16 at once", "same": 2, "of": 3, "error": None}


def test_drafts_that_are_never_accepted() -> None:
    never = Fake(ACCEPTED | {"accepted_draft_tokens": 0})
    assert errors(Fake(), never)["drafts"].startswith("no drafts were fed or accepted")
    assert not any(errors(Fake(), never, accepts=False).values())
    assert errors(Fake(), Fake(), accepts=False)["drafts"]


def test_with_a_runner(session) -> None:
    """The packed model has no drafts, and is found out."""
    entry = {"model": "small", "drafting": "small", "accepts": False}
    session.manifest["same_tokens"] = [entry | {"prompts": [[5], [1, 2, 3], [7] * 20]}]
    with pytest.raises(StepFailed, match="no drafts were fed") as failed:
        acceptance.same_tokens(session)
    checks = failed.value.found["checks"]
    right = ["4 at once", "16 at once", "drafts, 2 at once", "drafts, 4 at once"]
    assert [c["check"] for c in checks if not c["error"]] == right * 2
    assert "--cuda_graph" in session.log.read_text()
