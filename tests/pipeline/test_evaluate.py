"""Scoring a text with a program, and comparing it with a Hugging Face model or another program."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_small
from transformers import AutoModelForCausalLM, AutoTokenizer

from et_moe.pipeline import logits as logits_of
from et_moe.pipeline.config import ConfigError, ConfigWarning
from et_moe.pipeline.evaluate import ROWS, Evaluation, evaluate
from et_moe.pipeline.logits import HuggingFaceLogits, ProgramLogits

TEXT = "What is said here is of no importance; it only has to be long enough. " * 7
VOCABULARY = 264


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def token_ids(scored_model: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(scored_model / "checkpoint")(TEXT)["input_ids"]


@pytest.fixture(scope="module")
def likelihoods(scored_model: Path, token_ids: list[int]):
    """The negative log-likelihoods of a window's tokens behind the first, by Hugging Face."""
    model = AutoModelForCausalLM.from_pretrained(scored_model / "checkpoint").eval()

    def compute(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            rows = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        return -rows.double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    return compute


def small_runner(tmp_path: Path, body: str) -> Path:
    """A runner that is a script in Python: `out` is where it writes, `header(rows)` begins it."""
    path = tmp_path / "runner"
    path.write_text(
        "#!/usr/bin/env python3\n"
        "import os, signal, sys, time\n"
        "out = open([a for a in sys.argv if 'logits_path' in a][0].split('=')[1], 'wb', 0)\n"
        "def header(rows, columns=264):\n"
        "    text = {'descr': '<f4', 'fortran_order': False, 'shape': (rows, columns)}\n"
        "    text = repr(text).ljust(117).encode() + b'\\n'\n"
        "    out.write(b'\\x93NUMPY\\x01\\x00' + len(text).to_bytes(2, 'little') + text)\n"
        f"{body}\n"
    )
    path.chmod(0o755)
    return path


def test_a_model_of_linear_layers_only(tmp_path: Path) -> None:
    """The cache of transformers knows no length without a layer of full attention."""
    make_small(tmp_path / "checkpoint", layer_types=["linear_attention", "linear_attention"])
    (tmp_path / "text").write_text("some text of more than one window")
    uniform = small_runner(tmp_path, "header(100)\nout.write(bytes(100 * 264 * 4))")
    result = evaluate(tmp_path, tmp_path / "text", uniform, 16, model_dir=tmp_path / "checkpoint")
    assert result.tokens > 20 and abs(result.perplexity - 264) < 0.01


@pytest.mark.parametrize("program", ["plain", "score", "drafts"])
@pytest.mark.parametrize("window", [64, 100])
def test_a_program_against_hugging_face(
    runner, scored_model, text, token_ids, likelihoods, program: str, window: int
) -> None:
    """The program computes the same as the model, so all figures are those of transformers."""
    checkpoint = scored_model / "checkpoint"
    seen = []
    result = evaluate(
        scored_model / program,
        text,
        runner.binary,
        window,
        model_dir=checkpoint,
        progress=lambda *at: seen.append(at),
    )
    windows = [token_ids[i : i + window] for i in range(0, len(token_ids), window)]
    every = torch.cat([likelihoods(w) for w in windows if len(w) > 1])
    assert result.tokens == len(every) and seen[-1] == (len(every), len(every))
    assert seen == sorted(set(seen)) and len(seen) >= len(every) / ROWS
    assert result.perplexity == pytest.approx(every.mean().exp().item(), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(every.mean().exp().item(), rel=1e-9)
    assert 0 <= result.kl_divergence < 1e-9 and result.top1_agreement == 1
    # As llama.cpp has it: the tokens behind the first half of each full window.
    counted = torch.cat([likelihoods(w)[window // 2 :] for w in windows if len(w) == window])
    for found, rel in ((result.llama_cpp, 1e-5), (result.reference_llama_cpp, 1e-9)):
        assert found.tokens == len(counted) == len(token_ids) // window * (window - window // 2 - 1)
        expected = counted.mean().exp().item()
        error = expected * counted.std(unbiased=False).item() / (len(counted) - 1) ** 0.5
        assert found.perplexity == pytest.approx(expected, rel=rel)
        assert found.error == pytest.approx(error, rel=10 * rel)


def test_a_program_against_itself(runner, scored_model, text, token_ids) -> None:
    """The runner reads the text by the program's tokenizer; two of them run beside each other."""
    program = scored_model / "score"
    result = evaluate(program, text, runner.binary, 64, reference_program=program)
    assert result.tokens == len(token_ids) - -(-len(token_ids) // 64)
    assert (result.kl_divergence, result.top1_agreement, result.perplexity_growth) == (0, 1, 0)
    assert result.llama_cpp == result.reference_llama_cpp
    other = evaluate(program, text, runner.binary, 64, reference_program=scored_model / "plain")
    assert 0 <= other.kl_divergence < 1e-9 and other.perplexity == result.perplexity
    alone = evaluate(program, text, runner.binary, 64)
    assert alone == Evaluation(result.tokens, result.perplexity, llama_cpp=result.llama_cpp)


def test_what_is_printed(runner, scored_model, text) -> None:
    program = scored_model / "score"
    both = evaluate(program, text, runner.binary, 64, reference_program=scored_model / "plain")
    table = both.to_table()
    for value in (both.perplexity, both.reference_perplexity, both.llama_cpp.perplexity):
        assert f" {value:.4f}" in table
    assert "KL divergence" in table and "+/-" in table
    found = json.loads(both.to_json())
    assert found["llama_cpp"]["tokens"] == both.llama_cpp.tokens
    assert abs(found["perplexity_growth"]) < 1e-6
    alone = evaluate(program, text, runner.binary, 64)
    assert "reference" not in alone.to_table() and "KL" not in alone.to_table()
    assert json.loads(alone.to_json())["kl_divergence"] is None


@pytest.mark.parametrize("window", [2, 250])
def test_texts_that_llama_cpp_has_no_figure_for(runner, scored_model, text, window: int) -> None:
    """Fewer than two full windows, or windows of which no token counts."""
    path = text.with_name("short")
    path.write_text(TEXT[:300])
    result = evaluate(scored_model / "score", path, runner.binary, window)
    assert result.llama_cpp is None and result.tokens > 100
    assert "llama.cpp" not in result.to_table()


def test_a_window_larger_than_any_number(runner, scored_model, text) -> None:
    path = text.with_name("short")
    path.write_text(TEXT[:200])
    result, whole = (
        evaluate(scored_model / "score", path, runner.binary, n) for n in (1 << 64, 200)
    )
    assert result == whole and result.tokens > 100


def test_windows_of_one_length_are_a_batch(scored_model, token_ids, monkeypatch) -> None:
    """Their rows are those of each alone."""
    windows = [token_ids[i : i + 40] for i in range(0, 200, 40)] + [token_ids[:7]]
    monkeypatch.setattr(logits_of, "BATCH_TOKENS", 100)
    batched = HuggingFaceLogits(scored_model / "checkpoint", windows)
    shapes = []
    model = batched._model
    batched._model = lambda ids, **more: shapes.append(ids.shape) or model(ids, **more)
    for ids in windows:
        found = torch.cat([batched.read(n) for n in (1, len(ids) - 2)])
        alone = HuggingFaceLogits(scored_model / "checkpoint", [ids]).read(len(ids) - 1)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
    assert shapes == [(2, 40), (2, 40), (1, 40), (1, 7)]


def test_the_reference_is_on_a_gpu_where_there_is_one(scored_model, monkeypatch) -> None:
    """All of it, with what it is given; only logits leave it."""
    free = logits_of.SPARE_BYTES + 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))
    for found, size, device in ((True, 1000, "cuda"), (True, 1001, "cpu"), (False, 1, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert logits_of.reference_device(size) == torch.device(device)
    meta = torch.device("meta")
    monkeypatch.setattr(logits_of, "reference_device", lambda size: meta)
    away = HuggingFaceLogits(scored_model / "checkpoint", [[1, 2, 3]])
    assert {p.device for p in (*away._model.parameters(), *away._head.parameters())} == {meta}

    def call(ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert ids.device == meta and not use_cache
        size = away._head.weight.shape[1]
        return SimpleNamespace(last_hidden_state=torch.zeros(*ids.shape, size, device=meta))

    away._model = call
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        away.read(2)


def test_a_gpu_that_another_process_has_to_itself(monkeypatch) -> None:
    def fail() -> tuple[int, int]:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert logits_of.reference_device(1) == torch.device("cpu")


TOO_LITTLE = "/checkpoint: too little GPU memory is left, so the CPU runs the reference$"


def test_a_gpu_too_small_for_the_reference(scored_model, monkeypatch) -> None:
    """The CPU computes instead, which is said."""
    checkpoint, move = scored_model / "checkpoint", torch.nn.Module.to
    expected = HuggingFaceLogits(checkpoint, [[1, 2, 3]]).read(2)

    def to(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        if device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(logits_of, "reference_device", lambda size: torch.device("meta"))
    with pytest.warns(ConfigWarning, match=TOO_LITTLE):
        found = HuggingFaceLogits(checkpoint, [[1, 2, 3]])
    assert torch.equal(found.read(2), expected)


def test_a_gpu_too_small_for_a_batch_of_the_reference(scored_model, monkeypatch) -> None:
    """That batch and those behind it are computed by the CPU."""
    checkpoint, windows = scored_model / "checkpoint", [[1, 2, 3, 4, 5], [6, 7, 8], [9, 8]]
    alone, found = (HuggingFaceLogits(checkpoint, windows) for _ in range(2))
    model, failures = found._model, [False, True, False, False]

    def call(*args, **options):
        if failures.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(*args, **options)

    found._model = call
    assert torch.equal(found.read(4), alone.read(4))
    with pytest.warns(ConfigWarning, match=TOO_LITTLE):
        rows = found.read(2)
    assert torch.equal(rows, alone.read(2)) and torch.equal(found.read(1), alone.read(1))
    assert not failures


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('error: no such GPU')", "failed: error: no such GPU"),
        ("header(9)\nout.write(bytes(5000))\nsys.exit('error: full')", "failed: error: full"),
        ("header(9)", "failed: it gave fewer logits than expected"),
        ("out.write(b'not what it was asked for')", "failed: it gave fewer logits than expected"),
        ("header(9)\nos.kill(os.getpid(), signal.SIGKILL)", r"failed: \(ended by SIGKILL\)"),
        (
            "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\nwhile True: out.write(bytes(10**6))",
            r"failed: \(ended by SIGPIPE\)",
        ),
    ],
)
def test_a_runner_that_fails(scored_model, text, tmp_path: Path, body: str, message: str) -> None:
    broken = small_runner(tmp_path, body)
    with pytest.raises(ConfigError, match=f"^{broken} {message}$"):
        evaluate(scored_model / "score", text, broken, 64)


def test_a_runner_that_is_not_done_is_ended(scored_model, tmp_path: Path, token_ids) -> None:
    """It waits for its reader, and so would an evaluation for its end."""
    slow = small_runner(tmp_path, "header(10**6)\nwhile True: out.write(bytes(10**6))")
    with pytest.raises(ZeroDivisionError), ProgramLogits(slow, tmp_path, [[1, 2]]) as rows:
        process = rows._process
        assert rows.read(2).shape == (2, VOCABULARY)
        raise ZeroDivisionError
    assert process.returncode is not None


def test_nothing_of_it_is_left_by_a_kill(tmp_path: Path, monkeypatch) -> None:
    """What the runner reads has no name: there is nothing to be removed."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    body = (
        "import json\n"
        "path = [a for a in sys.argv if 'score_ids' in a][0].split('=')[1]\n"
        "header(1 + (json.load(open(path)) == [[1, 2], [3, 4, 5]]))"
    )
    with ProgramLogits(small_runner(tmp_path, body), tmp_path, [[1, 2], [3, 4, 5]]) as rows:
        assert rows._header() == (2, VOCABULARY)
        assert not list(temporary.iterdir())


def test_rows_are_read_as_they_come(scored_model, tmp_path: Path) -> None:
    """The runner gives a row, and then waits for a file that is made once the row was read."""
    body = (
        "header(2)\nout.write(bytes(264 * 4))\n"
        f"while not os.path.exists({str(tmp_path / 'seen')!r}): time.sleep(0.01)\n"
        "out.write(bytes(264 * 4))"
    )
    with ProgramLogits(small_runner(tmp_path, body), tmp_path, [[1, 2, 3]]) as rows:
        assert not rows.read(1).any()
        (tmp_path / "seen").touch()
        assert not rows.read(1).any()


def test_many_windows_are_one_process(scored_model, text, tmp_path: Path, runner) -> None:
    """Whatever their number, the program is loaded once for each model."""
    count = tmp_path / "count"
    wrapper = tmp_path / "counted"
    wrapper.write_text(f'#!/bin/sh\necho >> {count}\nexec {runner.binary} "$@"\n')
    wrapper.chmod(0o755)
    evaluate(scored_model / "score", text, wrapper, 16, reference_program=scored_model / "plain")
    assert count.read_text() == "\n" * 2


def test_what_the_runner_refuses_is_the_message(runner, scored_model, text, tmp_path) -> None:
    program = scored_model / "score"
    message = f"failed: {program}: window 0: 300 tokens do not fit the context of 256$"
    with pytest.raises(ConfigError, match=message):
        evaluate(program, text, runner.binary, 300)
    with pytest.raises(ConfigError, match=f"failed: error: {tmp_path / 'model.pte'}: "):
        evaluate(scored_model / "score", text, runner.binary, 64, reference_program=tmp_path)


def test_programs_that_do_not_fit(runner, scored_model, text, tmp_path: Path) -> None:
    other = small_runner(tmp_path, "header(9, 300 if any('plain' in a for a in sys.argv) else 264)")
    plain, program = scored_model / "plain", scored_model / "score"
    with pytest.raises(ConfigError, match=f"^{program}: vocabulary of 264, {plain} has 300$"):
        evaluate(program, text, other, 64, reference_program=plain)
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'none'}: no program: model.pte is not"):
        evaluate(tmp_path / "none", text, runner.binary, 64)
    (tmp_path / "model.pte").touch()
    message = f"^{tmp_path / 'tokenizer.json'}: no such file; --model-dir names a checkpoint"
    with pytest.raises(ConfigError, match=message):
        evaluate(tmp_path, text, runner.binary, 64)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'tokenizer.json'}: "):
        evaluate(tmp_path, text, runner.binary, 64)


@pytest.fixture
def other_tokens(scored_model: Path, tmp_path: Path) -> Path:
    """A copy of `scored_model`'s program `score`, whose tokenizer has two ids exchanged."""
    program, other = scored_model / "score", tmp_path / "other"
    other.mkdir()
    for name in ("model.pte", "model.ptd"):
        (other / name).symlink_to(program / name)
    tokenizer = json.loads((program / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return other


def test_a_reference_whose_tokens_are_others(runner, scored_model, text, other_tokens) -> None:
    """One without a tokenizer is compared all the same."""
    program = scored_model / "score"
    message = f"^{other_tokens / 'tokenizer.json'}: {text} has other tokens by it than by {program}"
    with pytest.raises(ConfigError, match=f"{message}/tokenizer.json$"):
        evaluate(program, text, runner.binary, 64, reference_program=other_tokens)
    (other_tokens / "tokenizer.json").unlink()
    result = evaluate(program, text, runner.binary, 64, reference_program=other_tokens)
    assert result.kl_divergence == 0


def test_a_program_whose_tokens_are_others(
    runner, scored_model, text, other_tokens, token_ids, tmp_path: Path
) -> None:
    """Than those of the checkpoint, which may have its tokenizer in other files."""
    checkpoint, message = tmp_path / "checkpoint", f"^{other_tokens / 'tokenizer.json'}: {text} has"
    shutil.copytree(scored_model / "checkpoint", checkpoint)
    tokenizer = checkpoint / "tokenizer.json"
    with pytest.raises(ConfigError, match=f"{message} other tokens by it than by {tokenizer}$"):
        evaluate(other_tokens, text, runner.binary, 64, checkpoint)
    model = json.loads(tokenizer.read_text())["model"]
    tokenizer.unlink()
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    (checkpoint / "merges.txt").write_text("#version: 0.2\n")
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ConfigError, match=f"{message} other tokens by it than by {checkpoint}$"):
        evaluate(other_tokens, text, runner.binary, 64, checkpoint)
    result = evaluate(scored_model / "score", text, runner.binary, 64, checkpoint)
    assert result.tokens == len(token_ids) - -(-len(token_ids) // 64)
