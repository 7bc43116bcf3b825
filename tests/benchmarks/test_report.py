"""The page of results: that it is made of the results in the tree, and how it is made."""

import json

import pytest

from et_moe.benchmarks.report import acceptance, cpu, e2e, machine_code, page


def test_the_page_is_made_of_the_results_in_the_tree():
    """If this fails, run `python -m et_moe.benchmarks report`."""
    assert page.PAGE.read_text() == page.page(page.read_results(page.RESULTS))


def test_links_of_the_page_are_there():
    text = page.PAGE.read_text()
    for name in ("images/e2e.png", "images/kernels.png", "performance.md"):
        assert f"]({name})" in text and (page.PAGE.parent / name).is_file()


def test_results_in_the_tree_are_small():
    lines = [len(path.read_text().splitlines()) for path in page.RESULTS.glob("*.json")]
    assert sum(lines) < 2000


HEAD = {"command": "x", "commit": "0123456789abcdef", "modified": False, "machine": "G", "cpus": 2}


def figures(commit="0123456789abcdef", modified=False):
    return HEAD | {"commit": commit, "modified": modified}


PEERS = {"rows": [], "comparison": []}
ACTIVATIONS = {
    "kernels": "Triton kernels",
    "tokens": 20,
    "top1_agreement": 0.5,
    "logits_error": 0.1,
    "layers": [{"layer": 0, "moe_error": 0.01, "hidden_error": 0.02}],
}


def test_one_commit_or_several():
    results = {"peers": figures() | PEERS, "activations": figures() | ACTIVATIONS}
    assert "All figures are of commit 0123456." in page.page(results)
    results["peers"] |= {"commit": "fedcba9876", "modified": True}
    text = page.page(results)
    assert "several commits: fedcba9, with changes (other implementations)," in text
    assert "0123456 (activations)." in text
    assert "## Kernels" not in text and "**Not measured yet" in text


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path / "tree/results")
    monkeypatch.setattr(page, "PAGE", tmp_path / "docs/results.md")
    (tmp_path / "docs").mkdir()
    (tmp_path / "new/results").mkdir(parents=True)
    return tmp_path


def test_update_takes_new_results_over(places):
    new = places / "new/results"
    command = f"run --out {places}/new/results/activations.json"
    result = figures() | ACTIVATIONS | {"command": command, "logits_error": 0.123456789}
    (new / "activations.json").write_text(json.dumps(result))
    page.update(new)
    kept = json.loads((places / "tree/results/activations.json").read_text())
    assert kept["command"] == "run --out FOLDER/results/activations.json"
    assert kept["logits_error"] == 0.1234568
    assert "`run --out FOLDER/results/activations.json`" in page.PAGE.read_text()
    before = page.PAGE.read_text()
    page.update(None)  # makes the page of what is in the tree now
    assert page.PAGE.read_text() == before == page.page(page.read_results(page.RESULTS))


def test_a_folder_without_results_is_refused(places):
    with pytest.raises(ValueError, match=r"no results found, expected e2e.json, batch.json"):
        page.update(places / "new/results")
    assert not page.PAGE.exists()


RATE = {"median": 8.0, "low": 7.0, "high": 9.0}
CPU_ROW = {
    "activations": "int8",
    "cuda_graph": False,
    "prompt": 128,
    "generated": 64,
    "prefill_tok_s": RATE,
    "first_token_ms": RATE,
    "decode_tok_s": RATE,
    "load_ms": 1500,
    "gpu": None,
    "achieved": None,
}


def test_a_cpu_run_says_how_its_program_was_made(places):
    path = places / "new/results/e2e_cpu.json"
    path.write_text(json.dumps(HEAD | {"gpu": None, "rows": [CPU_ROW], "profiles": []}))
    path.with_suffix(".tsv").write_text("61\tet-moe export --output-dir FOLDER/program\n")
    (section,) = [s for s in page.SECTIONS if s.name == "e2e_cpu"]
    lines = cpu.section(page.condense(section, path))
    assert "| `et-moe export --output-dir FOLDER/program` | 61 |" in lines
    assert "| 128 | 64 | 8 (7 to 9) | 8.0 (7.0 to 9.0) | 8.0 (7.0 to 9.0) | 1.50 |" in lines


def test_profiles_become_rows():
    kernels = [{"name": f"k{i}", "launches": 1, "us": 1.0, "share": 0.05} for i in range(20)]
    call = {"launches": 20, "kernels_us": 20.0, "span_us": 30.0, "kernels": kernels}
    profile = {"activations": "int8", "prompt": 16, "prefill": call, "decode": call}
    kept = e2e.condense({"rows": [], "profiles": [profile]})
    assert "profiles" not in kept and len(kept["kernels"]) == 2 * e2e.KERNELS
    assert [(c["call"], c["launches"]) for c in kept["calls"]] == [("decode", 20), ("prefill", 20)]


def test_acceptance_is_told_in_a_few_words():
    checks = [{"model": "a", "error": None}, {"model": "a", "error": "no"}]
    run = {"tool": "memcheck", "mode": "graphs", "summary": ["ERROR SUMMARY: 0 errors"]}
    made = {"status": "passed", "reason": None, "seconds": 1.6}
    steps = [
        made | {"name": "kernel tests", "found": {"passed": 8, "failed": 0}},
        made | {"name": "models", "found": {"checks": checks}},
        made | {"name": "compute-sanitizer", "found": {"runs": [run]}},
        made | {"name": "demo benchmark", "status": "failed", "reason": "no", "found": {}},
    ]
    kept = acceptance.condense(HEAD | {"status": "failed", "packed": {}, "steps": steps})
    assert "packed" not in kept
    lines = acceptance.section(kept)
    assert "| kernel tests | passed | 8 tests passed, 0 failed | 2 |" in lines
    assert "| models | passed | 2 checks of 1 models, 1 failed | 2 |" in lines
    assert (
        "| compute-sanitizer | passed | memcheck (graphs): ERROR SUMMARY: 0 errors | 2 |" in lines
    )
    assert "| demo benchmark | failed | no | 2 |" in lines


@pytest.mark.parametrize(("spilled", "said"), [(0, "None spills."), (8, "are spilled by k.")])
def test_machine_code_says_what_spills(spilled, said):
    row = {"kernel": "k", "arch": "sm_90", "registers": 40, "shared_memory": 2048}
    row |= {"tensor_instructions": 3, "spilled_bytes": spilled}
    kept = machine_code.condense(HEAD | {"rows": [row]})
    lines = machine_code.section(kept)
    assert any(said in line for line in lines)
    assert "| k | 1 |  |  |  | 40, 2, 3 |  |  |" in lines
