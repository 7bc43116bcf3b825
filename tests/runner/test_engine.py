"""The engine, run by scripts (engine_check.cpp): sequences that go on, and early ends.

The pieces in which an appended part was fed must not show in the tokens. They may show in the last
bits of the logits: the parity tests allow log-probabilities to differ by 1e-3.
"""

from functools import partial
from pathlib import Path

import pytest

CONTEXT = 32
FIRST, SECOND = [58, 151, 241, 26, 230], [81, 7, 5]  # no end of sequence follows soon


@pytest.fixture
def engine(run_engine, tiny_program: Path):
    """Runs a script on one engine and gives an answer for each of its commands."""
    return partial(run_engine, tiny_program)


def generate(ids: list[int], count: int, **more) -> dict:
    return {"generate": ids, "max_new_tokens": count, **more}


def append(ids: list[int], count: int, **more) -> dict:
    return {"append": ids, "max_new_tokens": count, **more}


@pytest.mark.parametrize("first", [1, 2, 5, 7])
def test_a_prompt_in_two_parts(engine, first: int) -> None:
    prompt = [*FIRST, *SECOND]
    (whole,) = engine(generate(prompt, 12))
    fed, rest = engine(append(prompt[:first], 0), append(prompt[first:], 12))
    assert fed == {"ids": [], "finish": "length"}
    assert rest == whole and len(whole["ids"]) == 12


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 11}])
@pytest.mark.parametrize("stop", [{}, {"stop_after": 2}])
def test_a_conversation(engine, sampling: dict, stop: dict) -> None:
    """The last token that was drawn is fed with what is appended, however the generation ended."""
    turns = engine(
        generate(FIRST, 4, **stop, **sampling),
        append(SECOND, 3, **sampling),
        append(SECOND, 5, **sampling),
    )
    assert turns[0]["finish"] == ("callback" if stop else "length")
    sequence = list(FIRST)
    for turn, appended in zip(turns, ([], SECOND, SECOND), strict=True):
        sequence += appended
        (alone,) = engine(generate(sequence, len(turn["ids"]), **sampling))
        assert alone["ids"] == turn["ids"]
        sequence += turn["ids"]


def test_reasons_to_finish(engine, tiny_program: Path) -> None:
    (free,) = engine(generate(FIRST, 20))
    assert free["finish"] == "length"
    (stopped,) = engine(generate(FIRST, 20, stop_after=3))
    assert stopped == {"ids": free["ids"][:3], "finish": "callback"}
    (full,) = engine(generate([7] * (CONTEXT - 1), 20))
    assert len(full["ids"]) == 1 and full["finish"] == "length"
    # A whole context can be fed, not answered.
    refused, fed = engine(append([7] * CONTEXT, 1), append([7] * CONTEXT, 0))
    assert refused["error"].endswith("of which the answer needs one at least")
    assert fed == {"ids": [], "finish": "length"}


def test_an_end_of_sequence_id_stops(engine) -> None:
    """At a high temperature such an id is drawn sooner or later."""
    script = [generate(FIRST, 25, temperature=50.0, seed=seed) for seed in range(40)]
    answers = engine(*script)
    stopped = [answer for answer in answers if answer["finish"] == "stop"]
    assert stopped and len(stopped) < len(answers)
    ends = {answer["ids"][-1] for answer in stopped}
    others = {i for answer in answers if answer["finish"] == "length" for i in answer["ids"]}
    assert not ends & others


def test_what_is_refused_leaves_the_sequence(engine) -> None:
    good = append(SECOND, 6)
    whole = engine(generate(FIRST, 2), good)[1]
    refused = {
        "the prompt is empty": append([], 3),
        "token id 9999 is outside the vocabulary": append([1, 9999], 3),
        "temperature -1": append([1], 3, temperature=-1.0),
        "max_new_tokens -1: expected at least 0": append([1], -1),
        f"the prompt has {CONTEXT} tokens after {len(FIRST) + 2} in the sequence, the context of "
        f"the program holds {CONTEXT}": append([1] * CONTEXT, 3),
    }
    first, *errors, last = engine(generate(FIRST, 2), *refused.values(), good)
    assert "ids" in first and last == whole
    for message, answer in zip(refused, errors, strict=True):
        assert answer["error"].startswith(message), answer


def test_scoring_and_generating_take_turns(engine) -> None:
    alone = engine(generate(FIRST, 8))
    first, scored, second, again = engine(
        generate(FIRST, 8), {"score": [*FIRST, *SECOND]}, generate(FIRST, 8), append(SECOND, 2)
    )
    assert first == second == alone[0] and len(scored["logprobs"]) == len([*FIRST, *SECOND]) - 1
    assert again == engine(generate(FIRST, 8), append(SECOND, 2))[1]


def test_appending_to_what_was_scored(engine) -> None:
    """After scoring, the sequence has all but the last of the scored ids."""
    scored = engine({"score": [*FIRST, 1]}, append(SECOND, 6))[1]
    assert scored == engine(generate([*FIRST, *SECOND], 6))[0]
