"""The 35B at full size on a GPU: the script, with a python3 that only writes down its arguments."""

import re
import subprocess
from pathlib import Path

import pytest

from et_moe.benchmarks.e2e import Program

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = ("int8", "bf16", "state", "mixed", "drafts1", "drafts2", "long")
PYTHON = """#!/bin/sh
case $2 in et_moe*) echo "$@" >>{log} ;; esac
case "$*" in *--output-dir*)
  for last; do :; done
  mkdir -p "$last" && touch "$last/model.ptd"
  [ "$3" = export ] || [ "$FAILING" = make-checkpoint ] || touch "$last/config.json" ;;
esac
[ "$3" != "$FAILING" ]
"""


@pytest.fixture
def measure(tmp_path: Path):
    """Runs measurements over a folder with all programs; gives the exit code and the calls."""
    folder, log, tools = tmp_path / "packed", tmp_path / "log", tmp_path / "bin"
    for name in PROGRAMS:
        (folder / "full_size" / name).mkdir(parents=True)
        (folder / "full_size" / name / "model.pte").touch()
    (folder / "manifest.json").write_text("{}")
    tools.mkdir()
    (tools / "python3").write_text(PYTHON.format(log=log))
    (tools / "python3").chmod(0o755)

    def run(*measurements: str, failing: str = "nothing") -> tuple[int, list[str], str]:
        log.write_text("")
        done = subprocess.run(
            [REPO / "scripts/gpu_full_size.sh", folder, *measurements],
            env={"PATH": f"{tools}:/usr/bin:/bin", "FAILING": failing},
            capture_output=True,
            text=True,
        )
        calls = log.read_text().replace(str(folder), "FOLDER").splitlines()
        return done.returncode, [call.removeprefix("-m et_moe.") for call in calls], done.stderr

    return run


def commands(calls: list[str]) -> list[str]:
    """The first words of calls, and of benchmarks the results."""
    words = [call.split() for call in calls]
    outs = [w[w.index("--out") + 1] if "--out" in w else "" for w in words]
    return [" ".join([*w[:2], Path(out).stem]).strip() for w, out in zip(words, outs, strict=True)]


def test_all_of_it(measure, tmp_path: Path) -> None:
    """Weights are made once for all programs that they serve."""
    code, calls, error = measure()
    assert code == 0, error
    made, export = "pipeline.cli make-checkpoint", "pipeline.cli export"
    expected = [made, export, "benchmarks e2e e2e", "benchmarks batch batch"]
    expected += [f"benchmarks {name} {name}" for name in ("activations", "peers", "kernels")]
    expected += ["benchmarks batch few"]
    expected += [part for n in (1, 2) for part in (export, f"benchmarks batch drafts{n}")]
    expected += ["benchmarks batch state", "benchmarks batch second_turn"]
    expected += [made, export, "benchmarks e2e mixed"]
    assert commands(calls) == expected
    exports = [call for call in calls if call.startswith(export)]
    drafts = [call.split("--draft-tokens ")[1].split()[0] for call in exports]
    assert drafts == ["0", "1", "2", "0"]
    assert "--program int8=FOLDER/full_size/int8 --program bf16=FOLDER/full_size/bf16" in calls[2]
    single = [call for call in calls if call.startswith("benchmarks e2e")]
    programs = re.findall(r"--program (\S+)", " ".join(single))
    taken = [Program.parse(text.replace("FOLDER", str(tmp_path / "packed"))) for text in programs]
    assert [program.folder.name for program in taken] == ["int8", "bf16", "mixed"]


def test_one_of_them(measure) -> None:
    code, calls, error = measure("second_turn")
    assert code == 0, error
    assert commands(calls)[-1] == "benchmarks batch second_turn" and len(calls) == 3
    assert calls[-1].endswith("/full_size/long --load 1:32032:32 --prefix-cache")
    code, calls, _ = measure("second_turn")
    assert code == 0 and commands(calls) == ["benchmarks batch second_turn"]


def test_a_bundle_that_was_not_finished_is_made_again(measure) -> None:
    code, calls, _ = measure("state", failing="make-checkpoint")
    assert code and len(calls) == 1
    code, calls, _ = measure("state")
    assert code == 0 and len(calls) == 3


def test_what_another_packing_left_is_not_used(measure, tmp_path: Path) -> None:
    measure("state")
    (tmp_path / "packed/manifest.json").write_text('{"commit": 1}')
    assert len(measure("state")[1]) == 3


def test_the_times_of_the_page_are_those_of_its_programs(measure, tmp_path: Path) -> None:
    measure()
    steps = (tmp_path / "packed/results/e2e.tsv").read_text().splitlines()
    assert [step.split()[2] for step in steps] == ["make-checkpoint", "export"]
    assert "--recipe 4w" in steps[0] and "--draft-tokens 0" in steps[1]


def test_a_measurement_that_fails_does_not_end_the_others(measure) -> None:
    code, calls, _ = measure("kernels", "state", failing="kernels")
    assert code == 1 and commands(calls)[-1] == "benchmarks batch state"


def test_what_is_none(measure) -> None:
    code, calls, error = measure("speed")
    assert (code, calls) == (2, []) and "speed: no such measurement; usage: " in error
