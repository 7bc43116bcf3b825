"""The end-to-end benchmark: a CPU program through the runner, and its arithmetic on GPU stats."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from et_moe.benchmarks import e2e as bench
from et_moe.benchmarks.report import e2e as report
from et_moe.pipeline.models import load_config, parse_config

ROOF = {"bandwidth": 4e12, "int8": 1.6e15, "bf16": 8e14}


def test_a_cpu_program(build_dir, tiny_checkpoint, tiny_program, tmp_path):
    """One prompt fits the context of 32 tokens, and one does not; the first is still reported."""
    out = tmp_path / "results" / "e2e.json"
    command = [sys.executable, "-m", "et_moe.benchmarks", "e2e"]
    command += ["--program", f"int8={tiny_program}"]
    command += ["--out", out, "--model-dir", tiny_checkpoint, "--prompts", "9,40"]
    command += ["--new-tokens", "6", "--warmup", "1", "--num-iters", "3"]
    command += ["--runner", build_dir / "runner/qwen3_5_moe_runner"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    result = json.loads(out.read_text())
    assert result["gpu"] is None and result["profiles"] == []
    measured, refused = result["rows"]  # a CPU program has no CUDA graphs
    assert measured["prompt"] == 9 and not measured["cuda_graph"] and measured["gpu"] is None
    assert measured["generated"] <= 6 and measured["achieved"] is None
    for key in ("prefill_tok_s", "decode_tok_s", "first_token_ms"):
        assert 0 < measured[key]["low"] <= measured[key]["median"] <= measured[key]["high"]
    rate = measured["prefill_tok_s"]["median"]
    assert measured["first_token_ms"]["median"] == pytest.approx(9e3 / rate, rel=1e-6)
    assert refused["prompt"] == 40 and "the context of the program holds 32" in refused["error"]
    assert result["command"].startswith("python -m et_moe.benchmarks e2e --program int8=")
    text = "\n".join(report.section(report.condense(result)))
    assert f"| int8 | no | 9 | {measured['generated']} | {rate:.0f} (" in text
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_program_is_named_after_its_activations(tmp_path):
    for text in ("int8", f"int8={tmp_path}", f"fp8={tmp_path}"):
        with pytest.raises(typer.BadParameter, match="expected int8=DIR or bf16=DIR"):
            bench.Program.parse(text)


def gpu_stats(prefill: float, decode: float, generated: int = 512) -> dict:
    return {
        "prefill_token_per_sec": prefill,
        "decode_token_per_sec": decode,
        "prompt_tokens": 1600,
        "generated_tokens": generated,
        "model_load_start_ms": 100,
        "model_load_end_ms": 5100,
        "first_token_ms": 6041,
        "prompt_eval_end_ms": 6040,
        "gpu_total_bytes": 140 << 30,
        "gpu_free_before_load_bytes": 139 << 30,
        "gpu_free_after_load_bytes": 121 << 30,
        "gpu_free_after_generate_bytes": 120 << 30,
        "gpu_peak_usage_mb": 20480.0,
    }


def test_summary_of_gpu_stats():
    row = bench.summarize([gpu_stats(40000, 500), gpu_stats(50000, 700), gpu_stats(20000, 600)])
    assert row["prefill_tok_s"] == {"median": 40000, "low": 20000, "high": 50000}
    assert row["decode_tok_s"]["median"] == 600
    assert row["first_token_ms"] == {"median": 41.0, "low": 33.0, "high": 81.0}
    assert row["load_ms"] == 5000
    assert row["gpu"] == {"peak_mb": 20480.0, "used_mb": 19 * 1024}
    one = bench.summarize([gpu_stats(40000, 0, generated=1)])
    assert one["decode_tok_s"] is None and one["generated"] == 1
    with pytest.raises(RuntimeError, match="no measurable time"):
        bench.summarize([gpu_stats(0, 500)])


def test_rates_against_the_roof():
    kernel = bench.roofline.Kernel
    kernels = [kernel("a", 4e9), kernel("b", 0.0, int8=8e11, bf16=4e11)]
    reached = bench.achieved(kernels, 4e-3, ROOF)  # at least 1 ms + 0.5 ms + 0.5 ms
    assert reached["bytes_per_s"] == pytest.approx(1e12)
    assert reached["operations_per_s"] == pytest.approx(3e14)
    assert reached["of_bandwidth"] == pytest.approx(0.25)
    assert reached["of_roof"] == pytest.approx(0.5)


def test_cost_of_a_prompt_and_of_its_activations():
    c = parse_config({"model_type": "qwen3_5_moe"})

    def operations(kernels, kind):
        return sum(getattr(k, kind) for k in kernels)

    int8, bf16 = (bench.prefill_cost(c, name, 1600) for name in ("int8", "bf16"))
    assert operations(int8, "int8") > 7e12 and operations(bf16, "int8") == 0
    total = operations(int8, "int8") + operations(int8, "bf16")
    assert operations(bf16, "bf16") == pytest.approx(total)
    # A prompt of two pieces runs the model twice; the second attends to the first.
    pieces = bench.prefill_cost(c, "int8", 4096)
    assert len(pieces) == 2 * len(int8)
    first = bench.call_cost(c, "int8", 2048, 0)
    assert operations(pieces, "bf16") > 2 * operations(first, "bf16")


class FakeRunner:
    """Answers as a GPU program would, and is slower without CUDA graphs."""

    def measure(self, program, prompt, new_tokens, cuda_graph):
        if prompt > 4000:
            raise RuntimeError("the prompt is too long")
        return [gpu_stats(40000, 600 if cuda_graph else 200)]


def test_rows_of_a_gpu_program(tmp_path):
    c = parse_config({"model_type": "qwen3_5_moe"})
    gpu = {"name": "G", "roof": ROOF}
    programs = [bench.Program(name, Path(name)) for name in ("int8", "bf16")]
    rows = list(bench.measure_all(FakeRunner(), programs, [1600, 4096], 512, c, gpu))
    assert [r["cuda_graph"] for r in rows] == [False, True] * 4
    assert ["error" in r for r in rows] == [False, False, True, True] * 2
    decode = rows[1]["achieved"]["decode"]
    least = sum(k.seconds(**ROOF) for k in bench.call_cost(c, "int8", 1, 1600 + 256))
    assert decode["of_roof"] == pytest.approx(600 * least)
    kernel = {"name": "moe", "launches": 3, "us": 60.0, "share": 1.0}
    call = {"launches": 3, "kernels_us": 60.0, "span_us": 70.0, "kernels": [kernel]}
    profiles = [
        {"activations": "int8", "prompt": 1600, "prefill": call, "decode": call},
        {"activations": "bf16", "prompt": 1600, "prefill": None, "decode": None, "error": "no g++"},
    ]
    head = {"machine": "G", "command": "x", "commit": None, "cpus": 2}
    result = head | {"gpu": gpu, "rows": rows, "profiles": profiles}
    text = "\n".join(report.section(report.condense(result)))
    assert "Measured roof: 4.00 TB/s, 1600 TOPS INT8, 800 TFLOPS bf16." in text
    assert "| int8 | yes | 4096 | failed: the prompt is too long |" in text
    assert "| `moe` | 3 | 60.0 | 100.0% |" in text
    assert "Not profiled: bf16, prompt of 1600 tokens: no g++" in text
    report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_prompt_ids_are_within_the_vocabulary(tiny_checkpoint):
    runner = bench.Runner(Path("runner"), 2, 5, load_config(tiny_checkpoint).vocab_size)
    program = bench.Program("int8", Path("p"))
    command = runner.command(program, 300, 8, cuda_graph=True)
    assert "--cuda_graph" in command and command == runner.command(program, 300, 8, True)
    (ids,) = [a for a in command if isinstance(a, str) and a.startswith("--prompt_ids=")]
    ids = [int(i) for i in ids.partition("=")[2].split(",")]
    assert len(ids) == 300 and max(ids) < 264 and len(set(ids)) > 100
