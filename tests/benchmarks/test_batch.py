"""Many sequences at once: what the command measures, and what the page says of it."""

import json
from pathlib import Path

import pytest

from et_moe.benchmarks import batch, roofline
from et_moe.benchmarks.batch import Load
from et_moe.benchmarks.profile import Launch, ProfileError, batched_call
from et_moe.benchmarks.report import batch as report
from et_moe.benchmarks.shape import model_shape
from et_moe.pipeline.models import parse_config

FULL = parse_config({"model_type": "qwen3_5_moe"})


def test_rows_of_a_program(runner, tiny_program, tiny_checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "batch.json"
    shape = model_shape(tiny_checkpoint)
    loads = [Load(1, 1, 10, 8), Load(3, 3, 10, 8), Load(2, 5, 10, 8)]
    assert batch.measure(runner.binary, tiny_program, loads, shape, out)
    result = json.loads(out.read_text())
    assert [row["requests"] for row in result["rows"]] == [1, 3, 5]
    assert result["recurrent_state_dtype"] == "float32"
    for row in result["rows"]:
        assert row["output_token_per_sec"] > 0 and row["time_to_first_token_ms_p99"] > 0
        assert "roof_ms" not in row  # there is no GPU to have one
    lines = report.section(result)
    assert any(line.startswith("| 2 | 5 | ") for line in lines)


def test_prompts_that_have_been_answered_before(
    runner, tiny_program, tiny_checkpoint, tmp_path: Path
) -> None:
    out, shape = tmp_path / "batch.json", model_shape(tiny_checkpoint)
    loads = [Load.parse("1:20:8")]
    assert batch.measure(runner.binary, tiny_program, loads, shape, out, prefix_cache=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["cached_prompt_tokens"] == 0  # less than a page


def test_a_step_draws_what_is_accepted_besides() -> None:
    stats = {"prompt_eval_end_ms": 1000, "inference_end_ms": 3000, "decode_token_per_sec": 600.0}
    assert batch.steps_of(stats, 4) == {"step_ms": pytest.approx(2000 / 300)}
    drafts = {"draft_tokens": 900, "accepted_draft_tokens": 400}
    drafts["accepted_draft_tokens_per_position"] = [300, 100]
    found = batch.steps_of(stats | drafts, 4)
    assert found == drafts | {"step_ms": pytest.approx(2000 / 200)}
    assert batch.steps_of(stats | {"decode_token_per_sec": 0.0}, 4) == {}


def test_a_failure_is_kept(runner, tiny_program, tiny_checkpoint, tmp_path: Path) -> None:
    """The prompts do not fit the context."""
    out, shape = tmp_path / "batch.json", model_shape(tiny_checkpoint)
    loads = [Load.parse("2:1000:8")]
    assert not batch.measure(runner.binary, tiny_program, loads, shape, out)
    (row,) = json.loads(out.read_text())["rows"]
    assert "context" in row["error"] and row["error"] in report.cells(row)


@pytest.mark.parametrize("text", ["8", "8:0:4", "8:x:4", "1:2:3:4:5"])
def test_a_load_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=f"--load {text}: expected"):
        Load.parse(text)


def launches(*names: str) -> list[Launch]:
    return [Launch(i, i + 1, name) for i, name in enumerate(names)]


PREFILL = ("_embedding_kernel", "_scan_kernel", "_finish_kernel")
STEP = ("_embedding_kernel", "_step_kernel", "_finish_kernel", "_hand_over_kernel")


@pytest.mark.parametrize("rule", ["_scan_kernel", "_few_tokens_kernel"])
def test_the_step_that_is_profiled(rule: str) -> None:
    """Prompts are fed between steps; the second step behind the last one has all sequences."""
    fill = ("_embedding_kernel", rule, "_finish_kernel")
    trace = launches("fill", *fill, *STEP, *fill, *STEP, *STEP, *STEP, *STEP, "copy")
    assert [launch.start for launch in batched_call(trace)] == [15, 16, 17, 18]
    for names in ((*fill, *STEP, *STEP), (*STEP, *STEP, *STEP), (*fill, *STEP, *STEP, "x", *STEP)):
        with pytest.raises(ProfileError, match="three decode calls behind a prefill, two equal"):
            batched_call(launches(*names))


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_step_with_drafts_that_is_profiled(drafts: int) -> None:
    """It has an embedding for the rows that the head takes, and one for each further draft; and a
    prefill has one for the head's cache."""
    head = ("_embedding_kernel", "_decode_kernel", "_finish_kernel")
    step = (*STEP[:-1], *drafts * head, "_hand_over_drafts_kernel")
    fill = (*PREFILL[:-1], *head)
    trace = launches("fill", *fill, *step, *fill, *step, *step, *step)
    found = batched_call(trace)
    assert tuple(launch.name for launch in found) == step
    assert found[-1].end == len(trace) - len(step)


@pytest.mark.parametrize(
    ("sequences", "milliseconds"), [(8, 1.4), (64, 6.1), (256, 14.2)]
)  # by hand, at 4.24 TB/s and 2,000 cached tokens
def test_bytes_of_a_step(sequences: int, milliseconds: float) -> None:
    moved = sum(kernel.bytes for kernel in roofline.batch_step(sequences, FULL, 2000))
    assert 1e3 * moved / 4.24e12 == pytest.approx(milliseconds, rel=0.06)
    rounded = sum(kernel.bytes for kernel in roofline.batch_step(sequences, FULL, 2000, 2))
    assert moved - rounded == pytest.approx(sequences * 30 * 2 * 2 * 32 * 128 * 128)


def test_the_dtype_of_a_state(tiny_program: Path, tmp_path: Path) -> None:
    assert batch.state_dtype(tiny_program) == "float32"
    program = (tiny_program / "model.pte").read_bytes()
    other = program.replace(
        b'recurrent_state", "dtype": "float32"', b'recurrent_state", "dtype": "bfloat16"'
    )
    (tmp_path / "model.pte").write_bytes(other)
    assert other != program and batch.state_dtype(tmp_path) == "bfloat16"
    for damaged in (b"no program", program.replace(b'"state"', b'"stats"'), b""):
        (tmp_path / "model.pte").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{tmp_path / 'model.pte'}: no get_bindings in it"):
            batch.state_dtype(tmp_path)
