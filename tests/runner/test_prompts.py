"""Many prompts at once from a file of JSON lines, and a prompt from a file of token ids."""

import fcntl
import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

VOCABULARY, CONTEXT, LONG = 264, 32, 8192


def write(path: Path, *lines: dict | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


@pytest.fixture
def answer(runner, tiny_program: Path, tmp_path: Path):
    """Answers the lines of a file at once, and gives the ids of each."""

    def run(lines: list[dict], *flags: str, program: Path = tiny_program) -> list[list[int]]:
        prompts, output = write(tmp_path / "prompts.jsonl", *lines), tmp_path / "ids.json"
        runner.run(program, f"--prompts_path={prompts}", f"--output_ids_path={output}", *flags)
        return json.loads(output.read_text())

    return run


def random_lines(count: int) -> list[dict]:
    """Prompts and limits of any length; some lines are greedy, some sampled."""
    rng = random.Random(7)
    lines = []
    for i in range(count):
        length = rng.randint(1, CONTEXT - 1)
        ids = [rng.randrange(VOCABULARY - 4) for _ in range(length)]
        line = {"prompt_ids": ids, "max_new_tokens": rng.randint(1, CONTEXT)}
        if i % 2:
            line |= {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "seed": -i}
        lines.append(line)
    return lines


@pytest.mark.parametrize("places", [(), ("--max_sequences=3",), ("--max_sequences=100",)])
def test_answers_together_are_as_they_are_alone(runner, answer, tiny_program, places) -> None:
    lines = random_lines(20)
    together = answer(lines, *places)
    assert len({len(ids) for ids in together}) > 3
    for line, ids in zip(lines, together, strict=True):
        keys = ("temperature", "top_k", "top_p", "seed")
        flags = [f"--{key}={line[key]}" for key in keys if key in line]
        alone = runner.generate(tiny_program, line["prompt_ids"], line["max_new_tokens"], *flags)
        assert ids == alone


def test_a_line_takes_from_the_flags_what_it_lacks(runner, answer, tiny_program) -> None:
    flags = ("--temperature=2", "--seed=5", "--top_k=40", "--top_p=0.9", "--max_new_tokens=7")
    prompt = {"prompt_ids": [1, 2, 3]}
    own = {"temperature": 0, "max_new_tokens": 4}
    sampled, greedy = answer([prompt, prompt | own], *flags)
    assert sampled == runner.generate(tiny_program, [1, 2, 3], 7, *flags[:-1])
    assert greedy == runner.generate(tiny_program, [1, 2, 3], 4) != sampled[:4]


@pytest.mark.parametrize(
    "parameter",
    [
        {"min_p": 0.9},
        {"presence_penalty": 5.0},
        {"frequency_penalty": 5.0},
        {"repetition_penalty": 3.0},
    ],
)
def test_parameters_that_have_no_flag_count(answer, parameter: dict) -> None:
    """Each changes some answer of many, and only of its line."""
    prompts = [{"prompt_ids": [i, i], "temperature": 1.0, "seed": i} for i in range(12)]
    plain = answer(prompts)
    mixed = [p | (parameter if i % 2 else {}) for i, p in enumerate(prompts)]
    changed = answer(mixed)
    assert changed[::2] == plain[::2] and changed[1::2] != plain[1::2]
    assert changed[3] == answer([mixed[3]])[0]


def test_more_prompts_than_places(answer) -> None:
    """The engine itself has a queue of 256."""
    lines = [{"prompt_ids": [i % 250, i // 250], "max_new_tokens": 2} for i in range(700)]
    answers = answer(lines, "--max_sequences=2")
    assert answers == answer(lines) and len(answers) == 700
    assert answers[:5] == [answer([line])[0] for line in lines[:5]]


@pytest.mark.parametrize("sequences", [1, 3])
def test_answers_are_printed_in_order(runner, tiny_program, tmp_path, sequences: int) -> None:
    """Also where a later one ends first; as a single prompt's is, text with a tokenizer."""
    tokenizer = f"--tokenizer_path={tiny_program / 'tokenizer.json'}"
    lines = [{"prompt": "Hello", "max_new_tokens": 20}, {"prompt_ids": [5], "max_new_tokens": 1}]
    lines.append({"prompt": "é", "max_new_tokens": 3})
    prompts = f"--prompts_path={write(tmp_path / 'prompts', *lines)}"
    done = runner.run(tiny_program, tokenizer, prompts, f"--max_sequences={sequences}")
    expected = ""
    for number, line in enumerate(lines, 1):
        prompt = f"--prompt={line['prompt']}" if "prompt" in line else "--prompt_ids=5"
        limit = f"--max_new_tokens={line['max_new_tokens']}"
        alone = runner.run(tiny_program, tokenizer, prompt, limit).stdout
        expected += f"[{number}]\n" + alone.split("PyTorchObserver")[0]
    assert done.stdout.split("PyTorchObserver")[0] == expected
    assert done.stderr == f"{sequences} sequences at once, a KV cache of {sequences * 64} tokens\n"


def test_ids_are_printed_without_a_tokenizer(runner, answer, tiny_program, tmp_path) -> None:
    lines = [{"prompt_ids": [1, 2], "max_new_tokens": 3}, {"prompt_ids": [3], "max_new_tokens": 2}]
    first, second = answer(lines)
    done = runner.run(tiny_program, f"--prompts_path={tmp_path / 'prompts.jsonl'}")
    expected = ["[1]", " ".join(map(str, first)) + " ", "[2]", " ".join(map(str, second)) + " "]
    assert done.stdout.splitlines()[:4] == expected


def test_stats(runner, tiny_program: Path, tmp_path: Path) -> None:
    prompt = [58, 151, 241, 26, 230]  # no end of sequence follows soon
    lines = [{"prompt_ids": prompt, "max_new_tokens": n} for n in (2, 4, 6)]
    prompts, stats = write(tmp_path / "prompts", *lines), tmp_path / "stats"
    flags = (f"--prompts_path={prompts}", f"--stats_path={stats}", "--warmup=2", "--num_iters=3")
    output = runner.run(tiny_program, *flags).stdout.splitlines()
    assert len([line for line in output if line.startswith("[")]) == len(lines)
    observed = [line for line in output if line.startswith("PyTorchObserver ")]
    assert [f"PyTorchObserver {line}" for line in stats.read_text().splitlines()] == observed
    assert len(observed) == 3
    for line in stats.read_text().splitlines():
        fields = json.loads(line)
        assert fields["requests"] == 3
        assert (fields["prompt_tokens"], fields["generated_tokens"]) == (15, 12)
        for name in ("time_to_first_token_ms", "time_between_tokens_ms"):
            assert 0 <= fields[f"{name}_median"] <= fields[f"{name}_p99"] < 60_000
        assert fields["time_to_first_token_ms_median"] > 0  # the other may come in one event
        took = fields["inference_end_ms"] - fields["inference_start_ms"]
        assert 12_000 / (took + 2) < fields["output_token_per_sec"]
        assert fields["first_token_ms"] <= fields["prompt_eval_end_ms"]
        assert fields["prompt_eval_end_ms"] <= fields["inference_end_ms"]
    rows = output[output.index(observed[-1]) + 1 :]
    table = [row.split() for row in rows]
    assert table[0] == ["Requests", "3"] and all(row == row.rstrip() for row in rows)
    assert [row[-1] for row in table if "Time" in row] == ["median", "median"]


def test_a_prefix_cache(runner, answer, long_program: Path, tmp_path: Path) -> None:
    """A second run takes over what the first one computed, up to its last full page."""
    rng = random.Random(5)
    shared = [rng.randrange(1, VOCABULARY - 4) for _ in range(2000)]
    lines = [{"prompt_ids": [*shared, *range(1, 20 + i)], "max_new_tokens": 4} for i in range(3)]
    stats = tmp_path / "stats"
    flags = (f"--stats_path={stats}", "--num_iters=2", "--max_sequences=1")
    alone = answer(lines, *flags, program=long_program)
    assert "cached_prompt_tokens" not in stats.read_text()
    assert answer(lines, "--prefix_cache", *flags, program=long_program) == alone
    first, second = (json.loads(line) for line in stats.read_text().splitlines())
    assert 2 * 1800 < first["cached_prompt_tokens"] < second["cached_prompt_tokens"]
    assert second["cached_prompt_tokens"] > 0.95 * second["prompt_tokens"]


NEITHER = "expected one of prompt and prompt_ids"
LINES = {
    '{"prompt_ids": [1], "stop": "x"}': 'unknown key "stop", expected prompt, prompt_ids, max_new',
    '{"prompt_ids": [1], "top_k": 1, "top_k": 2}': 'the key "top_k" is there twice',
    '{"max_new_tokens": 3}': NEITHER,
    '{"prompt": "x", "prompt_ids": [1]}': NEITHER,
    "{}": NEITHER,
    "[1, 2]": "expected a JSON object, got a list",
    "7": "expected a JSON object, got 7",
    "": "an empty line, expected a JSON object",
    " \t": "an empty line, expected a JSON object",
    '{"prompt_ids": [1]': "not JSON: wrong at column 19",
    '{"prompt_ids": [1]} x': "not JSON: wrong at column 21",
    '{"prompt_ids": [1]}\0': "not JSON: it has a byte 0",
    '{"prompt_ids": [[1]]}': "nested deeper than a list of token ids",
    '{"prompt_ids": 1}': "prompt_ids: expected a list of token ids, got 1",
    '{"prompt_ids": [1, 2.5]}': "prompt_ids: entry 1 is not a token id",
    '{"prompt_ids": [1, "2"]}': "prompt_ids: entry 1 is not a token id",
    '{"prompt_ids": [9223372036854775808]}': "prompt_ids: entry 0 is not a token id",
    '{"prompt_ids": []}': "the prompt is empty",
    '{"prompt_ids": [1, -1]}': "the prompt: token id -1 is outside the vocabulary of 264",
    '{"prompt_ids": [264]}': "the prompt: token id 264 is outside the vocabulary of 264",
    json.dumps({"prompt_ids": [1] * 33}): "the prompt has 33 tokens, the context of the program",
    '{"prompt": ""}': "the prompt is empty",
    '{"prompt": 1}': "prompt: expected a text, got 1",
    '{"prompt": null}': "prompt: expected a text, got null",
    '{"prompt": {"prompt": "x"}}': "prompt: expected a text, got an object",
    '{"prompt": "\udce9"}': "not JSON: wrong at column 14",
    '{"prompt_ids": [1], "max_new_tokens": 0}': "max_new_tokens 0: expected at least 1",
    '{"prompt_ids": [1], "max_new_tokens": 1.0}': "max_new_tokens: expected a 64-bit integer, got",
    '{"prompt_ids": [1], "max_new_tokens": null}': "max_new_tokens: expected a 64-bit integer, got",
    '{"prompt_ids": [1], "seed": 9223372036854775808}': "seed: expected a 64-bit integer, got 92",
    '{"prompt_ids": [1], "top_k": true}': "top_k: expected a 64-bit integer, got true",
    '{"prompt_ids": [1], "top_k": -1}': "top_k -1: expected 0 (off) or more",
    '{"prompt_ids": [1], "top_p": "0.5"}': 'top_p: expected a number, got "0.5"',
    '{"prompt_ids": [1], "top_p": 0}': "top_p 0: expected more than 0 and at most 1",
    '{"prompt_ids": [1], "min_p": 2}': "min_p 2: expected 0 to 1",
    '{"prompt_ids": [1], "temperature": -1}': "temperature -1: expected 0 (greedy)",
    '{"prompt_ids": [1], "temperature": 1e39}': "temperature: expected a 32-bit number, got 1e+39",
    '{"prompt_ids": [1], "temperature": 1e999}': "a number is too large",
    '{"prompt_ids": [1], "temperature": NaN}': "not JSON: wrong at column 36",
    '{"prompt_ids": [1], "repetition_penalty": 0}': "repetition_penalty 0: expected a finite",
}


def refusal(runner, program: Path, *flags: str) -> str:
    """What is said of a file before the weights are even looked for."""
    command = [runner.binary, f"--model_path={program / 'model.pte'}", "--data_path=missing"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout, done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_is_refused(runner, tiny_program, tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts"
    text = f'{{"prompt_ids": [1]}}\n{line}\n{{"prompt_ids": [1]}}'
    path.write_bytes(text.encode(errors="surrogateescape"))
    tokenizer = f"--tokenizer_path={tiny_program / 'tokenizer.json'}"
    said = refusal(runner, tiny_program, f"--prompts_path={path}", tokenizer)
    assert said.startswith(f"error: {path}:2: {LINES[line]}"), said


def test_a_file_that_is_refused(runner, tiny_program: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.touch()
    said = refusal(runner, tiny_program, f"--prompts_path={path}")
    assert said == f"error: {path}: is empty, expected a JSON object on each line\n"
    write(path, {"prompt": "x"})
    said = refusal(runner, tiny_program, f"--prompts_path={path}")
    assert said == f"error: {path}:1: prompt: --tokenizer_path is needed to read a text prompt\n"
    said = refusal(runner, tiny_program, f"--prompts_path={tmp_path / 'missing'}")
    assert said == f"error: {tmp_path / 'missing'}: cannot be opened: No such file or directory\n"
    # What a line does not say is not the line's fault.
    said = refusal(runner, tiny_program, f"--prompts_path={path}", "--top_p=2")
    assert said.startswith("error: top_p 2: expected")
    said = refusal(runner, tiny_program, f"--prompts_path={path}", "--max_new_tokens=0")
    assert said == "error: max_new_tokens 0: expected at least 1\n"
    said = refusal(runner, tiny_program, f"--prompts_path={path}", f"--stats_path={path}")
    assert "the same file as that of --prompts_path" in said


def test_a_file_as_other_programs_write_it(answer, runner, tiny_program, tmp_path: Path) -> None:
    """With CRLF, a byte order mark and no newline at its end; through a pipe."""
    text = '\ufeff{"prompt_ids": [1, 2]}\r\n{"prompt_ids": [3]}'
    output = f"--output_ids_path={tmp_path / 'out'}"
    runner.run(tiny_program, "--prompts_path=/dev/stdin", output, input=text)
    expected = answer([{"prompt_ids": [1, 2]}, {"prompt_ids": [3]}])
    assert json.loads((tmp_path / "out").read_text()) == expected


FLAGS = {
    "--max_sequences=0": "--max_sequences",
    "--max_sequences=-1": "--max_sequences",
    "--memory_fraction=0": "--memory_fraction: Value 0: expected more than 0 and at most 1",
    "--memory_fraction=nan": "--memory_fraction: Value nan: expected more than 0 and at most 1",
    "--memory_fraction=1.1": "--memory_fraction: Value 1.1: expected more than 0 and at most 1",
    "--memory_fraction=0.9": "model.pte is a program for the CPU, which has no GPU memory",
    "--prompt_ids=1": "Exactly 1 option from",
    "--prefix_cache=x": "--prefix_cache",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(runner, tiny_program: Path, tmp_path: Path, flag: str) -> None:
    prompts = f"--prompts_path={write(tmp_path / 'prompts', {'prompt_ids': [1]})}"
    done = runner.run(tiny_program, prompts, flag, check=False)
    assert done.returncode > 0 and FLAGS[flag] in done.stderr, done.stderr


def test_flags_of_single_prompts(runner, tiny_program: Path) -> None:
    done = runner.run(tiny_program, "--prompt_ids=1", "--max_sequences=2", check=False)
    assert done.returncode > 0 and "--max_sequences requires --prompts_path" in done.stderr
    done = runner.run(tiny_program, "--prompt_ids=1", "--memory_fraction=0.5", check=False)
    message = "is a program for the CPU, which has no GPU memory"
    assert f"error: memory_fraction: {tiny_program / 'model.pte'} {message}" in done.stderr


def test_a_long_prompt_from_a_file(runner, long_program: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    ids = [rng.randrange(1, VOCABULARY - 4) for _ in range(LONG - 5)]
    path, output = tmp_path / "ids", tmp_path / "out"
    path.write_text(json.dumps(ids))
    flags = ("--max_new_tokens=4", f"--output_ids_path={output}", "--warmup=1")
    runner.run(long_program, f"--prompt_ids_path={path}", *flags)
    alone = json.loads(output.read_text())
    assert alone == runner.generate(long_program, ids, 4)
    with path.open() as pipe:
        runner.run(long_program, "--prompt_ids_path=/dev/stdin", *flags, stdin=pipe)
    assert json.loads(output.read_text()) == alone
    write(path, {"prompt_ids": ids}, {"prompt_ids": ids[:99]})
    runner.run(long_program, f"--prompts_path={path}", *flags)
    assert json.loads(output.read_text()) == [alone, runner.generate(long_program, ids[:99], 4)]


def test_prompt_ids_that_are_refused(runner, tiny_program: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids"
    no_list = "not a JSON list of token ids: "
    for text, message in {
        "": no_list,
        "[1, 2": no_list,
        "[1, 2\0]": no_list + "it has a byte 0",
        "[1] [2]": no_list,
        "{}": "expected a JSON list of token ids",
        "7": "expected a JSON list of token ids",
        "[1, [2]]": "entry 1 is not a token id",
        "[1, 2.0]": "entry 1 is not a token id",
        "[1, 9223372036854775808]": "entry 1 is not a token id",
    }.items():
        path.write_text(text)
        done = runner.run(tiny_program, f"--prompt_ids_path={path}", check=False)
        assert done.returncode == 1 and f"error: {path}: {message}" in done.stderr, done.stderr
    for text, message in {
        "[]": "the prompt is empty",
        "[264]": "token id 264 is outside the vocabulary",
        json.dumps([1] * 33): "the prompt has 33 tokens, the context of the program holds 32",
    }.items():
        path.write_text(text)
        done = runner.run(tiny_program, f"--prompt_ids_path={path}", check=False)
        assert done.returncode == 1 and message in done.stderr
    done = runner.run(tiny_program, f"--prompt_ids_path={tmp_path}", check=False)
    assert done.stderr == f"error: {tmp_path}: cannot be read: Is a directory\n"


@pytest.fixture
def start(runner, long_program: Path, tmp_path: Path):
    """Starts answers that fill the context, each behind a short one, and waits for that."""
    processes = []

    def run(*flags: str) -> subprocess.Popen:
        short, full = {"prompt_ids": [1], "max_new_tokens": 2}, {"prompt_ids": [1, 2]}
        path = write(tmp_path / "prompts", short, full, full, full)
        command = [runner.binary, f"--model_path={long_program / 'model.pte'}"]
        command += [f"--data_path={long_program / 'model.ptd'}", f"--prompts_path={path}"]
        command += [f"--max_new_tokens={LONG}", f"--stats_path={tmp_path / 'stats'}", *flags]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, bufsize=0, **pipe)  # what follows the line stays there
        processes.append(process)
        assert process.stdout.readline() == b"[1]\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_prints_the_stats_up_to_there(start, tmp_path: Path, number: int) -> None:
    """One prompt still waits for a place: it counts for nothing."""
    process = start("--max_sequences=2", "--num_iters=3")
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.decode().splitlines()[1:] == [f"error: ended by {signal.Signals(number).name}"]
    lines = output.decode().splitlines()
    observed = [i for i, line in enumerate(lines) if line.startswith("PyTorchObserver ")]
    answers = [line.split() for line in lines[: observed[0]] if not line.startswith("[")]
    stats = json.loads(lines[observed[0]].removeprefix("PyTorchObserver "))
    assert len(observed) == 1 and stats["requests"] == len(answers) < 4
    assert stats["generated_tokens"] == sum(map(len, answers)) < LONG
    assert stats["prompt_tokens"] == 2 * len(answers) - 1
    assert lines[observed[0] + 1].split() == ["Requests", str(len(answers))]
    assert not (tmp_path / "stats").exists()


def test_a_second_signal_ends_at_once(start, tmp_path: Path) -> None:
    """It must, because there may be nobody who reads what is left to print."""
    process = start()
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_end_at_once(start, number: int) -> None:
    process = start()
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number


def test_answers_end_with_their_reader(start) -> None:
    process = start("--num_iters=1000000")
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert process.stderr.read().decode().endswith(" tokens\n")
