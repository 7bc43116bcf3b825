"""A small model as method graphs, and programs that lower it in a process of their own.

Other tests turn Triton's interpreter on for their whole process, and under it there is nothing to
compile. Run: `python lowering_methods.py COMMAND FOLDER`.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from et_moe.backends.method_graph import MethodGraph

HIDDEN, VOCABULARY, GROUP = 128, 256, 32
MAX_TOKENS = 64
STATE = {"conv.state": (torch.bfloat16, (3, HIDDEN))}
WEIGHTS = {
    "embed.weight": (torch.int8, (VOCABULARY, HIDDEN)),
    "embed.scale": (torch.bfloat16, (VOCABULARY, 1)),
    "conv.weight": (torch.bfloat16, (HIDDEN, 4)),
    "norm.weight": (torch.bfloat16, (HIDDEN,)),
    "proj.weight": (torch.uint8, (HIDDEN, HIDDEN // 2)),
    "proj.scale": (torch.bfloat16, (HIDDEN, HIDDEN // GROUP)),
    "head.weight": (torch.uint8, (VOCABULARY, HIDDEN // 2)),
    "head.scale": (torch.bfloat16, (VOCABULARY, HIDDEN // GROUP)),
}


class Small(torch.nn.Module):
    """Embedding, convolution with state, INT4 layer and head, greedy token."""

    def hidden(self, tokens, num_tokens, state, w):
        et = torch.ops.et_moe
        x = et.embedding_w8(tokens.view(-1), w["embed.weight"], w["embed.scale"], torch.bfloat16)
        x = et.causal_conv1d(x, w["conv.weight"], state["conv.state"], num_tokens)
        norm = w["norm.weight"]
        x = et.linear_w4a8(x, w["proj.weight"], w["proj.scale"], GROUP, norm, 1e-6, x)
        return x if num_tokens is None else x.index_select(0, num_tokens - 1)

    def forward(self, tokens, position, num_tokens, state, w):
        last = self.hidden(tokens, num_tokens, state, w).float()
        logits = torch.ops.et_moe.linear_w4a8(last, w["head.weight"], w["head.scale"], GROUP)
        return logits.argmax(-1, keepdim=True), logits


class LibraryCall(Small):
    """Has a matrix product that no kernel of ours computes."""

    def forward(self, tokens, position, num_tokens, state, w):
        token, logits = super().forward(tokens, position, num_tokens, state, w)
        return token, logits @ torch.ones(VOCABULARY, VOCABULARY)


class CopiedState(Small):
    """Updates state with an op that Inductor compiles by itself."""

    def forward(self, tokens, position, num_tokens, state, w):
        state["conv.state"].mul_(2)
        return super().forward(tokens, position, num_tokens, state, w)


def method(model: torch.nn.Module, decode: bool) -> MethodGraph:
    """Exports one method on fake tensors."""
    names = ["tokens", "position"] + ([] if decode else ["num_tokens"])
    with FakeTensorMode():
        arguments = (
            torch.empty((1, 1 if decode else 8), dtype=torch.int64),
            torch.empty(1, dtype=torch.int64),
            None if decode else torch.empty(1, dtype=torch.int64),
            {n: torch.empty(shape, dtype=dtype) for n, (dtype, shape) in STATE.items()},
            {n: torch.empty(shape, dtype=dtype) for n, (dtype, shape) in WEIGHTS.items()},
        )
    tokens = None if decode else {1: Dim("T", min=2, max=MAX_TOKENS)}
    program = torch.export.export(
        model,
        arguments,
        dynamic_shapes=(tokens, None, None, dict.fromkeys(STATE), dict.fromkeys(WEIGHTS)),
        strict=False,
    )
    return MethodGraph(program, names, list(STATE), list(WEIGHTS))


def methods() -> dict[str, MethodGraph]:
    return {"prefill": method(Small(), False), "decode": method(Small(), True)}


def _lower(folder: Path) -> None:
    """The `.pte` for two architectures, its parts, and what a second run with the cache does."""
    from et_moe.backends.cuda.backend import lower

    constants = {"get_max_seq_len": 128, "get_eos_ids": "[1, 2]"}
    archs = ["sm_90", "sm_80"]
    start = time.monotonic()
    program = lower(methods(), archs, constants, folder / "cache")
    report = {"first_seconds": time.monotonic() - start}
    (folder / "model.pte").write_bytes(program.pte)
    (folder / "sidecar.json").write_text(program.sidecar())
    for name, codes in program.compiled.items():
        for arch, code in codes.items():
            (folder / f"{name}.{arch}.so").write_bytes(code.code)
            (folder / f"{name}.{arch}.cpp").write_text(code.source)
    damaged = next((folder / "cache").iterdir())
    start = time.monotonic()
    again = lower(methods(), archs, constants, folder / "cache")
    report |= {"seconds": time.monotonic() - start, "same": again.pte == program.pte}
    damaged.write_bytes(b"damaged")
    report["same_after_damage"] = (
        lower(methods(), archs, constants, folder / "cache").pte == again.pte
    )
    report["cuda_before_and_after"] = [torch.cuda.is_available(), torch.version.cuda]
    (folder / "report.json").write_text(json.dumps(report))


def _again(folder: Path) -> None:
    """The digest of one method, compiled alone and without a cache."""
    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights

    graphs = {"decode": method(Small(), True)}
    code = compile_method(graphs["decode"], plan_weights(graphs), "sm_80").code
    (folder / "again.txt").write_text(hashlib.sha256(code).hexdigest())


def _errors(folder: Path) -> None:
    """The messages of graphs that must be refused."""
    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights

    messages = {}
    for model in (LibraryCall(), CopiedState()):
        graphs = {"decode": method(model, True)}
        try:
            compile_method(graphs["decode"], plan_weights(graphs), "sm_90")
        except Exception as e:
            messages[type(model).__name__] = [type(e).__name__, str(e)]
    (folder / "errors.json").write_text(json.dumps(messages))


def _launches(folder: Path) -> None:
    """Launches per decoded token of four layers of the 35B model, of both kinds."""
    from checkpoints import storages

    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights
    from et_moe.examples.qwen3_5_moe.model import MODEL
    from et_moe.pipeline.export import build_graphs
    from et_moe.pipeline.make_checkpoint import text_config
    from et_moe.pipeline.models import parse_config
    from et_moe.pipeline.storage import Precision

    config = parse_config(text_config(MODEL, "35b", layers=4), where="35b")
    graphs = build_graphs(config, Precision(storages()), 4096)
    code = compile_method(graphs["decode"], plan_weights(graphs), "sm_90")
    report = {"layers": config.layer_types, "launches": code.launches}
    report["plain"] = [kernel.function for kernel in code.kernels if not kernel.dependent]
    (folder / "launches.json").write_text(json.dumps(report))


def _ended(folder: Path) -> None:
    """What a compile says that is ended by a signal while ptxas works."""
    from unittest import mock

    from et_moe.backends.cuda import gpu
    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights
    from et_moe.pipeline.signals import Ended, ending_signals

    assembler, seen = folder / "ptxas", folder / "seen"
    # Stands in for ptxas: says its version, or ends its caller and goes on.
    script = f"""#!/bin/sh
        [ "$1" = --version ] && exec {gpu.ptxas()} --version
        find "$TMPDIR" -name '*.ptx' > {seen}
        kill -TERM $PPID
        exec sleep 60"""
    assembler.write_text(script)
    assembler.chmod(0o755)
    graphs = {"decode": method(Small(), True)}
    report = {}
    with mock.patch.object(gpu, "ptxas", lambda: assembler):
        try:
            with ending_signals():
                compile_method(graphs["decode"], plan_weights(graphs), "sm_90")
        except Ended as e:
            report["error"] = str(e)
    report["files_then"] = bool(seen.read_text())
    (folder / "ended.json").write_text(json.dumps(report))


if __name__ == "__main__":
    commands = {
        "lower": _lower,
        "again": _again,
        "ended": _ended,
        "errors": _errors,
        "launches": _launches,
    }
    commands[sys.argv[1]](Path(sys.argv[2]))
