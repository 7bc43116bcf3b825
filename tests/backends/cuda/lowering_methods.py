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

from et_moe.backends.method_graph import PAGES, SLOTS, HandOver, MethodGraph

HIDDEN, VOCABULARY, GROUP = 128, 256, 32
MAX_TOKENS = 64
STATE = {"conv.state": (torch.bfloat16, (3, HIDDEN))}
"""Dtype and shape of a slot."""
OWN_POOL = {PAGES: 1, SLOTS: 1}
"""Of the state that a delegate has by itself."""
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


EXPERTS, INNER = 3, 48
EXPERT_WEIGHTS = WEIGHTS | {
    "int8.w13": (torch.int8, (EXPERTS, 2 * INNER, HIDDEN)),
    "int8.w13_scale": (torch.bfloat16, (EXPERTS, 2 * INNER, 1)),
    "int8.w2": (torch.int8, (EXPERTS, HIDDEN, INNER)),
    "int8.w2_scale": (torch.bfloat16, (EXPERTS, HIDDEN, 1)),
    "dense.w13": (torch.float32, (EXPERTS, 2 * INNER, HIDDEN)),
    "dense.w2": (torch.float32, (EXPERTS, HIDDEN, INNER)),
}


class Small(torch.nn.Module):
    """An embedding, a convolution with state, an INT4 layer and a head that gives the greedy
    token."""

    def hidden(self, tokens, slots, num_tokens, state, w):
        et = torch.ops.et_moe
        x = et.embedding_w8(tokens.view(-1), w["embed.weight"], w["embed.scale"], torch.bfloat16)
        x = et.causal_conv1d(x, w["conv.weight"], state["conv.state"], slots, num_tokens)
        norm = w["norm.weight"]
        x = et.linear_w4a8(x, w["proj.weight"], w["proj.scale"], GROUP, norm, 1e-6, x)
        return x if num_tokens is None else x.index_select(0, num_tokens - 1)

    def forward(self, tokens, positions, slots, num_tokens, state, w):
        last = self.hidden(tokens, slots, num_tokens, state, w).float()
        logits = torch.ops.et_moe.linear_w4a8(last, w["head.weight"], w["head.scale"], GROUP)
        return logits.argmax(-1, keepdim=True), logits


class Scores(Small):
    """Gives the logits of the last token and nothing else, hence no token to go on with."""

    def forward(self, count, ids, slots, state, w):
        last = self.hidden(ids, slots, count, state, w).float()
        return (torch.ops.et_moe.linear_w4a8(last, w["head.weight"], w["head.scale"], GROUP),)


class Columns(Small):
    """Gives a number for every token, in columns."""

    def forward(self, tokens, positions, slots, num_tokens, state, w):
        x = self.hidden(tokens, slots, None, state, w).float()
        return x[:1, :1].long(), x[:, :2].t()


class Pairs(Small):
    """Gives twice as many rows as there are tokens."""

    def forward(self, tokens, positions, slots, num_tokens, state, w):
        x = self.hidden(tokens, slots, None, state, w).float()
        return x[:1, :1].long(), torch.cat([x, x])


class Rows(torch.nn.Module):
    """Logits and the greedy token of each of a number of rows, which have no state, through INT8
    and dense experts.

    Inputs and outputs vary in the same size.
    """

    def forward(self, tokens, offsets, state, w):
        et, ids = torch.ops.et_moe, (tokens.view(-1) + offsets).clamp(0, VOCABULARY - 1)
        x = et.embedding_w8(ids, w["embed.weight"], w["embed.scale"], torch.bfloat16).float()
        # One of the numbers is no expert's.
        first = (ids % (EXPERTS + 1)).int().view(-1, 1)
        chosen = torch.cat((first, tokens.view(-1, 1).int() % EXPERTS), dim=1)
        weights, weight = (numbers.float() * 0.25 + 0.5 for numbers in (chosen, first))
        tables = [w[f"int8.{name}"] for name in ("w13", "w13_scale", "w2", "w2_scale")]
        x = et.moe_w8a8(x, *tables, weights, chosen, x)
        tables = w["dense.w13"], w["dense.w2"]
        x = et.moe(et.rms_norm(x, w["norm.weight"]), *tables, weight, first, x)
        logits = et.linear_w4a8(x, w["head.weight"], w["head.scale"], GROUP)
        return logits.argmax(-1, keepdim=True), logits


class Drafts(torch.nn.Module):
    """Draws the token behind each of three rows of each sequence, whose state has versions."""

    def forward(self, tokens, positions, slots, num_tokens, versions, state, w):
        et, ids = torch.ops.et_moe, tokens.view(-1)
        x = et.embedding_w8(ids, w["embed.weight"], w["embed.scale"], torch.bfloat16)
        places = (slots, num_tokens, versions, True)
        x = et.causal_conv1d(x, w["conv.weight"], state["conv.state"], *places)
        x = et.linear_w4a8(x, w["proj.weight"], w["proj.scale"], GROUP)
        x = et.rms_norm(x.float(), w["norm.weight"])
        logits = et.linear_w4a8(x, w["head.weight"], w["head.scale"], GROUP)
        zero = positions * 0
        token = et.sample(logits, zero.float(), zero, zero + 1.0, zero, positions)
        same = (tokens[:, 1:] == token[:, :-1]) & (num_tokens[:, None] > torch.arange(1, 3))
        first, second = same.long().split(1, dim=1)
        return token, (first + first * second).view(-1)


class LibraryCall(Small):
    """Has a matrix product that no kernel of ours computes."""

    def forward(self, tokens, positions, slots, num_tokens, state, w):
        token, logits = super().forward(tokens, positions, slots, num_tokens, state, w)
        return token, logits @ torch.ones(VOCABULARY, VOCABULARY)


class CopiedState(Small):
    """Updates state with an op that Inductor compiles by itself."""

    def forward(self, tokens, positions, slots, num_tokens, state, w):
        state["conv.state"].mul_(2)
        return super().forward(tokens, positions, slots, num_tokens, state, w)


class _Decode(torch.nn.Module):
    """A model without the argument that decode leaves out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, tokens, positions, slots, state, w):
        return self._model(tokens, positions, slots, None, state, w)


def _export(
    model: torch.nn.Module,
    inputs: dict[str, tuple[int, ...]],
    state: dict[str, tuple[torch.dtype, tuple[int, ...]]] = STATE,
    shortest: int = 2,
    weights: dict[str, tuple[torch.dtype, tuple[int, ...]]] = WEIGHTS,
    **names,
) -> MethodGraph:
    """Exports one method of int64 inputs, and int32 `slots`, on fake tensors.

    Args:
        inputs: their shapes. A size of 8 stands for one that varies from call to call and is at
            least `shortest`.
        names: what `MethodGraph` is told of the outputs and of the hand-over.
    """
    with FakeTensorMode():
        arguments = (
            *(
                torch.empty(shape, dtype=torch.int32 if name == "slots" else torch.int64)
                for name, shape in inputs.items()
            ),
            {n: torch.empty((3, *shape), dtype=dtype) for n, (dtype, shape) in state.items()},
            {n: torch.empty(shape, dtype=dtype) for n, (dtype, shape) in weights.items()},
        )
    length = Dim("T", min=shortest, max=MAX_TOKENS)
    varying = [{shape.index(8): length} if 8 in shape else None for shape in inputs.values()]
    program = torch.export.export(
        model,
        arguments,
        dynamic_shapes=(
            *varying,
            {name: {0: Dim("S", min=1, max=1 << 20)} for name in state},
            dict.fromkeys(weights),
        ),
        strict=False,
    )
    pools = dict.fromkeys(state, SLOTS)
    named = {"inputs": list(inputs), "state": pools, "weights": list(weights)}
    return MethodGraph(program=program, **named, **names)


def method(model: torch.nn.Module, decode: bool) -> MethodGraph:
    """The method `decode`, or `prefill`, of a model such as `Small`."""
    outputs = ["token", "logits"]
    if decode:
        inputs = {"tokens": (1, 1), "positions": (1,), "slots": (1,)}
        hand_over = HandOver("token", "tokens", "positions")
        return _export(_Decode(model), inputs, outputs=outputs, hand_over=hand_over)
    inputs = {"tokens": (1, 8), "positions": (1,), "slots": (1,), "num_tokens": (1,)}
    return _export(model, inputs, outputs=outputs)


def scores() -> MethodGraph:
    """A method whose inputs have other names than those of `method` and that hands nothing over."""
    return _export(Scores(), {"count": (1,), "ids": (1, 8), "slots": (1,)}, outputs=["logits"])


def rows() -> MethodGraph:
    """A method of 1 to `MAX_TOKENS` rows, in two inputs and in both outputs."""
    inputs = {"tokens": (8, 1), "offsets": (8,)}
    outputs = ["token", "logits"]
    return _export(Rows(), inputs, {}, shortest=1, weights=EXPERT_WEIGHTS, outputs=outputs)


def drafts() -> MethodGraph:
    """A method of three rows of each of 2 to `MAX_TOKENS` sequences."""
    inputs = {"tokens": (8, 3), **dict.fromkeys(("positions", "slots"), (8,))}
    inputs |= dict.fromkeys(("num_tokens", "versions"), (8,))
    state = {"conv.state": (torch.bfloat16, (5, HIDDEN))}
    return _export(Drafts(), inputs, state, outputs=["token", "accepted"])


def methods() -> dict[str, MethodGraph]:
    return {"prefill": method(Small(), False), "decode": method(Small(), True)}


def _lower(folder: Path) -> None:
    """Writes the `.pte` for two architectures, its parts, and what a second run with the cache
    does."""
    from et_moe.backends.cuda.backend import lower

    constants = {"get_max_seq_len": 128, "get_eos_ids": "[1, 2]"}
    archs = ["sm_90", "sm_80"]
    start = time.monotonic()
    program = lower(methods(), archs, constants, folder / "cache", OWN_POOL)
    report = {"first_seconds": time.monotonic() - start}
    (folder / "model.pte").write_bytes(program.pte)
    (folder / "sidecar.json").write_text(program.sidecar())
    for name, codes in program.compiled.items():
        for arch, code in codes.items():
            for part in code.ranges:
                (folder / f"{name}.{arch}.{part.longest}.so").write_bytes(part.code)
                (folder / f"{name}.{arch}.{part.longest}.cpp").write_text(part.source)
    damaged = next((folder / "cache").iterdir())
    start = time.monotonic()
    again = lower(methods(), archs, constants, folder / "cache", OWN_POOL)
    report |= {"seconds": time.monotonic() - start, "same": again.pte == program.pte}
    damaged.write_bytes(b"damaged")
    report["same_after_damage"] = (
        lower(methods(), archs, constants, folder / "cache", OWN_POOL).pte == again.pte
    )
    report["cuda_before_and_after"] = [torch.cuda.is_available(), torch.version.cuda]
    (folder / "report.json").write_text(json.dumps(report))


def _again(folder: Path) -> None:
    """Writes the digest of one method, compiled alone and without a cache."""
    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights

    graphs = {"decode": method(Small(), True)}
    (code,) = compile_method(graphs["decode"], plan_weights(graphs), "sm_80").ranges
    (folder / "again.txt").write_text(hashlib.sha256(code.code).hexdigest())


def _drafts(folder: Path) -> None:
    """Writes the kernels of `drafts` and how often each is launched, range by range."""
    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights

    graphs = {"drafts": drafts()}
    ranges = compile_method(graphs["drafts"], plan_weights(graphs), "sm_90").ranges
    report = {part.longest: {k.function: k.launches for k in part.kernels} for part in ranges}
    (folder / "drafts.json").write_text(json.dumps(report))


def _errors(folder: Path) -> None:
    """Writes the messages with which graphs are refused."""
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
    """Writes how many launches a decoded token takes in four layers of the 35B model, which are of
    both kinds."""
    from checkpoints import storages

    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights
    from et_moe.examples.qwen3_5_moe.model import MODEL
    from et_moe.pipeline.graphs import build_graphs
    from et_moe.pipeline.make_checkpoint import text_config
    from et_moe.pipeline.models import Sizes, parse_config
    from et_moe.pipeline.storage import Precision

    config = parse_config(text_config(MODEL, "35b", layers=4), where="35b")
    graphs = build_graphs(config, Precision(storages()), Sizes(4096, 2048, 1))
    (code,) = compile_method(graphs["decode"], plan_weights(graphs), "sm_90").ranges
    report = {"layers": config.layer_types, "launches": code.launches}
    report["plain"] = [kernel.function for kernel in code.kernels if not kernel.dependent]
    (folder / "launches.json").write_text(json.dumps(report))


def _alone(folder: Path) -> None:
    """What is compiled for no program, in one process: its start takes as long as a method does."""
    from et_moe.backends.cuda.build import scratch_folder

    _again(folder)  # first, and in a folder of its own, where there is nothing to be shared
    with scratch_folder():
        for write in (_drafts, _errors, _launches):
            write(folder)


def _ended(folder: Path) -> None:
    """Writes what a compile says when a signal ends it while ptxas works."""
    from unittest import mock

    from et_moe.backends.cuda import gpu
    from et_moe.backends.cuda.compile import compile_method
    from et_moe.backends.cuda.prepack import plan_weights
    from et_moe.pipeline.signals import Ended, ending_signals

    assembler, seen = folder / "ptxas", folder / "seen"
    # This stands in for ptxas: it says its version, or it ends its caller and goes on running.
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
        "alone": _alone,
        "ended": _ended,
    }
    commands[sys.argv[1]](Path(sys.argv[2]))
