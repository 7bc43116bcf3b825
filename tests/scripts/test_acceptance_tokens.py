"""The acceptance's comparison of tokens alone with those in batches, with drafts and with a prefix
cache fails where it must."""

from dataclasses import dataclass, field
from pathlib import Path

import acceptance_tokens
import gpu_acceptance as acceptance
import pytest
from acceptance_session import StepFailed

CACHED = {"cached_prompt_tokens": 128}
ACCEPTED = {"draft_tokens": 9, "accepted_draft_tokens": 5} | CACHED
SHARED = [1] * 130
NAMES = ("4 at once", "16 at once", "drafts", "drafts, 2 at once", "drafts, 4 at once")
NAMES += ("prefix cache", "drafts, prefix cache")


@dataclass
class Fake:
    """A program that counts up from a prompt's last token, but for what is in `other`."""

    stats: dict = field(default_factory=lambda: CACHED)
    other: dict[str, int] = field(default_factory=dict)

    def answer(self, requests: list[dict], *flags: str) -> tuple[list[list[int]], dict]:
        tokens = [
            [request["prompt_ids"][-1] + i for i in range(request["max_new_tokens"])]
            for request in requests
        ]
        if flags[-1] in self.other:
            tokens[self.other[flags[-1]]][7] += 1
        return tokens, self.stats


def errors(program: Fake, drafting: Fake, accepts: bool = True) -> dict[str, str | None]:
    given = ([[3, 4], [5], [6]], accepts, SHARED)
    checks = acceptance_tokens.check_same_tokens(program, drafting, *given)
    return {check["check"]: check["error"] for check in checks}


def test_all_agree() -> None:
    assert errors(Fake(), Fake(ACCEPTED)) == dict.fromkeys(NAMES)


@pytest.mark.parametrize(
    ("flag", "name"), [("--max_sequences=4", "4 at once"), ("--prefix_cache", "prefix cache")]
)
@pytest.mark.parametrize("drafting", [False, True])
def test_a_token_that_differs(drafting: bool, flag: str, name: str) -> None:
    other = Fake(ACCEPTED, {flag: 1})
    found = errors(Fake(), other) if drafting else errors(other, Fake(ACCEPTED))
    name = f"drafts, {name}" if drafting else name
    assert found.pop(name) == "request 1: token 7 of 41 is 13, expected 12"
    assert not any(found.values())


def test_many_at_once_are_counted() -> None:
    other = Fake(ACCEPTED, {"--max_sequences=16": 2})
    prompts = [[3], [5], [6]]
    given = (other, Fake(ACCEPTED), prompts, True, SHARED)
    checks = list(acceptance_tokens.check_same_tokens(*given))
    assert checks[1] == {"check": "16 at once", "same": 2, "of": 3, "error": None}


def test_drafts_that_are_never_accepted() -> None:
    never = Fake(ACCEPTED | {"accepted_draft_tokens": 0})
    assert errors(Fake(), never)["drafts"].startswith("no drafts were fed or accepted")
    assert not any(errors(Fake(), never, accepts=False).values())
    assert errors(Fake(), Fake(), accepts=False)["drafts"]


def test_a_prefix_cache_that_is_not_used() -> None:
    found = errors(Fake({}), Fake(ACCEPTED))
    assert found.pop("prefix cache").startswith("expected at least 128 cached tokens")
    assert not any(found.values())


@pytest.fixture
def compared(session, scored_model: Path):
    """Compares the tokens of a packed program with those of another one."""

    def compare(drafting: str) -> dict:
        for name in ("plain", drafting):
            folder = session.folder / "models" / name
            if not folder.exists():
                folder.symlink_to(scored_model / name)
        prompts = {"prompts": [[5], [1, 2, 3], [7] * 20], "shared": list(range(130))}
        entry = {"model": "plain", "drafting": drafting, "accepts": False, **prompts}
        session.manifest["same_tokens"] = [entry]
        return acceptance.same_tokens(session)

    return compare


def test_with_a_runner(compared) -> None:
    checks = compared("drafts")["checks"]
    assert [c["check"] for c in checks] == list(NAMES) * 2
    assert [c["cached_prompt_tokens"] for c in checks if "cached_prompt_tokens" in c] == [128] * 4


def test_with_a_runner_that_does_not_draft(compared, session) -> None:
    with pytest.raises(StepFailed, match="no drafts were fed") as failed:
        compared("plain")
    checks = failed.value.found["checks"]
    right = [name for name in NAMES if name != "drafts"]
    assert [c["check"] for c in checks if not c["error"]] == right * 2
    assert "--cuda_graph" in session.log.read_text()
