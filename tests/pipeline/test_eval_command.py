"""`et-moe eval` as a command: what it prints, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

from checkpoints import change_config, make_small

Run = Callable[..., tuple[int, str, str]]


def test_eval(run: Run, tiny_checkpoint, tiny_program, build_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("caf\u00e9 au lait. " * 4)
    runner = build_dir / "runner" / "qwen3_5_moe_runner"
    common = ("eval", "--model-dir", tiny_checkpoint, "--text", text, "--window", 16)
    common += ("--program-dir", tiny_program, "--runner", runner)
    code, out, err = run(*common, "--json")
    assert code == 0, err
    result, slow = json.loads(out), f"warning: {tiny_program}/model.pte: takes one token a call"
    assert err.count(slow) == 1 and "`export --score` makes programs that take 64" in err
    assert result["tokens"] > 50 and 0 <= result["top1_agreement"] <= 1
    assert abs(result["perplexity_growth"]) < 0.2 and 0 <= result["kl_divergence"] < 0.5
    code, out, _ = run(*common)
    assert code == 0 and f"{result['perplexity']:.4f}" in out
    common = ("eval", "--text", text, "--window", 16, "--runner", runner)
    common += ("--program-dir", tiny_program, "--reference-program", tiny_program)
    code, out, err = run(*common, "--json")
    assert code == 0 and "tokens" in err, err
    found = json.loads(out)
    assert found["perplexity"] == found["reference_perplexity"] == result["perplexity"]
    assert (found["kl_divergence"], found["top1_agreement"]) == (0, 1)


def test_eval_of_what_is_not_there(
    refused, tiny_checkpoint, tiny_program, build_dir: Path, tmp_path: Path
) -> None:
    text, empty, latin = (tmp_path / name for name in ("text", "empty", "latin"))
    text.write_text("some text")
    empty.touch()
    latin.write_bytes(b"caf\xe9")
    good = {
        "--model-dir": tiny_checkpoint,
        "--program-dir": tiny_program,
        "--text": text,
        "--runner": build_dir / "runner" / "qwen3_5_moe_runner",
    }

    def check(parts: list[object], **changes: object) -> None:
        options = good | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
        refused("eval", *(x for pair in options.items() for x in pair), parts=["error: ", *parts])

    missing = tmp_path / "missing"
    check([f"{missing}: no such directory"], model_dir=missing)
    check([missing], text=missing)
    check([empty, "fewer than two tokens"], text=empty)
    check([latin, "UTF-8"], text=latin)
    check([missing, "cannot be run"], runner=missing)
    check([missing / "model.pte"], program_dir=missing)
    check(["--window 1: expected at least 2"], window=1)
    check(["--model-dir and --reference-program: expected at most one"], reference_program=missing)
    make_small(tmp_path / "other", vocab_size=320)
    check([tmp_path / "other", "320", "264"], model_dir=tmp_path / "other")
    (tmp_path / "other" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Model")
    change_config(tmp_path / "other", auto_map=code)
    check([tmp_path / "other", "320", "264"], model_dir=tmp_path / "other")
    assert not (tmp_path / "ran").exists()
    for file in (tmp_path / "other").glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    check([tmp_path / "other", "safetensors"], model_dir=tmp_path / "other")


def test_a_program_that_takes_many_tokens_is_no_slow_one(
    run: Run, scored_model: Path, build_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("a few words")
    runner = build_dir / "runner" / "qwen3_5_moe_runner"
    for name in ("score", "plain"):
        program = scored_model / name
        code, _, err = run("eval", "--program-dir", program, "--text", text, "--runner", runner)
        assert code == 0 and ("takes one token a call" in err) == (name == "plain"), err


def test_exports_with_a_method_for_it(run: Run, tmp_path: Path) -> None:
    command = ("export", "--preset", "tiny", "--graph-only", "--output-dir", tmp_path / "program")
    assert run(*command, "--max-sequences", 1, "--score")[0] == 0
    pte = (tmp_path / "program" / "model.pte").read_bytes()
    assert b"get_score_tokens" in pte and b'"score"' in pte
