"""Counting accepted drafts: against drafts of whole sequences without a cache, one at a time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_small
from sequences import one_sequence

from et_moe.benchmarks import __main__ as benchmarks
from et_moe.benchmarks import drafts as tool
from et_moe.benchmarks.drafts import BEHIND, IN_FRONT, Hidden, Sequences
from et_moe.examples.qwen3_5_moe.graph import Places

SIZES = tool.Sizes(sequences=3, prompt=5, new_tokens=24)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drafts") / "checkpoint"
    make_small(directory, mtp_num_hidden_layers=1)
    (directory / "heldout.txt").write_text("Return a list of all that is there. " * 8)
    return directory


@pytest.fixture(scope="module")
def sequences(checkpoint: Path) -> Sequences:
    """Sequences whose random head guesses some of the tokens: few differ."""
    with torch.no_grad():
        model = tool.load_model(checkpoint)
        # An output head of few directions makes model and head agree now and then.
        weight = model.lm_head.weight
        weight[6:] = 0
        weight.mul_(100)
        text = checkpoint / "heldout.txt"
        prompts = tool.prompts_of(text, checkpoint / "tokenizer.json", SIZES)
        return Sequences(model, prompts, SIZES.new_tokens, 0.0, 0)


def test_tokens_are_the_models(sequences: Sequences) -> None:
    """Each token is the likeliest behind those before it, and states are those of one call."""
    model = sequences.model
    assert sequences.tokens.shape == (3, 29) and sequences.hidden.shape == (3, 28, 32)
    for tokens, hidden in zip(sequences.tokens, sequences.hidden, strict=True):
        state, where = one_sequence(model, 29)
        x = model.hidden(
            tokens[None, :-1], Places(torch.zeros(1).long(), **where, num_tokens=None), state
        )
        torch.testing.assert_close(hidden, x, rtol=1e-4, atol=1e-5)
        drawn = model.lm_head(x, norm=model.norm.weight).argmax(-1)
        assert torch.equal(drawn[SIZES.prompt - 1 :], tokens[SIZES.prompt :])


def drafts_of(model, states, tokens, k: int, hidden: Hidden) -> list[int]:
    """k drafts behind `tokens`, all rows anew for each; states: [n - 1, H] of the others."""
    drafts = []
    for _ in range(k):
        state, where = one_sequence(model, 64)
        places = Places(torch.zeros(1).long(), **where, num_tokens=None)
        x = model.mtp(model.embed_tokens(tokens[1:]), states, places, state)
        normed = tool.rms_norm(x, model.mtp.norm.weight, model.config.rms_norm_eps)
        draft = model.lm_head(normed)[-1:].argmax(-1)
        states = torch.cat((states, (normed if hidden.head == BEHIND else x)[-1:]))
        tokens = torch.cat((tokens, draft))
        drafts.append(int(draft))
    return drafts


@pytest.mark.parametrize("hidden", [Hidden(), Hidden(IN_FRONT, IN_FRONT), Hidden(BEHIND, IN_FRONT)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_steps_are_those_of_one_sequence_after_the_other(
    sequences: Sequences, k: int, hidden: Hidden
) -> None:
    model, expected = sequences.model, [0] * (k + 1)
    for tokens, states in zip(sequences.tokens, sequences.hidden, strict=True):
        states = states if hidden.model == IN_FRONT else model.normed(states)
        drawn, last = SIZES.prompt + 1, len(tokens) - 1
        while drawn + 2 <= last:
            drafts = drafts_of(model, states[:drawn], tokens[: drawn + 1], k, hidden)
            wanted = tokens[drawn + 1 : drawn + 1 + k].tolist()
            fed = min(k, last - drawn - 1)
            accepted = next((j for j in range(fed) if drafts[j] != wanted[j]), fed)
            for j in range(accepted + 1):
                expected[j] += 1
            drawn += accepted + 1
    assert 0 < expected[1] < expected[0]
    assert tool.count_accepted(sequences, k, hidden) == expected


def test_draws_depend_on_the_seed(checkpoint: Path) -> None:
    model = tool.load_model(checkpoint)
    prompts = torch.tensor([[1, 2, 3]] * 2)
    one, again, other = (Sequences(model, prompts, 12, 1.0, s).tokens for s in (1, 1, 2))
    assert torch.equal(one, again) and torch.equal(one[0], one[1])
    assert not torch.equal(one, other)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "drafts", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        benchmarks.main()
    return ended.value.code, *capsys.readouterr()


def test_command(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "drafts.json"
    flags = ["--model-dir", checkpoint, "--out", out]
    flags += ["--sequences", 2, "--prompt", 4, "--new-tokens", 8]
    code, table, error = run(monkeypatch, capsys, *flags)
    assert code == 0, error
    assert "behind the norm" in table and "tokens a step" in table
    rows = json.loads(out.read_text())["rows"]
    assert [row["k"] for row in rows] == [1, 2, 3] * 4
    assert all(len(row["accepted"]) == row["k"] for row in rows)
    code, _, error = run(monkeypatch, capsys, *flags, "--sequences", 1000)
    assert code == 1 and "heldout.txt: " in error and "too few for 1000 prompts" in error


def test_a_model_without_a_head(tiny_checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "text").write_text("word " * 500)
    flags = ["--model-dir", tiny_checkpoint, "--text", tmp_path / "text", "--out", tmp_path / "x"]
    code, _, error = run(monkeypatch, capsys, *flags)
    assert code == 1 and f"{tiny_checkpoint}: no head for multi-token prediction" in error
