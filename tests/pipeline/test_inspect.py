"""`et-moe inspect` of a program for the CPU, and the same numbers where programs are made."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from executorch.exir import to_edge
from torch import nn, zeros
from torch.export import export

from et_moe.backends.sealed_file import check_sealed, write_sealed
from et_moe.pipeline.footprint import in_words

Run = Callable[..., tuple[int, str, str]]


def test_json(run: Run, tiny_program: Path) -> None:
    file = tiny_program / "model.pte"
    code, printed, _ = run("inspect", file, "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["backend"] == "cpu" and found["bytes"] == file.stat().st_size
    methods, constants = found["methods"], found["constants"]
    assert set(methods) == {"prefill", "decode", "decode_batch"}
    for method in methods.values():
        assert [t["name"] for t in method["outputs"]] == ["token", "logits"]
        assert method["inputs"][0]["name"] == "tokens" and method["scratch"] > 0
        assert method["ops"]["et_moe::linear_w4a8"] == 5 and method["ops"]["et_moe::moe_w4a8"] == 2
        assert {t["pool"] for t in method["state"]} == {"pages", "slots"}
        assert any(t["name"] == "embed_tokens.weight" for t in method["weights"])
    assert methods["decode"]["ops"].keys() < methods["prefill"]["ops"].keys()
    assert constants["get_max_seq_len"] == 32 and json.loads(constants["get_backend"]) == "cpu"
    assert 5 < constants["get_bits_per_weight"] < 6 and constants["get_bytes_per_token"] > 1e4


def test_tables(run: Run, tiny_program: Path) -> None:
    code, printed, _ = run("inspect", tiny_program / "model.pte")
    assert code == 0
    rows = [" ".join(re.findall(r"[^\s│]+", line)) for line in printed.splitlines()]
    for row in (
        "decode et_moe::moe_router 2",
        "prefill input tokens int64 [1, 2..32]",
        "decode input tokens (next: token) int64 [1, 1]",
        "decode_batch output logits float32 [2..64, 264]",
        "get_max_seq_len: 32",
    ):
        assert row in rows
    assert re.fullmatch(r"\d\.\d\d bits a weight, .* MB read for a decoded token", rows[-1])


def test_damaged_and_foreign_programs(run: Run, tiny_program: Path, tmp_path: Path) -> None:
    whole, file = (tiny_program / "model.pte").read_bytes(), tmp_path / "model.pte"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    relu = to_edge(export(nn.ReLU(), (zeros(2),))).to_executorch().buffer
    for content, problem in (
        (flipped, "damaged: checksum mismatch"),
        (whole[:-1], "no checksum at its end: truncated, or not written by `et-moe export`"),
        (whole[:10], "no checksum at its end"),
        (relu, "no checksum at its end"),
    ):
        file.write_bytes(content)
        code, printed, error = run("inspect", file)
        assert code == 1 and not printed and error.startswith(f"error: {file}: {problem}"), error
    write_sealed(file, relu)
    check_sealed(file.read_bytes())
    code, _, error = run("inspect", file)
    assert code == 1 and "neither for the CPU nor for CUDA" in error


@pytest.mark.parametrize("how", ["--model-dir", "--prequantized"])
def test_export_prints_the_same_numbers(
    run: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, how: str
) -> None:
    source = {"--model-dir": tiny_checkpoint, "--prequantized": tiny_bundle}[how]
    flags = ("--recipe", "dense") if how == "--model-dir" else ()
    output = ("--output-dir", tmp_path / "p", "--graph-only")
    code, _, said = run("export", how, source, *flags, *output)
    assert code == 0
    constants = json.loads(run("inspect", tmp_path / "p/model.pte", "--json")[1])["constants"]
    taken = in_words(constants["get_bits_per_weight"], constants["get_bytes_per_token"])
    assert taken in said
