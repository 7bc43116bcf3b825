"""Decoding with drafts over the fake driver: the kernels' tokens are those of the CPU.

A call takes the interpreter many seconds. With ET_MOE_DRAFT_PROMPTS set all is run, which takes
half an hour; without it two short requests. ET_MOE_DRAFT_TOKENS, 1 to 3, says how many drafts a
step has; 1 if it is not set.
"""

import json
import os
from pathlib import Path

import pytest

MANY = "ET_MOE_DRAFT_PROMPTS" in os.environ
LONG = pytest.mark.skipif(not MANY, reason="takes too long: set ET_MOE_DRAFT_PROMPTS")
EAGER, GRAPH = pytest.param(False, id="eager", marks=LONG), pytest.param(True, id="graph")
TOGETHER = 2 if os.environ.get("ET_MOE_DRAFT_TOKENS", "1") == "1" else 1
"""Sequences that draft together on CUDA."""
PROMPTS = [[5, 77, 130, 9, 31, 64, 250, 3, 8, 19, 20, 33, 41, 57, 101, 99], [9, 8], [4], [7, 7, 7]]


@pytest.mark.parametrize("graph", [EAGER, GRAPH])
@pytest.mark.timeout(1800)
def test_requests(fake, programs, tmp_path: Path, graph: bool) -> None:
    """Together, alone with calls that run ahead, greedy and sampled."""
    prompts, most = (PROMPTS, 12) if MANY else ([[5], [2, 2]], 5)
    requests = [{"prompt_ids": ids, "max_new_tokens": most + i} for i, ids in enumerate(prompts)]
    requests[1] |= {"temperature": 0.7, "seed": 3}
    path = tmp_path / "prompts"
    path.write_text("\n".join(map(json.dumps, requests)))
    flags = (f"--prompts_path={path}", f"--output_ids_path={tmp_path / 'ids'}")
    flags += (f"--max_sequences={TOGETHER}",)
    flags += (f"--stats_path={tmp_path / 'stats'}",)

    def run(backend: str, *more: str, **environment: str) -> tuple[list, dict]:
        done = fake.runner(programs / "drafts" / backend, *flags, *more, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads((tmp_path / name).read_text()) for name in ("ids", "stats")]

    expected, cpu = run("cpu")
    sidecar = str(programs / "drafts/cuda/kernels.json")
    tokens, stats = run("cuda", *(["--cuda_graph"] if graph else []), execute=sidecar)
    assert tokens == expected
    for name in ("draft_steps", "draft_tokens", "accepted_draft_tokens_per_position"):
        assert stats[name] == cpu[name], name
    assert stats["accepted_draft_tokens_per_position"][0] > 0
    report = fake.report()
    assert not report["violations"] and not report["leaks"]


@LONG
@pytest.mark.parametrize("graph", [EAGER, GRAPH])
@pytest.mark.timeout(1800)
def test_a_conversation(fake, programs, graph: bool) -> None:
    """A turn that ends at a token behind which the device has gone on is fed again."""
    script = []
    for stop in (1, 4, 5, 6):
        script.append({"generate": PROMPTS[0], "max_new_tokens": 14, "stop_after": stop})
        script.append({"append": [9, 8], "max_new_tokens": 5})
    lines = "".join(json.dumps(command) + "\n" for command in script)

    def run(backend: str, *more: str, **environment: str) -> list[dict]:
        folder = programs / "drafts" / backend
        files = (folder / "model.pte", folder / "model.ptd")
        done = fake.run("tests/runner/engine_check", *files, *more, stdin=lines, **environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    sidecar = str(programs / "drafts/cuda/kernels.json")
    found = run("cuda", *(["--cuda_graph"] if graph else []), execute=sidecar)
    assert found == run("cpu")
    report = fake.report()
    assert not report["violations"] and not report["leaks"]
