"""Files that the runner loads: their seals, whether a program and its weights belong together,
and paths that lead to no regular file."""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
import toy_programs
import xxhash
from checkpoints import make_small, storages

from et_moe.backends.sealed_file import FINGERPRINT, MAGIC, PtdWriter
from et_moe.pipeline.bundle import Bundle
from et_moe.pipeline.checkpoint import Checkpoint
from et_moe.pipeline.export import ExportOptions, export
from et_moe.pipeline.quantize import QuantizedCheckpoint

TRAILER = 24


def refused(runner, pte: Path, ptd: Path, *messages: str) -> None:
    command = [runner.binary, f"--model_path={pte}", f"--data_path={ptd}", "--prompt_ids=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout, (done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("name", "more"),
    # The seal of a program covers all of it: there is no byte more.
    [("model.pte", -1), ("model.pte", None), *(("model.ptd", more) for more in (1, -1, None))],
)
def test_a_seal_of_fewer_bytes(runner, tiny_program: Path, tmp_path: Path, name, more) -> None:
    """The seal covers one byte, or one byte more or less than it has to cover."""
    whole = (tiny_program / name).read_bytes()
    covered = struct.unpack_from("<Q", whole, len(whole) - 16)[0]
    covered = 1 if more is None else covered + more
    digest = xxhash.xxh3_64_intdigest(whole[:covered])
    path = tmp_path / name
    path.write_bytes(whole[:-TRAILER] + MAGIC + struct.pack("<QQ", covered, digest))
    files = {"model.pte": tiny_program / "model.pte", "model.ptd": tiny_program / "model.ptd"}
    files[name] = path
    refused(runner, *files.values(), f"error: {path}: ", "checksum does not cover")


def test_bytes_behind_the_data(runner, tiny_program: Path, tmp_path: Path) -> None:
    whole = (tiny_program / "model.ptd").read_bytes()
    path = tmp_path / "model.ptd"
    path.write_bytes(whole[:-TRAILER] + b"more" + whole[-TRAILER:])
    refused(runner, tiny_program / "model.pte", path, f"error: {path}: ", "behind its data")


@pytest.mark.parametrize("name", ["model.pte", "model.ptd"])
def test_a_fifo(runner, tiny_program: Path, tmp_path: Path, name: str) -> None:
    """It is refused at once: nobody may ever write to it."""
    files = {"model.pte": tiny_program / "model.pte", "model.ptd": tiny_program / "model.ptd"}
    files[name] = tmp_path / name
    os.mkfifo(files[name])
    refused(runner, *files.values(), f"error: {files[name]}: is empty or not a regular file")


COUNTED = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/types.h>
#define OPEN(name)                                                                     \
  int name(const char* path, int flags, ...) {                                         \
    va_list rest;                                                                      \
    va_start(rest, flags);                                                             \
    int (*real)(const char*, int, ...) = (int (*)(const char*, int, ...))dlsym(RTLD_NEXT, #name); \
    fprintf(stderr, "open %s\n", path);                                                \
    return real(path, flags, va_arg(rest, mode_t));                                    \
  }
OPEN(open)
OPEN(open64)
"""


def test_what_is_checked_is_what_is_loaded(runner, tiny_program: Path, tmp_path: Path) -> None:
    """Each file is opened once: a path may lead elsewhere the second time."""
    (tmp_path / "counted.c").write_text(COUNTED)
    library = tmp_path / "counted.so"
    command = ["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "counted.c", "-ldl"]
    subprocess.run(command, check=True)
    pte, ptd = tiny_program / "model.pte", tiny_program / "model.ptd"
    done = subprocess.run(
        [runner.binary, f"--model_path={pte}", f"--data_path={ptd}", "--prompt_ids=1"],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    opened = done.stderr.splitlines()
    assert opened.count(f"open {pte}") == 1 and opened.count(f"open {ptd}") == 1, opened


def small(folder: Path, **overrides) -> QuantizedCheckpoint:
    make_small(folder, **overrides)
    return QuantizedCheckpoint(Checkpoint(folder), storages("4w", 32, "8w"))


def test_weights_of_another_configuration(runner, tiny_program: Path, tmp_path: Path) -> None:
    """The shapes are the same, but it is another model."""
    options = ExportOptions(max_seq_len=32)
    export(small(tmp_path / "eps", rms_norm_eps=1e-5), tmp_path / "other", options)
    pte, ptd = tiny_program / "model.pte", tmp_path / "other" / "model.ptd"
    message = (
        f"error: {pte} with {ptd}: they do not fit each other: rms_norm_eps is 1e-05 in the "
        "weights, the program has 1e-06"
    )
    refused(runner, pte, ptd, message)


def test_a_damaged_fingerprint_is_damage(runner, tiny_program: Path, tmp_path: Path) -> None:
    whole, text = (tiny_program / "model.ptd").read_bytes(), b'"group_size": 32'
    assert text in whole
    path = tmp_path / "model.ptd"
    path.write_bytes(whole.replace(text, b'"group_size": 33', 1))
    message = f"error: {path}: damaged: checksum mismatch of tensor {FINGERPRINT}"
    refused(runner, tiny_program / "model.pte", path, message)


def test_programs_of_the_same_weights(runner, tiny_bundle, tiny_program, tmp_path: Path) -> None:
    """Their context lengths and activations may differ."""
    options = ExportOptions(max_seq_len=16, activation_dtype="bf16")
    export(Bundle(tiny_bundle), tmp_path, options)
    (tmp_path / "model.ptd").unlink()
    (tmp_path / "model.ptd").symlink_to(tiny_program / "model.ptd")
    assert len(runner.generate(tmp_path, [1, 2, 3], 4)) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no fingerprint of its model; export it again with `et-moe export`"),
        ('{"model_type": "toys"}', 'model_type is "toys" in the weights, the program has "toy"'),
        ("{}", 'model_type is not given in the weights, the program has "toy"'),
        ('{"a": 1, "model_type": "toy"}', "a is 1 in the weights, the program has not given"),
        ("[1]", "its fingerprint is no JSON object"),
        ("[" * 100000 + "]" * 100000, "its fingerprint cannot be read"),
        ("{", "its fingerprint cannot be read"),
    ],
)
def test_fingerprints_that_differ(runner, tmp_path: Path, text: str, message: str) -> None:
    program = toy_programs.write(tmp_path)
    path = tmp_path / "model.ptd"
    with PtdWriter(path, {}, {FINGERPRINT: text}):
        pass
    both = f"error: {program / 'model.pte'} with {path}: they do not fit each other: "
    start = both if "the program has" in message else f"error: {path}: "
    refused(runner, program / "model.pte", path, start + message)


def test_fingerprints_are_compared_by_value(runner, tmp_path: Path) -> None:
    program = toy_programs.write(tmp_path)
    text = json.dumps(json.loads(toy_programs.CONSTANTS["get_fingerprint"]), indent=1)
    with PtdWriter(tmp_path / "model.ptd", {}, {FINGERPRINT: text}):
        pass
    assert len(runner.generate(program, [1], 2)) == 2
