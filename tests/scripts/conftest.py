"""A folder that the packer made, and a session of the acceptance over it.

Programs here are for the CPU; the runner takes the same flags for them.
"""

import json
import sys
import time

import acceptance_models as models
import gpu_acceptance as acceptance
import numpy as np
import pack_acceptance as packer
import pytest


@pytest.fixture
def folder(build_dir, tiny_program, tmp_path):
    """A folder that the packer made with one model, whose program is for the CPU."""
    folder = tmp_path / "pack"
    model_folder = folder / "models/small"
    model_folder.mkdir(parents=True)
    for name in ("model.pte", "model.ptd"):
        (model_folder / name).symlink_to(tiny_program / name)
    runner = packer.pack_runner(build_dir / "runner/qwen3_5_moe_runner", folder)
    program = models.Program(packer.run, runner, model_folder, tmp_path)
    cases = [models.make_case(program, prompt, 8, 1e-4) for prompt in ([5], [1, 2, 3], [7] * 20)]
    assert all(len(case.expected_ids) > 1 for case in cases)
    ids = list(range(20))
    np.save(model_folder / models.EXPECTED_LOGITS, program.logits(ids))
    entry = models.Model("small", "float32", cases, ids).to_json()
    manifest = {"models": [entry], "python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    (folder / models.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def session(folder, tmp_path):
    manifest = json.loads((folder / acceptance.MANIFEST).read_text())
    log = tmp_path / "log.txt"
    log.write_text("")
    return acceptance.Session(folder, manifest, tmp_path, log, False, time.monotonic() + 60)
