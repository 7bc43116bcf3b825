"""Decoding with drafts of the demo checkpoint's head: no token changes, whatever else happens.

ET_MOE_DRAFT_PROMPTS is how many prompts there are for each number of drafts from 1 to 3; 200 take
minutes.
"""

import functools
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from et_moe.benchmarks import drafts as reference
from et_moe.pipeline.bundle import Bundle, write_bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.models import model_of
from et_moe.pipeline.quantize import QuantizedCheckpoint
from et_moe.pipeline.storage import choose_storages
from et_moe.scripts import train_demo

DEMO = Path(train_demo.__file__).parent.parent / "examples" / "qwen3_5_moe" / "demo_checkpoint"
CONTEXT, SEQUENCES = 200, 12
MANY = "ET_MOE_DRAFT_PROMPTS"
COUNT = int(os.environ.get(MANY, 30))
DRAFTS = (1, 2, 3) if MANY in os.environ else (3,)

Ids = list[int]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("drafts") / "bundle"
    checkpoint = Checkpoint(DEMO)
    storages = choose_storages(model_of(checkpoint.config).parts, group_size=32)
    write_bundle(QuantizedCheckpoint(checkpoint, storages), directory)
    return directory


@pytest.fixture(scope="module")
def program(bundle: Path) -> Callable[..., Path]:
    """The demo with so many drafts, among so many tokens or all, exported once."""

    @functools.cache
    def make(drafts: int, vocabulary: int = 0, score: bool = False) -> Path:
        folder = bundle.with_name(f"{drafts} drafts of {vocabulary}, {score=}")
        more = {"draft_tokens": drafts, "draft_vocabulary": vocabulary, "score": score}
        options = ExportOptions(max_seq_len=CONTEXT, max_sequences=SEQUENCES, **more)
        export(Bundle(bundle), folder, options)
        return folder

    return make


@pytest.fixture(scope="module")
def text() -> Ids:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return tokenizer.encode((DEMO / "heldout.txt").read_text()).ids


def some_requests(text: Ids, count: int, sampled: bool, most: int = 60) -> list[dict]:
    """Pieces of the text, of one token up to more than a page; some fill the context."""
    draw = random.Random(count + sampled)
    requests = []
    for i in range(count):
        length = 1 if i % 10 == 0 else draw.randint(2, 90)
        begin = draw.randrange(len(text) - length)
        request = {
            "prompt_ids": text[begin : begin + length],
            "max_new_tokens": draw.randint(1, most),
        }
        if i % 8 == 0:
            request["max_new_tokens"] = CONTEXT
        if sampled:
            request |= {"temperature": draw.choice([0.5, 1.0]), "seed": draw.randrange(99)}
            request |= {"top_k": draw.choice([0, 20]), "top_p": draw.choice([0.9, 1.0])}
        if i % 7 == 3:  # the engine draws such tokens itself, without drafts
            request["frequency_penalty"] = 0.5
        requests.append(request)
    return requests


@pytest.fixture
def serve(runner, tmp_path: Path) -> Callable[..., tuple[list[Ids], dict]]:
    """The tokens of requests, and the stats."""

    def run(program: Path, requests: list[dict], *flags: str) -> tuple[list[Ids], dict]:
        prompts, ids, stats = (tmp_path / name for name in ("prompts", "ids", "stats"))
        prompts.write_text("\n".join(map(json.dumps, requests)))
        given = (f"--prompts_path={prompts}", f"--output_ids_path={ids}", f"--stats_path={stats}")
        runner.run(program, *given, *flags)
        return json.loads(ids.read_text()), json.loads(stats.read_text())

    return run


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_no_token_changes(serve, program, text: Ids, drafts: int, sampled: bool) -> None:
    """Alone, in batches, and in batches that are too large for drafts until they shrink."""
    requests = some_requests(text, COUNT, sampled)
    expected, without = serve(program(0), requests)
    assert "draft_tokens" not in without
    shares = []
    for sequences in (1, 4, SEQUENCES):
        tokens, stats = serve(program(drafts), requests, f"--max_sequences={sequences}")
        assert tokens == expected
        accepted = stats["accepted_draft_tokens_per_position"]
        assert len(accepted) == drafts and sorted(accepted, reverse=True) == accepted
        assert sum(accepted) == stats["accepted_draft_tokens"] < stats["draft_tokens"]
        shares.append(accepted[0] / stats["draft_steps"])
        # No token comes in no time: those of a step share its time.
        assert stats["time_between_tokens_ms_median"] > 0.01
    assert min(shares) > 0.4
    assert shares[0] == shares[1]


def test_no_token_changes_with_a_shortened_vocabulary(serve, program, text: Ids) -> None:
    """A quarter of the tokens, those that texts have most of, are drafted nearly as well."""
    requests = [
        request for sampled in (False, True) for request in some_requests(text, 16, sampled)
    ]
    expected, whole = serve(program(3), requests)
    tokens, stats = serve(program(3, 512), requests)
    assert tokens == expected
    shares = [s["accepted_draft_tokens_per_position"][0] / s["draft_steps"] for s in (whole, stats)]
    assert 0.7 < shares[1] / shares[0] < 1


def test_a_shortened_vocabulary_beside_a_score(runner, serve, program, text: Ids) -> None:
    """One program has both. So few tokens are hardly ever drafted right."""
    both, neither = program(2, 7, score=True), program(0)
    requests = some_requests(text, 8, False) + some_requests(text, 8, True)
    tokens, stats = serve(both, requests)
    assert tokens == serve(neither, requests)[0]
    assert 0 <= stats["accepted_draft_tokens"] < 0.1 * stats["draft_tokens"]
    found, expected = (runner.score(folder, text[:150]) for folder in (both, neither))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("drafts", DRAFTS)
def test_one_prompt_is_as_in_a_file_of_prompts(runner, serve, program, text: Ids, drafts) -> None:
    prompt = text[:40]
    request = {"prompt_ids": prompt, "max_new_tokens": CONTEXT}
    (expected,), stats = serve(program(drafts), [request])
    flags = (f"--prompt_ids={','.join(map(str, prompt))}", f"--max_new_tokens={CONTEXT}")
    done = runner.run(program(drafts), *flags)
    line = next(line for line in done.stdout.splitlines() if line.startswith("PyTorch"))
    alone = json.loads(line.removeprefix("PyTorchObserver "))
    assert runner.generate(program(drafts), prompt, CONTEXT) == expected
    for name in ("draft_steps", "draft_tokens", "accepted_draft_tokens_per_position"):
        assert alone[name] == stats[name], name
    assert "Accepted" in done.stdout and "% of first drafts" in done.stdout


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_as_many_are_accepted_as_by_the_reference(
    serve, bundle: Path, program, text: Ids, drafts: int, temperature: float
) -> None:
    """The reference takes the runner's tokens: where two are as likely, it may draw others."""
    count = 40
    sizes = reference.Sizes(sequences=16, prompt=32, new_tokens=count)
    prompts = reference.prompts_of(DEMO / "heldout.txt", DEMO / "tokenizer.json", sizes)
    more = {"max_new_tokens": count, "temperature": temperature, "seed": 5}
    requests = [{"prompt_ids": ids, **more} for ids in prompts.tolist()]
    tokens, _ = serve(program(drafts), requests)
    whole = [i for i, ids in enumerate(tokens) if len(ids) == count][:8]  # no end of sequence
    tokens, stats = serve(program(drafts), [requests[i] for i in whole], "--max_sequences=4")
    with torch.no_grad():
        model, drawn = reference.load_model(bundle), torch.tensor(tokens)
        sequences = reference.Sequences(model, prompts[whole], count, temperature, 5, drawn)
        steps, *accepted = reference.count_accepted(sequences, drafts, reference.Hidden())
    assert len(whole) == 8 and steps > 100
    assert stats["draft_steps"] == pytest.approx(steps, abs=0.03 * steps)
    assert stats["accepted_draft_tokens_per_position"] == pytest.approx(accepted, abs=0.03 * steps)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 11}])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_conversations(run_engine, program, text: Ids, drafts: int, sampling: dict) -> None:
    """Whichever token a callback ends a turn at, accepted drafts behind it are taken back."""
    script = []
    for stop in range(1, 12):
        script.append({"generate": text[:30], "max_new_tokens": 40, "stop_after": stop, **sampling})
        script.append({"append": text[60:63], "max_new_tokens": 9, **sampling})
        script.append({"append": text[80:81], "max_new_tokens": 5, **sampling})
    assert run_engine(program(drafts), *script) == run_engine(program(0), *script)


def test_an_end_of_sequence_within_the_drafts(run_engine, program, text: Ids) -> None:
    """Hot sequences come to one sooner or later."""
    script = [
        {"generate": text[i : i + 9], "max_new_tokens": 150, "temperature": 1.5, "seed": i}
        for i in range(30)
    ]
    answers = run_engine(program(3), *script)
    assert answers == run_engine(program(0), *script)
    assert any(answer["finish"] == "stop" for answer in answers)


COMMANDS = {
    "together": ("5", "together", 40),
    "few pages": ("8/5", "random", 32, 12),
    "cancel": ("3", "cancel"),
    "close": ("3", "close"),
    "prefix": ("3", "prefix", 6),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_requests_of_all_kinds(build_dir: Path, program, command: str) -> None:
    """Put back, cancelled, with a prefix that others had: see async_engine_check.cpp."""
    folder = program(3)
    sequences, *rest = COMMANDS[command]
    tool = build_dir / "tests" / "runner" / "async_engine_check"
    files = (folder / "model.pte", folder / "model.ptd")
    line = [str(part) for part in (tool, *files, 0, sequences, *rest)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
