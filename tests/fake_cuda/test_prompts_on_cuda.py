"""The runner's file of prompts over the fake driver."""

import json
import re
from pathlib import Path

import pytest

GPU_BYTES = 2**32
PROMPTS = [[5, 77, 130, 9, 31, 64, 250, 3, 8], [9, 8], [4], [7, 7, 7]]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts"
    lines = [json.dumps({"prompt_ids": ids, "max_new_tokens": 3}) for ids in PROMPTS]
    path.write_text("\n".join(lines))
    return f"--prompts_path={path}"


@pytest.mark.timeout(900)
def test_executed_tokens_are_those_of_the_cpu(fake, programs, prompts: str, tmp_path: Path) -> None:
    """Also from a second run, which replays graphs."""
    flags = (prompts, f"--output_ids_path={tmp_path / 'ids'}", "--warmup=1")
    assert fake.runner(programs / "cpu", *flags).returncode == 0
    expected = json.loads((tmp_path / "ids").read_text())
    sidecar = str(programs / "cuda/kernels.json")
    done = fake.runner(programs / "cuda", *flags, "--cuda_graph", execute=sidecar)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ids").read_text()) == expected
    report = fake.report()
    assert not report["violations"] and not report["leaks"]
    stats = json.loads(done.stdout.splitlines()[0].removeprefix("PyTorchObserver "))
    assert stats["gpu_total_bytes"] == GPU_BYTES and stats["gpu_peak_usage_mb"] > 0
    assert "Peak GPU memory" in done.stdout


def test_the_fraction_of_memory_bounds_the_kv_cache(fake, programs, prompts: str) -> None:
    """A fraction that is too small for one sequence is refused."""

    def run(fraction: float):
        flags = ("--max_sequences=200", f"--memory_fraction={fraction}")
        return fake.runner(programs / "cuda", prompts, *flags)

    def cached(done) -> int:
        assert done.returncode == 0, done.stderr
        expected = r"200 sequences at once, a KV cache of (\d+) tokens\n"
        return int(re.fullmatch(expected, done.stderr)[1])

    def used(done) -> int:
        line = next(line for line in done.stdout.splitlines() if line.startswith("PyTorch"))
        stats = json.loads(line.removeprefix("PyTorchObserver "))
        return GPU_BYTES - stats["gpu_free_after_generate_bytes"]

    whole, part = run(1.0), run(0.011)  # 45 MiB: what calls take, weights, slots, some pages
    assert 128 <= cached(part) < cached(whole) == 200 * 128
    assert used(part) < used(whole)
    refused = run(1e-9)
    assert refused.returncode == 1 and "with memory_fraction" in refused.stderr
